"""Rounding errors against float64, and logits of every kind of extremity."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT_DTYPES, assert_close, cases, distributions, indices, normal, positive

import jaxce

pytestmark = [pytest.mark.values, pytest.mark.any_jax]

CPU_SLABS, PRIME = 65_536, 32_771  # longer than what a CPU adds up in one go; the second can't be cut into slabs


def plain(logits, labels):
    """What one writes without this package."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, labels[:, None], -1).mean()


def truth(function, logits, *rest):
    with jax.enable_x64(True):
        exact = jnp.asarray(np.asarray(logits).astype(np.float64))
        return jax.tree.map(np.asarray, jax.jit(function)(exact, *rest))


SHAPES = [((16, 10), 1.0), ((8, 1000), 10.0), ((4, CPU_SLABS), 10.0), ((4, PRIME), 1.0)]


@cases(
    ("dtype", "shape", "scale"),
    [(jnp.float32, *SHAPES[0]), (jnp.float16, *SHAPES[1]), (jnp.float32, *SHAPES[2])],
    [(dtype, *shape) for dtype in (jnp.float16, jnp.float32) for shape in SHAPES],
)
def test_the_error_is_no_larger_than_the_plain_computations(dtype, shape, scale):
    logits, labels = scale * normal(shape), indices(shape[0], shape[1])
    logits = logits.astype(dtype)
    want, want_gradient = truth(jax.value_and_grad(jaxce.reference.cross_entropy), logits, labels)
    ours, theirs = (jax.jit(jax.value_and_grad(f))(logits, labels) for f in (jaxce.cross_entropy, plain))
    errors = [abs(np.float64(value) - want) for value, _ in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] + 4 * np.finfo(np.float32).eps * abs(want)
    assert np.linalg.norm(want_gradient) > 0
    errors = [np.linalg.norm(np.asarray(g).astype(np.float64) - want_gradient) for _, g in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1] + 4 * np.finfo(np.float32).eps * np.linalg.norm(want_gradient)


@cases(
    ("num_classes", "probabilities", "options"),
    [
        (CPU_SLABS, False, {"label_smoothing": 0.2}),
        (CPU_SLABS, True, {"label_smoothing": 0.2, "logit_softcap": 3.0}),
    ],
    [
        (CPU_SLABS, False, {"logit_softcap": 3.0}),
        (CPU_SLABS, True, {}),
        (PRIME, False, {"z_loss": 0.1}),
    ],
)
def test_long_rows(num_classes, probabilities, options):
    # The first half of a row impossible: whole slabs of it have no maximum.
    logits = normal((2, num_classes)).at[0, : num_classes // 2].set(-jnp.inf)
    labels = jnp.array([num_classes - 1, 3])
    if probabilities:
        labels = jax.nn.softmax(logits + normal(logits.shape, 1))

    @jax.jit
    def run(x, labels, tangent):
        gradient = jax.grad(lambda x: jaxce.cross_entropy(x, labels, **options))
        return jaxce.cross_entropy(x, labels, **options), *jax.jvp(gradient, (x,), (tangent,))

    value, gradient, product = run(logits, labels, normal(logits.shape, 2))
    assert (gradient[0, : num_classes // 2] == 0).all()
    # The textbook form has no derivative at -inf: the impossible classes of row 0 are left out of it instead.
    with jax.enable_x64(True):
        rows = [run_row(logits, labels, row, num_classes, probabilities, options) for row in (0, 1)]
    assert_close(value, np.mean([row[0] for row in rows]), 1e-5)
    for got, number in ((gradient, 1), (product, 2)):
        assert_close(got[0, num_classes // 2 :], rows[0][number] / 2, 1e-4)
        assert_close(got[1], rows[1][number] / 2, 1e-4)


def run_row(logits, labels, row, num_classes, probabilities, options):
    """Loss, gradient and Hessian-vector product of one row in float64, from its possible classes alone."""
    first = num_classes // 2 if row == 0 else 0
    x = jnp.asarray(np.asarray(logits)[row, first:], np.float64)
    tangent = jnp.asarray(np.asarray(normal(logits.shape, 2))[row, first:], np.float64)
    y = np.asarray(labels)[row, first:].astype(np.float64) if probabilities else int(labels[row]) - first
    options = dict(options)
    # ε/C counts the impossible classes as well.
    epsilon = options.pop("label_smoothing", 0.0)

    def loss(x):
        target = y if probabilities else jax.nn.one_hot(y, x.shape[0], dtype=x.dtype)
        return jaxce.reference.cross_entropy(x, (1 - epsilon) * target + epsilon / num_classes, **options)

    run = jax.jit(lambda x, tangent: (loss(x), *jax.jvp(jax.grad(loss), (x,), (tangent,))))
    return jax.tree.map(np.asarray, run(x, tangent))


@cases("dtype", [jnp.bfloat16], [jnp.float16])
def test_long_rows_of_half_precision(dtype):
    logits = normal((2, CPU_SLABS), dtype=dtype)
    got = jax.jit(jax.value_and_grad(jaxce.cross_entropy))(logits, jnp.array([0, 9]))
    want = truth(jax.value_and_grad(jaxce.reference.cross_entropy), logits, jnp.array([0, 9]))
    assert_close(got[0], want[0], 1e-5)
    assert_close(got[1], want[1], float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("to_labels", [lambda y: y, lambda y: jax.nn.one_hot(y, 3)], ids=["indices", "probabilities"])
def test_logits_of_a_billion(to_labels):
    logits = jnp.array([[1e9, 0.0, -1e9], [1e9, 1e9, 0.0]])
    losses, pull = jax.vjp(lambda x: jaxce.cross_entropy(x, to_labels(jnp.array([1, 0])), reduction="none"), logits)
    np.testing.assert_allclose(losses, [1e9, np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(2))[0], [[1, -1, 0], [-0.5, 0.5, 0]], atol=1e-6)


@cases(
    ("offset", "options", "probabilities"),
    [(1e5, {}, False), (-1e5, {"label_smoothing": 0.1}, True)],
    product((1e5, -1e5), ({}, {"label_smoothing": 0.1}), (False, True)),
)
def test_an_offset_changes_nothing(offset, options, probabilities):
    # Multiples of 1/8, which float32 holds exactly at 1e5.
    logits = jnp.round(normal((3, 5)) * 8) / 8
    labels = distributions((3, 5)) if probabilities else indices(3, 5)
    for got, want in zip(
        jax.value_and_grad(jaxce.cross_entropy)(logits + offset, labels, **options),
        jax.value_and_grad(jaxce.cross_entropy)(logits, labels, **options),
        strict=True,
    ):
        assert_close(got, want, 1e-6)


@cases(
    ("probabilities", "options"),
    [(False, {"label_smoothing": 0.2}), (True, {"logit_softcap": 3.0})],
    product((False, True), ({}, {"label_smoothing": 0.2}, {"z_loss": 0.1}, {"logit_softcap": 3.0})),
)
def test_impossible_classes(probabilities, options):
    logits = normal((2, 5)).at[:, 1].set(-jnp.inf)
    labels = jnp.array([0, 3])
    if probabilities:
        labels = jax.nn.one_hot(labels, 5)
    value, gradient = jax.value_and_grad(jaxce.cross_entropy)(logits, labels, **options)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (gradient[:, 1] == 0).all()
    assert (gradient[:, 0] != 0).all()


@pytest.mark.parametrize("label", [1, np.array([0.5, 0.5, 0, 0, 0], np.float32)], ids=["index", "probabilities"])
def test_an_impossible_label_has_no_finite_loss(label):
    assert not np.isfinite(jaxce.cross_entropy(normal(5).at[1].set(-jnp.inf), label))


@pytest.mark.parametrize("bad", [[-np.inf] * 4, [0, np.nan, 1, 2], [0, np.inf, 1, 2]], ids=["-inf", "NaN", "+inf"])
def test_a_row_that_has_no_softmax_is_nan_and_only_that_row(bad):
    logits = normal((3, 4)).at[1].set(jnp.array(bad, jnp.float32))
    losses, pull = jax.vjp(lambda x: jaxce.cross_entropy(x, jnp.array([0, 1, 2]), reduction="none"), logits)
    assert np.isnan(losses).tolist() == [False, True, False]
    assert np.isnan(pull(jnp.ones(3))[0]).any(1).tolist() == [False, True, False]
    assert np.isnan(jaxce.log_softmax(logits)).any(1).tolist() == [False, True, False]


def test_a_long_row_of_impossible_classes_is_nan():
    assert np.isnan(jaxce.cross_entropy(jnp.full(CPU_SLABS, -jnp.inf), 3))


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, jnp.float64])
def test_the_loss_is_wide_and_each_gradient_has_its_inputs_dtype(x64, dtype):
    logits, labels = normal((2, 5), dtype=dtype), distributions((2, 5)).astype(jnp.bfloat16)
    weight = jnp.ones(5, jnp.float16)
    loss, grads = jax.value_and_grad(lambda x, t, w: jaxce.cross_entropy(x, t, weight=w), (0, 1, 2))(
        logits, labels, weight
    )
    assert loss.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    assert [g.dtype for g in grads] == [dtype, jnp.bfloat16, jnp.float16]
    assert jaxce.log_softmax(logits).dtype == loss.dtype
    assert jax.grad(lambda x: jaxce.log_softmax(x)[0, 0])(logits).dtype == dtype


def test_a_probability_of_an_impossible_class_is_infinite():
    logits = jnp.array([0.0, -jnp.inf, 1.0])
    for probabilities, finite in (([0.5, 0.5, 0.0], False), ([0.5, 0.0, 0.5], True)):
        labels = jnp.array(probabilities)
        assert bool(jnp.isfinite(jaxce.cross_entropy(logits, labels))) == finite
        assert bool(jnp.isfinite(jaxce.nll_loss(logits, labels))) == finite


def test_what_is_left_out_behind_the_class_axis_reaches_no_gradient():
    logits, labels, weight = normal((3, 5, 4)), indices((3, 4), 5), positive((5,), 1)
    live = jnp.arange(12).reshape(3, 4) % 3 != 0

    def gradients(logits, axis):
        def loss(x, cap, weight):
            options = {"weight": weight, "logit_softcap": cap, "label_smoothing": 0.1}
            return jaxce.cross_entropy(x, labels, axis=axis, where=live, **options)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(logits, jnp.array(2.0), weight)

    dirty = gradients(jnp.where(live[:, None], logits, jnp.nan), 1)
    clean = gradients(jnp.moveaxis(logits, 1, -1), -1)
    assert_close(jnp.moveaxis(dirty[0], 1, -1), clean[0], 1e-5)
    assert_close(dirty[1], clean[1], 1e-5)
    assert_close(dirty[2], clean[2], 1e-5)


def test_nan_stays_in_its_long_row():
    # More than 32,768 classes take a form of their own on a CPU.
    logits, labels = normal((3, 40_960)).at[:2, 7].set(jnp.nan), jnp.array([-100, 5, 5])
    loss, gradient = jax.value_and_grad(lambda x: jaxce.cross_entropy(x, labels, reduction="sum"))(logits)
    each = jaxce.cross_entropy(logits, labels, reduction="none")
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(each), [False, True, False])
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.all(np.isnan(gradient[1]))
    assert np.all(np.isfinite(gradient[2]))
    assert float(gradient[2].sum()) == pytest.approx(0, abs=1e-5)


def test_nothing_flows_back_from_the_log_probability_of_an_impossible_class():
    logits = normal(5).at[2].set(-jnp.inf)
    _, pull = jax.vjp(jaxce.log_softmax, logits)
    want = pull(jnp.ones(5).at[2].set(0))[0]
    assert_close(pull(jnp.ones(5))[0], want, 1e-6)
    assert want[2] == 0
