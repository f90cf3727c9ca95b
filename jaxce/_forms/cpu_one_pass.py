"""Sums on a CPU that store nothing: XLA:CPU adds up in one pass what arithmetic alone makes of the logits.

XLA:CPU fuses a sum into one pass only if what it adds up is plain arithmetic that no other sum uses, not even a
scalar. So masks are minima and maxima, each sum reads inputs of its own behind a barrier, and constants come from a
`one` behind it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxce._math.example import Shares, Sums, Target, Terms, beside, cap_logits, class_weight, finite, is_index


class Inputs(NamedTuple):
    """What a sum is made of; all its own."""

    logits: Array
    largest: Array  # m, of the example
    target: Array | None
    weight: Array | None
    softcap: Array | None
    one: Array  # a constant to JAX

    @property
    def m(self) -> Array:
        return beside(self.largest)

    @property
    def lowest(self) -> Array:
        return self.one * (float(jnp.finfo(self.largest.dtype).min) / 2)

    def x(self) -> Array:
        """The capped logits, -inf for an impossible class."""
        x = self.logits.astype(self.largest.dtype)
        if self.softcap is None:
            return x
        cap = self.softcap.astype(x.dtype)
        lost = jnp.minimum(lax.stop_gradient(x) * (self.one / 4) - self.lowest, 0 * self.one)
        return cap * jnp.tanh(jnp.maximum(x, self.lowest) / cap) + lost

    def exp(self) -> Array:
        return jnp.exp(self.x() - self.m)

    def exp_x(self) -> Array:
        # The exponential of -1000 is 0.
        return self.exp() * jnp.maximum(self.x() - self.m, -1000 * self.one)

    def gap(self) -> Array:
        """m - x; of an impossible class a huge number."""
        return self.m - jnp.maximum(self.x(), self.lowest)

    def target_share(self) -> Array:
        assert self.target is not None
        return self.target.astype(self.largest.dtype) * class_weight(self.weight, self.m)

    def smooth_share(self) -> Array:
        """The weight of the class; 0 if it is impossible."""
        x = lax.stop_gradient(self.x())
        possible = jnp.minimum(jnp.maximum(x * (self.one / 4), self.lowest) - self.lowest, self.one)
        return possible * class_weight(self.weight, x)


def fits(*_: Any) -> bool:
    return True


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
    """`partial_sums`; the label's logit is read by its address."""
    maximum = lax.stop_gradient(cap_logits(logits.max(0), softcap))
    m = finite(maximum)
    probabilities = None if target is None or is_index(target) else target

    inputs = Inputs(logits, m, probabilities, weight, softcap, jnp.ones((), m.dtype))

    def total(term: Callable[[Inputs], Array]) -> Array:
        nonlocal inputs
        # Behind the barrier of the sum before: XLA makes one of two barriers of the same arrays.
        inputs = lax.optimization_barrier(inputs)
        return term(inputs._replace(one=lax.stop_gradient(inputs.one))).sum(0)

    def shares(share: Callable[[Inputs], Array]) -> Shares:
        gap = total(lambda own: share(own) * own.gap())
        return Shares(jnp.where(gap > 1e30, jnp.inf, gap), total(share))

    if target is None:
        of_target = None
    elif is_index(target):
        of_target = shares_of_label(logits, target - first_class, softcap, m)
    else:
        of_target = shares(Inputs.target_share)
    # Without a cap not its own: a gradient may use the exponentials again.
    exp = total(Inputs.exp) if softcap is not None else jnp.exp(cap_logits(logits, None) - beside(m)).sum(0)
    return Sums(maximum, m, Terms(exp, total(Inputs.exp_x), of_target, shares(Inputs.smooth_share) if smooth else None))


def shares_of_label(logits: Array, index: Array, softcap: Array | None, m: Array) -> Shares:
    """The label's share, of a single class or of none of these."""
    inside = (index >= 0) & (index < logits.shape[0])
    clipped = jnp.clip(index, 0, logits.shape[0] - 1)
    if logits.ndim == 1:
        logit = lax.dynamic_index_in_dim(logits, clipped, keepdims=False)
    else:
        logit = jnp.take_along_axis(logits, clipped[None], 0)[0]
    return Shares(jnp.where(inside, m - cap_logits(logit, softcap), 0), inside.astype(m.dtype))
