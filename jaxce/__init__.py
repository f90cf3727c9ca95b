"""The cross-entropy family for JAX: the losses of classifiers and language models, with hand-written gradients."""

from jaxce import reference
from jaxce._api.distillation import linear_distillation_loss
from jaxce._api.log_probs import linear_token_log_probs, token_log_probs
from jaxce._api.projections import linear_cross_entropy
from jaxce._api.results import LossStats, TokenStats
from jaxce._api.scores import cross_entropy, log_softmax, nll_loss
from jaxce._mesh.sharding import InShardMap, OnMesh

__all__ = [
    "InShardMap",
    "LossStats",
    "OnMesh",
    "TokenStats",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_token_log_probs",
    "log_softmax",
    "nll_loss",
    "reference",
    "token_log_probs",
]
