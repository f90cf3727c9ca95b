"""Long rows on a CPU: summed in equal slabs, and the slabs' sums merged."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._math.example import Sums, Target, is_index, merge

# XLA:CPU takes several times as long for the maximum and the sums of a longer row as for those of its slabs.
LONGEST = 32_768
SHORTEST_SLAB = 256


def fits(logits: Array, *_: Any) -> bool:
    return logits.ndim == 1 and slabs(logits.shape[0]) > 1


def sums(
    rest: Callable[..., Sums],
    logits: Array,
    target: Target | None,
    weight: Array | None,
    softcap: Array | None,
    _reference: Array | None = None,
    *,
    smooth: bool,
    first_class: Array | int,
) -> Sums:
    """`partial_sums` of slabs that are views of the row, merged."""
    classes = logits.shape[0]
    count = slabs(classes)
    whole_target = target is None or is_index(target)
    rows = (logits, None if whole_target else target, weight)
    first_classes = first_class + jnp.arange(count, dtype=jnp.int32) * (classes // count)

    def sums_of(first_class: Array, slab: tuple[Array, Array | None, Array | None]) -> Sums:
        logits, slab_target, weight = slab
        slab_target = target if whole_target else slab_target
        return rest(logits, slab_target, weight, softcap, smooth=smooth, first_class=first_class)

    parts = jax.vmap(sums_of)(first_classes, jax.tree.map(lambda row: row.reshape(count, -1), rows))
    # Else XLA:CPU adds up all slabs' terms at once, which is as slow. Each behind a barrier of its own: what nobody
    # reads isn't computed.
    return merge(jax.tree.map(lax.optimization_barrier, parts))


def slabs(classes: int) -> int:
    """How many equal slabs a row is cut into; 1 if it is short or can't be cut evenly.

    A multiple of 16 wherever there is one, so that the slabs of a row sharded over a power of two stay where they are.
    """
    if classes <= LONGEST:
        return 1
    counts = [n for n in range(2, 1 + classes // SHORTEST_SLAB) if classes % n == 0 and classes // n <= LONGEST]
    return min(counts, key=lambda n: (n % 16 != 0, n), default=1)
