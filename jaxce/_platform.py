"""The platform that a function will run on, as far as it is known where the function is traced."""

from typing import Any

import jax
from jax.sharding import get_abstract_mesh


def platform_of(arrays: Any) -> str:
    """The word "cpu", "gpu" or "tpu", by the arrays or their mesh, else the mesh or device in use, or JAX's default."""
    leaves = jax.tree.leaves(arrays)
    for mesh in (*(jax.typeof(leaf).sharding.mesh for leaf in leaves), get_abstract_mesh()):
        if mesh.abstract_device is not None:
            return mesh.abstract_device.platform
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed:
            return next(iter(leaf.devices())).platform
    config: Any = jax.config  # whose type doesn't know all of its options on each JAX
    default = config.jax_default_device
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform
