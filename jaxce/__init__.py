"""The cross-entropy family for JAX: the losses of classifiers and language models, with hand-written gradients."""

from jaxce import reference, sharded
from jaxce._distillation import linear_distillation_loss
from jaxce._linear import linear_cross_entropy
from jaxce._log_probs import linear_token_log_probs, token_log_probs
from jaxce._losses import LossStats, TokenStats, cross_entropy, log_softmax, nll_loss

__all__ = [
    "LossStats",
    "TokenStats",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_token_log_probs",
    "log_softmax",
    "nll_loss",
    "reference",
    "sharded",
    "token_log_probs",
]
