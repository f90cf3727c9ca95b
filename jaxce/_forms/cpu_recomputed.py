"""Gradients on a CPU from logits behind a barrier: XLA stores nothing of their size for them in the forward pass."""

from collections.abc import Callable
from typing import Any

from jax import Array, lax

from jaxce._softmax import Gradients


def gradients(rest: Callable[..., Gradients], logits: Array, *inputs: Any, first_class: Array | int) -> Gradients:
    """`partial_gradients` of logits that are read again, if they have 16 bits or a cap.

    Else the gradient itself has room for the exponentials, which cost more there than memory does.
    """
    softcap = inputs[2]
    if logits.dtype.itemsize == 2 or softcap is not None:
        logits, inputs = lax.optimization_barrier((logits, inputs))
    return rest(logits, *inputs, first_class=first_class)
