"""The loop over classes that keeps logits where the kernel's gradient will be. For a CPU.

The array that a slab's gradient will be written to has room for that slab's logits of D tokens. The forward pass leaves
them there, and the backward pass makes only those of the other N - D tokens again: 3 matmuls for up to D tokens,
4 - D/N for more, and no memory of its own.
"""

import dataclasses
from functools import partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._math.quantity import Sums
from jaxce._mesh.layout import TOKENS
from jaxce._projection.chunks import Numbers, Plan, cut_slab, read, scan_chunks, sums_of
from jaxce._projection.inputs import (
    Head,
    Inputs,
    Wanted,
    add,
    cut,
    join,
    split_by,
    take_tokens,
    without_left_out,
)
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


class Part(NamedTuple):
    """Some of the tokens, and what their gradients need; those whose logits were kept are a part of their own."""

    inputs: Inputs
    whole_rows: Any
    cotangents: Any


def split_tokens(whole: Part, first: int) -> list[Part]:
    """The first tokens and the others, if there are both."""
    tokens = whole.inputs.tokens
    spans = pairwise([0, first, tokens] if 0 < first < tokens else [0, tokens])
    return [
        Part(
            cut(whole.inputs, TOKENS, start, end - start),
            *take_tokens((whole.whole_rows, whole.cotangents), start, end - start),
        )
        for start, end in spans
    ]


def backward(plan: Plan, residuals: Any, cotangents: Any, factor: Array | float = 1.0) -> Inputs:
    """The gradients for any cotangents of the numbers, times a factor."""
    wanted, inputs, whole_rows, kept = residuals
    head = inputs.heads[0]
    parts = split_tokens(Part(without_left_out(inputs), whole_rows, cotangents), tokens_kept(head))

    def step(carry: tuple[Inputs, list[Inputs]], start: Array | int, size: int) -> tuple[Any, None]:
        gradients, of_tokens = carry
        logits = kept_logits(head, gradients.heads[0].kernel, start, size)
        shares, found = [], []
        for place, (part, own) in enumerate(zip(parts, of_tokens, strict=True)):
            slab, numbers = cut_slab(plan, part.inputs, start, size), (part.whole_rows, part.cotangents)
            of_block = partial(over_classes.add_block, plan, wanted, slab, numbers, start, factor)
            share, own_and_others = of_block(join(own, gradients), 0, slab.tokens, None if place else (logits,))
            shares.append(share)
            found.append(split_by(TOKENS, slab, own_and_others)[0])
        return (over_classes.finish_slab(slab, gradients, reduce(add, shares), start, factor), found), None

    _, gradients = split_by(TOKENS, inputs, over_classes.start_gradients(plan, wanted, inputs))
    gradients = gradients._replace(heads=(dataclasses.replace(gradients.heads[0], kernel=kept),))
    of_tokens = [
        split_by(TOKENS, part.inputs, over_classes.start_gradients(plan, wanted, part.inputs))[0] for part in parts
    ]
    (gradients, of_tokens), _ = scan_chunks(step, (gradients, of_tokens), plan.columns, chunk_size(plan, inputs))
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *of_tokens)
    return over_classes.finish_sums(inputs, join(together, gradients), factor)


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
