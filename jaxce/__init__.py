"""The cross-entropy family for JAX: the losses of classifiers and language models, with hand-written gradients."""

from jaxce import reference, sharded
from jaxce._linear import linear_cross_entropy
from jaxce._losses import LossStats, cross_entropy, log_softmax, nll_loss

__all__ = ["LossStats", "cross_entropy", "linear_cross_entropy", "log_softmax", "nll_loss", "reference", "sharded"]
