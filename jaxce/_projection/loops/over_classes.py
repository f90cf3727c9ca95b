"""The loop over classes: all tokens against a slab of them at a time.

The backward pass makes each slab's logits again and finishes that slab of the kernel's gradient: four matmuls in all,
and no array larger than N×slab, N×D or the gradients themselves.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._math.quantity import Sums, rounded
from jaxce._mesh.devices import vary_alike
from jaxce._mesh.layout import CLASSES, TOKENS
from jaxce._projection.chunks import (
    Numbers,
    Plan,
    chunk_gradients,
    cut_slab,
    first_reference,
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
    empty,
    join,
    put,
    split_by,
    take_from,
    take_tokens,
    without_left_out,
    zero_sums,
)
from jaxce._projection.loops import auto
from jaxce._projection.loops.tpu_one_pass import as_laid_out, sums_of_slab


def fits(plan: Plan, wanted: Wanted, inputs: Inputs) -> bool:
    """Always."""
    return True


def chunk_size(plan: Plan, inputs: Inputs) -> int:
    """How many classes a slab has."""
    return plan.chunk_size or auto.classes_at_a_time(plan, inputs)


def evaluate(plan: Plan, inputs: Inputs) -> Numbers:
    """The numbers of every token, where no gradient is wanted."""
    size = plan.chunk_size or auto.classes_evaluated_at_a_time(plan, inputs)
    return numbers_and_rows(plan, gather_kernels(plan, inputs), size)[0]


def forward(plan: Plan, wanted: Wanted, inputs: Inputs) -> tuple[Numbers, Any]:
    """The numbers of every token, and what `backward` needs."""
    inputs = gather_kernels(plan, inputs)
    numbers, whole_rows = numbers_and_rows(plan, inputs, chunk_size(plan, inputs))
    return numbers, (wanted, inputs, whole_rows)


def numbers_and_rows(plan: Plan, inputs: Inputs, size: int) -> tuple[Numbers, Any]:
    """The numbers of every token, and what their gradients need of its whole row."""
    inputs = as_laid_out(plan, inputs)

    def sums(start: Array | int, size: int, reference: Any, _: None) -> tuple[Sums, None]:
        return sums_of_slab(plan, inputs, start, size, reference), None

    size = min(size, plan.columns)
    found, _ = pass_over_slabs(plan, sums, size, first_reference(plan, inputs, size), None)
    return read(plan, inputs, found)


def pass_over_slabs(
    plan: Plan, sums: Callable[..., tuple[Sums, Any]], size: int, reference: Any, kept: Any
) -> tuple[Sums, Any]:
    """The sums over all classes, from `sums(start, size, reference, kept)` of slabs of them, and what those keep."""

    def step(carry: tuple[Sums, Any], start: Array | int, width: int) -> tuple[Any, None]:
        before, kept = carry
        of_slab, kept = sums(start + size, width, before.maximum, kept)
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), before, of_slab)
        return (plan.quantity.merge(stacked), kept), None

    # The first slab starts the sums, so that merging has no empty sums to know of.
    carry = sums(0, size, reference, kept)
    if plan.columns > size:
        carry, _ = scan_chunks(step, carry, plan.columns - size, size)
    found, kept = carry
    return plan.merge_devices(found), kept


def backward(plan: Plan, residuals: Any, cotangents: Any, factor: Array | float = 1.0) -> Inputs:
    """The gradients for any cotangents of the numbers, times a factor.

    That is after the matmuls: one over the number of tokens would take the small logit gradients out of float16's range
    before them.
    """
    wanted, inputs, whole_rows = residuals
    clean = inputs if auto.zeroes_left_out_by_block(plan) else without_left_out(inputs)

    def step(gradients: Inputs, start: Array | int, size: int) -> tuple[Inputs, None]:
        slab = cut_slab(plan, clean, start, size)
        of_slab = partial(add_block, plan, wanted, slab, (whole_rows, cotangents), start, factor)
        share, gradients = in_blocks(plan, of_slab, gradients, inputs)
        return finish_slab(slab, gradients, share, start, factor), None

    start = start_gradients(plan, wanted, inputs)
    gradients, _ = scan_chunks(step, start, plan.columns, chunk_size(plan, inputs))
    return finish_sums(inputs, gradients, factor)


def start_gradients(plan: Plan, wanted: Wanted, inputs: Inputs) -> Inputs:
    """What the slabs write to where a gradient has classes, and add to where it has none."""
    own = inputs.with_heads(lambda head: dataclasses.replace(head, kernel=head.own_features(head.kernel)))
    of_classes, of_others = split_by(CLASSES, own, wanted.of(own))
    written = by_axes(
        lambda axes, array, flag: None if flag is None else to_be_written(plan, axes, array), own, of_classes
    )
    return join(written, zero_sums(inputs, of_others))


def to_be_written(plan: Plan, axes: list[str], array: Array) -> Array:
    """An array for the gradient of one with classes: every slab writes its part of it; 0 for columns of padding."""
    position = axes.index(CLASSES)
    padding = lax.slice_in_dim(array, plan.columns, None, axis=position)
    if not padding.size:
        return empty(array)
    place = [plan.columns if axis == position else 0 for axis in range(array.ndim)]
    return lax.dynamic_update_slice(empty(array), jnp.zeros_like(padding), place)


def in_blocks(
    plan: Plan, of_block: Callable[..., tuple[Inputs, Inputs]], gradients: Inputs, inputs: Inputs
) -> tuple[Inputs, Inputs]:
    """`add_block` of all tokens, a block of them at a time.

    So that a TPU has the gradient of a block's logits on the chip for both matmuls.
    """

    def step(carry: tuple[Inputs, Inputs], first: Array | int, tokens: int) -> tuple[Any, None]:
        share, gradients = carry
        more, gradients = of_block(gradients, first, tokens)
        return (add(share, more), gradients), None

    block = auto.tokens_beside_a_slab(plan, inputs)
    if block >= inputs.tokens:
        return of_block(gradients, 0, inputs.tokens)
    like, _ = jax.eval_shape(lambda gradients: of_block(gradients, 0, block), gradients)
    nothing = jax.tree.map(lambda share: jnp.zeros(share.shape, share.dtype), like)
    nothing, _ = vary_alike((nothing, inputs.heads[0].hidden))
    return scan_chunks(step, (nothing, gradients), inputs.tokens, block)[0]


def add_block(
    plan: Plan,
    wanted: Wanted,
    slab: Inputs,
    of_tokens: tuple[Any, Any],
    start: Array | int,
    factor: Array | float,
    gradients: Inputs,
    first: Array | int,
    tokens: int,
    logits: tuple[Array, ...] | None = None,
) -> tuple[Inputs, Inputs]:
    """What a block of tokens adds to gradients of a slab of classes from `start`, and the gradients of its own arrays.

    Its logits are made here if they weren't kept.
    """
    block = cut(slab, TOKENS, first, tokens)
    if auto.zeroes_left_out_by_block(plan):
        # There they are a part of the matmul; elsewhere they would be a copy for each slab.
        block = without_left_out(block)
    logits = block.logits() if logits is None else logits
    whole_rows, cotangents = take_tokens(of_tokens, first, tokens)
    found = chunk_gradients(plan, wanted, block, logits, whole_rows, cotangents, start)
    with_tokens, share = split_by(TOKENS, block, found)
    final, sums = split_by(CLASSES, block, with_tokens)
    before = by_axes(
        lambda axes, _, whole, part: None if part is None else take_from(whole, axes.index(TOKENS), first, tokens),
        slab,
        gradients,
        sums,
    )
    part = join(jax.tree.map(lambda gradient: factor * gradient, final), add(before, sums))
    return share, join(put(slab, gradients, part, tokens=first, classes=start), gradients)


def finish_slab(slab: Inputs, gradients: Inputs, share: Inputs, start: Array | int, factor: Array | float) -> Inputs:
    """The slab's share of a gradient with an axis of classes is final: it is written where it belongs."""
    final, sums = split_by(CLASSES, slab, share)
    final = rounded(jax.tree.map(lambda gradient: factor * gradient, final), slab)
    written = put(slab, gradients, scatter_kernels(final), classes=start)
    before = by_axes(lambda axes, _, whole, part: None if part is None else whole, slab, gradients, sums)
    return join(join(written, add(before, sums)), gradients)


def finish_sums(inputs: Inputs, gradients: Inputs, factor: Array | float) -> Inputs:
    """The gradients without an axis of classes, which are sums over the slabs, times the factor."""
    final, sums = split_by(CLASSES, inputs, gradients)
    return join(final, jax.tree.map(lambda gradient: factor * gradient, sums))
