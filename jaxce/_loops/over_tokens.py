"""The loop over tokens: a chunk of them against all classes at a time.

For a mean or a sum every token's cotangent is known as soon as its loss is, so `loss_and_gradients` makes the gradients
there and then: three matmuls in all. The kernel's gradient is added up in float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._compose import ExampleWeights, Options
from jaxce._loops.accelerator import first_reference, read_once
from jaxce._loops.across_devices import merge_devices
from jaxce._loops.auto import tokens_at_a_time
from jaxce._loops.shared import (
    Config,
    Inputs,
    PerToken,
    Projection,
    Summed,
    Wanted,
    add,
    compose,
    compose_gradients,
    gradient_shares,
    look,
    matmul_dtype,
    scan_chunks,
    take_chunk,
    take_tokens,
    without_left_out,
    zeros,
)
from jaxce._softmax import Cotangents, Normalizer, Stats, compute_dtype, keep, read_stats

# There, it saves a pass over the logits of a chunk; a TPU would make a copy of them in case they are needed again.
ON_GPU = ("cuda", "rocm")


def chunk_size(config: Config, inputs: Inputs) -> int:
    """How many tokens a chunk has."""
    size = config.chunk_size or tokens_at_a_time(config.platform, inputs, config.columns, config.groups)
    return -(-size // config.groups) * config.groups


def evaluate(config: Config, inputs: Inputs) -> tuple[Stats, Array]:
    """The numbers of every token and the class of its largest logit, where no gradient is wanted."""
    stats, _, predicted = forward(config, inputs)
    return stats, predicted


def forward(config: Config, inputs: Inputs) -> tuple[Stats, Normalizer, Array]:
    """The numbers of every token, what their gradients need, and the class of the largest logit of each."""
    inputs = cut_padding(config, inputs)

    def step(_: None, start: Array | int, size: int) -> tuple[None, Any]:
        part = take_chunk(inputs, start, size, config.groups)
        return None, forward_chunk(config, part, Projection(config).logits(part))

    _, outs = scan_chunks(step, None, inputs.hidden.shape[0], chunk_size(config, inputs))
    stats, normalizer, predicted = join(config, outs)
    return stats, normalizer, predicted


def backward(
    config: Config, wanted: Wanted, inputs: Inputs, normalizer: Normalizer, cotangents: Cotangents
) -> tuple[Summed, PerToken]:
    """The gradients for any cotangents of the numbers of `forward`; the logits are made again."""
    whole, inputs = inputs, cut_padding(config, inputs)

    def step(sums: Summed, start: Array | int, size: int) -> tuple[Summed, PerToken]:
        part = without_left_out(take_chunk(inputs, start, size, config.groups))
        logits = Projection(config).logits(part)
        numbers = take_tokens((normalizer, cotangents), start, size, config.groups)
        shares, per_token = gradient_shares(config, wanted, part, logits, *numbers)
        return add(sums, shares), per_token

    sums, outs = scan_chunks(step, zero_sums(inputs, wanted), inputs.hidden.shape[0], chunk_size(config, inputs))
    return with_padding(whole, sums), join(config, outs)


def loss_and_gradients(
    config: Config, wanted: Wanted, inputs: Inputs, weights: ExampleWeights, options: Options
) -> tuple[tuple[Array, tuple[Stats, Array]], tuple[Summed, PerToken, ExampleWeights, Options]]:
    """The sum of the losses with the numbers of every token, and the gradients of that sum."""
    whole, inputs = inputs, cut_padding(config, inputs)

    def step(carry: tuple[Summed, Options], start: Array | int, size: int) -> tuple[Any, Any]:
        sums, option_sums = carry
        part = take_chunk(inputs, start, size, config.groups)
        part_weights = take_tokens(weights, start, size, config.groups)
        logits = Projection(config).logits(part)
        stats, normalizer, predicted = forward_chunk(config, part, logits)
        _, cotangents, of_weights, of_options = compose_gradients(config, stats, part_weights, options)
        clean = without_left_out(part)
        shares, per_token = gradient_shares(config, wanted, clean, logits, normalizer, cotangents)
        return (add(sums, shares), add(option_sums, of_options)), (per_token, of_weights, stats, predicted)

    carry = (zero_sums(inputs, wanted), jax.tree.map(jnp.zeros_like, options))
    (sums, option_sums), outs = scan_chunks(step, carry, inputs.hidden.shape[0], chunk_size(config, inputs))
    per_token, of_weights, stats, predicted = join(config, outs)
    gradients = with_padding(whole, sums), per_token, of_weights, option_sums
    return (compose(config, stats, weights, options), (stats, predicted)), gradients


def forward_chunk(config: Config, inputs: Inputs, logits: Array) -> tuple[Stats, Normalizer, Array]:
    """`forward` of the tokens of `inputs`."""
    reference = first_reference(config, inputs, config.columns)
    sums, predicted = merge_devices(config, read_once(ON_GPU, partial(look, config), reference, inputs, logits, 0))
    stats, normalizer = jax.vmap(read_stats)(sums, inputs.targets)
    return keep(inputs.live, stats), normalizer, predicted


def zero_sums(inputs: Inputs, wanted: Wanted) -> Summed:
    dtype = compute_dtype(matmul_dtype(inputs.hidden, inputs.kernel))
    return Summed(
        zeros(inputs.kernel, wanted.kernel, dtype),
        zeros(inputs.bias, wanted.bias, dtype),
        zeros(inputs.class_weight, wanted.class_weight, dtype),
        zeros(inputs.softcap, wanted.softcap, dtype),
    )


def cut_padding(config: Config, inputs: Inputs) -> Inputs:
    """`inputs` without the classes that are padding: a copy of the kernel, where it has any."""
    axis = Projection(config).class_axis
    kernel = lax.slice_in_dim(inputs.kernel, 0, config.columns, axis=axis)
    return inputs._replace(kernel=kernel, bias=None if inputs.bias is None else inputs.bias[: config.columns])


def with_padding(inputs: Inputs, sums: Summed) -> Summed:
    """The gradients of what `cut_padding` has cut, with zeros for the padding."""

    def pad(gradient: Array | None, primal: Array | None) -> Array | None:
        if gradient is None or primal is None:
            return None
        lacking = [(0, long - short) for long, short in zip(primal.shape, gradient.shape, strict=True)]
        return jnp.pad(gradient, lacking)

    return sums._replace(kernel=pad(sums.kernel, inputs.kernel), bias=pad(sums.bias, inputs.bias))


def join(config: Config, outs: list[Any]) -> Any:
    """The per-token outputs of `scan_chunks`, as arrays over all tokens."""
    groups = config.groups

    def flat(leaf: Array) -> Array:
        """(groups, tokens of a group, ...), from the (chunks, tokens of a chunk, ...) of an output."""
        chunks, size, *rest = leaf.shape
        return jnp.moveaxis(leaf.reshape(chunks, groups, size // groups, *rest), 0, 1).reshape(groups, -1, *rest)

    def whole(*leaves: Array) -> Array:
        joined = jnp.concatenate([flat(leaf) for leaf in leaves], 1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(whole, *outs)
