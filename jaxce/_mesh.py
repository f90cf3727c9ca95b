"""What JAX's types say of a mesh."""

from typing import Any, TypeVar

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType

Tree = TypeVar("Tree")


def explicit_mesh(arrays: Any) -> AbstractMesh | None:
    """The mesh with explicit axes on which some of the arrays lie."""
    for array in jax.tree.leaves(arrays):
        mesh = jax.typeof(array).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def vary_alike(arrays: Tree) -> Tree:
    """The arrays, each varying over every axis of a `jax.shard_map` that any of them varies over.

    A gradient that is written by hand has to vary as its input does: that of weights that are the same everywhere is
    summed over the axes here, where JAX transposes this.
    """
    varying = frozenset[Any]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(arrays)))

    def vary(leaf: Array) -> Array:
        missing = varying - jax.typeof(leaf).manual_axis_type.varying
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(vary, arrays)
