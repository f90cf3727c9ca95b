"""Numbers from tutorials on the PyTorch functions, as they are printed there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

TWO_ROWS = [
    [2.0017240, -0.4806132, -0.1626286, -0.4228996, -1.3143820],
    [-0.3741181, 0.0773606, -0.7851442, -0.2291262, -1.0958053],
]
FIVE_LOGITS = [-1.3533, -1.3074, -1.7906, 0.3113, 0.7982]
THREE_ROWS = [[1.0, 2.0, 3.0]] * 3
THREE_LABELS = [2, 1, 0]
THREE_ROWS_GRADIENT = [[0.0300, 0.0816, -0.1116], [0.0300, -0.2518, 0.2217], [-0.3033, 0.0816, 0.2217]]


def assert_printed(got, want, atol=5.1e-5):
    np.testing.assert_allclose(got, want, atol=atol, rtol=0)


def test_cross_entropy_of_two_rows():
    assert_printed(jaxce.cross_entropy(TWO_ROWS, [2, 1]), 1.7886)


def test_nll_loss_of_log_softmax_of_two_rows():
    assert_printed(jaxce.nll_loss(jaxce.log_softmax(TWO_ROWS), [2, 1]), 1.7886)


def test_log_softmax_of_five_logits():
    # The logits are rounded as well.
    assert_printed(jaxce.log_softmax(FIVE_LOGITS), [-2.8079, -2.7619, -3.2451, -1.1432, -0.6564], 1e-4)


def test_three_labels_for_one_example_are_a_clear_error():
    with pytest.raises(ValueError, match=r"labels must be a scalar.*; got \(3,\)"):
        jaxce.cross_entropy(FIVE_LOGITS, [1, 0, 0])


@pytest.mark.parametrize(("shape", "labels"), [((3, 5), [1, 0, 4]), ((3, 100), [1, 0, 4]), ((1, 5), [1])])
def test_one_label_for_each_row_is_right(shape, labels):
    assert_printed(jaxce.cross_entropy(jnp.zeros(shape), labels), np.log(shape[1]))


def test_nll_loss_takes_scores_as_they_are():
    assert_printed(jaxce.nll_loss([[0.1, 0.1, 0.1, 0.2, 0.5]] * 2, [4, 1]), -0.3000)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: jaxce.cross_entropy(x, jnp.array(THREE_LABELS)),
        lambda x: jaxce.cross_entropy(x, jnp.eye(3)[jnp.array(THREE_LABELS)]),
        lambda x: jaxce.nll_loss(jaxce.log_softmax(x), jnp.array(THREE_LABELS)),
        lambda x: jaxce.nll_loss(jaxce.log_softmax(x), jnp.eye(3)[jnp.array(THREE_LABELS)]),
    ],
    ids=["indices", "one-hot", "nll_loss", "nll_loss one-hot"],
)
def test_three_rows_have_the_same_loss_and_gradient_on_every_way(loss):
    value, gradient = jax.value_and_grad(loss)(jnp.array(THREE_ROWS))
    assert_printed(value, 1.4076)
    assert_printed(gradient, THREE_ROWS_GRADIENT)


@pytest.mark.parametrize(
    ("label", "loss", "gradient"),
    [
        (0, 2.4076, [-0.9100, 0.2447, 0.6652]),
        (1, 1.4076, [0.0900, -0.7553, 0.6652]),
        (2, 0.4076, [0.0900, 0.2447, -0.3348]),
    ],
)
def test_one_row(label, loss, gradient):
    row = jnp.array([1.0, 2.0, 3.0])
    value, got = jax.value_and_grad(jaxce.cross_entropy)(row, label)
    assert_printed(value, loss)
    assert_printed(got, gradient)
    assert_printed(jaxce.log_softmax(row), [-2.4076, -1.4076, -0.4076])
    assert_printed(jnp.exp(jaxce.log_softmax(row)), [0.0900, 0.2447, 0.6652])


def test_log_softmax_normalises_along_its_own_axis():
    rows = jnp.array(TWO_ROWS)
    along_0, along_1 = (jaxce.log_softmax(rows, axis) for axis in (0, 1))
    np.testing.assert_allclose(jnp.exp(along_0).sum(0), np.ones(5), rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(along_1).sum(1), np.ones(2), rtol=1e-6)
    assert not np.allclose(along_0, along_1)
