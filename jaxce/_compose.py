"""From the numbers of each example to a loss: weights, smoothing, z-loss and reductions, in plain JAX.

Every loss of the package is composed here, on arrays of the batch's shape or of a chunk of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxce._mesh import Axes, size_along, total
from jaxce._softmax import Stats, Target, is_index


class Options(NamedTuple):
    """The options that compose a loss from its numbers; None where an option is off."""

    label_smoothing: Array | None = None
    z_loss: Array | None = None


class ExampleWeights(NamedTuple):
    """Per example, 0 where it is left out; None where all that are left in weigh 1."""

    sample: Array | None  # sample_weight
    total: Array | None  # what the mean divides by: sample_weight, times the weight of the label's class


def example_weights(
    targets: Target, live: Array | None, sample_weight: Array | None, weight: Array | None, dtype: jnp.dtype
) -> ExampleWeights:
    """The weights of the examples, in the dtype of the loss."""
    sample = None if sample_weight is None else sample_weight.astype(dtype)
    if sample is not None and live is not None:
        sample = jnp.where(live, sample, 0)
    if weight is None or not is_index(targets):
        return ExampleWeights(sample, sample)
    # A bad label is a negative index here. It counts as one example, whose loss is NaN.
    counted = targets >= 0 if live is None else live & (targets >= 0)
    # On a mesh the gathered weights lie as the labels do.
    where = jax.typeof(targets).sharding
    of_label = weight.astype(dtype).at[jnp.maximum(targets, 0)].get(out_sharding=None if where.mesh.empty else where)
    of_class = jnp.where(counted, of_label, 1)
    if live is not None:
        of_class = jnp.where(live, of_class, 0)
    return ExampleWeights(sample, times(sample, of_class))


def times(weight: Array | None, value: Array) -> Array:
    return value if weight is None else weight * value


def weight_sum(
    weights: ExampleWeights, live: Array | None, losses: Array | jax.ShapeDtypeStruct, axes: Axes = ()
) -> Array:
    """What the mean of `losses` divides by; of the examples of all devices along the axes."""
    if weights.total is not None:
        return total(weights.total.sum(), axes)
    if live is not None:
        return total(live.sum(), axes).astype(losses.dtype)
    return jnp.asarray(losses.size * size_along(axes), losses.dtype)


def example_losses(stats: Stats, weights: ExampleWeights, num_classes: int, options: Options) -> Array:
    """The loss of each example, weighted: (1-ε)·w_y·nll + (ε/C)·smooth_nll + z·w_y·log_z².

    The numbers are 0 for an example that is left out, and so is its loss.
    """
    loss = times(weights.total, stats.nll)
    if options.label_smoothing is not None:
        epsilon = options.label_smoothing.astype(loss.dtype)
        loss = (1 - epsilon) * loss + epsilon / num_classes * times(weights.sample, stats.smooth_nll)
    if options.z_loss is not None:
        loss += options.z_loss.astype(loss.dtype) * times(weights.total, stats.log_z**2)
    return loss


def divide(total: Array, weight: Array) -> Array:
    """`total / weight`; 0, with zero gradient, where the weight is 0."""
    empty = weight == 0
    return jnp.where(empty, 0, total / jnp.where(empty, 1, weight))


def reduce_losses(losses: Array, total_weight: Array, reduction: str, axes: Axes = ()) -> Array:
    """The loss; of the examples of all devices along the axes."""
    if reduction == "none":
        return losses
    loss = total(losses.sum(), axes)
    return divide(loss, total_weight) if reduction == "mean" else loss
