"""Sums of soft-capped rows on a GPU: XLA stores the capped logits if more than one sum uses them, so only one does."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._math.example import Shares, Sums, Target, beside, cap_logits, finite, is_index, target_share, terms


def fits(
    logits: Array, target: Target | None, weight: Array | None, softcap: Array | None, reference: Array | None = None
) -> bool:
    return reference is None and softcap is not None and target is not None and is_index(target)


def sums(
    _: Callable[..., Sums],
    logits: Array,
    target: Target,
    weight: Array | None,
    softcap: Array,
    _reference: Array | None = None,
    *,
    smooth: bool,
    first_class: Array | int,
) -> Sums:
    """`partial_sums`; maximum and label are found before the cap, which keeps the order."""
    maximum = lax.stop_gradient(cap_logits(logits.max(0), softcap))
    m, x = finite(maximum), cap_logits(logits, softcap)
    rows = terms(x, beside(m), None, weight, smooth=smooth, first_class=first_class)
    total = jax.tree.map(lambda row: row.sum(0), rows)
    label = target_share(target, None, logits, first_class) > 0
    inside = (target >= first_class) & (target < first_class + logits.shape[0])
    logit = jnp.where(label, logits, 0).sum(0)
    gap = jnp.where(inside, m - cap_logits(logit, softcap), 0)
    return Sums(maximum, m, total._replace(target=Shares(gap, inside.astype(m.dtype))))
