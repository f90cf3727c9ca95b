"""The losses on arrays of scores: `log_softmax`, `nll_loss` and `cross_entropy`."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxce import _checks, _forms
from jaxce._checks import LossOptions
from jaxce._compose import Options, example_losses, example_weights, reduce_losses, times, weight_sum
from jaxce._layout import Layout, constrain, layout_of_logits, layout_of_types, on_mesh
from jaxce._mesh import (
    Axes,
    axes_of,
    explicit_mesh,
    first_largest,
    form_over,
    own_part,
    real_part,
    size_along,
    vary_alike,
    vary_over,
)
from jaxce._softmax import Stats, compute_dtype, is_index, log_probs, negative_log_prob, softmax_stats

Reduction: TypeAlias = Literal["none", "mean", "sum"]


class LossStats(NamedTuple):
    """What a training loop logs, without gradient. An array that isn't read costs nothing under `jax.jit`.

    Without weights and `where`, `(predicted == labels).sum() / weight_sum` is the accuracy and `nll.sum() / weight_sum`
    the mean; with weights, `weight_sum` isn't the number of examples. An example that `where` leaves out has a
    prediction too: count `(predicted == labels) & where`. To join the stats of batches, `np.hstack` each field.

    Attributes:
      nll: negative log-likelihood of each example in nats, without weights, smoothing and z-loss; batch shape,
        float32 (float64 for float64 logits), 0 where the example is left out.
      log_z: logarithm of the sum of the exponentials of each example's logits; like `nll`.
      entropy: entropy of the softmax of each example in nats; like `nll`.
      predicted: index of the largest logit of each example, also where it is left out: compare with `==`, which a label
        that is ignored never is. Batch shape, int32.
      weight_sum: what the mean divides by, the total weight of the examples left in; a scalar.
    """

    nll: Array
    log_z: Array
    entropy: Array
    predicted: Array
    weight_sum: Array


class TokenStats(NamedTuple):
    """Of each token, differentiable in all three; an array that isn't read costs nothing under `jax.jit`.

    Attributes:
      log_prob: log-probability of the label in nats, at most 0; batch shape, float32 (float64 for float64 inputs).
      log_z: logarithm of the sum of the exponentials of the logits over the temperature; like `log_prob`.
      entropy: entropy of the distribution over the classes in nats, at least 0; like `log_prob`.
    """

    log_prob: Array
    log_z: Array
    entropy: Array


# What a function returns: the loss of all examples, with `LossStats` if wanted; or `TokenStats`.
Output: TypeAlias = Literal["loss", "tokens"]


def token_stats(stats: Stats) -> TokenStats:
    """The numbers as `TokenStats`. Rounding may not bring a probability above 1, or an entropy below 0."""

    def at_least_0(x: Array) -> Array:
        return x + lax.stop_gradient(jnp.maximum(x, 0) - x)

    return TokenStats(-at_least_0(stats.nll), stats.log_z, at_least_0(stats.entropy))


def over_examples(function: Callable[..., Any], axis: int, in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """`function` of examples with classes on axis 0, vmapped over the axes before the class axis."""
    for _ in range(axis):
        function = jax.vmap(function, in_axes)
    return function


def stats_of_examples(
    logits: Array,
    targets: Array,
    axis: int,
    weight: Array | None,
    softcap: Array | None,
    live: Array | None,
    *,
    scale: Array | None = None,
    smooth: bool,
    class_axes: Axes,
) -> Stats:
    """The numbers of every example."""
    columns = logits.shape[axis]
    one = partial(softmax_stats, form_over(class_axes, _forms.chosen(), columns), smooth)
    in_axes = (0, 0, None, None, None if scale is None else 0, None if live is None else 0)
    axes = axes_of((logits, targets, weight, softcap, scale, live))
    logits, weight, softcap, scale = vary_over((logits, weight, softcap, scale), axes)
    live = vary_over(live, axes - set(class_axes))
    targets = vary_over(targets, axes - set(class_axes) if is_index(targets) else axes)
    weight = along_classes(own_part(class_axes, weight, columns), logits, axis)
    return over_examples(one, axis, in_axes)(logits, targets, weight, softcap, scale, live)


def along_classes(weight: Array | None, scores: Array, axis: int) -> Array | None:
    """Class weights that broadcast against the scores behind the class axis."""
    return None if weight is None else weight.reshape(-1, *(1,) * (scores.ndim - axis - 1))


def log_softmax(logits: ArrayLike, axis: int = -1, *, where: ArrayLike | None = None) -> Array:
    r"""Logarithm of the softmax along the class axis.

    .. math:: \log p_c = (x_c - m) - \log \sum_k e^{x_k - m}, \qquad m = \max_k x_k

    Equivalent to `jax.nn.log_softmax`, computed and returned in float32 for 16-bit logits, and with a gradient that
    is exactly 0 where a logit is -inf. See Goodfellow et al., *Deep Learning*, section 6.2.2.3.

    Args:
      logits: unnormalized log-probabilities; a float array of any shape with the class axis at `axis`.
      axis: the class axis. The rows along it are normalized, each for itself.
      where: classes to include; bool, broadcastable to the shape of `logits`. The others are left out of the sum
        and have -inf for a result.

    Returns:
      Log-probabilities in nats, of the shape of `logits`; float32, or float64 for float64 logits. NaN in a row that
      is all -inf, or that holds NaN or +inf.

    Raises:
      TypeError: `logits` isn't a float array, `where` isn't bool, or one of them isn't an array.
      ValueError: `axis` is out of range, there are no classes, or `where` doesn't fit.

    Example:
      >>> import jaxce
      >>> print(*(f"{log_prob:.4f}" for log_prob in jaxce.log_softmax([1.0, 2.0, 3.0])))
      -2.4076 -1.4076 -0.4076
    """
    return _log_softmax(
        _checks.as_array("logits", logits),
        _checks.as_optional_array("where", where),
        axis=_checks.integer("axis", axis),
    )


@partial(jax.jit, static_argnames=("axis",))
def _log_softmax(logits: Array, where: Array | None, *, axis: int) -> Array:
    axis = _checks.class_axis("logits", logits, axis)
    where = _checks.class_mask(where, logits.shape)
    one = partial(log_probs, _forms.chosen())
    return over_examples(one, axis, (0, None if where is None else 0))(*vary_alike((logits, where)))


def nll_loss(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of the labels, from log-probabilities.

    .. math:: \ell_i = -w_{y_i} \log p_{i,y_i}

    `nll_loss(log_softmax(x), labels)` is `cross_entropy(x, labels)`, which is the leaner of the two. As
    `torch.nn.functional.nll_loss`, which takes no class probabilities. The log-probabilities needn't be normalized.

    Args:
      log_probs: log-probabilities in nats; a float array of any shape with the class axis at `axis`.
      labels: class indices, integers of the shape of `log_probs` without the class axis; or class probabilities,
        floats of the shape of `log_probs`.
      axis: the class axis.
      weight: weight of each class, shape (C,).
      sample_weight: weight of each example, of the batch shape.
      ignore_index: an example with this label is left out: loss 0, gradient 0.
      where: False leaves an example out; bool, broadcastable to the batch shape.
      reduction: "none", "sum", or "mean", which divides by the total weight of the examples left in.

    Returns:
      The loss in nats: a scalar, or of the batch shape for "none"; float32, or float64 for float64 log-probabilities.
      NaN for an example whose label is out of range.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: an argument has a wrong shape or value.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> log_probs = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]))
      >>> print(f"{jaxce.nll_loss(log_probs, [0, 1]):.4f}")
      0.2899
    """
    labels, options = _checks.loss_options(
        labels,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        where=where,
        reduction=reduction,
    )
    return _nll_loss(_checks.as_array("log_probs", log_probs), labels, options, axis=_checks.integer("axis", axis))


@partial(jax.jit, static_argnames=("axis",))
def _nll_loss(log_probs: Array, labels: Array, options: LossOptions, *, axis: int) -> Array:
    axis = _checks.class_axis("log_probs", log_probs, axis, labels)
    targets, live = _checks.examples("log_probs", log_probs.shape, axis, labels, options)
    weight = options.weight
    in_axes = (0, 0, None, None if live is None else 0)
    class_weight = along_classes(weight, log_probs, axis)
    nll = over_examples(negative_log_prob, axis, in_axes)(*vary_alike((log_probs, targets, class_weight, live)))
    weights = example_weights(targets, live, options.sample_weight, weight, nll.dtype)
    return reduce_losses(times(weights.total, nll), weight_sum(weights, live, nll), options.reduction)


@overload
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
    reduction: Reduction = "mean",
    return_stats: Literal[False] = False,
) -> Array: ...


@overload
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
    reduction: Reduction = "mean",
    return_stats: Literal[True],
) -> tuple[Array, LossStats]: ...


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
    reduction: Reduction = "mean",
    return_stats: bool = False,
) -> Array | tuple[Array, LossStats]:
    r"""Cross-entropy between the softmax of the logits and the labels.

    .. math:: \ell_i = (1-\varepsilon) w_{y_i} (\log Z_i - x_{i,y_i})
              + \frac{\varepsilon}{C} \sum_c w_c (\log Z_i - x_{i,c}) + \zeta w_{y_i} \log^2 Z_i,
              \qquad \log Z_i = \log \sum_c e^{x_{i,c}}

    for class indices, and with :math:`q = (1-\varepsilon) p + \varepsilon/C` for class probabilities p

    .. math:: \ell_i = \sum_c w_c q_{i,c} (\log Z_i - x_{i,c}) + \zeta \log^2 Z_i

    As `torch.nn.functional.cross_entropy` (smoothing after Szegedy et al., 2016, arXiv:1512.00567, and z-loss after
    Chowdhery et al., 2022, arXiv:2204.02311), without storing a softmax or a one-hot array. Differentiable in reverse
    mode in every float argument; `jaxce.reference.cross_entropy` has forward mode.

    Args:
      logits: unnormalized log-probabilities; a float array of any shape with the class axis at `axis`. A class whose
        logit is -inf can't happen: its gradient is 0, and label smoothing gives it no share.
      labels: class indices, integers of the shape of `logits` without the class axis; or class probabilities, floats
        of the shape of `logits`, taken as they are: that they sum to 1 isn't checked. The dtype decides which, never
        the shape.
      axis: the class axis; 1 is PyTorch's layout (N, C, d1, ...).
      weight: weight of each class, shape (C,).
      sample_weight: weight of each example, of the batch shape.
      ignore_index: an example with this label is left out: loss 0, and gradient 0 in every input, whatever its
        logits are. Any integer; class probabilities have no such label: use `where`.
      where: False leaves an example out in the same way; bool, broadcastable to the batch shape.
      label_smoothing: the share ε, from 0 to 1, of the target that is spread over all classes.
      z_loss: factor ζ of the squared log Z, which keeps logits from drifting.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first; classes at -inf stay there.
      reduction: "none", "sum", or "mean", which divides by the total weight of the examples left in (for class
        indices Σ w[y]·sample_weight, for probabilities Σ sample_weight) and is 0 if that is 0.
      return_stats: also return `LossStats`, ready for `jax.value_and_grad(..., has_aux=True)`.

    Returns:
      The loss in nats: a scalar, or of the batch shape for "none"; float32, or float64 for float64 logits. NaN for an
      example whose label is out of range. With `return_stats`, a pair of the loss and `LossStats`.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: an argument has a wrong shape or value.
      JaxRuntimeError: under `jax.experimental.checkify`, a label is out of range.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
      >>> print(f"{jaxce.cross_entropy(logits, [2, 1, 0]):.4f}")
      1.4076
    """
    labels, options = _checks.loss_options(
        labels,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        where=where,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        reduction=reduction,
        return_stats=return_stats,
    )
    return _cross_entropy(_checks.as_array("logits", logits), labels, options, axis=_checks.integer("axis", axis))


@partial(jax.jit, static_argnames=("axis", "num_classes", "layout", "output"))
def _cross_entropy(
    logits: Array,
    labels: Array,
    options: LossOptions,
    *,
    axis: int,
    num_classes: int | None = None,
    layout: Layout | None = None,
    output: Output = "loss",
) -> Any:
    axis = _checks.class_axis("logits", logits, axis, labels)
    shards = 1 if layout is None or layout.mesh is not None else size_along(layout.classes)
    columns = logits.shape[axis]
    num_classes = _checks.classes("logits", columns * shards, num_classes)
    shape = (*logits.shape[:axis], num_classes, *logits.shape[axis + 1 :])
    targets, live = _checks.examples(
        "logits", shape, axis, labels, options, classes_here=num_classes if shards == 1 else columns
    )
    batch, dtype = shape[:axis] + shape[axis + 1 :], compute_dtype(logits.dtype)
    arrays = Arrays(logits, targets, live, _checks.inverse_temperature(options.temperature, batch, dtype))
    options = options.without_examples()
    compute = partial(_loss_and_stats if output == "loss" else _token_stats, axis, num_classes)
    if layout is None and (mesh := explicit_mesh(logits)) is not None:
        layout = layout_of_types(mesh, partial(layout_of_logits, axis=axis), logits=logits)
    if layout is None or layout.mesh is None:
        return compute(layout, arrays, options)
    if not is_index(targets) and num_classes < columns:
        padding = [(0, 0)] * logits.ndim
        padding[axis] = (0, columns - num_classes)
        arrays = arrays._replace(targets=jnp.pad(targets, padding))
    arrays = arrays._replace(logits=constrain(layout.mesh, (logits,), layout.given)[0])
    of_batch: Any = layout.of_batch()
    of_logits: Any = layout.with_classes(axis)
    of_targets: Any = of_batch if is_index(targets) else of_logits
    specs = Arrays(of_logits, of_targets, of_batch, of_batch), options.specs(of_batch)
    out = out_specs(output, options, of_batch, PartitionSpec())
    return on_mesh(layout, partial(compute, layout), (arrays, options), specs, out)


class Arrays(NamedTuple):
    """What the numbers of the examples are made of."""

    logits: Array
    targets: Array
    live: Array | None
    scale: Array | None  # one over the temperature


def out_specs(output: Output, options: LossOptions, of_batch: Any, scalar: Any) -> Any:
    """How what a function returns lies on a mesh."""
    if output == "tokens":
        return TokenStats(of_batch, of_batch, of_batch)
    loss = of_batch if options.reduction == "none" else scalar
    return (loss, LossStats(of_batch, of_batch, of_batch, of_batch, scalar)) if options.return_stats else loss


def _token_stats(
    axis: int, num_classes: int, layout: Layout | None, arrays: Arrays, options: LossOptions
) -> TokenStats:
    """The numbers of each token; on a mesh, of what a device has."""
    numbers = numbers_of(axis, layout, without_padding(axis, num_classes, layout, arrays), options)
    return token_stats(numbers(weight=None, smooth=False))


def without_padding(axis: int, num_classes: int, layout: Layout | None, arrays: Arrays) -> Arrays:
    """The arrays with logits of -inf for classes that are padding."""
    logits = arrays.logits
    real = real_part(() if layout is None else layout.classes, logits.shape[axis], num_classes)
    if real is None:
        return arrays
    real = real.reshape(-1, *(1,) * (logits.ndim - axis - 1))
    return arrays._replace(logits=jnp.where(real, logits, -jnp.inf))


def numbers_of(axis: int, layout: Layout | None, arrays: Arrays, options: LossOptions) -> Callable[..., Stats]:
    """The numbers of every example, for class weights and with or without those of smoothing."""
    return partial(
        stats_of_examples,
        arrays.logits,
        arrays.targets,
        axis,
        softcap=options.logit_softcap,
        live=arrays.live,
        scale=arrays.scale,
        class_axes=() if layout is None else layout.classes,
    )


def _loss_and_stats(
    axis: int, num_classes: int, layout: Layout | None, arrays: Arrays, options: LossOptions
) -> Array | tuple[Array, LossStats]:
    """The loss of arguments that have been checked, and its stats if they are wanted.

    On a mesh, of what a device has.
    """
    arrays = without_padding(axis, num_classes, layout, arrays)
    logits, targets, live, _ = arrays
    class_axes, token_axes = ((), ()) if layout is None else (layout.classes, layout.token_axes)
    class_weight = options.class_weight_within(targets)
    numbers = numbers_of(axis, layout, arrays, options)
    stats = numbers(weight=class_weight, smooth=options.label_smoothing is not None)
    weights = example_weights(targets, live, options.sample_weight, options.weight, stats.nll.dtype)
    losses = example_losses(stats, weights, num_classes, Options(options.label_smoothing, options.z_loss))
    total_weight = weight_sum(weights, live, losses, token_axes)
    loss = reduce_losses(losses, total_weight, options.reduction, token_axes)
    if not options.return_stats:
        return loss
    if class_weight is not None and not is_index(targets):
        stats = numbers(weight=None, smooth=False)
    again = _forms.read_again(logits)
    index = jnp.argmax(again, axis).astype(jnp.int32)
    predicted = first_largest(class_axes, again.max(axis), index, logits.shape[axis])
    read = LossStats(stats.nll, stats.log_z, stats.entropy, predicted, total_weight)
    return loss, lax.stop_gradient(read)
