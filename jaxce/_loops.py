"""The two loops of `linear_cross_entropy`: the numbers of every token from a projection, and their gradients.

N tokens, D features, C classes. Both compute the same numbers:

    over tokens   a chunk of tokens against all classes; `summed_loss` also has the gradients of the chunk there and
                  then, since a mean or a sum gives every token a cotangent that is known: three matmuls in all
    over classes  all tokens against a slab of classes; the backward pass makes each slab's logits again: four matmuls
                  in all, and no array larger than N×slab, N×D or the gradients themselves. It need not make those of
                  D tokens, for which the kernel's gradient has room until it is there itself (`Room`)

A loop runs over whole chunks and then, outside of it, over what is left, so that nothing is padded or counted twice.
"""

from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxce._compose import ExampleWeights, Options, example_losses
from jaxce._softmax_stats import (
    Cotangents,
    Normalizer,
    Stats,
    Sums,
    Tree,
    compute_dtype,
    is_index,
    keep,
    merge,
    partial_gradients,
    partial_sums,
    primal_values,
    read_stats,
    row_sums,
    scan_chunks,
)

Loop: TypeAlias = Literal["tokens", "classes"]


class Config(NamedTuple):
    """What is known when the function is traced."""

    loop: Loop
    either_loop: bool  # the other loop may be taken where fewer gradients are wanted
    keeps_logits: bool  # the loop over classes keeps some of them for the backward pass, see `Room`
    chunk_size: int | None  # tokens or classes at a time
    num_classes: int  # columns of the kernel beyond these are padding
    transpose_kernel: bool
    precision: lax.PrecisionLike
    smooth: bool


class Inputs(NamedTuple):
    """The arrays that the numbers of the tokens are made of."""

    hidden: Array  # (N, D)
    kernel: Array  # (D, C), or (C, D) with transpose_kernel
    bias: Array | None  # (C,)
    targets: Array  # (N,) class indices, or (N, num_classes) probabilities
    class_weight: Array | None  # (num_classes,)
    softcap: Array | None
    live: Array | None  # (N,)


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

    def logits(self, hidden: Array, kernel: Array, bias: Array | None) -> Array:
        logits = self._dot(hidden, 1, kernel, 1 - self.class_axis)
        return logits if bias is None else logits + bias.astype(logits.dtype)

    def hidden_gradient(self, dlogits: Array, kernel: Array) -> Array:
        return self._dot(dlogits, 1, kernel, self.class_axis)

    def kernel_gradient(self, hidden: Array, dlogits: Array) -> Array:
        if self.config.transpose_kernel:
            return self._dot(dlogits, 0, hidden, 0)
        return self._dot(hidden, 0, dlogits, 0)


def take_tokens(tree: Any, start: Array | int, size: int) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), tree)


def join(outs: list[Any]) -> Any:
    """The per-token outputs of `scan_chunks`, as arrays over all tokens."""
    flat = [
        jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), out) for out in outs
    ]
    return flat[0] if len(flat) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *flat)


def take_chunk(inputs: Inputs, start: Array | int, size: int) -> Inputs:
    hidden, targets, live = take_tokens((inputs.hidden, inputs.targets, inputs.live), start, size)
    return inputs._replace(hidden=drop_dead(live, hidden), targets=targets, live=live)


def drop_dead(live: Array | None, rows: Array) -> Array:
    """Zeros in the rows of tokens that are left out, so that no NaN or infinity goes through a matmul as 0·NaN."""
    return rows if live is None else jnp.where(live[:, None], rows, 0)


def cut_padding(config: Config, inputs: Inputs) -> Inputs:
    """`inputs` without the classes that are padding: a copy of the kernel, where it has any."""
    axis = Projection(config).class_axis
    kernel = lax.slice_in_dim(inputs.kernel, 0, config.num_classes, axis=axis)
    return inputs._replace(kernel=kernel, bias=None if inputs.bias is None else inputs.bias[: config.num_classes])


def chunk_logits(config: Config, inputs: Inputs) -> Array:
    return Projection(config).logits(inputs.hidden, inputs.kernel, inputs.bias)


def forward_chunk(config: Config, inputs: Inputs, logits: Array) -> tuple[Stats, Normalizer, Array]:
    """The numbers of the tokens of `inputs`, and the class of the largest logit of each."""
    sums = jax.vmap(partial(row_sums, smooth=config.smooth), (0, 0, None, None))(
        logits, inputs.targets, inputs.class_weight, inputs.softcap
    )
    stats, normalizer = jax.vmap(read_stats)(sums, inputs.targets)
    return keep(inputs.live, stats), normalizer, jnp.argmax(logits, -1).astype(jnp.int32)


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


def zeros(like: Array | None, want: bool, dtype: jnp.dtype | None = None) -> Array | None:
    return jnp.zeros_like(like, dtype) if want and like is not None else None


def zero_sums(inputs: Inputs, wanted: Wanted, dtype: jnp.dtype) -> Summed:
    return Summed(
        zeros(inputs.kernel, wanted.kernel, dtype),
        zeros(inputs.bias, wanted.bias, dtype),
        zeros(inputs.class_weight, wanted.class_weight, dtype),
        zeros(inputs.softcap, wanted.softcap, dtype),
    )


def logit_gradients(
    inputs: Inputs,
    logits: Array,
    normalizer: Normalizer,
    cotangents: Cotangents,
    first_class: Array | int = 0,
) -> Any:
    """`partial_gradients` of every token of `inputs`."""

    def one(logits: Array, target: Array, live: Array | None, normalizer: Normalizer, cotangents: Cotangents) -> Any:
        return partial_gradients(
            logits,
            target,
            inputs.class_weight,
            inputs.softcap,
            live,
            normalizer,
            cotangents,
            first_class=first_class,
        )

    return jax.vmap(one)(logits, inputs.targets, inputs.live, normalizer, cotangents)


def gradient_shares(
    config: Config,
    wanted: Wanted,
    inputs: Inputs,
    logits: Array,
    normalizer: Normalizer,
    cotangents: Cotangents,
    first_class: Array | int = 0,
) -> tuple[Summed, PerToken]:
    """What these tokens and classes add to each gradient that is wanted."""
    project = Projection(config)
    gradients = logit_gradients(inputs, logits, normalizer, cotangents, first_class)
    # In the inputs' dtype, so that the backward matmuls are too.
    narrow = gradients.logits.astype(matmul_dtype(inputs.hidden, inputs.kernel))
    summed = Summed(
        kernel=project.kernel_gradient(inputs.hidden, narrow) if wanted.kernel else None,
        bias=gradients.logits.sum(0) if wanted.bias else None,
        class_weight=gradients.weight.sum(0) if wanted.class_weight else None,
        softcap=gradients.softcap.sum(0) if wanted.softcap else None,
    )
    return summed, PerToken(
        hidden=project.hidden_gradient(narrow, inputs.kernel) if wanted.hidden else None,
        targets=gradients.target if wanted.targets else None,
    )


def add(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)


def wanted_gradients(inputs: Any) -> Wanted:
    """Which inputs are being differentiated, told by `symbolic_zeros`."""
    flags = (inputs.hidden, inputs.kernel, inputs.bias, inputs.targets, inputs.class_weight, inputs.softcap)
    return Wanted(*(flag is not None and flag.perturbed for flag in flags))


# The numbers of every token, for any reduction and any cotangents: the gradient makes the logits again.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_stats(config: Config, inputs: Inputs) -> tuple[Stats, Array]:
    """The numbers of every token, and the class of its largest logit."""
    stats, _, predicted, _ = forward_stats(config, inputs, None)
    return stats, predicted


def forward_stats(config: Config, inputs: Inputs, room: Array | None) -> tuple[Stats, Normalizer, Array, Array | None]:
    """The numbers of every token, and the class of its largest logit; and the room, with logits in it."""
    if config.loop == "classes":
        return forward_over_classes(config, inputs, room)
    inputs = cut_padding(config, inputs)

    def step(_: None, start: Array | int, size: int) -> tuple[None, Any]:
        part = take_chunk(inputs, start, size)
        return None, forward_chunk(config, part, chunk_logits(config, part))

    _, outs = scan_chunks(step, None, inputs.hidden.shape[0], chunk_size(config, inputs))
    return *join(outs), None


def _linear_stats_fwd(config: Config, inputs: Any) -> tuple[Any, Any]:
    wanted = wanted_gradients(inputs)
    inputs = primal_values(inputs)
    stats, normalizer, predicted, room = forward_stats(config, inputs, empty_room(config, wanted, inputs))
    return (stats, predicted), (inputs, normalizer, wanted, room)


def _linear_stats_bwd(config: Config, residuals: Any, cotangents: Any) -> tuple[Inputs]:
    inputs, normalizer, wanted, room = residuals
    stats, _ = cotangents
    cotangents = Cotangents(*(None if isinstance(g, SymbolicZero) else g for g in stats))
    if config.loop == "classes":
        sums, per_token = backward_over_classes(config, wanted, inputs, normalizer, cotangents, room)
    else:
        sums, per_token = backward_over_tokens(config, wanted, inputs, normalizer, cotangents)
    return (as_cotangents(inputs, sums, per_token),)


def as_cotangents(inputs: Inputs, sums: Summed, per_token: PerToken) -> Any:
    """Each gradient in its input's dtype and shape; the only place where a sum over chunks of tokens is rounded."""

    def like(gradient: Array, primal: Array) -> Array:
        padding = [(0, whole - part, 0) for whole, part in zip(primal.shape, gradient.shape, strict=True)]
        return lax.pad(gradient.astype(primal.dtype), jnp.zeros((), primal.dtype), padding)

    gradients = (per_token.hidden, sums.kernel, sums.bias, per_token.targets, sums.class_weight, sums.softcap, None)
    return Inputs(*(g if g is None else like(g, x) for g, x in zip(gradients, inputs, strict=True)))  # type: ignore[arg-type]


linear_stats.defvjp(_linear_stats_fwd, _linear_stats_bwd, symbolic_zeros=True)


def backward_over_tokens(
    config: Config, wanted: Wanted, inputs: Inputs, normalizer: Normalizer, cotangents: Cotangents
) -> tuple[Summed, PerToken]:
    inputs = cut_padding(config, inputs)

    def step(sums: Summed, start: Array | int, size: int) -> tuple[Summed, PerToken]:
        part = take_chunk(inputs, start, size)
        logits = chunk_logits(config, part)
        part_normalizer, part_cotangents = take_tokens((normalizer, cotangents), start, size)
        shares, per_token = gradient_shares(config, wanted, part, logits, part_normalizer, part_cotangents)
        return add(sums, shares), per_token

    sums = zero_sums(inputs, wanted, normalizer.log_sum.dtype)
    sums, outs = scan_chunks(step, sums, inputs.hidden.shape[0], chunk_size(config, inputs))
    return sums, join(outs)


def take_slab(config: Config, inputs: Inputs, start: Array | int, size: int) -> Inputs:
    """The inputs as they concern the classes from `start`."""

    def take(array: Array | None) -> Array | None:
        return None if array is None else lax.dynamic_slice_in_dim(array, start, size)

    return inputs._replace(
        kernel=lax.dynamic_slice_in_dim(inputs.kernel, start, size, Projection(config).class_axis),
        bias=take(inputs.bias),
        targets=(
            inputs.targets if is_index(inputs.targets) else lax.dynamic_slice_in_dim(inputs.targets, start, size, 1)
        ),
        class_weight=take(inputs.class_weight),
    )


class Room(NamedTuple):
    """Where the kernel's gradient will be. Until a slab of it is there, it holds the slab's logits of D tokens."""

    config: Config
    tokens: int  # how many have room, the first ones; N where there are fewer than D

    def _place(self, start: Array | int, size: int) -> tuple[list[Array], tuple[int, int]]:
        classes_first = self.config.transpose_kernel
        place = [start, 0] if classes_first else [0, start]
        shape = (size, self.tokens) if classes_first else (self.tokens, size)
        return [jnp.asarray(index, jnp.int32) for index in place], shape

    def keep(self, room: Array, logits: Array, start: Array | int) -> Array:
        """`room` with the logits of the slab of classes from `start`."""
        place, shape = self._place(start, logits.shape[1])
        return lax.dynamic_update_slice(room, logits[: self.tokens].reshape(shape), place)

    def logits(self, room: Array, start: Array | int, size: int) -> Array:
        """The (tokens, size) logits that were kept."""
        return lax.dynamic_slice(room, *self._place(start, size)).reshape(self.tokens, size)


def empty_room(config: Config, wanted: Wanted, inputs: Inputs) -> Array | None:
    """Room for logits in the gradient of the kernel, if there is to be one and they fit: of the logits' own dtype."""
    dtype = compute_dtype(matmul_dtype(inputs.hidden, inputs.kernel))
    # The gradients of class probabilities are as large as the logits: not to be put together from two parts.
    if not (config.keeps_logits and wanted.kernel) or wanted.targets or inputs.kernel.dtype != dtype:
        return None
    return jnp.zeros_like(inputs.kernel)


def forward_over_classes(
    config: Config, inputs: Inputs, room: Array | None
) -> tuple[Stats, Normalizer, Array, Array | None]:
    kept = Room(config, min(inputs.hidden.shape))

    def step(
        carry: tuple[tuple[Sums, Array] | None, Array | None], start: Array | int, size: int
    ) -> tuple[tuple[tuple[Sums, Array], Array | None], None]:
        totals, room = carry
        slab = take_slab(config, inputs, start, size)
        logits = chunk_logits(config, slab)
        one = partial(partial_sums, smooth=config.smooth, first_class=start)
        part = jax.vmap(one, (0, 0, None, None))(logits, slab.targets, slab.class_weight, slab.softcap)
        part_best = start + jnp.argmax(logits, -1).astype(jnp.int32)
        if room is not None:
            room = kept.keep(room, logits, start)
        if totals is None:
            return ((part, part_best), room), None
        sums, best = totals
        # The first of equal logits, and NaN above all, as in argmax.
        ahead = (part.maximum > sums.maximum) | (jnp.isnan(part.maximum) & ~jnp.isnan(sums.maximum))
        stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), sums, part)
        return ((merge(stacked), jnp.where(ahead, part_best, best)), room), None

    # The first slab starts the sums, so that merging has no empty sums to know of.
    size = min(chunk_size(config, inputs), config.num_classes)
    carry, _ = step((None, room), 0, size)

    def later(carry: Any, start: Array | int, width: int) -> tuple[Any, None]:
        return step(carry, start + size, width)

    if config.num_classes > size:
        carry, _ = scan_chunks(later, carry, config.num_classes - size, size)
    (sums, predicted), room = carry
    stats, normalizer = jax.vmap(read_stats)(sums, inputs.targets)
    return keep(inputs.live, stats), normalizer, predicted, room


def backward_over_classes(
    config: Config,
    wanted: Wanted,
    inputs: Inputs,
    normalizer: Normalizer,
    cotangents: Cotangents,
    room: Array | None,
    scale: Array | float = 1.0,
) -> tuple[Summed, PerToken]:
    """Each slab's share of the kernel's gradient is final: it is rounded and written where it belongs.

    Everything is multiplied by `scale` after the matmuls: one over the number of tokens would take the small logit
    gradients out of float16's range before them.
    """
    dtype = normalizer.log_sum.dtype
    tokens = inputs.hidden.shape[0]
    # The tokens whose logits are kept, and the others.
    kept = Room(config, 0 if room is None else min(inputs.hidden.shape))
    spans = list(pairwise([0, kept.tokens, tokens] if 0 < kept.tokens < tokens else [0, tokens]))
    parts = [take_chunk(inputs, start, end - start) for start, end in spans]
    numbers = [take_tokens((normalizer, cotangents), start, end - start) for start, end in spans]

    def put(whole: Array | None, part: Array | None, start: Array | int, axis: int = 0) -> Array | None:
        if whole is None or part is None:
            return None
        return lax.dynamic_update_slice_in_dim(whole, (scale * part).astype(whole.dtype), start, axis)

    def step(
        carry: tuple[Summed, list[PerToken]], start: Array | int, size: int
    ) -> tuple[tuple[Summed, list[PerToken]], None]:
        sums, per_token = carry
        slabs = [take_slab(config, part, start, size) for part in parts]
        logits = [chunk_logits(config, slab) for slab in slabs]
        if sums.kernel is not None and kept.tokens:
            logits[0] = kept.logits(sums.kernel, start, size)
        shares = [
            gradient_shares(config, wanted, slab, x, normalizer, cotangents, start)
            for slab, x, (normalizer, cotangents) in zip(slabs, logits, numbers, strict=True)
        ]
        share = reduce(add, [summed for summed, _ in shares])
        sums = Summed(
            kernel=put(sums.kernel, share.kernel, start, Projection(config).class_axis),
            bias=put(sums.bias, share.bias, start),
            class_weight=put(sums.class_weight, share.class_weight, start),
            softcap=add(sums.softcap, share.softcap),
        )
        per_token = [
            PerToken(add(whole.hidden, part.hidden), put(whole.targets, part.targets, start, 1))
            for whole, (_, part) in zip(per_token, shares, strict=True)
        ]
        return (sums, per_token), None

    zero = (
        Summed(
            zeros(inputs.kernel, wanted.kernel) if room is None else room,
            zeros(inputs.bias, wanted.bias),
            zeros(inputs.class_weight, wanted.class_weight),
            zeros(inputs.softcap, wanted.softcap, dtype),
        ),
        [PerToken(zeros(part.hidden, wanted.hidden, dtype), zeros(part.targets, wanted.targets)) for part in parts],
    )
    (sums, per_token), _ = scan_chunks(step, zero, config.num_classes, chunk_size(config, inputs))
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *per_token)
    softcap, hidden = jax.tree.map(lambda total: scale * total, (sums.softcap, whole.hidden))
    return sums._replace(softcap=softcap), whole._replace(hidden=hidden)


# The sum of the losses. Its cotangent only scales the gradients, so that the loop over tokens can make them in the
# forward pass.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_loss(
    config: Config, inputs: Inputs, weights: ExampleWeights, options: Options
) -> tuple[Array, tuple[Stats, Array]]:
    """The sum of the tokens' losses; and what `linear_stats` returns, without gradient."""
    stats, _, predicted, _ = forward_stats(config, inputs, None)
    return compose(config, stats, weights, options), (stats, predicted)


def compose(config: Config, stats: Stats, weights: ExampleWeights, options: Options) -> Array:
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


def _summed_loss_fwd(config: Config, inputs: Any, weights: Any, options: Any) -> tuple[Any, Any]:
    wanted = wanted_gradients(inputs)
    inputs, weights, options = primal_values((inputs, weights, options))
    # With the kernel or the hidden states frozen, two matmuls do over tokens, and three over classes.
    if config.either_loop and not (wanted.kernel and wanted.hidden):
        config = config._replace(loop="tokens")
    if config.loop == "tokens":
        out, gradients = forward_and_backward_over_tokens(config, wanted, inputs, weights, options)
        return out, (inputs, gradients, None)
    stats, normalizer, predicted, room = forward_stats(config, inputs, empty_room(config, wanted, inputs))
    out = compose(config, stats, weights, options), (stats, predicted)
    return out, (inputs, None, (wanted, normalizer, room, stats, weights, options))


def _summed_loss_bwd(config: Config, residuals: Any, cotangents: Any) -> tuple[Any, Any, Any]:
    inputs, gradients, unfinished = residuals
    g, _ = cotangents
    if isinstance(g, SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    if gradients is not None:
        sums, per_token, weights, options = jax.tree.map(lambda leaf: g * leaf, gradients)
        return as_cotangents(inputs, sums, per_token), weights, options
    wanted, normalizer, room, stats, weights, options = unfinished
    _, of_stats, of_weights, of_options = compose_gradients(config, stats, weights, options)
    sums, per_token = backward_over_classes(config, wanted, inputs, normalizer, of_stats, room, g)
    weights, options = jax.tree.map(lambda leaf: g * leaf, (of_weights, of_options))
    return as_cotangents(inputs, sums, per_token), weights, options


summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd, symbolic_zeros=True)


def forward_and_backward_over_tokens(
    config: Config, wanted: Wanted, inputs: Inputs, weights: ExampleWeights, options: Options
) -> tuple[tuple[Array, tuple[Stats, Array]], tuple[Summed, PerToken, ExampleWeights, Options]]:
    """`summed_loss`, and its gradients."""
    inputs = cut_padding(config, inputs)

    def step(carry: tuple[Summed, Options], start: Array | int, size: int) -> tuple[Any, Any]:
        sums, option_sums = carry
        part = take_chunk(inputs, start, size)
        logits = chunk_logits(config, part)
        stats, normalizer, predicted = forward_chunk(config, part, logits)
        loss, cotangents, of_weights, of_options = compose_gradients(
            config, stats, take_tokens(weights, start, size), options
        )
        shares, per_token = gradient_shares(config, wanted, part, logits, normalizer, cotangents)
        return (add(sums, shares), add(option_sums, of_options)), (per_token, of_weights, loss[None], stats, predicted)

    zero = (
        zero_sums(inputs, wanted, compute_dtype(matmul_dtype(inputs.hidden, inputs.kernel))),
        jax.tree.map(jnp.zeros_like, options),
    )
    (sums, option_sums), outs = scan_chunks(step, zero, inputs.hidden.shape[0], chunk_size(config, inputs))
    per_token, of_weights, losses, stats, predicted = join(outs)
    return (losses.sum(), (stats, predicted)), (sums, per_token, of_weights, option_sums)


def chunk_size(config: Config, inputs: Inputs) -> int:
    """The one asked for; or a power of two, which divides most numbers of tokens, so that there is seldom a rest."""
    if config.chunk_size is not None:
        return config.chunk_size
    tokens, features = inputs.hidden.shape
    if config.loop == "classes":
        # A slab's logits are at most 8 million entries. Few tokens need wider slabs to be worth a step of the loop.
        return min(2048 if tokens <= 1024 else 1024, max(256, power_of_two(2**23 // max(tokens, 1))))
    # Each chunk reads and writes the float32 gradient of the kernel, which takes about as long as the matmuls of a few
    # hundred tokens; so a chunk may take as much memory as that gradient, and a quarter more. And at least a million
    # logits, below which the steps of the loop cost more than what they do.
    itemsize = matmul_dtype(inputs.hidden, inputs.kernel).itemsize
    return max(128, power_of_two(5 * features // (4 + itemsize)), power_of_two(2**20 // config.num_classes))


def power_of_two(bound: int) -> int:
    """The largest power of two that is at most `bound`, or 1."""
    return 1 << max(bound.bit_length() - 1, 0)
