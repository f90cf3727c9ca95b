"""`return_stats`: what a training loop reads beside the loss."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, cases, distributions, indices, normal, positive

import jaxce

pytestmark = pytest.mark.values

LOGITS, LABELS = normal((4, 6)), indices(4, 6)
LOG_P = jax.nn.log_softmax(LOGITS)


EVERY = {"label_smoothing": 0.1, "z_loss": 0.1, "weight": positive(6), "sample_weight": positive(4)}


@cases(
    ("names", "probabilities"),
    [(("z_loss",), True), (("sample_weight",), False), (("weight", "label_smoothing"), False)],
    product([(), *((name,) for name in EVERY), ("weight", "label_smoothing")], (False, True)),
)
def test_the_stats_know_nothing_of_weights_and_regularization(names, probabilities):
    options = {name: EVERY[name] for name in names}
    labels = distributions((4, 6)) if probabilities else LABELS
    target = labels if probabilities else jax.nn.one_hot(LABELS, 6)
    loss, stats = jaxce.cross_entropy(LOGITS, labels, return_stats=True, **options)
    assert_close(loss, jaxce.cross_entropy(LOGITS, labels, **options), 1e-6)
    assert_close(stats.nll, -(target * LOG_P).sum(-1), 1e-6)
    assert_close(stats.log_z, jax.nn.logsumexp(LOGITS, -1), 1e-6)
    assert_close(stats.entropy, -(jnp.exp(LOG_P) * LOG_P).sum(-1), 1e-6)
    assert (stats.predicted == LOGITS.argmax(-1)).all()


def test_weight_sum_is_what_the_mean_divides_by():
    options = {"weight": positive(6), "sample_weight": positive(4, 1), "ignore_index": 5}
    mean, stats = jaxce.cross_entropy(LOGITS, LABELS, return_stats=True, **options)
    live = LABELS != 5
    assert not live.all()
    assert_close(stats.weight_sum, jnp.where(live, options["weight"][LABELS] * options["sample_weight"], 0).sum(), 1e-6)
    assert_close(mean * stats.weight_sum, jaxce.cross_entropy(LOGITS, LABELS, reduction="sum", **options), 1e-6)
    _, stats = jaxce.cross_entropy(LOGITS, distributions((4, 6)), return_stats=True, weight=positive(6))
    assert stats.weight_sum == 4


def test_the_stats_are_of_the_capped_logits():
    capped = 2 * jnp.tanh(LOGITS / 2)
    _, stats = jaxce.cross_entropy(LOGITS, LABELS, return_stats=True, logit_softcap=2.0)
    _, want = jaxce.cross_entropy(capped, LABELS, return_stats=True)
    for got, expected in zip(stats, want, strict=True):
        assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes_and_shapes(x64, dtype):
    logits = normal((2, 6, 3), dtype=dtype)
    loss, stats = jaxce.cross_entropy(logits, indices((2, 3), 6), axis=1, return_stats=True)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert isinstance(stats, jaxce.LossStats)
    assert (loss.shape, loss.dtype) == ((), wide)
    for name in ("nll", "log_z", "entropy"):
        assert (getattr(stats, name).shape, getattr(stats, name).dtype) == ((2, 3), wide)
    assert (stats.predicted.shape, stats.predicted.dtype) == ((2, 3), jnp.int32)
    assert (stats.weight_sum.shape, stats.weight_sum.dtype) == ((), wide)


def test_left_out_rows_are_zero():
    logits = LOGITS.at[jnp.array([1, 2])].set(jnp.nan)
    _, stats = jaxce.cross_entropy(
        logits, LABELS.at[1].set(-100), where=jnp.array([True, True, False, True]), return_stats=True
    )
    for numbers in (stats.nll, stats.log_z, stats.entropy):
        assert (numbers != 0).tolist() == [True, False, False, True]
        assert (numbers[jnp.array([1, 2])] == 0).all()
    assert stats.weight_sum == 2


def test_the_stats_have_no_gradient():
    def total(logits, weight):
        _, stats = jaxce.cross_entropy(logits, LABELS, weight=weight, return_stats=True)
        return sum(jnp.sum(numbers.astype(jnp.float32)) for numbers in stats)

    for gradient in jax.grad(total, (0, 1))(LOGITS, positive(6)):
        assert (gradient == 0).all()


def test_the_stats_do_not_change_the_gradient():
    def with_stats(logits):
        return jaxce.cross_entropy(logits, LABELS, return_stats=True)

    (_, stats), gradient = jax.value_and_grad(with_stats, has_aux=True)(LOGITS)
    assert_close(gradient, jax.grad(jaxce.cross_entropy)(LOGITS, LABELS), 1e-6)
    np.testing.assert_array_equal(stats.nll, with_stats(LOGITS)[1].nll)
