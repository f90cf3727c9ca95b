"""The logits of chosen classes of an example, and the log of the sum of all others' exponentials."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxce._math.example import STACKED, Merging, beside, final_logits, final_logits_and_pull, finite, keep
from jaxce._math.quantity import Example


class Chosen(NamedTuple):
    """Numbers of an example, relative to its largest logit. A class that is no class has 0."""

    logits: Array  # (k,)
    log_rest: Array


class Terms(NamedTuple):
    """What is summed over the classes."""

    exp: Array  # of the others
    logits: Array  # (k,) of those that are among these classes, 0 for the others


class Sums(NamedTuple):
    """The largest logit of the other classes, and the sums."""

    maximum: Array
    reference: Array
    total: Terms


@dataclasses.dataclass(frozen=True)
class OfChosen:
    """`Chosen` of an example; its logits are of one distribution."""

    def takes_reference(self, example: Example) -> bool:
        """No: the others may all be far below the chosen ones."""
        return False

    def sums(self, example: Example, reference: Any = None, *, first_class: Array | int = 0) -> Sums:
        """Over some of the classes."""
        (logits,), (softcap,), (inverse_temperature,) = example.logits, example.softcap, example.inverse_temperature
        x = final_logits(logits, softcap, inverse_temperature)
        place = places(example, x, first_class)
        rest = without(x, place, -jnp.inf)
        maximum = lax.stop_gradient(rest.max(0))
        m = finite(maximum)
        last = x.shape[0] - 1
        own = jnp.where(place > last, 0, x[jnp.minimum(place, last)])
        return Sums(maximum, m, Terms(jnp.exp(rest - m).sum(0), own))

    def merge(self, parts: Any, over: Merging = STACKED) -> Sums:
        """Relative to the largest logit of all the others."""
        maximum = over.largest(parts.maximum)
        m = finite(maximum)
        factor = jnp.where(parts.maximum == -jnp.inf, 0, jnp.exp(parts.reference - m))
        return Sums(maximum, m, Terms(over.total(factor * parts.total.exp), over.total(parts.total.logits)))

    def read(self, sums: Sums, example: Example) -> tuple[Chosen, Sums]:
        """Both relative to the largest logit, so that no digits are lost where all logits are large."""
        own = sums.total.logits
        largest = finite(lax.stop_gradient(jnp.maximum(own.max(-1), sums.maximum)))
        found = Chosen(own - largest[..., None], sums.reference - largest + jnp.log(sums.total.exp))
        return keep_chosen(example.counts_in, found), sums

    def gradients(
        self, example: Example, whole_row: Sums, cotangents: Chosen, *, first_class: Array | int = 0
    ) -> Example:
        """Of the chosen their own; of the others their shares in the sum."""
        (logits,), (softcap,), (inverse_temperature,) = example.logits, example.softcap, example.inverse_temperature
        x, pull = final_logits_and_pull(logits, softcap, inverse_temperature, example.counts_in)
        m, exp = beside((whole_row.reference, whole_row.total.exp))
        place = places(example, x, first_class)
        dx = jnp.zeros_like(x)
        if cotangents.log_rest is not None:
            dx += jnp.where(exp == 0, 0, beside(cotangents.log_rest) * jnp.exp(x - m) / jnp.where(exp == 0, 1, exp))
        dx = without(dx, place, 0 if cotangents.logits is None else cotangents.logits)
        counts_in = None if example.counts_in is None else beside(example.counts_in)
        return Example(*((gradient,) for gradient in pull(keep(counts_in, dx))))

    def losses(self, numbers: Chosen, weights: Any, options: Any) -> Array:
        """There are none: what is made of these numbers is plain JAX."""
        raise NotImplementedError


def places(example: Example, x: Array, first_class: Array | int) -> Array:
    """The rows of `x` in which the chosen classes stand; one beyond the last for classes elsewhere."""
    place = example.chosen - first_class
    return jnp.where((place >= 0) & (place < x.shape[0]), place, x.shape[0])


def without(x: Array, place: Array, value: Array | float) -> Array:
    """`x` with that value in these places."""
    return x.at[place].set(value, mode="drop")


def keep_chosen(counts_in: Array | None, found: Chosen) -> Chosen:
    if counts_in is None:
        return found
    return Chosen(keep(counts_in[..., None], found.logits), keep(counts_in, found.log_rest))
