"""What the numbers of the tokens are made of where logits are a projection, and which axis of it holds what.

N tokens, D features, C classes. `axes_of_inputs` is the one table of axes: cutting a chunk of tokens or a slab of
classes, flattening a batch, how arrays lie on a mesh, and which gradients are sums over a loop, are read off it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import CustomVJPPrimal

from jaxce._math.example import compute_dtype, is_index
from jaxce._math.quantity import Leaf
from jaxce._mesh.devices import Axes, size_along, vary_alike
from jaxce._mesh.layout import CLASSES, FEATURES, KERNEL_FEATURES, TOKENS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """What the logits of every token are made of. A loss has one, distillation has the student's and the teacher's.

    All matmuls accumulate in float32, or float64.
    """

    hidden: Array  # (N, D)
    kernel: Array  # (D, C), or (C, D) with transpose_kernel
    bias: Array | None  # (C,)
    softcap: Array | None
    inverse_temperature: Array | None  # (N,)
    transpose_kernel: bool = dataclasses.field(metadata={"static": True})
    precision: lax.PrecisionLike = dataclasses.field(default=None, metadata={"static": True})
    # On a mesh, each device along these axes has its own features of the kernel.
    feature_axes: Axes = dataclasses.field(default=(), metadata={"static": True})

    @property
    def axes(self) -> "Head":
        """The head's part of the table of axes."""
        kernel = f"{CLASSES} {KERNEL_FEATURES}" if self.transpose_kernel else f"{KERNEL_FEATURES} {CLASSES}"
        rows: Any = {
            "hidden": f"{TOKENS} {FEATURES}",
            "kernel": kernel,
            "bias": CLASSES,
            "softcap": "",
            "inverse_temperature": TOKENS,
        }
        return dataclasses.replace(self, **rows)

    @property
    def class_axis(self) -> int:
        """Of the kernel."""
        return 0 if self.transpose_kernel else 1

    @property
    def columns(self) -> int:
        """How many classes the kernel has, padding included."""
        return self.kernel.shape[self.class_axis]

    @property
    def dtype(self) -> jnp.dtype:
        """Of the operands of its matmuls: their own; of two different ones, the wider dtype of computation."""
        if self.hidden.dtype == self.kernel.dtype:
            return self.hidden.dtype
        of_both = (compute_dtype(array.dtype) for array in (self.hidden, self.kernel))
        return max(of_both, key=lambda dtype: dtype.itemsize)

    def _dot(self, a: Array, a_axis: int, b: Array, b_axis: int) -> Array:
        return lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            (((a_axis,), (b_axis,)), ((), ())),
            precision=self.precision,
            preferred_element_type=compute_dtype(self.dtype),
        )

    def logits(self, real: Array | None) -> Array:
        """(N, C) logits before the soft cap; -inf for columns that aren't real classes."""
        logits = self._dot(self.hidden, 1, self.kernel, 1 - self.class_axis)
        if self.bias is not None:
            logits += self.bias.astype(logits.dtype)
        return logits if real is None else jnp.where(real, logits, -jnp.inf)

    def logits_of_classes(self, real: Array | None) -> Array:
        """The same with the classes first, (C, N)."""
        logits = self._dot(self.kernel, 1 - self.class_axis, self.hidden, 1)
        if self.bias is not None:
            logits += self.bias.astype(logits.dtype)[:, None]
        return logits if real is None else jnp.where(real[:, None], logits, -jnp.inf)

    def hidden_gradient(self, of_logits: Array, real: Array | None) -> Array:
        """From (N, C) gradients of the logits."""
        kernel = self.kernel
        if real is not None:
            kernel = jnp.where(jnp.expand_dims(real, 1 - self.class_axis), kernel, 0)
        return self._dot(of_logits, 1, kernel, self.class_axis)

    def kernel_gradient(self, of_logits: Array) -> Array:
        """From (N, C) gradients of the logits."""
        if self.transpose_kernel:
            return self._dot(of_logits, 0, self.hidden, 0)
        return self._dot(self.hidden, 0, of_logits, 0)

    def transposed(self) -> "Head":
        """The same with the kernel's axes in the other order."""
        return dataclasses.replace(self, kernel=self.kernel.T, transpose_kernel=not self.transpose_kernel)

    def gather_features(self) -> "Head":
        """The head with all features of its kernel, on each device."""
        if not self.feature_axes:
            return self
        axis = 1 - self.class_axis
        kernel = lax.all_gather(self.kernel, self.feature_axes, axis=axis, tiled=True)
        return dataclasses.replace(self, kernel=kernel)

    def scatter_features(self, gradient: Array) -> Array:
        """The sum over the devices of a gradient of the kernel, of the features that this device has."""
        if not self.feature_axes:
            return gradient
        axis = 1 - self.class_axis
        return lax.psum_scatter(gradient, self.feature_axes, scatter_dimension=axis, tiled=True)

    def own_features(self, kernel: Array) -> Array:
        """So much of a whole kernel as this device has of it."""
        axis = 1 - self.class_axis
        own = self.hidden.shape[-1] // size_along(self.feature_axes)
        return kernel if kernel.shape[axis] == own else lax.slice_in_dim(kernel, 0, own, axis=axis)


class Inputs(NamedTuple):
    """The arrays that the numbers of the tokens are made of; or their gradients, or flags for them."""

    heads: tuple[Head, ...]
    target: Leaf = None  # (N,) class indices, or (N, C) class probabilities
    chosen: Leaf = None  # (N, k) class indices
    class_weight: Leaf = None  # (C,)
    counts_in: Leaf = None  # (N,) False for a token that is left out
    real: Leaf = None  # (C,) False for columns that are padding

    @property
    def dtype(self) -> jnp.dtype:
        """Of computation."""
        return compute_dtype(self.heads[0].dtype)

    @property
    def tokens(self) -> int:
        """How many."""
        return self.heads[0].hidden.shape[0]

    def logits(self) -> tuple[Array, ...]:
        """(N, C), of each head."""
        return tuple(head.logits(self.real) for head in self.heads)

    def with_heads(self, function: Callable[[Head], Head]) -> "Inputs":
        """The inputs with `function` of each head."""
        return self._replace(heads=tuple(map(function, self.heads)))


def axes_of_inputs(inputs: Inputs) -> Inputs:
    """The table of axes: what each axis of each array holds; of a batch that isn't flattened, all axes hold tokens."""
    rows: Any = {
        "target": f"{TOKENS} {CLASSES}" if inputs.target is not None and not is_index(inputs.target) else TOKENS,
        "chosen": f"{TOKENS} chosen",
        "class_weight": CLASSES,
        "counts_in": TOKENS,
        "real": CLASSES,
    }
    return Inputs(heads=tuple(head.axes for head in inputs.heads), **rows)


def by_axes(function: Callable[..., Any], inputs: Inputs, *others: Inputs) -> Any:
    """`function(axes, array, ...)` of each of the inputs that is there, and of the same in the others."""

    def one(array: Array | None, axes: str, *rest: Any) -> Any:
        return None if array is None else function(axes.split(), array, *rest)

    return jax.tree.map(one, inputs, axes_of_inputs(inputs), *others, is_leaf=lambda leaf: leaf is None)


def flatten_batch(inputs: Inputs, batch: tuple[int, ...]) -> Inputs:
    """The inputs with the batch axes made one axis of tokens."""

    def flatten(axes: list[str], array: Array) -> Array:
        return array.reshape(math.prod(batch), *array.shape[len(batch) :]) if TOKENS in axes else array

    return by_axes(flatten, inputs)


def cut(inputs: Inputs, axis: str, start: Array | int, size: int, groups: int = 1) -> Inputs:
    """The inputs as they concern so many tokens or classes from `start`, or as many tokens from each of some groups."""

    def take(axes: list[str], array: Array) -> Array:
        return take_from(array, axes.index(axis), start, size, groups) if axis in axes else array

    return by_axes(take, inputs)


def take_from(array: Array, position: int, start: Array | int, size: int, groups: int = 1) -> Array:
    """So many entries along an axis from `start`; with groups, along the first axis, as many from each of them."""
    if groups == 1:
        return lax.dynamic_slice_in_dim(array, start, size, position)
    grouped = array.reshape(groups, -1, *array.shape[1:])
    taken = lax.dynamic_slice_in_dim(grouped, start // groups, size // groups, 1)
    return taken.reshape(size, *array.shape[1:])


def take_tokens(tree: Any, start: Array | int, size: int, groups: int = 1) -> Any:
    """So many of the tokens, of arrays whose first axis holds them."""
    return jax.tree.map(lambda array: take_from(array, 0, start, size, groups), tree)


def without_left_out(inputs: Inputs) -> Inputs:
    """The inputs with zeros for hidden states of tokens left out: their logits have no gradient, but NaN·0 is NaN."""
    if inputs.counts_in is None:
        return inputs
    counts_in = inputs.counts_in[:, None]
    return inputs.with_heads(lambda head: dataclasses.replace(head, hidden=jnp.where(counts_in, head.hidden, 0)))


# Gradients are `Inputs` too, None where they aren't wanted.


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted; no data to JAX, so that it can stand among residuals."""

    flags: Inputs

    @property
    def anything(self) -> bool:
        """Whether it isn't an evaluation."""
        return any(jax.tree.leaves(self.flags))

    def all_of(self, *names: str) -> bool:
        """Whether all of these arrays of the first head have one."""
        return all(getattr(self.flags.heads[0], name) for name in names)

    def of(self, gradients: Inputs) -> Inputs:
        """Those of the gradients that are wanted."""
        return jax.tree.map(lambda flag, gradient: gradient if flag else None, self.flags, gradients)


def wanted_gradients(inputs: Any) -> Wanted:
    """Which inputs are being differentiated, told by `symbolic_zeros`; none of arrays themselves."""

    def is_perturbed(leaf: Any) -> bool:
        return isinstance(leaf, CustomVJPPrimal) and leaf.perturbed

    def is_leaf(leaf: Any) -> bool:
        return leaf is None or isinstance(leaf, CustomVJPPrimal)

    return Wanted(jax.tree.map(is_perturbed, inputs, is_leaf=is_leaf))


def split_by(axis: str, inputs: Inputs, gradients: Inputs) -> tuple[Inputs, Inputs]:
    """The gradients of inputs with that axis, and those of inputs without it, which are sums over it."""
    have = by_axes(lambda axes, _, gradient: gradient if axis in axes else None, inputs, gradients)
    have_not = by_axes(lambda axes, _, gradient: None if axis in axes else gradient, inputs, gradients)
    return have, have_not


def join(a: Inputs, b: Inputs) -> Inputs:
    """The gradients of both, each of which is in one of them at most."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda leaf: leaf is None)


def add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def zero_sums(inputs: Inputs, gradients: Inputs) -> Inputs:
    """Zeros for sums of such gradients, of the shapes of the inputs, in the dtype of computation."""
    dtype = inputs.dtype
    return by_axes(
        lambda axes, array, gradient: None if gradient is None else jnp.zeros_like(array, dtype=dtype),
        inputs,
        gradients,
    )


def empty(array: Array) -> Array:
    """What will be written whole; to fill it with zeros takes a TPU as long as a matmul of a few hundred tokens."""
    return vary_alike((lax.empty(array.shape, array.dtype), array))[0]


def put(inputs: Inputs, whole: Inputs, part: Inputs, **starts: Array | int) -> Inputs:
    """`whole` with the part that stands at these places, rounded to its dtype; `tokens` and `classes` say where."""

    def write(axes: list[str], _: Array, array: Array | None, part: Array | None) -> Array | None:
        if array is None or part is None:
            return None
        indices = [jnp.asarray(starts.get(name, 0), jnp.int32) for name in axes]
        return lax.dynamic_update_slice(array, part.astype(array.dtype), indices)

    return by_axes(write, inputs, whole, part)
