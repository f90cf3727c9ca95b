"""Laws that hold for all inputs."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, distributions, indices, normal, positive
from hypothesis import given
from hypothesis import strategies as st

import jaxce

pytestmark = [pytest.mark.values, pytest.mark.any_jax]

SEEDS = st.integers(0, 2**16)
SHAPES = st.sampled_from([(1, 2), (3, 5), (4, 7)])
EVERYTHING = {"label_smoothing": 0.2, "z_loss": 0.1, "logit_softcap": 3.0}
OPTIONS = st.sampled_from([{}, EVERYTHING])


@cache
def of_one_and_of_many(options):
    """Compiled once for all seeds."""
    options = EVERYTHING if options else {}
    one = jax.value_and_grad(lambda x, y: jaxce.cross_entropy(x, y, **options))

    def batched(logits, labels):
        value, pull = jax.vjp(lambda x: jaxce.cross_entropy(x, labels, reduction="none", **options), logits)
        return value, pull(jnp.ones(logits.shape[0]))[0]

    return jax.jit(one), jax.jit(jax.vmap(one)), jax.jit(batched)


@pytest.mark.thorough
@given(SEEDS, SHAPES, OPTIONS)
def test_batched_is_vmap_is_loop(seed, shape, options):
    logits, labels = normal(shape, seed), indices(shape[0], shape[1], seed)
    one, mapped, batched = of_one_and_of_many(bool(options))
    batched, mapped = batched(logits, labels), mapped(logits, labels)
    looped = [jnp.stack(part) for part in zip(*[one(x, y) for x, y in zip(logits, labels, strict=True)], strict=True)]
    for ours, theirs, loop in zip(batched, mapped, looped, strict=True):
        assert_close(ours, loop, 1e-6)
        assert_close(theirs, loop, 1e-6)


@pytest.mark.parametrize("probabilities", [False, True])
@given(seed=SEEDS, garbage=st.sampled_from([np.nan, np.inf, -np.inf]), options=OPTIONS)
def test_a_masked_batch_is_the_batch_without_those_rows(probabilities, seed, garbage, options):
    keep = np.array([0, 2, 3])
    floats = {"logits": normal((5, 6), seed), "sample_weight": positive(5, seed)}
    if probabilities:
        floats["labels"] = distributions((5, 6), seed=seed)
        mask = {"where": jnp.array([True, False, True, True, False])}
    else:
        mask = {"where": jnp.array([True, False, True, True, True]), "labels": jnp.array([0, 99, 5, 2, -100])}
    weight = positive(6, seed)
    dirty = {name: value.at[jnp.array([1, 4])].set(garbage) for name, value in floats.items()}
    clean = {name: value[keep] for name, value in floats.items()}

    def run(floats, rest):
        def loss(floats, weight):
            return jaxce.cross_entropy(**floats, **rest, weight=weight, **options)

        return jax.value_and_grad(loss, (0, 1))(floats, weight)

    value, (gradient, dweight) = run(dirty, mask)
    want, (want_gradient, want_dweight) = run(clean, {} if probabilities else {"labels": mask["labels"][keep]})
    assert_close(value, want, 1e-5)
    assert_close(dweight, want_dweight, 1e-5)
    for name in floats:
        assert_close(gradient[name][keep], want_gradient[name], 1e-5)
        assert (gradient[name][np.array([1, 4])] == 0).all()


@pytest.mark.parametrize("probabilities", [False, True])
@given(seed=SEEDS, garbage=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_nll_loss_leaves_rows_out_as_well(probabilities, seed, garbage):
    log_probs = jax.nn.log_softmax(normal((3, 4), seed))
    labels = distributions((3, 4), seed=seed) if probabilities else jnp.array([0, 50, 3])
    where = jnp.array([True, False, True])
    keep = np.array([0, 2])

    def run(log_probs, labels, **options):
        return jax.value_and_grad(lambda x: jaxce.nll_loss(x, labels, **options))(log_probs)

    dirty = labels.at[1].set(garbage) if probabilities else labels
    value, gradient = run(log_probs.at[1].set(garbage), dirty, where=where)
    want, want_gradient = run(log_probs[keep], labels[keep])
    assert_close(value, want, 1e-6)
    assert_close(gradient[keep], want_gradient, 1e-6)
    assert (gradient[1] == 0).all()


@given(SEEDS, st.integers(-50, 50))
def test_a_shift_of_the_logits_changes_nothing(seed, shift):
    logits, labels = normal((3, 5), seed), indices(3, 5, seed)
    for got, want in zip(
        jax.value_and_grad(jaxce.cross_entropy)(logits + shift, labels),
        jax.value_and_grad(jaxce.cross_entropy)(logits, labels),
        strict=True,
    ):
        assert_close(got, want, 2e-5)


@given(SEEDS)
def test_the_order_of_classes_does_not_matter(seed):
    logits, labels, order = normal((3, 5), seed), indices(3, 5, seed), np.random.default_rng(seed).permutation(5)
    weight = positive(5, seed)
    value, gradient = jax.value_and_grad(jaxce.cross_entropy)(logits, labels, weight=weight)
    got, permuted = jax.value_and_grad(jaxce.cross_entropy)(
        logits[:, order], jnp.argsort(order)[labels], weight=weight[order]
    )
    assert_close(got, value, 1e-6)
    assert_close(permuted, gradient[:, order], 1e-5)


@given(SEEDS, SHAPES)
def test_gradient_rows_sum_to_zero(seed, shape):
    gradient = jax.grad(jaxce.cross_entropy)(
        normal(shape, seed), indices(shape[0], shape[1], seed), label_smoothing=0.2
    )
    assert (jnp.abs(gradient).sum(-1) > 0).all()
    np.testing.assert_allclose(gradient.sum(-1), np.zeros(shape[0]), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32, np.int64])
@pytest.mark.parametrize("ignore_index", [-100, 3, 255, -(2**40), 2**70])
def test_any_integer_may_be_ignored_with_labels_of_any_dtype(x64, dtype, ignore_index):
    labels = np.array([0, 3, 4, 3], dtype)
    losses = jaxce.cross_entropy(normal((4, 300)), jnp.asarray(labels), ignore_index=ignore_index, reduction="none")
    assert (np.asarray(losses) == 0).tolist() == [int(label) == ignore_index for label in labels]
    assert not np.isnan(losses).any()


@pytest.mark.parametrize("label", [2**32 + 1, 2**31, -(2**32) + 1])
def test_a_label_of_64_bits_is_not_cut_to_a_valid_one(x64, label):
    assert np.isnan(jaxce.cross_entropy(normal(5), jnp.asarray(label, jnp.int64)))
