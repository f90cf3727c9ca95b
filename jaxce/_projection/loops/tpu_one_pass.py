"""The sums over a slab of classes as a part of its matmul: on a TPU the loop over classes stores no logits for them.

Elsewhere they are made in two passes: a GPU would have to ask its host whether to make the sums of each slab again.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxce._math.quantity import Sums
from jaxce._projection.chunks import Plan, cut_slab, example_of, sums_of, sums_of_classes_first
from jaxce._projection.inputs import Head, Inputs
from jaxce._projection.loops.one_pass import in_one_pass

PLATFORMS = ("tpu",)


def sums_of_slab(plan: Plan, inputs: Inputs, start: Array | int, size: int, reference: Any) -> Sums:
    """The sums over so many classes from `start`; relative to `reference`, if they may be."""
    start = jnp.asarray(start, jnp.int32)
    if plan.gathers_slabs:
        # Before the question whether to make them again, which other devices may answer otherwise.
        there, sums = cut_slab(plan, inputs, start, size), partial(of_slab, plan)
    else:
        there, sums = inputs, partial(of_classes, plan, size)
    if plan.quantity.takes_reference(example_of(inputs, ())):
        return in_one_pass(PLATFORMS, sums, reference, there, start)
    return sums(None, there, start)


def of_classes(plan: Plan, size: int, reference: Any, inputs: Inputs, start: Array) -> Sums:
    """The sums over so many classes from `start`."""
    # Cut where it is multiplied, or a TPU would make a copy of it in case it is needed again.
    return of_slab(plan, reference, cut_slab(plan, inputs, start, size), start)


def of_slab(plan: Plan, reference: Any, slab: Inputs, start: Array) -> Sums:
    """The sums over a slab of classes; with a reference, of logits with the classes first, which it adds up at once."""
    if reference is None:
        return sums_of(plan, slab, slab.logits(), start)
    return sums_of_classes_first(plan, slab, start, reference)


def as_laid_out(plan: Plan, inputs: Inputs) -> Inputs:
    """The kernels with that axis last which a TPU puts last: a `cond` would make a copy of it to have it otherwise."""

    def lay_out(head: Head) -> Head:
        rows, columns = head.kernel.shape
        gathered = head.feature_axes and not plan.gathers_slabs
        return head if columns % 128 == 0 or rows % 128 != 0 or gathered else head.transposed()

    return inputs.with_heads(lay_out) if plan.platform == "tpu" else inputs
