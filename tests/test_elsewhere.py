"""What goes wrong in other packages (DESIGN.md): each row that concerns the losses on logits."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HALF_DTYPES, assert_close, cases, normal, positive

import jaxce

pytestmark = [pytest.mark.values, pytest.mark.any_jax]


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": np.ones(10, np.float32)},
    "z-loss": {"z_loss": 0.1},
}
BAD = [-1, -100, 10, 2**31 - 1, -(2**31)]


@cases(("bad", "name"), list(zip(BAD, [*OPTIONS, "plain"], strict=True)), product(BAD, OPTIONS))
def test_a_bad_label_is_nan_in_its_own_row_and_nowhere_else(bad, name):
    options = OPTIONS[name]
    logits, labels = normal((4, 10)), jnp.array([3, bad, 9, 0])

    def loss(x):
        return jaxce.cross_entropy(x, labels, ignore_index=-7, reduction="none", **options)

    losses, gradient = jax.jit(lambda x: (loss(x), jax.grad(lambda x: loss(x).sum())(x)))(logits)
    assert np.isnan(losses).tolist() == [False, True, False, False]
    assert np.isnan(gradient).all(1).tolist() == [False, True, False, False]
    assert np.isnan(gradient).any(1).tolist() == [False, True, False, False]
    good = np.array([0, 2, 3])
    want = jax.jit(jax.grad(lambda x: jaxce.cross_entropy(x, labels[good], reduction="sum", **options)))(logits[good])
    assert_close(gradient[good], want, 1e-6)


@pytest.mark.parametrize("bad", [-1, 10])
def test_a_bad_label_of_nll_loss_is_nan_in_its_own_row(bad):
    losses, pull = jax.vjp(lambda x: jaxce.nll_loss(x, jnp.array([3, bad]), reduction="none"), normal((2, 10)))
    assert np.isnan(losses).tolist() == [False, True]
    assert np.isnan(pull(jnp.ones(2))[0]).all(1).tolist() == [False, True]


def test_a_bad_label_makes_the_mean_nan():
    assert np.isnan(jaxce.cross_entropy(normal((2, 10)), jnp.array([3, -1])))


@pytest.mark.parametrize("loss", [jaxce.cross_entropy, jaxce.nll_loss])
@pytest.mark.parametrize(("shape", "labels"), [((4, 10), (1,)), ((4, 4), (4, 4)), ((4, 4), (4, 1)), ((4, 4), (1, 4))])
def test_labels_never_broadcast(loss, shape, labels):
    with pytest.raises(ValueError, match="labels must have shape"):
        loss(jnp.zeros(shape), jnp.zeros(labels, int))


@pytest.mark.parametrize("loss", [jaxce.cross_entropy, lambda x, y: jaxce.nll_loss(jaxce.log_softmax(x), y)])
@pytest.mark.parametrize("to_labels", [lambda y: y, lambda y: jax.nn.one_hot(y, 4)], ids=["indices", "one-hot"])
def test_an_impossible_class_leaves_the_loss_finite(loss, to_labels):
    logits = normal((2, 4)).at[:, 2].set(-jnp.inf)
    value, gradient = jax.value_and_grad(loss)(logits, to_labels(jnp.array([0, 3])))
    without = jnp.array([0, 1, 3])
    want, want_gradient = jax.value_and_grad(jaxce.cross_entropy)(logits[:, without], jnp.array([0, 2]))
    assert_close(value, want, 1e-6)
    assert_close(gradient[:, without], want_gradient, 1e-6)
    assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_logits_have_a_float32_loss(dtype):
    logits = normal((8, 1000), dtype=dtype)
    loss = jaxce.cross_entropy(logits, jnp.arange(8))
    assert loss.dtype == jnp.float32
    assert_close(loss, jaxce.cross_entropy(logits.astype(jnp.float32), jnp.arange(8)), 1e-6)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_many_uniform_float16_classes_do_not_overflow(dtype):
    value, gradient = jax.value_and_grad(jaxce.cross_entropy)(jnp.zeros(131_072, dtype), 5)
    np.testing.assert_allclose(value, np.log(131_072), rtol=1e-6)
    assert_close(gradient[5], np.asarray(1 / 131_072 - 1, np.float32), 1e-2)
    np.testing.assert_allclose(np.asarray(gradient[:5], np.float32), 1 / 131_072, rtol=1e-2)


def test_an_offset_costs_no_digits():
    # `log_z - x_y` gives 1.4609 here: at 1e5 the spacing of float32 is 1/128.
    row = jnp.array([0.0, 0.5, -0.25, 1.0])
    assert_close(jaxce.cross_entropy(row + 1e5, 1), jaxce.cross_entropy(row, 1), 1e-6)


@pytest.mark.parametrize("loss", [jaxce.cross_entropy, jaxce.nll_loss])
@pytest.mark.parametrize("weight", [None, np.ones(3, np.float32)])
def test_the_mean_of_nothing_is_zero(loss, weight):
    for logits, labels in [(normal((2, 3)), jnp.full(2, -100)), (jnp.zeros((0, 3)), jnp.zeros(0, int))]:
        value, gradient = jax.value_and_grad(loss)(logits, labels, weight=weight)
        assert value == 0
        assert gradient.shape == logits.shape
        assert (gradient == 0).all()


def test_nan_in_an_ignored_row_does_not_reach_the_kernel():
    hidden, kernel, labels = normal((3, 4)), normal((4, 5), 1), jnp.array([1, -100, 2])

    def loss(kernel, hidden, labels):
        return jaxce.cross_entropy(hidden @ kernel, labels, reduction="sum")

    logits = (hidden @ kernel).at[1].set(jnp.nan)
    dlogits = jax.grad(lambda x: jaxce.cross_entropy(x, labels, reduction="sum"))(logits)
    assert (dlogits[1] == 0).all()
    rows = np.array([0, 2])
    assert_close(hidden.T @ dlogits, jax.grad(loss)(kernel, hidden[rows], labels[rows]), 1e-6)


def test_grad_of_vmap_works():
    logits, labels = normal((3, 5)), jnp.array([0, 4, 2])
    gradient = jax.grad(lambda x: jax.vmap(jaxce.cross_entropy)(x, labels).mean())(logits)
    assert_close(gradient, jax.grad(jaxce.cross_entropy)(logits, labels), 1e-6)


def test_forward_mode_is_refused_and_not_zero():
    logits = normal(5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: jaxce.cross_entropy(x, 1), (logits,), (logits,))
    _, tangent = jax.jit(lambda x: jax.jvp(lambda x: jaxce.reference.cross_entropy(x, 1), (x,), (x,)))(logits)
    assert_close(tangent, jax.grad(jaxce.cross_entropy)(logits, 1) @ logits, 1e-5)


def test_every_example_has_its_own_cotangent():
    logits, labels, cotangents = normal((4, 6)), jnp.array([0, 5, 3, 1]), jnp.array([0.0, 2.0, -3.0, 0.5])
    _, pull = jax.vjp(lambda x: jaxce.cross_entropy(x, labels, reduction="none"), logits)
    one_by_one = jnp.stack(
        [g * jax.grad(jaxce.cross_entropy)(x, y) for x, y, g in zip(logits, labels, cotangents, strict=True)]
    )
    assert_close(pull(cotangents)[0], one_by_one, 1e-6)


def test_z_loss_and_targets_have_gradients():
    logits, targets = normal((3, 5)), positive((3, 5))

    got, want = (
        jax.jit(jax.grad(lambda x, t, z, loss=loss: loss(x, t, z_loss=z), (0, 1, 2)))(logits, targets, 0.3)
        for loss in (jaxce.cross_entropy, jaxce.reference.cross_entropy)
    )
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_the_soft_cap_is_differentiated():
    logits = 3 * normal((3, 5))
    got, want = (
        jax.jit(jax.grad(lambda x, loss=loss: loss(x, jnp.array([0, 4, 2]), logit_softcap=2.0)))(logits)
        for loss in (jaxce.cross_entropy, jaxce.reference.cross_entropy)
    )
    assert_close(got, want, 1e-5)


def test_the_soft_cap_does_not_revive_an_impossible_class():
    logits = normal((2, 4)).at[:, 3].set(-jnp.inf)
    value, gradient = jax.value_and_grad(jaxce.cross_entropy)(logits, jnp.array([0, 1]), logit_softcap=2.0)
    want, want_gradient = jax.value_and_grad(jaxce.cross_entropy)(logits[:, :3], jnp.array([0, 1]), logit_softcap=2.0)
    assert_close(value, want, 1e-6)
    assert_close(gradient[:, :3], want_gradient, 1e-6)
    assert (gradient[:, 3] == 0).all()


def test_labels_of_64_bits_do_not_wrap_around_in_32():
    """Without x64, `jax.jit` would make class 1 of 2³² + 1."""
    wide = np.array([0, 2**32 + 1, 2**32, -(2**32)])
    loss = jaxce.cross_entropy(jnp.zeros((4, 5)), wide, reduction="none")
    assert jnp.isnan(loss).tolist() == [False, True, True, True]
    loss = jaxce.cross_entropy(jnp.zeros((4, 5)), wide, ignore_index=2**32, reduction="none")
    assert loss[2] == 0
    assert jnp.isnan(loss).tolist() == [False, True, False, True]
