"""The loop over tokens: a chunk of them against all classes at a time.

For a mean or a sum every token's cotangent is known as soon as its loss is, so `loss_and_gradients` makes the gradients
there and then: three matmuls in all. The kernel's gradient is added up in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxce._math.quantity import rounded
from jaxce._mesh.layout import CLASSES, TOKENS
from jaxce._projection.chunks import (
    Numbers,
    Plan,
    chunk_gradients,
    composed,
    composed_gradients,
    gather_kernels,
    read,
    scan_chunks,
    scatter_kernels,
)
from jaxce._projection.inputs import (
    Inputs,
    Wanted,
    add,
    by_axes,
    cut,
    join,
    split_by,
    take_tokens,
    without_left_out,
    zero_sums,
)
from jaxce._projection.loops import auto
from jaxce._projection.loops.gpu_one_pass import sums_of_chunk


def fits(plan: Plan, wanted: Wanted, inputs: Inputs) -> bool:
    """Where it is asked for, or suits the platform."""
    return plan.strategy == "tokens" or (plan.strategy == "auto" and auto.takes_tokens(plan, wanted, inputs))


def chunk_size(plan: Plan, inputs: Inputs) -> int:
    """How many tokens a chunk has."""
    size = plan.chunk_size or auto.tokens_at_a_time(plan, inputs)
    return -(-size // plan.token_groups) * plan.token_groups


def evaluate(plan: Plan, inputs: Inputs) -> Numbers:
    """The numbers of every token, where no gradient is wanted."""
    return pass_over_chunks(plan, gather_kernels(plan, inputs))[0]


def forward(plan: Plan, wanted: Wanted, inputs: Inputs) -> tuple[Numbers, Any]:
    """The numbers of every token, and what `backward` needs."""
    inputs = gather_kernels(plan, inputs)
    numbers, whole_rows = pass_over_chunks(plan, inputs)
    return numbers, (wanted, inputs, whole_rows)


def pass_over_chunks(plan: Plan, inputs: Inputs) -> tuple[Numbers, Any]:
    """The numbers of every token, and what their gradients need of its whole row."""
    inputs = cut_padding(plan, inputs)

    def step(_: None, start: Array | int, size: int) -> tuple[None, Any]:
        chunk = cut(inputs, TOKENS, start, size, plan.token_groups)
        return None, numbers_of_chunk(plan, chunk, chunk.logits())

    _, outs = scan_chunks(step, None, inputs.tokens, chunk_size(plan, inputs))
    return put_together(plan, outs)


def numbers_of_chunk(plan: Plan, inputs: Inputs, logits: tuple[Array, ...]) -> tuple[Numbers, Any]:
    """`pass_over_chunks` of the tokens of `inputs`."""
    return read(plan, inputs, plan.merge_devices(sums_of_chunk(plan, inputs, logits)))


def backward(plan: Plan, residuals: Any, cotangents: Any, factor: Array | float = 1.0) -> Inputs:
    """The gradients for any cotangents of the numbers, times a factor; the logits are made again."""
    wanted, inputs, whole_rows = residuals
    real = cut_padding(plan, inputs)

    def step(sums: Inputs, start: Array | int, size: int) -> tuple[Inputs, Inputs]:
        chunk = without_left_out(cut(real, TOKENS, start, size, plan.token_groups))
        of_chunk = take_tokens((whole_rows, cotangents), start, size, plan.token_groups)
        found = chunk_gradients(plan, wanted, chunk, chunk.logits(), *of_chunk)
        of_tokens, shares = split_by(TOKENS, chunk, found)
        return add(sums, shares), of_tokens

    sums, outs = scan_chunks(step, start_sums(real, wanted), real.tokens, chunk_size(plan, real))
    gradients = join(with_padding(inputs, sums), put_together(plan, outs))
    return finished(inputs, jax.tree.map(lambda gradient: factor * gradient, gradients))


def loss_and_gradients(
    plan: Plan, wanted: Wanted, inputs: Inputs, weights: Any, options: Any
) -> tuple[tuple[Array, Numbers], Any]:
    """The sum of the losses with the numbers of every token, and what `gradients_times` needs."""
    inputs = gather_kernels(plan, inputs)
    real = cut_padding(plan, inputs)

    def step(carry: tuple[Inputs, Any], start: Array | int, size: int) -> tuple[Any, Any]:
        sums, option_sums = carry
        chunk = cut(real, TOKENS, start, size, plan.token_groups)
        of_chunk = take_tokens(weights, start, size, plan.token_groups)
        logits = chunk.logits()
        numbers, whole_rows = numbers_of_chunk(plan, chunk, logits)
        cotangents, of_weights, of_options = composed_gradients(plan, numbers, of_chunk, options)
        found = chunk_gradients(plan, wanted, without_left_out(chunk), logits, whole_rows, cotangents)
        of_tokens, shares = split_by(TOKENS, chunk, found)
        return (add(sums, shares), add(option_sums, of_options)), (of_tokens, of_weights, numbers)

    carry = (start_sums(real, wanted), jax.tree.map(jnp.zeros_like, options))
    (sums, of_options), outs = scan_chunks(step, carry, real.tokens, chunk_size(plan, real))
    of_tokens, of_weights, numbers = put_together(plan, outs)
    gradients = join(with_padding(inputs, sums), of_tokens)
    return (composed(plan, numbers, weights, options), numbers), (inputs, gradients, of_weights, of_options)


def gradients_times(plan: Plan, residuals: Any, factor: Array) -> tuple[Inputs, Any, Any]:
    """The gradients of `loss_and_gradients` times the cotangent of the sum, by inputs, weights and options."""
    inputs, *gradients = residuals
    of_inputs, of_weights, of_options = jax.tree.map(lambda gradient: factor * gradient, gradients)
    return finished(inputs, of_inputs), of_weights, of_options


def start_sums(inputs: Inputs, wanted: Wanted) -> Inputs:
    """Zeros for the gradients that are sums over the tokens."""
    return split_by(TOKENS, inputs, zero_sums(inputs, wanted.of(inputs)))[1]


def finished(inputs: Inputs, gradients: Inputs) -> Inputs:
    """Each gradient in its input's dtype, the only place where a sum over chunks is rounded; and on its device."""
    return scatter_kernels(rounded(gradients, inputs))


def cut_padding(plan: Plan, inputs: Inputs) -> Inputs:
    """`inputs` without the classes that are padding: a copy of the kernel, where it has any."""
    return cut(inputs, CLASSES, 0, plan.columns) if inputs.heads[0].columns != plan.columns else inputs


def with_padding(inputs: Inputs, gradients: Inputs) -> Inputs:
    """The gradients of what `cut_padding` has cut, with zeros for the padding."""

    def pad(_: list[str], array: Array, gradient: Array | None) -> Array | None:
        if gradient is None or gradient.shape == array.shape:
            return gradient
        return jnp.pad(gradient, [(0, long - short) for long, short in zip(array.shape, gradient.shape, strict=True)])

    return by_axes(pad, inputs, gradients)


def put_together(plan: Plan, outs: list[Any]) -> Any:
    """The outputs of `scan_chunks`, one for each token, as arrays over all tokens."""
    groups = plan.token_groups

    def flat(leaf: Array) -> Array:
        """(groups, tokens of a group, ...), from the (chunks, tokens of a chunk, ...) of an output."""
        chunks, size, *rest = leaf.shape
        return jnp.moveaxis(leaf.reshape(chunks, groups, size // groups, *rest), 0, 1).reshape(groups, -1, *rest)

    def whole(*leaves: Array) -> Array:
        joined = jnp.concatenate([flat(leaf) for leaf in leaves], 1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(whole, *outs)
