"""A kernel for GPUs that reads a row of logits once, where XLA reads it twice: for its maximum, and relative to that.

Off by default: see `ONE_READ_ON_GPU` in `_softmax_stats.py`. After Milakov and Gimelshein, *Online normalizer
calculation for softmax*, 2018, arXiv:1805.02867.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Entries that a thread takes at a time: two or four loads of 16 bytes, and one more exponential for all of them.
WIDTH = 16
WARP = 32


def max_and_exp(logits: Array, *, interpret: bool = False) -> tuple[Array, Array]:
    """`m = max x` and `Σ exp(x - m)` of the (C,) logits in float32; the sum is 0 where every logit is -inf."""
    (classes,) = logits.shape
    lanes = min(256, max(WARP, pl.next_power_of_2(pl.cdiv(classes, WIDTH))))
    number = jax.ShapeDtypeStruct((), jnp.float32)
    maximum, exp = pl.pallas_call(
        partial(_kernel, classes=classes, lanes=lanes),
        out_shape=(number, number),
        compiler_params=triton.CompilerParams(num_warps=lanes // WARP),
        interpret=interpret,
        name="max_and_exp",
    )(logits)
    return maximum, exp


def _kernel(logits_ref: Any, maximum_ref: Any, exp_ref: Any, *, classes: int, lanes: int) -> None:
    """Every lane keeps a maximum and a sum relative to it, which shrinks as the maximum rises."""
    block = lanes * WIDTH
    shape = (lanes, WIDTH)
    offsets = lax.broadcasted_iota(jnp.int32, shape, 0) * WIDTH + lax.broadcasted_iota(jnp.int32, shape, 1)

    def add(sums: tuple[Array, Array], x: Array) -> tuple[Array, Array]:
        maximum, exp = sums
        x = x.astype(jnp.float32)
        risen = jnp.maximum(maximum, x.max(1))
        reference = _finite(risen)
        exp = exp * _exp(maximum - reference) + _exp(x - reference[:, None]).sum(1)
        return risen, exp

    def step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        return add(sums, triton.load(logits_ref.at[i * block + offsets]))

    sums = jnp.full((lanes,), -jnp.inf, jnp.float32), jnp.zeros((lanes,), jnp.float32)
    whole = classes // block
    sums = lax.fori_loop(0, whole, step, sums)
    if classes % block:
        rest = whole * block + offsets
        sums = add(sums, triton.load(logits_ref.at[rest], mask=rest < classes, other=-jnp.inf))
    maximum = sums[0].max()
    maximum_ref[...] = maximum
    exp_ref[...] = (sums[1] * _exp(sums[0] - _finite(maximum))).sum()


def _exp(x: Array) -> Array:
    """For x of at most 0: a power of two is an instruction of the card, and `jnp.exp` half as many again."""
    return jnp.exp2(x * math.log2(math.e))


def _finite(maximum: Array) -> Array:
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)
