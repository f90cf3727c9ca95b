"""What JAX's types say of a mesh, and what its devices sum where each has some of the classes.

Across the class axes go a few numbers for each example, never logits. A sum over them is the same number on each of
those devices, which JAX's types know; the gradients of what is the same everywhere are summed where JAX transposes
`vary_over`.
"""

import math
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, get_abstract_mesh

from jaxce._math.example import Merging

Tree = TypeVar("Tree")
Axes: TypeAlias = tuple[str, ...]


def explicit_mesh(arrays: Any) -> AbstractMesh | None:
    """The mesh with explicit axes on which some of the arrays lie."""
    for array in jax.tree.leaves(arrays):
        mesh = jax.typeof(array).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def automatic_devices() -> int:
    """How many devices lie along the automatic axes of the mesh in use, over which any array may be sharded."""
    mesh = get_abstract_mesh()
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in sizes if kind == AxisType.Auto)


def axes_of(arrays: Any) -> frozenset[Any]:
    """The axes of a `jax.shard_map` over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(arrays)))


def vary_over(arrays: Tree, axes: frozenset[Any]) -> Tree:
    """The arrays, each varying over all of these axes.

    A gradient that is written by hand has to vary as its input does: that of weights that are the same everywhere is
    summed over the axes here, where JAX transposes this.
    """

    def vary(leaf: Array) -> Array:
        missing = axes - jax.typeof(leaf).manual_axis_type.varying
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(vary, arrays)


def vary_alike(arrays: Tree) -> Tree:
    """The arrays, each varying over every axis of a `jax.shard_map` that any of them varies over."""
    return vary_over(arrays, axes_of(arrays))


def total(value: Array, axes: Axes) -> Array:
    """The sum over the devices along these axes."""
    return lax.psum(value, axes) if axes else value


def size_along(axes: Axes) -> int:
    """How many devices lie along these axes of a `jax.shard_map`."""
    return lax.axis_size(axes) if axes else 1


def merging_over(axes: Axes) -> Merging:
    """How numbers of each device's classes become those of all classes."""
    return Merging(
        largest=partial(lax.pmax, axis_name=axes),
        total=partial(lax.psum, axis_name=axes),
        first_largest=partial(first_largest, axes),
    )


def first_largest(axes: Axes, maximum: Array, index: Array) -> Array:
    """The class of the largest logit of all, from each device's largest one and its class.

    The first of equal ones, and NaN above all, as in `argmax`.
    """
    rank = lax.stop_gradient(jnp.where(jnp.isnan(maximum), jnp.inf, maximum))
    return lax.pmin(jnp.where(rank == lax.pmax(rank, axes), index, jnp.iinfo(index.dtype).max), axes)


def first_class(axes: Axes, classes: int) -> Array | int:
    """Which of all classes is the first one of this device, where each along these axes has so many."""
    return lax.axis_index(axes) * classes if axes else 0


def own_part(axes: Axes, weight: Array | None, classes: int) -> Array | None:
    """The class weights of this device's classes; zeros for padding."""
    if weight is None:
        return None
    padded = jnp.pad(weight, (0, classes * size_along(axes) - weight.shape[0]))
    return lax.dynamic_slice_in_dim(padded, first_class(axes, classes), classes) if axes else padded


def real_part(axes: Axes, classes: int, num_classes: int) -> Array | None:
    """(classes,) False for those of this device that are padding; None if no device has any."""
    if classes * size_along(axes) == num_classes:
        return None
    return first_class(axes, classes) + jnp.arange(classes, dtype=jnp.int32) < num_classes
