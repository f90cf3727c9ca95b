"""From the numbers of each example to a loss: weights, smoothing, z-loss and reductions, in plain JAX.

Every loss of the package is composed here, on arrays of the batch's shape or of a chunk of it. Which numbers a loss
needs is found by asking which of them its terms read, so it is said beside their formulas and nowhere else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxce._math.example import Stats, Target, is_index
from jaxce._mesh.devices import Axes, size_along, total


class ExampleWeights(NamedTuple):
    """Per example, 0 where it is left out; None where all that are left in weigh 1."""

    sample: Array | None  # sample_weight
    total: Array | None  # what the mean divides by: sample_weight, times the weight of the label's class


def example_weights(
    targets: Target, counts_in: Array | None, sample_weight: Array | None, weight: Array | None, dtype: jnp.dtype
) -> ExampleWeights:
    """The weights of the examples, in the dtype of the loss."""
    sample = None if sample_weight is None else sample_weight.astype(dtype)
    if sample is not None and counts_in is not None:
        sample = jnp.where(counts_in, sample, 0)
    if weight is None or not is_index(targets):
        return ExampleWeights(sample, sample)
    # A bad label is a negative index here. It counts as one example, whose loss is NaN.
    counted = targets >= 0 if counts_in is None else counts_in & (targets >= 0)
    # On a mesh the gathered weights lie as the labels do.
    where = jax.typeof(targets).sharding
    of_label = weight.astype(dtype).at[jnp.maximum(targets, 0)].get(out_sharding=None if where.mesh.empty else where)
    of_class = jnp.where(counted, of_label, 1)
    if counts_in is not None:
        of_class = jnp.where(counts_in, of_class, 0)
    return ExampleWeights(sample, times(sample, of_class))


def times(weight: Array | None, value: Array) -> Array:
    return value if weight is None else weight * value


def weight_sum(
    weights: ExampleWeights, counts_in: Array | None, losses: Array | jax.ShapeDtypeStruct, axes: Axes = ()
) -> Array:
    """What the mean of `losses` divides by; of the examples of all devices along the axes."""
    if weights.total is not None:
        return total(weights.total.sum(), axes)
    if counts_in is not None:
        return total(counts_in.sum(), axes).astype(losses.dtype)
    return jnp.asarray(losses.size * size_along(axes), losses.dtype)


# The terms of a loss. Each returns its share for examples with these numbers, or None where its option is off. An
# example that is left out has zeros for numbers, and so it has for a loss.


def likelihood(stats: Stats, weights: ExampleWeights, num_classes: int, options: Any) -> Array:
    """(1-ε)·w_y·nll."""
    loss = times(weights.total, stats.nll)
    epsilon = options.label_smoothing
    return loss if epsilon is None else (1 - epsilon.astype(loss.dtype)) * loss


def smoothing(stats: Stats, weights: ExampleWeights, num_classes: int, options: Any) -> Array | None:
    """(ε/C)·smooth_nll, whose class weights are in it already."""
    epsilon = options.label_smoothing
    if epsilon is None:
        return None
    return epsilon.astype(stats.smooth_nll.dtype) / num_classes * times(weights.sample, stats.smooth_nll)


def z_loss(stats: Stats, weights: ExampleWeights, num_classes: int, options: Any) -> Array | None:
    """ζ·w_y·log_z²."""
    if options.z_loss is None:
        return None
    return options.z_loss.astype(stats.log_z.dtype) * times(weights.total, stats.log_z**2)


TERMS: list[Callable[..., Array | None]] = [likelihood, smoothing, z_loss]


def example_losses(stats: Stats, weights: ExampleWeights, num_classes: int, options: Any) -> Array:
    """The loss of each example, weighted: the sum of the terms that are on."""
    first, *others = (term(stats, weights, num_classes, options) for term in TERMS)
    assert first is not None
    return sum((share for share in others if share is not None), start=first)


def is_read(losses: Callable[..., Array], numbers: Any, weights: Any, options: Any) -> Any:
    """Which of the numbers the losses read, a bool for each."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (numbers, weights, options))
    jaxpr = jax.make_jaxpr(losses)(*shapes).jaxpr
    read = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    read |= {id(variable) for variable in jaxpr.outvars}
    leaves, tree = jax.tree.flatten(numbers)
    return jax.tree.unflatten(tree, [id(variable) in read for variable in jaxpr.invars[: len(leaves)]])


def reads_smoothing(num_classes: int, options: Any) -> bool:
    """Whether the loss needs `smooth_nll`, which takes sums of its own."""
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
    of_one = Stats(scalar, scalar, scalar, scalar), ExampleWeights(scalar, scalar)

    def losses(stats: Stats, weights: ExampleWeights, options: Any) -> Array:
        return example_losses(stats, weights, num_classes, options)

    return is_read(losses, *of_one, jax.tree.map(lambda _: scalar, options)).smooth_nll


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
