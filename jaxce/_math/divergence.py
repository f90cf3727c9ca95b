"""The divergence of two distributions over the classes of an example, as a quantity of the loops.

With logits x of one distribution p and u of another q, their maxima m_x and m_u, and a = x - m_x, b = u - m_u:

    KL(p, q) = Σ_c p_c (log p_c - log q_c) = Σ_c p_c (a_c - b_c) - log Σ_c exp a_c + log Σ_c exp b_c

so that a loop needs two maxima and three sums of each token, which merge as those of labels do.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._math.composition import ExampleWeights, times
from jaxce._math.example import STACKED, Merging, beside, final_logits, final_logits_and_pull, finite, keep
from jaxce._math.quantity import Example


class OfPair(NamedTuple):
    """A number of each distribution."""

    x: Array
    u: Array


class Terms(NamedTuple):
    """What is summed over the classes."""

    exp_x: Array  # exp a
    exp_u: Array  # exp b
    gap: Array  # exp(a)·(a - b)


class Sums(NamedTuple):
    """The largest logits of some of the classes, and the sums over them."""

    maximum: OfPair
    reference: OfPair
    total: Terms


class WholeRow(NamedTuple):
    """What the gradient needs of the whole row, besides the logits themselves."""

    reference: OfPair
    exp: OfPair
    divergence: Array


@dataclasses.dataclass(frozen=True)
class OfTwo:
    """KL(teacher, student), or with `reverse` KL(student, teacher); the student is the first distribution."""

    reverse: bool

    def pair(self, student: Any, teacher: Any) -> OfPair:
        """What belongs to p, then what belongs to q; of those two it makes student and teacher again."""
        return OfPair(student, teacher) if self.reverse else OfPair(teacher, student)

    def takes_reference(self, example: Example) -> bool:
        """Both may have one."""
        return True

    def sums(self, example: Example, reference: Any = None, *, first_class: Array | int = 0) -> Sums:
        """Over some of the classes."""
        x, u = self.pair(*map(final_logits, *by_head(example)))
        maximum = OfPair(*(lax.stop_gradient(logits.max(0)) for logits in (x, u)))
        m = OfPair(*map(finite, maximum)) if reference is None else reference
        a, b = x - beside(m.x), u - beside(m.u)
        exp_a = jnp.exp(a)
        terms = Terms(exp_a, jnp.exp(b), jnp.where(exp_a == 0, 0, exp_a * (a - b)))
        return Sums(maximum, m, jax.tree.map(lambda row: row.sum(0), terms))

    def merge(self, parts: Any, over: Merging = STACKED) -> Sums:
        """Relative to the largest logits of all."""
        maximum = OfPair(*map(over.largest, parts.maximum))
        m = OfPair(*map(finite, maximum))
        rise = OfPair(*(new - old for new, old in zip(m, parts.reference, strict=True)))
        factor = OfPair(
            *(jnp.where(of == -jnp.inf, 0, jnp.exp(-up)) for of, up in zip(parts.maximum, rise, strict=True))
        )
        exp_x, exp_u, gap = parts.total
        moved = jnp.where(factor.x == 0, 0, factor.x * (gap - (rise.x - rise.u) * exp_x))
        return Sums(maximum, m, Terms(over.total(factor.x * exp_x), over.total(factor.u * exp_u), over.total(moved)))

    def read(self, sums: Sums, example: Example) -> tuple[Array, WholeRow]:
        """The divergence; NaN where one of the distributions has no class that can happen."""
        exp_x, exp_u, gap = sums.total
        log_u = jnp.where(sums.maximum.u == -jnp.inf, jnp.nan, jnp.log(exp_u))
        divergence = gap / exp_x - jnp.log(exp_x) + log_u
        return keep(example.counts_in, divergence), WholeRow(sums.reference, OfPair(exp_x, exp_u), divergence)

    def gradients(
        self, example: Example, whole_row: WholeRow, cotangents: Array, *, first_class: Array | int = 0
    ) -> Example:
        """With respect to the logits of both.

        d KL / dx = p·(log p - log q - KL),    d KL / du = q - p
        """
        of_heads = zip(*by_head(example), strict=True)
        final = [final_logits_and_pull(x, cap, inverse, example.counts_in) for x, cap, inverse in of_heads]
        m, exp, divergence = beside(whole_row)
        x, u = self.pair(*(logits for logits, _ in final))
        a, b = x - m.x, u - m.u
        p, q = jnp.exp(a) / exp.x, jnp.exp(b) / exp.u
        log_ratio = (a - jnp.log(exp.x)) - (b - jnp.log(exp.u))
        g = beside(cotangents)
        dx, du = g * jnp.where(p == 0, 0, p * (log_ratio - divergence)), g * (q - p)
        counts_in = None if example.counts_in is None else beside(example.counts_in)
        of_logits = zip(final, self.pair(dx, du), strict=True)
        return Example(*zip(*(pull(keep(counts_in, dx)) for (_, pull), dx in of_logits), strict=True))

    def losses(self, numbers: Array, weights: ExampleWeights, options: Any) -> Array:
        """The divergences, weighted; the temperature squared is a part of the weight."""
        return times(weights.total, numbers)


def by_head(example: Example) -> tuple[tuple[Any, ...], ...]:
    """What makes the final logits of each distribution."""
    return example.logits, example.softcap, example.inverse_temperature
