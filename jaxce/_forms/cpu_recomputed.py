"""Gradients on a CPU from logits behind a barrier: XLA stores nothing of their size for them in the forward pass."""

from collections.abc import Callable
from typing import Any

from jax import Array, lax

from jaxce._math.example import Gradients


def fits(logits: Array, target: Array, weight: Array | None, softcap: Array | None, *_: Any) -> bool:
    # Of 32 bits and without a cap, the gradient itself has room for the exponentials, which cost more than memory.
    return logits.dtype.itemsize == 2 or softcap is not None


def gradients(rest: Callable[..., Gradients], *inputs: Any, first_class: Array | int) -> Gradients:
    """`partial_gradients` of logits that are read again."""
    return rest(*lax.optimization_barrier(inputs), first_class=first_class)
