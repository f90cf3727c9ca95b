"""The loop over classes that keeps logits where the kernel's gradient will be. For a CPU.

The array that a slab's gradient will be written to has room for that slab's logits of D tokens. The forward pass leaves
them there, and the backward pass makes only those of the other N - D tokens again: 3 matmuls for up to D tokens,
4 - D/N for more, and no memory of its own.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._math.quantity import Sums
from jaxce._projection.chunks import Numbers, Plan, cut_slab, read, scan_chunks, sums_of
from jaxce._projection.inputs import Head, Inputs, Wanted, add, without_left_out
from jaxce._projection.loops import over_classes
from jaxce._projection.loops.over_classes import chunk_size, evaluate

__all__ = ["backward", "evaluate", "fits", "forward"]


def fits(plan: Plan, wanted: Wanted, inputs: Inputs) -> bool:
    """Where nothing else is asked for, and the gradient of the one kernel is wanted and of the logits' own dtype."""
    if plan.strategy != "auto" or len(inputs.heads) > 1 or not wanted.all_of("kernel"):
        return False
    # The gradients of class probabilities are as large as the logits: not to be put together from two parts. With more
    # devices than one, the tokens could lie on others than the gradient of the kernel.
    return not wanted.flags.target and inputs.heads[0].kernel.dtype == inputs.dtype and jax.device_count() == 1


def forward(plan: Plan, wanted: Wanted, inputs: Inputs) -> tuple[Numbers, Any]:
    """The numbers of every token, and what `backward` needs, the kept logits among it."""

    def sums(start: Array | int, size: int, _: Any, kept: Array) -> tuple[Sums, Array]:
        slab = cut_slab(plan, inputs, start, size)
        logits = slab.logits()
        return sums_of(plan, slab, logits, start), keep(slab.heads[0], kept, logits[0], start)

    kept = jnp.zeros_like(inputs.heads[0].kernel)
    size = min(chunk_size(plan, inputs), plan.columns)
    found, kept = over_classes.pass_over_slabs(plan, sums, size, None, kept)
    numbers, whole_rows = read(plan, inputs, found)
    return numbers, (wanted, inputs, whole_rows, kept)


def backward(plan: Plan, residuals: Any, cotangents: Any, factor: Array | float = 1.0) -> Inputs:
    """The gradients for any cotangents of the numbers, times a factor."""
    wanted, inputs, whole_rows, kept = residuals
    clean = without_left_out(inputs)
    tokens, first = inputs.tokens, tokens_kept(inputs.heads[0])

    def step(gradients: Inputs, start: Array | int, size: int) -> tuple[Inputs, None]:
        slab = cut_slab(plan, clean, start, size)
        of_block = partial(over_classes.add_block, plan, wanted, slab, (whole_rows, cotangents), start, factor)
        logits = kept_logits(slab.heads[0], gradients.heads[0].kernel, start, size)
        share, gradients = of_block(gradients, 0, first, (logits,))
        if first < tokens:
            more, gradients = of_block(gradients, first, tokens - first)
            share = add(share, more)
        return over_classes.finish_slab(slab, gradients, share, start, factor), None

    start = over_classes.start_gradients(plan, wanted, inputs, kept)
    gradients, _ = scan_chunks(step, start, plan.columns, chunk_size(plan, inputs))
    return over_classes.finish_sums(inputs, gradients, factor)


def tokens_kept(head: Head) -> int:
    """The logits of how many tokens have room in the gradient of the kernel, the first ones."""
    return min(head.hidden.shape)


def place(head: Head, start: Array | int, size: int) -> tuple[list[Array], tuple[int, int]]:
    """Where the gradient of the kernel has the logits of a slab of classes from `start`."""
    corner = [start, 0] if head.transpose_kernel else [0, start]
    shape = (size, tokens_kept(head)) if head.transpose_kernel else (tokens_kept(head), size)
    return [jnp.asarray(index, jnp.int32) for index in corner], shape


def keep(head: Head, array: Array, logits: Array, start: Array | int) -> Array:
    """`array` with the logits of the slab of classes from `start`."""
    corner, shape = place(head, start, logits.shape[1])
    return lax.dynamic_update_slice(array, logits[: tokens_kept(head)].reshape(shape), corner)


def kept_logits(head: Head, array: Array, start: Array | int, size: int) -> Array:
    """The (tokens, size) logits that were kept."""
    return lax.dynamic_slice(array, *place(head, start, size)).reshape(tokens_kept(head), size)
