"""How the arrays of a loss lie on a mesh, and what each device has to gather to do its part of it.

Tokens lie along the axes in the batch dimensions of `hidden` or `logits`, classes along those of the class dimension of
`kernel` or `logits`. Each device works on its own tokens and its own classes. What else the kernel is sharded over is
gathered: features always, and where an axis holds both tokens and classes, whichever are fewer.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from jaxce._mesh import Axes

AnyMesh: TypeAlias = Mesh | AbstractMesh
Shape: TypeAlias = tuple[int, ...]


class Layout(NamedTuple):
    """What is known when a loss on a mesh is traced."""

    mesh: AnyMesh | None  # None inside of a caller's own `jax.shard_map`, where each array is what the device has
    # For each dimension the axes over which it is sharded; then those of them over which it is gathered.
    batch: tuple[Axes, ...]
    tokens_gathered: tuple[Axes, ...]
    classes: Axes
    classes_gathered: Axes
    features: Axes  # over which the loops gather the kernel, whole or a slab at a time
    gathers_slabs: bool
    given: tuple[PartitionSpec, ...]  # how hidden states and kernel, or logits, lie, and so their gradients

    @property
    def token_axes(self) -> Axes:
        """The axes over which the loss is summed."""
        return tuple(axis for axes in self.batch for axis in axes)

    def of_batch(self) -> PartitionSpec:
        """The spec of an array with the batch dimensions."""
        return PartitionSpec(*self.batch)

    def with_classes(self, axis: int) -> PartitionSpec:
        """The spec of an array with the batch dimensions and, at `axis`, one of classes."""
        return PartitionSpec(*self.batch[:axis], self.classes, *self.batch[axis:])

    @property
    def hidden(self) -> PartitionSpec:
        pairs = zip(self.batch, self.tokens_gathered, strict=True)
        return PartitionSpec(*(kept + gathered for kept, gathered in pairs), None)

    def kernel(self, transpose: bool) -> PartitionSpec:
        features, classes = self.features, self.classes + self.classes_gathered
        return PartitionSpec(classes, features) if transpose else PartitionSpec(features, classes)

    def gather_hidden(self, hidden: Array) -> Array:
        for dimension, axes in enumerate(self.tokens_gathered):
            hidden = gather(hidden, dimension, axes)
        return hidden

    def gather_kernel(self, kernel: Array, transpose: bool) -> Array:
        return gather(kernel, 0 if transpose else 1, self.classes_gathered)


def gather(array: Array, dimension: int, axes: Axes) -> Array:
    return lax.all_gather(array, axes, axis=dimension, tiled=True) if axes else array


def inside_shard_map(class_axes: Axes, batch_axes: Axes, batch_dimensions: int) -> Layout:
    """The layout of arrays that are each what a device has."""
    batch = (batch_axes, *((),) * max(batch_dimensions - 1, 0))
    return Layout(None, batch, ((),) * len(batch), class_axes, (), (), gathers_slabs=False, given=())


class Placed(NamedTuple):
    """An array's dimensions, each with the axes that it is sharded over."""

    name: str
    shape: Shape
    axes: tuple[Axes, ...]

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*self.axes)


def find_mesh(mesh: AnyMesh | None, arrays: Sequence[Any]) -> AnyMesh:
    """The mesh that was passed, else that of the arrays, else the ambient one."""
    if mesh is not None:
        if not isinstance(mesh, Mesh | AbstractMesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, or None; got {type(mesh).__name__}: {mesh!r}")
        return mesh
    for array in arrays:
        sharding = sharding_of(array)
        if sharding is not None:
            return sharding.mesh
    ambient = get_abstract_mesh()
    if ambient.empty:
        raise ValueError(
            "there is no mesh: pass mesh=jax.make_mesh(...), or call this under jax.set_mesh(mesh), or with arrays "
            "that lie on a mesh; without one, jaxce.cross_entropy and jaxce.linear_cross_entropy are the same losses"
        )
    return ambient


def sharding_of(array: Any) -> NamedSharding | None:
    """How an array lies on a mesh, as far as its type or the array itself tells."""
    if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
        return array.sharding if isinstance(array.sharding, NamedSharding) else None
    sharding = getattr(jax.typeof(array), "sharding", None)
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return sharding
    return None


def place(mesh: AnyMesh, name: str, array: Any, spec: PartitionSpec | None, example: str) -> Placed:
    """The axes of each dimension of an array, from the spec that was passed, or else from the array."""
    if spec is None:
        sharding = sharding_of(array)
        manual = get_abstract_mesh().manual_axes
        if sharding is None and manual:
            raise ValueError(
                f"batch_axes and class_axes must say which axes of the jax.shard_map, {', '.join(map(repr, manual))}, "
                f"hold tokens and which hold classes; got neither, and no {name}_spec"
            )
        if sharding is None:
            raise ValueError(
                f"{name}_spec must say how {name} lies on the mesh {describe(mesh)}: inside of jax.jit or jax.grad an "
                f"array on a mesh with automatic axes doesn't tell; for example {name}_spec={example}"
            )
        spec = sharding.spec
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"{name}_spec must be a jax.sharding.PartitionSpec; got {type(spec).__name__}: {spec!r}")
    if len(spec) > array.ndim:
        raise ValueError(f"{name}_spec must have at most {array.ndim} entries, one an axis of {name}; got {spec}")
    entries = (*spec, *(None,) * (array.ndim - len(spec)))
    axes = tuple(axes_in(mesh, f"{name}_spec", spec, entry) for entry in entries)
    named = [axis for part in axes for axis in part]
    for axis in named:
        if named.count(axis) > 1:
            raise ValueError(f"{name}_spec must name a mesh axis once; got {axis!r} twice in {spec}")
    return Placed(name, array.shape, axes)


def axes_in(mesh: AnyMesh, name: str, spec: PartitionSpec, entry: Any) -> Axes:
    """The axes that an entry of a spec names."""
    if entry is PartitionSpec.UNCONSTRAINED:
        raise ValueError(f"{name} must say of each axis how it is sharded; got {spec}: None says that it isn't")
    axes: Axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    for axis in axes:
        check_axis(mesh, name, axis, f"got {spec}")
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def check_axis(mesh: AnyMesh, name: str, axis: str, got: str) -> None:
    if axis not in mesh.shape:
        close = difflib.get_close_matches(str(axis), list(map(str, mesh.shape)), n=1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must name axes of the mesh {describe(mesh)}; {got}{hint}")


def describe(mesh: AnyMesh) -> str:
    """The mesh's axes and their sizes, as in (data=4, model=2)."""
    return "(" + ", ".join(f"{name}={size}" for name, size in mesh.shape.items()) + ")"


def names(axes: Sequence[str]) -> str:
    return ", ".join(map(repr, axes))


def size_of(mesh: AnyMesh, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def check_even(mesh: AnyMesh, placed: Placed, dimension: int, mend: Callable[[int], str]) -> None:
    """Each device has as much of a dimension as the others."""
    length, axes = placed.shape[dimension], placed.axes[dimension]
    devices = size_of(mesh, axes)
    if length % devices:
        raise ValueError(
            f"axis {dimension} of {placed.name}, of length {length}, must be divisible by {devices}, the devices along "
            f"{names(axes)}: {mend(-(-length // devices) * devices)}"
        )


def layout_of_logits(mesh: AnyMesh, logits: Placed, axis: int) -> Layout:
    """The layout of logits with classes on that axis."""
    for dimension in range(len(logits.shape)):
        if dimension != axis:
            check_even(mesh, logits, dimension, pad_batch)
    check_even(mesh, logits, axis, lambda length: f"pad it to {length}, and pass num_classes={logits.shape[axis]}")
    batch = logits.axes[:axis] + logits.axes[axis + 1 :]
    given = (logits.spec,)
    return Layout(mesh, batch, ((),) * len(batch), logits.axes[axis], (), (), gathers_slabs=False, given=given)


def pad_batch(length: int) -> str:
    return f"pad it to {length}, and leave the padding out with ignore_index or where"


def layout_of_projection(
    mesh: AnyMesh, hidden: Placed, kernel: Placed, *, transpose: bool, gathers_slabs: bool
) -> Layout:
    """The layout of hidden states and the kernel."""
    features, classes = (1, 0) if transpose else (0, 1)
    *batch, of_features = hidden.axes
    if of_features:
        raise ValueError(
            f"hidden must have all of its features on each device; got its last axis sharded over "
            f"{names(of_features)}: the logits would have to be summed across devices. Gather it first, "
            f"for example with jax.lax.with_sharding_constraint or jax.sharding.reshard"
        )
    for dimension in range(len(batch)):
        check_even(mesh, hidden, dimension, pad_batch)
    columns = kernel.shape[classes]
    check_even(mesh, kernel, classes, lambda length: f"pad it to {length}, and pass num_classes={columns}")
    check_even(mesh, kernel, features, lambda length: "shard it over fewer devices")
    token_axes = {axis for axes in batch for axis in axes}
    both = token_axes & set(kernel.axes[classes])
    # An axis with tokens and classes: all devices along it do the same classes or the same tokens.
    tokens = math.prod(hidden.shape[:-1]) // size_of(mesh, tuple(token_axes - both))
    classes_there = columns // size_of(mesh, tuple(set(kernel.axes[classes]) - both))
    tokens_are_gathered = both if tokens <= classes_there else set()
    classes_are_gathered = both - tokens_are_gathered
    if gathers_slabs and classes_are_gathered:
        raise ValueError(
            f"kernel_gather='slabs' needs a kernel that is sharded over the axes of the tokens by its features; got "
            f"its classes sharded over {names(sorted(classes_are_gathered))}: move them to axis {features}"
        )

    def split(axes: Axes, gathered: set[str]) -> tuple[Axes, Axes]:
        return tuple(a for a in axes if a not in gathered), tuple(a for a in axes if a in gathered)

    kept, of_tokens = zip(*(split(axes, tokens_are_gathered) for axes in batch), strict=True) if batch else ((), ())
    of_classes, classes_gathered = split(kernel.axes[classes], classes_are_gathered)
    remaining = {axis for axes in kept for axis in axes}
    # Over an axis without tokens the kernel is gathered before, or the loss would be counted once for each device.
    features_kept = tuple(axis for axis in kernel.axes[features] if axis in remaining)
    return Layout(
        mesh=mesh,
        batch=kept,
        tokens_gathered=of_tokens,
        classes=of_classes,
        classes_gathered=classes_gathered,
        features=features_kept,
        gathers_slabs=gathers_slabs,
        given=(hidden.spec, kernel.spec),
    )


def layout_of_types(mesh: AbstractMesh, layout_of: Callable[..., Layout], **arrays: Array) -> Layout | None:
    """The layout that the types of arrays on an explicit mesh tell; None where no device could do its part of it."""
    try:
        return layout_of(mesh, *(place(mesh, name, array, None, "") for name, array in arrays.items()))
    except ValueError:
        return None


def on_mesh(
    layout: Layout, function: Callable[..., Any], arguments: tuple[Any, ...], in_specs: tuple[Any, ...], out_specs: Any
) -> Any:
    """`function` on each device, of what it has of the arguments when they lie as `in_specs` says."""
    mesh = layout.mesh
    assert mesh is not None
    if AxisType.Explicit in mesh.axis_types:
        arguments = constrain(mesh, arguments, in_specs)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*arguments)


def constrain(mesh: AnyMesh, arrays: Any, specs: Any) -> Any:
    """The arrays, so that they lie as the specs say, a spec for each array or for a tree of them."""

    def one(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        if AxisType.Explicit in mesh.axis_types:
            return jax.tree.map(lambda array: jax.sharding.reshard(array, sharding), tree)
        return jax.tree.map(lambda array: lax.with_sharding_constraint(array, sharding), tree)

    return jax.tree.map(one, specs, arrays, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
