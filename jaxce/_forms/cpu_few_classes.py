"""Rows of a few classes on a CPU: one reduction makes all the sums."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._math.example import Sums, Target, Terms, beside, cap_logits, finite, terms

# Above it, XLA:CPU doesn't unroll the reduction.
MOST_CLASSES = 16


def fits(logits: Array, *_: Any) -> bool:
    return logits.shape[0] <= MOST_CLASSES


def sums(
    _: Callable[..., Sums],
    logits: Array,
    target: Target | None,
    weight: Array | None,
    softcap: Array | None,
    _reference: Array | None = None,
    *,
    smooth: bool,
    first_class: Array | int,
) -> Sums:
    """`partial_sums`, one reduction for all sums but the maximum."""
    x, maximum = cap_logits(logits, softcap), lax.stop_gradient(cap_logits(logits.max(0), softcap))
    m = finite(maximum)
    rows = terms(x, beside(m), target, weight, smooth=smooth, first_class=first_class)
    return Sums(maximum, m, add_up(rows))


@jax.custom_jvp
def add_up(rows: Terms) -> Terms:
    """The sums over axis 0, by one reduction; their derivative is that of sums, which `lax.reduce` can't know."""
    leaves, tree = jax.tree.flatten(rows)
    zeros = [jnp.zeros((), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(tree, lax.reduce(leaves, zeros, partial(jax.tree.map, jnp.add), (0,)))


@add_up.defjvp
def _add_up_jvp(primals: tuple[Terms], tangents: tuple[Terms]) -> tuple[Terms, Terms]:
    return add_up(*primals), jax.tree.map(lambda row: row.sum(0), *tangents)
