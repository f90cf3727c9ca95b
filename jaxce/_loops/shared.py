"""What the loop over tokens and the loop over classes share: the matmuls, and what a chunk adds to each gradient.

N tokens, D features, C classes. A loop runs over whole chunks and then, outside of it, over what is left, so that
nothing is padded or counted twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._compose import ExampleWeights, Options, example_losses
from jaxce._mesh import Axes, vary_alike
from jaxce._softmax import (
    Cotangents,
    Form,
    Normalizer,
    Stats,
    Sums,
    Tree,
    compute_dtype,
    is_index,
    scaled_gradients,
    scaled_sums,
)

Loop: TypeAlias = Literal["tokens", "classes"]


class Config(NamedTuple):
    """What is known when the function is traced."""

    platform: str  # "cpu", "gpu" or "tpu", as far as is known
    loop: Loop
    either_loop: bool  # the other loop may be taken where fewer gradients are wanted
    keeps_logits: bool  # the loop over classes keeps some of them for the backward pass, see `cpu_room.py`
    chunk_size: int | None  # tokens or classes at a time
    num_classes: int  # of the loss
    columns: int  # of the kernel, those that are worked on here; others are padding
    transpose_kernel: bool
    precision: lax.PrecisionLike
    smooth: bool  # with `smooth_nll`
    form: Form
    # On a mesh, see `across_devices.py`.
    class_axes: Axes = ()  # each device has its own classes, the same number of them
    groups: int = 1  # of tokens, which may lie on different devices: a chunk has as many of each
    feature_axes: Axes = ()  # each device has its own features of the kernel
    gathers_slabs: bool = False  # and no device gathers more than a slab at a time


class Inputs(NamedTuple):
    """The arrays that the numbers of the tokens are made of."""

    hidden: Array  # (N, D)
    kernel: Array  # (D, C), or (C, D) with transpose_kernel
    bias: Array | None  # (C,)
    targets: Array  # (N,) class indices, or (N, num_classes) probabilities
    class_weight: Array | None  # (num_classes,)
    softcap: Array | None
    live: Array | None  # (N,)
    scale: Array | None = None  # (N,), one over the temperature
    real: Array | None = None  # (C,) False for columns that are padding, where another device has none or fewer


def matmul_dtype(a: Array, b: Array) -> jnp.dtype:
    """The operands' own dtype; of two different ones, the wider dtype of computation."""
    if a.dtype == b.dtype:
        return a.dtype
    return max(compute_dtype(a.dtype), compute_dtype(b.dtype), key=lambda dtype: dtype.itemsize)


class Projection(NamedTuple):
    """The matmuls, with the kernel's layout and precision in one place. All accumulate in float32 (or float64)."""

    config: Config

    @property
    def class_axis(self) -> int:
        return 0 if self.config.transpose_kernel else 1

    def _dot(self, a: Array, a_axis: int, b: Array, b_axis: int) -> Array:
        dtype = matmul_dtype(a, b)
        return lax.dot_general(
            a.astype(dtype),
            b.astype(dtype),
            (((a_axis,), (b_axis,)), ((), ())),
            precision=self.config.precision,
            preferred_element_type=compute_dtype(dtype),
        )

    def logits(self, inputs: Inputs) -> Array:
        logits = self._dot(inputs.hidden, 1, inputs.kernel, 1 - self.class_axis)
        if inputs.bias is not None:
            logits += inputs.bias.astype(logits.dtype)
        return logits if inputs.real is None else jnp.where(inputs.real, logits, -jnp.inf)

    def logits_of_classes(self, inputs: Inputs) -> Array:
        """The logits with the classes first, (C, N)."""
        logits = self._dot(inputs.kernel, 1 - self.class_axis, inputs.hidden, 1)
        if inputs.bias is not None:
            logits += inputs.bias.astype(logits.dtype)[:, None]
        return logits if inputs.real is None else jnp.where(inputs.real[:, None], logits, -jnp.inf)

    def hidden_gradient(self, dlogits: Array, inputs: Inputs) -> Array:
        kernel = inputs.kernel
        if inputs.real is not None:
            kernel = jnp.where(jnp.expand_dims(inputs.real, 1 - self.class_axis), kernel, 0)
        return self._dot(dlogits, 1, kernel, self.class_axis)

    def kernel_gradient(self, hidden: Array, dlogits: Array) -> Array:
        if self.config.transpose_kernel:
            return self._dot(dlogits, 0, hidden, 0)
        return self._dot(hidden, 0, dlogits, 0)


def scan_chunks(
    step: Callable[[Any, Array | int, int], tuple[Any, Any]], carry: Any, length: int, size: int
) -> tuple[Any, list[Any]]:
    """`carry, out = step(carry, start, width)` over the whole chunks in a loop, then over the rest.

    Returns the last carry, and the outputs of the chunks, stacked, and of the rest.
    """
    size = min(size, length)
    whole = length // size if size else 0
    outs = []
    if whole > 1:
        carry, out = lax.scan(lambda carry, i: step(carry, i * size, size), carry, jnp.arange(whole, dtype=jnp.int32))
        outs.append(out)
    elif whole == 1:
        carry, out = step(carry, 0, size)
        outs.append(jax.tree.map(lambda leaf: leaf[None], out))
    rest = length - whole * size
    if rest or not whole:
        carry, out = step(carry, whole * size, rest)
        outs.append(jax.tree.map(lambda leaf: leaf[None], out))
    return carry, outs


def take_tokens(tree: Any, start: Array | int, size: int, groups: int = 1) -> Any:
    """So many of the tokens, as many from each group, from `start` on in steps of the groups."""

    def take(leaf: Array) -> Array:
        if groups == 1:
            return lax.dynamic_slice_in_dim(leaf, start, size)
        grouped = leaf.reshape(groups, -1, *leaf.shape[1:])
        taken = lax.dynamic_slice_in_dim(grouped, start // groups, size // groups, 1)
        return taken.reshape(size, *leaf.shape[1:])

    return jax.tree.map(take, tree)


def take_chunk(inputs: Inputs, start: Array | int, size: int, groups: int = 1) -> Inputs:
    """The inputs as they concern these tokens."""
    per_token = (inputs.hidden, inputs.targets, inputs.live, inputs.scale)
    hidden, targets, live, scale = take_tokens(per_token, start, size, groups)
    return inputs._replace(hidden=hidden, targets=targets, live=live, scale=scale)


def without_left_out(inputs: Inputs) -> Inputs:
    """The inputs with zeros for hidden states of tokens left out: their logits have no gradient, but NaN·0 is NaN."""
    if inputs.live is None:
        return inputs
    return inputs._replace(hidden=jnp.where(inputs.live[:, None], inputs.hidden, 0))


def take_slab(config: Config, inputs: Inputs, start: Array | int, size: int) -> Inputs:
    """The inputs as they concern the classes from `start`."""

    def take(array: Array | None, axis: int = 0) -> Any:
        return None if array is None else lax.dynamic_slice_in_dim(array, start, size, axis)

    return inputs._replace(
        kernel=take(inputs.kernel, Projection(config).class_axis),
        bias=take(inputs.bias),
        targets=inputs.targets if is_index(inputs.targets) else take(inputs.targets, 1),
        class_weight=take(inputs.class_weight),
        real=take(inputs.real),
    )


def class_index(config: Config, column: Array | int) -> Array | int:
    """Which of all classes a column of the kernel is."""
    return lax.axis_index(config.class_axes) * config.columns + column if config.class_axes else column


class Seen(NamedTuple):
    """What the forward pass knows of some of the classes."""

    sums: Sums
    predicted: Array  # the column of the largest logit


def look(config: Config, reference: Array | None, inputs: Inputs, logits: Array, start: Array | int) -> Seen:
    """What (N, C) logits from the column `start` show, relative to a number for each token, or to its largest logit."""
    arrays = (logits, inputs.targets, inputs.class_weight, inputs.softcap, inputs.scale, reference)
    sums = jax.vmap(
        partial(scaled_sums, config.form, smooth=config.smooth, first_class=class_index(config, start)),
        (0, 0, None, None, None if inputs.scale is None else 0, None if reference is None else 0),
    )(*arrays)
    return Seen(sums, start + jnp.argmax(logits, -1).astype(jnp.int32))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted; no data to JAX, so that it can stand among residuals."""

    hidden: bool
    kernel: bool
    bias: bool
    targets: bool
    class_weight: bool
    softcap: bool
    scale: bool


def wanted_gradients(inputs: Any) -> Wanted:
    """Which inputs are being differentiated, told by `symbolic_zeros`."""
    of_classes = (inputs.kernel, inputs.bias, inputs.targets, inputs.class_weight, inputs.softcap)
    flags = (inputs.hidden, *of_classes, inputs.scale)
    return Wanted(*(flag is not None and flag.perturbed for flag in flags))


class Summed(NamedTuple):
    """Gradients that are sums over the tokens, in the dtype of computation; None where they aren't wanted."""

    kernel: Array | None
    bias: Array | None
    class_weight: Array | None
    softcap: Array | None


class PerToken(NamedTuple):
    """Gradients with an axis of tokens."""

    hidden: Array | None
    targets: Array | None
    scale: Array | None


def zeros(like: Array | None, want: bool, dtype: jnp.dtype | None = None) -> Array | None:
    return jnp.zeros_like(like, dtype) if want and like is not None else None


def empty(like: Array | None, want: bool) -> Array | None:
    """What will be written whole; to fill it with zeros takes a TPU as long as a matmul of a few hundred tokens."""
    if not want or like is None:
        return None
    return vary_alike((lax.empty(like.shape, like.dtype), like))[0]


def add(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)


def gradient_shares(
    config: Config,
    wanted: Wanted,
    inputs: Inputs,
    logits: Array,
    normalizer: Normalizer,
    cotangents: Cotangents,
    start: Array | int = 0,
) -> tuple[Summed, PerToken]:
    """What these tokens and the classes from the column `start` add to each gradient that is wanted."""
    first_class = class_index(config, start)
    per_class = (inputs.class_weight, inputs.softcap)
    of_one = partial(scaled_gradients, config.form, first_class=first_class)
    gradients: Any = jax.vmap(of_one, (0, 0, None, None, 0, 0, 0, 0))(
        logits, inputs.targets, *per_class, inputs.scale, inputs.live, normalizer, cotangents
    )
    # In the inputs' dtype, so that the backward matmuls are too; and stored, or each of them would make it for itself.
    narrow = lax.optimization_barrier(gradients.logits.astype(matmul_dtype(inputs.hidden, inputs.kernel)))
    project = Projection(config)
    summed = Summed(
        kernel=project.kernel_gradient(inputs.hidden, narrow) if wanted.kernel else None,
        bias=gradients.logits.sum(0) if wanted.bias else None,
        class_weight=gradients.weight.sum(0) if wanted.class_weight else None,
        softcap=gradients.softcap.sum(0) if wanted.softcap else None,
    )
    return summed, PerToken(
        hidden=project.hidden_gradient(narrow, inputs) if wanted.hidden else None,
        targets=gradients.target if wanted.targets else None,
        scale=gradients.scale if wanted.scale else None,
    )


def compose(config: Config, stats: Stats, weights: ExampleWeights, options: Options) -> Array:
    """The sum of the losses."""
    return example_losses(stats, weights, config.num_classes, options).sum()


def compose_gradients(
    config: Config, stats: Stats, weights: ExampleWeights, options: Options
) -> tuple[Array, Cotangents, ExampleWeights, Options]:
    """The sum of the losses, and its gradients; what no option needs is None."""
    loss, pull = jax.vjp(partial(compose, config), stats, weights, options)
    of_stats, of_weights, of_options = pull(jnp.ones_like(loss))
    cotangents = Cotangents(
        nll=of_stats.nll,
        smooth_nll=of_stats.smooth_nll if config.smooth else None,
        log_z=None if options.z_loss is None else of_stats.log_z,
    )
    return loss, cotangents, of_weights, of_options
