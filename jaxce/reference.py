"""Textbook definitions of the losses, for comparison and for forward-mode differentiation.

Each function is its formula, in the dtype of its input, with no gradient of its own: give float64 arrays for a truth
to compare with, and use them with `jax.jvp` and `jax.jacfwd`, which the losses of `jaxce` itself can't take. They
store arrays of the logits' size, check nothing, and lack what needs care: an example left out must not hold NaN.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def log_softmax(logits: ArrayLike, axis: int = -1, *, where: ArrayLike | None = None) -> Array:
    """x - log Σ exp x."""
    x = jnp.asarray(logits)
    if where is not None:
        x = jnp.where(where, x, -jnp.inf)
    return x - jax.nn.logsumexp(x, axis, keepdims=True)


def nll_loss(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    reduction: str = "mean",
) -> Array:
    """-Σ_c w_c t_c log p_c, with a one-hot t for class indices."""
    log_p = jnp.moveaxis(jnp.asarray(log_probs), axis, -1)
    target, class_weight, counted = _targets(log_p, axis, labels, weight, ignore_index, where)
    losses = -_dot(target * _weight(log_p, weight), log_p)
    return _reduce(losses, class_weight, counted, sample_weight, reduction)


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: str = "mean",
) -> Array:
    """-Σ_c w_c q_c log p_c + z·log_z², with q = (1-ε)·t + ε/C; a scalar temperature, or one an example."""
    x = jnp.moveaxis(jnp.asarray(logits), axis, -1)
    if logit_softcap is not None:
        x = jnp.where(x == -jnp.inf, x, logit_softcap * jnp.tanh(x / logit_softcap))
    x = x / jnp.asarray(temperature, x.dtype)[..., None]
    log_p = log_softmax(x)
    log_z = jax.nn.logsumexp(x, -1)
    target, class_weight, counted = _targets(x, axis, labels, weight, ignore_index, where)
    # An impossible class takes no part in label smoothing.
    uniform = jnp.where(x == -jnp.inf, 0, label_smoothing / x.shape[-1])
    q = (1 - label_smoothing) * target + uniform
    losses = -_dot(q * _weight(x, weight), log_p) + z_loss * class_weight * log_z**2
    return _reduce(losses, class_weight, counted, sample_weight, reduction)


def _targets(
    x: Array,
    axis: int,
    labels: ArrayLike,
    weight: ArrayLike | None,
    ignore_index: int,
    where: ArrayLike | None,
) -> tuple[Array, Array, Array]:
    """Class probabilities (classes last); and per example the weight of its class, and whether it counts."""
    labels = jnp.asarray(labels)
    counted = jnp.ones(x.shape[:-1], bool)
    if where is not None:
        counted &= jnp.asarray(where)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.moveaxis(labels, axis, -1).astype(x.dtype), jnp.ones(x.shape[:-1], x.dtype), counted
    one_hot = jax.nn.one_hot(labels, x.shape[-1], dtype=x.dtype)
    counted &= labels != ignore_index
    return one_hot, jnp.where(counted, (one_hot * _weight(x, weight)).sum(-1), 1), counted


def _weight(x: Array, weight: ArrayLike | None) -> Array:
    return jnp.ones(x.shape[-1], x.dtype) if weight is None else jnp.asarray(weight).astype(x.dtype)


def _dot(q: ArrayLike, log_p: Array) -> Array:
    q = jnp.asarray(q)
    return (q * jnp.where((q == 0) & (log_p == -jnp.inf), 0, log_p)).sum(-1)


def _reduce(
    losses: Array, class_weight: Array, counted: Array, sample_weight: ArrayLike | None, reduction: str
) -> Array:
    sample = jnp.ones_like(losses) if sample_weight is None else jnp.asarray(sample_weight).astype(losses.dtype)
    losses = jnp.where(counted, sample * losses, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = jnp.where(counted, sample * class_weight, 0).sum()
    return jnp.where(total == 0, 0, losses.sum() / jnp.where(total == 0, 1, total))
