"""Where the kernel's gradient will be, the loop over classes keeps logits until then. For a CPU.

The array that a slab's gradient will be written to has room for that slab's logits of D tokens. The forward pass leaves
them there, and the backward pass makes only those of the other N - D tokens again: 3 matmuls for up to D tokens,
4 - D/N for more, and no memory of its own.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxce._loops.shared import Config, Inputs, Wanted, matmul_dtype
from jaxce._softmax import compute_dtype


class Room(NamedTuple):
    """How logits lie in the gradient of the kernel."""

    config: Config
    tokens: int  # how many have room, the first ones; N where there are fewer than D

    def _place(self, start: Array | int, size: int) -> tuple[list[Array], tuple[int, int]]:
        classes_first = self.config.transpose_kernel
        place = [start, 0] if classes_first else [0, start]
        shape = (size, self.tokens) if classes_first else (self.tokens, size)
        return [jnp.asarray(index, jnp.int32) for index in place], shape

    def keep(self, array: Array, logits: Array, start: Array | int) -> Array:
        """`array` with the logits of the slab of classes from `start`."""
        place, shape = self._place(start, logits.shape[1])
        return lax.dynamic_update_slice(array, logits[: self.tokens].reshape(shape), place)

    def logits(self, array: Array, start: Array | int, size: int) -> Array:
        """The (tokens, size) logits that were kept."""
        return lax.dynamic_slice(array, *self._place(start, size)).reshape(self.tokens, size)


def room_of(config: Config, inputs: Inputs) -> Room:
    return Room(config, min(inputs.hidden.shape))


def empty_room(config: Config, wanted: Wanted, inputs: Inputs) -> Array | None:
    """The gradient of the kernel, if there is to be one and logits fit: if it is of their own dtype."""
    dtype = compute_dtype(matmul_dtype(inputs.hidden, inputs.kernel))
    # The gradients of class probabilities are as large as the logits: not to be put together from two parts.
    if not (config.keeps_logits and wanted.kernel) or wanted.targets or inputs.kernel.dtype != dtype:
        return None
    return jnp.zeros_like(inputs.kernel)
