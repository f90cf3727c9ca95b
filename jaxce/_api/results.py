"""What the losses return besides a loss, and the words that options take."""

from typing import Literal, NamedTuple, TypeAlias, TypedDict

from jax import Array
from jax.typing import ArrayLike

from jaxce._mesh.sharding import Sharding

Reduction: TypeAlias = Literal["none", "mean", "sum"]
Strategy: TypeAlias = Literal["auto", "tokens", "classes"]


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


class LossKeywords(TypedDict, total=False):
    """The keywords that `cross_entropy` and `linear_cross_entropy` share, besides `return_stats`."""

    num_classes: int | None
    weight: ArrayLike | None
    sample_weight: ArrayLike | None
    ignore_index: int
    where: ArrayLike | None
    label_smoothing: ArrayLike
    z_loss: ArrayLike
    logit_softcap: ArrayLike | None
    temperature: ArrayLike
    reduction: Reduction
    sharding: Sharding | None
