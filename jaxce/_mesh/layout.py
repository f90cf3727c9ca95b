"""How the arrays of a call lie on a mesh, and what each device has to gather to do its part of it.

Tokens lie along the axes in the batch dimensions of `hidden` or `logits`, classes along those of the class dimension of
`kernel` or `logits`. Each device works on its own tokens and its own classes. What else the kernel is sharded over is
gathered: features always, and where an axis holds both tokens and classes, whichever are fewer.

A call on a single device has a layout too, without any axes; only this file knows whether there is a mesh.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes, get_abstract_mesh

from jaxce._mesh.devices import Axes, automatic_devices, axes_of, explicit_mesh, size_along
from jaxce._mesh.sharding import AnyMesh, InShardMap, OnMesh, Sharding

Shape: TypeAlias = tuple[int, ...]
# What an axis of an array holds, and a dimension of a mesh may share out; see `axes_of_inputs` in `_projection`.
TOKENS, CLASSES, FEATURES, KERNEL_FEATURES = "tokens", "classes", "features", "kernel_features"


class KernelLayout(NamedTuple):
    """How the kernel of a head lies, beside the classes that each device works on."""

    features: Axes = ()  # over which the loops gather it, whole or a slab at a time
    classes_gathered: Axes = ()  # over which it is gathered before


WHOLE_KERNEL = KernelLayout()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What is known of it when a function is traced. Hashable."""

    # For each batch dimension the axes over which tokens are sharded; then those over which hidden states are gathered.
    batch: tuple[Axes, ...] = ()
    tokens_gathered: tuple[Axes, ...] = ()
    classes: Axes = ()
    class_axis: int | None = None  # of arrays with tokens and classes, where it isn't the last
    kernels: tuple[KernelLayout, ...] = (WHOLE_KERNEL, WHOLE_KERNEL)
    gathers_slabs: bool = False
    # Which function runs: that of whole arrays, of what each device of the mesh has, or of arrays that XLA places.
    mesh: AnyMesh | None = None
    given: tuple[tuple[str, PartitionSpec], ...] = ()  # how arrays lie that were passed, and so their gradients
    placed_by_xla: PartitionSpec | None = None  # how tokens lie, of a mesh with explicit axes that no layout suits
    in_shard_map: bool = False

    @property
    def token_axes(self) -> Axes:
        """The axes over which the loss is summed."""
        return tuple(axis for axes in self.batch for axis in axes)

    @property
    def class_parts(self) -> int:
        """Into how many parts the classes are cut of the arrays that were passed."""
        return size_along(self.classes) if self.in_shard_map else 1

    @property
    def class_axes(self) -> Axes:
        """The axes along which each device has its own classes."""
        return self.classes

    def token_groups(self, tokens: int) -> int:
        """Of how many devices XLA might put tokens on each, where it places the arrays."""
        placed_here = self.mesh is None and not self.in_shard_map
        return math.gcd(tokens, automatic_devices()) if placed_here or self.placed_by_xla is not None else 1

    def spec(self, axes: str, kernel: KernelLayout = WHOLE_KERNEL) -> PartitionSpec:
        """How an array with these axes lies when the devices begin with it, as a row of the table of axes says."""
        names = axes.split()
        if names == [TOKENS, CLASSES] and self.class_axis is not None:
            return PartitionSpec(*self.batch[: self.class_axis], self.classes, *self.batch[self.class_axis :])
        entries: list[Axes] = []
        for name in names:
            if name == TOKENS:
                # Of hidden states each device may begin with fewer tokens than it works on.
                entries += self._of_hidden() if FEATURES in names else self.batch
            elif name == CLASSES:
                entries.append(self.classes + (kernel.classes_gathered if KERNEL_FEATURES in names else ()))
            else:
                entries.append(kernel.features if name == KERNEL_FEATURES else ())
        return PartitionSpec(*entries)

    def _of_hidden(self) -> list[Axes]:
        return [kept + more for kept, more in zip(self.batch, self.tokens_gathered, strict=True)]

    def gather(self, axes: str, array: Array, kernel: KernelLayout = WHOLE_KERNEL) -> Array:
        """What a device works on, of an array that lies as `spec` says: all but features of a kernel."""
        names = axes.split()
        if TOKENS in names and FEATURES in names:
            for dimension, gathered in enumerate(self.tokens_gathered):
                array = gather(array, dimension, gathered)
        if KERNEL_FEATURES in names:
            array = gather(array, names.index(CLASSES), kernel.classes_gathered)
        return array

    def as_given(self, **arrays: Array) -> dict[str, Array]:
        """The arrays, so that they lie as their specs say, and their gradients too."""
        if self.mesh is None:
            return arrays
        specs = dict(self.given)
        return {
            name: constrain(self.mesh, array, specs[name]) if name in specs else array for name, array in arrays.items()
        }

    def pad_classes(self, array: Array, axis: int, columns: int) -> Array:
        """An array with an axis of real classes, so that its devices can share it: zeros up to `columns`."""
        if self.mesh is None or not self.classes or array.shape[axis] == columns:
            return array
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, columns - array.shape[axis])
        return jnp.pad(array, padding)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], specs: Any, outputs: Any) -> Any:
        """`function(*arguments)`, on each device of the mesh of what it has, if there is one.

        `specs` says how the arguments lie, as `spec` has it; `outputs` which axes each of the results has.
        """
        if self.placed_by_xla is not None:
            assert self.mesh is not None
            of_batch, mesh = self.placed_by_xla, self.mesh
            out: Any = jax.tree.map(
                lambda axes: NamedSharding(mesh, of_batch if axes else PartitionSpec()),
                outputs,
            )
            return auto_axes(function, out_sharding=out)(*arguments)
        if self.mesh is None:
            return function(*arguments)
        if AxisType.Explicit in self.mesh.axis_types:
            arguments = constrain(self.mesh, arguments, specs)
        out_specs = jax.tree.map(self.spec, outputs)
        found = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out_specs)(*arguments)
        if not any(self.tokens_gathered):
            return found
        # What is of a token lies as the hidden states do.
        of_tokens = PartitionSpec(*self._of_hidden())
        return constrain(self.mesh, found, jax.tree.map(lambda axes: of_tokens if axes else PartitionSpec(), outputs))


def gather(array: Array, dimension: int, axes: Axes) -> Array:
    return lax.all_gather(array, axes, axis=dimension, tiled=True) if axes else array


HERE = Layout()


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
        return mesh
    for array in arrays:
        sharding = sharding_of(array)
        if sharding is not None:
            return sharding.mesh
    ambient = get_abstract_mesh()
    if ambient.empty:
        raise ValueError(
            "there is no mesh: pass OnMesh(mesh=jax.make_mesh(...)), or call this under jax.set_mesh(mesh), or with "
            "arrays that lie on a mesh; without one, leave sharding out"
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


def place(mesh: AnyMesh, name: str, array: Any, spec: PartitionSpec | None, option: str, example: str = "") -> Placed:
    """The axes of each dimension of an array, from the spec that was passed for `option`, or else from the array."""
    of_option = f"OnMesh({option}=...)"
    if spec is None:
        sharding = sharding_of(array)
        manual = get_abstract_mesh().manual_axes
        if sharding is None and manual:
            raise ValueError(
                f"sharding must be InShardMap(batch_axes=..., class_axes=...) inside of a jax.shard_map, to say which "
                f"of its axes, {quoted(manual)}, hold tokens and which hold classes; got OnMesh without {option}"
            )
        if sharding is None:
            raise ValueError(
                f"{of_option} must say how {name} lies on the mesh {describe(mesh)}: inside of jax.jit or jax.grad an "
                f"array on a mesh with automatic axes doesn't tell; for example OnMesh({option}={example})"
            )
        spec = sharding.spec
    if len(spec) > array.ndim:
        raise ValueError(f"{of_option} must have at most {array.ndim} entries, one an axis of {name}; got {spec}")
    entries = (*spec, *(None,) * (array.ndim - len(spec)))
    axes = tuple(axes_in(mesh, of_option, spec, entry) for entry in entries)
    named = [axis for part in axes for axis in part]
    for axis in named:
        if named.count(axis) > 1:
            raise ValueError(f"{of_option} must name a mesh axis once; got {axis!r} twice in {spec}")
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


def quoted(axes: Sequence[str]) -> str:
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
            f"{quoted(axes)}: {mend(-(-length // devices) * devices)}"
        )


def layout_of_logits(mesh: AnyMesh, logits: Placed, *, axis: int) -> Layout:
    """The layout of logits with classes on that axis."""
    for dimension in range(len(logits.shape)):
        if dimension != axis:
            check_even(mesh, logits, dimension, pad_batch)
    check_even(mesh, logits, axis, lambda length: f"pad it to {length}, and pass num_classes={logits.shape[axis]}")
    batch = logits.axes[:axis] + logits.axes[axis + 1 :]
    return Layout(
        mesh=mesh,
        batch=batch,
        tokens_gathered=((),) * len(batch),
        classes=logits.axes[axis],
        class_axis=axis,
        given=(("logits", logits.spec),),
    )


def pad_batch(length: int) -> str:
    return f"pad it to {length}, and leave the padding out with ignore_index or where"


def layout_of_projection(
    mesh: AnyMesh,
    hidden: Placed,
    kernel: Placed,
    teacher_kernel: Placed | None = None,
    *,
    transposed: tuple[bool, ...],
    gathers_slabs: bool = False,
) -> Layout:
    """The layout of hidden states and a kernel, or of a student's and a teacher's, which may be transposed."""
    kernels = [kernel] if teacher_kernel is None else [kernel, teacher_kernel]
    batch = check_hidden(mesh, hidden)
    for placed, transpose in zip(kernels, transposed, strict=True):
        check_kernel(mesh, placed, transpose)
    classes = 0 if transposed[0] else 1
    tokens_are_gathered, classes_are_gathered = gathered_along(mesh, hidden, kernel, classes)
    if gathers_slabs and classes_are_gathered:
        raise ValueError(
            f"kernel_gather='slabs' needs a kernel that is sharded over the axes of the tokens by its features; got "
            f"its classes sharded over {quoted(sorted(classes_are_gathered))}: move them to axis {1 - classes}"
        )
    kept = tuple(without(axes, tokens_are_gathered) for axes in batch)
    remaining = {axis for axes in kept for axis in axes}

    def layout_of_kernel(placed: Placed, transpose: bool) -> KernelLayout:
        of_features, of_its_classes = placed.axes[::-1] if transpose else placed.axes
        # Over an axis without tokens the kernel is gathered before, or the loss would be counted once for each device.
        return KernelLayout(
            features=tuple(axis for axis in of_features if axis in remaining),
            classes_gathered=tuple(axis for axis in of_its_classes if axis in classes_are_gathered),
        )

    return Layout(
        mesh=mesh,
        batch=kept,
        tokens_gathered=tuple(without(axes, remaining) for axes in batch),
        classes=without(kernel.axes[classes], classes_are_gathered),
        kernels=tuple(map(layout_of_kernel, kernels, transposed)),
        gathers_slabs=gathers_slabs,
        given=(("hidden", hidden.spec), ("kernel", kernel.spec)),
    )


def without(axes: Axes, left_out: set[str]) -> Axes:
    return tuple(axis for axis in axes if axis not in left_out)


def gathered_along(mesh: AnyMesh, hidden: Placed, kernel: Placed, class_axis: int) -> tuple[set[str], set[str]]:
    """Along which axes tokens are gathered, and along which classes.

    Where an axis holds both, all devices along it do the same classes or the same tokens, whichever are fewer.
    """
    of_tokens = {axis for axes in hidden.axes for axis in axes}
    of_classes = set(kernel.axes[class_axis])
    both = of_tokens & of_classes
    tokens = math.prod(hidden.shape[:-1]) // size_of(mesh, tuple(of_tokens - both))
    classes = kernel.shape[class_axis] // size_of(mesh, tuple(of_classes - both))
    return (both, set()) if tokens <= classes else (set(), both)


def check_hidden(mesh: AnyMesh, hidden: Placed) -> list[Axes]:
    """Each device has as many tokens as the others, with all features; the axes of each batch dimension."""
    *batch, of_features = hidden.axes
    if of_features:
        raise ValueError(
            f"hidden must have all of its features on each device; got its last axis sharded over "
            f"{quoted(of_features)}: the logits would have to be summed across devices. Gather it first, "
            f"for example with jax.lax.with_sharding_constraint or jax.sharding.reshard"
        )
    for dimension in range(len(batch)):
        check_even(mesh, hidden, dimension, pad_batch)
    return batch


def check_kernel(mesh: AnyMesh, kernel: Placed, transpose: bool) -> None:
    """Each device has as many classes and features of the kernel as the others."""
    features, classes = (1, 0) if transpose else (0, 1)
    columns = kernel.shape[classes]
    check_even(mesh, kernel, classes, lambda length: f"pad it to {length}, and pass num_classes={columns}")
    check_even(mesh, kernel, features, lambda length: "shard it over fewer devices")


def told_by_arrays(layout_of: Callable[..., Layout], otherwise: Layout, **arrays: Array) -> Layout | None:
    """The layout that types tell, or else arrays themselves; `otherwise` where no device could do its part of it.

    None where nothing is told.
    """
    mesh: AnyMesh | None = explicit_mesh(arrays)
    if mesh is None:
        placed = [sharding_of(array) for array in arrays.values()]
        meshes = {sharding.mesh for sharding in placed if sharding is not None}
        if None in placed or len(meshes) != 1:
            return None
        (mesh,) = meshes
        if all(sharding is None or sharding.is_fully_replicated for sharding in placed):
            return None
        otherwise = HERE
    try:
        return layout_of(mesh, *(place(mesh, name, array, None, name) for name, array in arrays.items()))
    except ValueError:
        return otherwise


# From the argument `sharding` to a layout.


def for_logits(sharding: Sharding | None, name: str, logits: Array, labels: Array | None, axis: int) -> Layout:
    """The layout of a function of logits, or of log-probabilities by that name."""
    layout_of = partial(layout_of_logits, axis=axis)
    if sharding is None:
        return told_by_arrays(layout_of, HERE, **{name: logits}) or HERE
    if isinstance(sharding, InShardMap):
        layout = inside(sharding, (name, logits), labels)
        check_parts(name, logits, "classes", "class_axes", layout.classes)
        return layout
    refuse_specs(check_kind(sharding), name, "logits")
    mesh = find_mesh(sharding.mesh, [logits])
    return layout_of(mesh, place(mesh, name, logits, sharding.logits, "logits", "P('data', 'model')"))


def for_projection(
    sharding: Sharding | None,
    hidden: Array,
    kernel: Array,
    labels: Array | None,
    *,
    transposed: tuple[bool, ...],
    strategy: str,
    teacher_kernel: Array | None = None,
) -> Layout:
    """The layout of a function of hidden states and a kernel, or of a student's and a teacher's."""
    arrays = {"hidden": hidden, "kernel": kernel}
    if teacher_kernel is not None:
        arrays["teacher_kernel"] = teacher_kernel
    layout_of = partial(layout_of_projection, transposed=transposed[: len(arrays) - 1])
    if sharding is None:
        explicit = explicit_mesh((arrays, labels))
        of_batch = PartitionSpec(*jax.typeof(hidden).sharding.spec[: hidden.ndim - 1])
        by_xla = HERE if explicit is None else Layout(mesh=explicit, placed_by_xla=of_batch)
        return told_by_arrays(layout_of, by_xla, **arrays) or by_xla
    if isinstance(sharding, InShardMap):
        layout = inside(sharding, ("hidden", hidden), labels)
        for name in list(arrays)[1:]:
            check_parts(name, arrays[name], "classes", "class_axes", layout.classes)
        return layout
    refuse_specs(check_kind(sharding), "hidden and kernel", *arrays)
    gathers_slabs = sharding.kernel_gather == "slabs"
    if gathers_slabs and strategy == "tokens":
        raise ValueError(
            "kernel_gather='slabs' needs the loop over classes; got strategy='tokens', which takes the whole kernel "
            "for each chunk of tokens: strategy='classes' or 'auto'"
        )
    mesh = find_mesh(sharding.mesh, list(arrays.values()))
    examples = {"hidden": "P('data')", "kernel": "P(None, 'model')"}
    specs = {name: getattr(sharding, name) for name in arrays}
    if teacher_kernel is not None and specs["teacher_kernel"] is None and sharding_of(teacher_kernel) is None:
        specs["teacher_kernel"] = as_student(specs["kernel"], *transposed)
    placed = (place(mesh, name, array, specs[name], name, examples.get(name, "")) for name, array in arrays.items())
    return layout_of(mesh, *placed, gathers_slabs=gathers_slabs)


def as_student(spec: PartitionSpec | None, transpose: bool, transpose_teacher: bool) -> PartitionSpec | None:
    """The spec of a teacher's kernel that lies as its student's does."""
    if spec is None or transpose == transpose_teacher:
        return spec
    return PartitionSpec(*(*spec, None, None)[:2][::-1])


def mesh_of(sharding: Sharding | None) -> AnyMesh | None:
    """The mesh that was passed."""
    return sharding.mesh if isinstance(sharding, OnMesh) else None


def check_kind(sharding: Any) -> OnMesh:
    if isinstance(sharding, OnMesh):
        return sharding
    got = type(sharding).__name__
    if isinstance(sharding, PartitionSpec | NamedSharding):
        kind = "PartitionSpec" if isinstance(sharding, PartitionSpec) else "NamedSharding"
        got = f"a {kind}: wrap it in jaxce.OnMesh, with a spec for each array"
    raise TypeError(f"sharding must be jaxce.OnMesh(...), jaxce.InShardMap(...) or None; got {got}")


def refuse_specs(sharding: OnMesh, arrays: str, *taken: str) -> None:
    """Specs of arrays that a function doesn't take say nothing to it."""
    for name in ("logits", "hidden", "kernel", "teacher_kernel"):
        if name not in taken and getattr(sharding, name) is not None:
            raise ValueError(f"OnMesh({name}=...) is of no array of this function, which takes {arrays}: leave it out")


def inside(sharding: InShardMap, scores: tuple[str, Array], labels: Array | None) -> Layout:
    """The layout inside of a caller's own `jax.shard_map`, of the array that holds tokens or examples."""
    of_batch = manual_axes("batch_axes", tuple(sharding.batch_axes))
    of_classes = manual_axes("class_axes", tuple(sharding.class_axes))
    both = set(of_batch) & set(of_classes)
    if both:
        raise ValueError(f"an axis holds examples or classes; got {both.pop()!r} in batch_axes and in class_axes")
    differs = [] if labels is None else [axis for axis in of_classes if axis in axes_of(labels)]
    if labels is not None and differs and jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be the same on all devices along {differs[0]!r}, an axis of class_axes; got labels that "
            "may differ: gather them, and hidden, before the jax.shard_map"
        )
    check_parts(*scores, "tokens" if scores[0] == "hidden" else "examples", "batch_axes", of_batch)
    return Layout(batch=(of_batch,), tokens_gathered=((),), classes=of_classes, in_shard_map=True)


def manual_axes(name: str, axes: Axes) -> Axes:
    """The names of axes of the `jax.shard_map` around the call."""
    manual = tuple(map(str, get_abstract_mesh().manual_axes))
    for axis in axes:
        if axis not in manual:
            among = f"those are {quoted(manual)}" if manual else "there is none around this call"
            raise ValueError(
                f"{name} must name axes of the jax.shard_map that this is called in; got {axis!r}: {among}"
            )
        if axis not in axes_of(lax.axis_index(axis)):
            raise ValueError(
                "a loss inside of a jax.shard_map must know over which axes an array varies; got check_vma=False: "
                "leave it True"
            )
    return axes


def check_parts(name: str, array: Array, what: str, axes_name: str, axes: Axes) -> None:
    """Each device has its own."""
    for axis in axes:
        if axis not in axes_of(array):
            raise ValueError(
                f"{name} must be this device's {what}; got the same array on all devices along {axis!r}: give it a "
                f"spec with {axis!r} in the in_specs of jax.shard_map, or leave {axis!r} out of {axes_name}"
            )


def constrain(mesh: AnyMesh, arrays: Any, specs: Any) -> Any:
    """The arrays, so that they lie as the specs say, a spec for each array or for a tree of them."""

    def one(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        if AxisType.Explicit in mesh.axis_types:
            return jax.tree.map(lambda array: jax.sharding.reshard(array, sharding), tree)
        return jax.tree.map(lambda array: lax.with_sharding_constraint(array, sharding), tree)

    return jax.tree.map(one, specs, arrays, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
