"""The platform that a function will run on, as far as it is known where the function is traced."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, get_abstract_mesh

# For tests: what every call is taken to run on, "cpu", "gpu", "tpu", or another word for a platform that nobody knows.
pretended: str | None = None


def platform_of(arrays: Any, mesh: Mesh | AbstractMesh | None = None) -> str:
    """The word "cpu", "gpu" or "tpu".

    By the mesh, the arrays or their mesh, else by the mesh or device in use, or JAX's default.
    """
    if pretended is not None:
        return pretended
    leaves = jax.tree.leaves(arrays)
    meshes = (mesh, *(jax.typeof(leaf).sharding.mesh for leaf in leaves), get_abstract_mesh())
    for abstract in (each.abstract_mesh if isinstance(each, Mesh) else each for each in meshes):
        if abstract is not None and abstract.abstract_device is not None:
            return abstract.abstract_device.platform
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed:
            return next(iter(leaf.devices())).platform
    config: Any = jax.config  # whose type doesn't know all of its options on each JAX
    default = config.jax_default_device
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform


def by_platform(*arrays: Any, default: Callable[..., Any], **functions: Callable[..., Any]) -> Any:
    """The function of the platform that the program is compiled for, "cpu", "cuda", "rocm" or "tpu", of the arrays."""
    if pretended is None:
        return lax.platform_dependent(*arrays, default=default, **functions)
    return functions.get("cuda" if pretended == "gpu" else pretended, default)(*arrays)
