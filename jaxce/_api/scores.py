"""The losses of arrays of scores: `log_softmax`, `nll_loss` and `cross_entropy`."""

from typing import Literal, Unpack, overload

from jax import Array
from jax.typing import ArrayLike

from jaxce._api.results import LossKeywords, LossStats, Reduction
from jaxce._arguments.arrays import as_array, as_optional_array
from jaxce._arguments.options import integer, loss_options, optional_integer
from jaxce._arguments.shapes import class_axis
from jaxce._calls.of_scores import log_probs_of_logits, loss_of_log_probs, loss_of_logits
from jaxce._mesh.layout import for_logits
from jaxce._mesh.sharding import Sharding


def log_softmax(
    logits: ArrayLike, axis: int = -1, *, where: ArrayLike | None = None, sharding: Sharding | None = None
) -> Array:
    r"""Logarithm of the softmax along the class axis.

    .. math:: \log p_c = (x_c - m) - \log \sum_k e^{x_k - m}, \qquad m = \max_k x_k

    Equivalent to `jax.nn.log_softmax`, computed and returned in float32 for 16-bit logits, and with a gradient that
    is exactly 0 where a logit is -inf. See Goodfellow et al., *Deep Learning*, section 6.2.2.3.

    Args:
      logits: unnormalized log-probabilities; a float array of any shape with the class axis at `axis`.
      axis: the class axis. The rows along it are normalized, each for itself.
      where: classes to include; bool, broadcastable to the shape of `logits`. The others are left out of the sum
        and have -inf for a result.
      sharding: `OnMesh` of logits on a mesh, or `InShardMap`; by default, as types and arrays tell.

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
    logits, where = as_array("logits", logits), as_optional_array("where", where)
    axis = class_axis("logits", logits, integer("axis", axis))
    layout = for_logits(sharding, "logits", logits, None, axis)
    return log_probs_of_logits(logits, where, axis=axis, layout=layout)


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
    sharding: Sharding | None = None,
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
      sharding: `OnMesh(logits=...)` of log-probabilities on a mesh, or `InShardMap`; by default, as types and arrays
        tell.

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
    labels, options = loss_options(
        labels,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        where=where,
        reduction=reduction,
    )
    log_probs = as_array("log_probs", log_probs)
    axis = class_axis("log_probs", log_probs, integer("axis", axis), labels)
    layout = for_logits(sharding, "log_probs", log_probs, labels, axis)
    return loss_of_log_probs(log_probs, labels, options, axis=axis, layout=layout)


class ScoresKeywords(LossKeywords, total=False):
    """The keywords of `cross_entropy` besides `return_stats`."""

    axis: int


@overload
def cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, return_stats: Literal[False] = False, **options: Unpack[ScoresKeywords]
) -> Array: ...


@overload
def cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, return_stats: Literal[True], **options: Unpack[ScoresKeywords]
) -> tuple[Array, LossStats]: ...


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    num_classes: int | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    sharding: Sharding | None = None,
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
      num_classes: how many of the classes are real, all by default. Those behind are padding: they count for nothing,
        whatever their logits, and their gradient is 0.
      weight: weight of each class, shape (num_classes,).
      sample_weight: weight of each example, of the batch shape.
      ignore_index: an example with this label is left out: loss 0, and gradient 0 in every input, whatever its
        logits are. Any integer; class probabilities have no such label: use `where`.
      where: False leaves an example out in the same way; bool, broadcastable to the batch shape.
      label_smoothing: the share ε, from 0 to 1, of the target that is spread over all classes.
      z_loss: factor ζ of the squared log Z, which keeps logits from drifting.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first; classes at -inf stay there.
      temperature: divides the logits, after the soft cap; a positive number, or an array of floats, a scalar or of the
        batch shape, differentiable. NaN for an example whose temperature in an array isn't positive.
      reduction: "none", "sum", or "mean", which divides by the total weight of the examples left in (for class
        indices Σ w[y]·sample_weight, for probabilities Σ sample_weight) and is 0 if that is 0.
      return_stats: also return `LossStats`, ready for `jax.value_and_grad(..., has_aux=True)`.
      sharding: `OnMesh` of logits on a mesh, or `InShardMap`; by default, as types and arrays tell.

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
    labels, options = loss_options(
        labels,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        where=where,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        temperature=temperature,
        reduction=reduction,
        return_stats=return_stats,
    )
    logits = as_array("logits", logits)
    axis = class_axis("logits", logits, integer("axis", axis), labels)
    return loss_of_logits(
        logits,
        labels,
        options,
        axis=axis,
        num_classes=optional_integer("num_classes", num_classes),
        layout=for_logits(sharding, "logits", logits, labels, axis),
    )
