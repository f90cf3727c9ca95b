"""Sums on a GPU relative to a number that is known before: the largest logit is found in the same pass as they."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax

from jaxce._math.example import Sums, Target, beside, cap_logits, terms


def fits(logits: Array, target: Any, weight: Any, softcap: Any, reference: Array | None = None) -> bool:
    return reference is not None


def sums(
    _: Callable[..., Sums],
    logits: Array,
    target: Target | None,
    weight: Array | None,
    softcap: Array | None,
    reference: Array,
    *,
    smooth: bool,
    first_class: Array | int,
) -> Sums:
    """`partial_sums`; the largest of `x - m`, as the sums are of it: XLA looks for that of `x` in a pass of its own."""
    x, m = cap_logits(logits, softcap), beside(reference)
    rows = terms(x, m, target, weight, smooth=smooth, first_class=first_class)
    maximum = lax.stop_gradient(reference + (x - m).max(0))
    return Sums(maximum, reference, jax.tree.map(lambda row: row.sum(0), rows))
