"""Sums over logits that are read once: relative to a number that is known before the logits are.

XLA then makes the maximum, the exponentials, their sum and the label's logit in one pass. With the maximum itself as
the reference there are two passes. Where a logit turns out to be far above the reference, the sums are made again.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxce._math.example import finite
from jaxce._math.quantity import Sums
from jaxce._mesh.devices import vary_alike
from jaxce._platform import by_platform

# Up to there the exponentials of any number of classes, and what the entropy sums, stay in the range of float32.
FAR = 64.0


def in_one_pass(platforms: Sequence[str], sums: Callable[..., Sums], reference: Any, *arrays: Any) -> Sums:
    """`sums(m, *arrays)`, with `reference` for m on these platforms, and None, for the maximum, on others."""
    functions = dict.fromkeys(platforms, partial(relative_to, sums))
    return by_platform(reference, *arrays, default=lambda _, *arrays: sums(None, *arrays), **functions)


def relative_to(sums: Callable[..., Sums], reference: Any, *arrays: Any) -> Sums:
    """The sums relative to `reference`; or to the maxima that they found, if one of these is far above it."""
    # `vmap` of a `cond` takes arrays of one kind only.
    reference, arrays = vary_alike((reference, arrays))
    found = sums(jax.tree.map(finite, reference), *arrays)
    # Infinitely far where `reference` is of impossible classes alone. NaN isn't far: it stays NaN either way.
    above = jax.tree.map(lambda maximum, m: (maximum - m > FAR).any(), found.maximum, reference)
    is_far = reduce(jnp.logical_or, jax.tree.leaves(above))
    m = jax.tree.map(lambda maximum, m: jnp.where(is_far, finite(maximum), finite(m)), found.maximum, reference)
    total = lax.cond(is_far, lambda: sums(m, *arrays).total, lambda: found.total)
    return found._replace(reference=m, total=total)
