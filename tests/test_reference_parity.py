"""Every combination of options against `jaxce.reference`, in float64: values, and gradients in every float input."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, cases, distributions, indices, normal, positive, value_and_grads

import jaxce

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.values]

F64 = np.float64
SHAPE, CLASSES, AXIS = (3, 5, 2), 5, 1
SWITCHES = ["weight", "sample_weight", "label_smoothing", "z_loss", "logit_softcap"]


def float_inputs(probabilities, switched_on, shape=SHAPE, axis=AXIS):
    floats = {
        "weight": positive(CLASSES, 1, F64),
        "sample_weight": positive(shape[:axis] + shape[axis + 1 :], 2, F64),
        "label_smoothing": jnp.asarray(0.3, F64),
        "z_loss": jnp.asarray(0.1, F64),
        "logit_softcap": jnp.asarray(1.5, F64),
    }
    floats = {name: value for name, value in floats.items() if name in switched_on}
    if probabilities:
        # Targets needn't sum to one, and nothing may assume that they do.
        floats["labels"] = distributions(shape, axis, dtype=F64) * positive(shape, 3, F64)
    return floats


def left_out(probabilities):
    """Options that leave out some of the examples, in every way that applies."""
    options = {"where": jnp.array([[True], [True], [False]])}
    return options if probabilities else {**options, "ignore_index": 4}


def combinations():
    """Sets of switches, with indices or probabilities: any three of the six take all their values together.

    A quarter of all combinations does that. Masks and reductions take turns among them.
    """
    for number, bits in enumerate(product((False, True), repeat=4)):
        weight, sample_weight, label_smoothing, z_loss = bits
        switches = (*bits, weight ^ sample_weight ^ label_smoothing)
        probabilities = sample_weight ^ label_smoothing ^ z_loss
        switched_on = tuple(name for name, on in zip(SWITCHES, switches, strict=True) if on)
        yield switched_on, probabilities, number // 2 % 2 == 1, ("none", "sum", "mean")[number % 3]


COMBINATIONS = list(combinations())


# Of the quick ones any two of the six take all their values together.
QUICK = [COMBINATIONS[number] for number in (0, 2, 5, 7, 9, 11, 12, 14)]


@cases(("switched_on", "probabilities", "masked", "reduction"), QUICK, COMBINATIONS)
def test_cross_entropy_is_the_textbook_formula(switched_on, probabilities, masked, reduction):
    floats = {"logits": normal(SHAPE, 0, F64), **float_inputs(probabilities, switched_on)}
    options = {"axis": AXIS, "reduction": reduction, **(left_out(probabilities) if masked else {})}
    if not probabilities:
        options["labels"] = jnp.array([[0, 4], [1, 2], [4, 3]])
    got = value_and_grads(jaxce.cross_entropy, floats, **options)
    want = value_and_grads(jaxce.reference.cross_entropy, floats, **options)
    assert_trees_close(got, want)


LAST, MIDDLE = ((6, 5), 1, SWITCHES), (SHAPE, AXIS, ("weight", "label_smoothing"))


@cases(
    ("probabilities", "shape", "axis", "switched_on"),
    [(False, *LAST), (True, *MIDDLE)],
    [(True, *LAST), (False, *MIDDLE)],
)
def test_few_classes(probabilities, shape, axis, switched_on):
    batch = shape[:axis] + shape[axis + 1 :]
    # The reference's gradient of a soft cap is NaN where a class is impossible.
    logits = normal(shape, 0, F64).at[0, 1].set(-1.0 if "logit_softcap" in switched_on else -np.inf)
    floats = {"logits": logits, **float_inputs(probabilities, switched_on, shape, axis)}
    options = {"axis": axis, "reduction": "none", "where": jnp.ones(batch, bool).at[1].set(False)}
    if probabilities:
        floats["labels"] = jnp.where(logits == -np.inf, 0, floats["labels"])
    else:
        options["labels"] = indices(batch, CLASSES)
    want = value_and_grads(jaxce.reference.cross_entropy, floats, **options)
    assert_trees_close(value_and_grads(jaxce.cross_entropy, floats, **options), want)
    assert_close(jaxce.cross_entropy(**floats, **options), want[0])
    low = {**floats, "logits": logits.astype(jnp.float16)}
    want = value_and_grads(jaxce.reference.cross_entropy, {**low, "logits": low["logits"].astype(F64)}, **options)
    assert_trees_close(value_and_grads(jaxce.cross_entropy, low, **options), want, 4e-3)


REDUCTIONS = [("none", True), ("sum", False), ("mean", True), ("mean", False)]


@cases(
    ("switched_on", "probabilities", "reduction", "masked"),
    [
        ((), True, "none", True),
        (("weight",), False, "sum", False),
        (("weight", "sample_weight"), False, "mean", True),
        (("weight", "sample_weight"), True, "mean", False),
    ],
    [
        (switched_on, probabilities, *reduction)
        for switched_on, probabilities, reduction in product(
            [(), ("weight",), ("weight", "sample_weight")], (False, True), REDUCTIONS
        )
    ],
)
def test_nll_loss_is_the_textbook_formula(switched_on, probabilities, masked, reduction):
    log_probs = jax.nn.log_softmax(normal(SHAPE, 0, F64), AXIS)
    floats = {"log_probs": log_probs, **float_inputs(probabilities, switched_on)}
    options = {"axis": AXIS, "reduction": reduction, **(left_out(probabilities) if masked else {})}
    if not probabilities:
        options["labels"] = jnp.array([[0, 4], [1, 2], [4, 3]])
    got = value_and_grads(jaxce.nll_loss, floats, **options)
    want = value_and_grads(jaxce.reference.nll_loss, floats, **options)
    assert_trees_close(got, want)


@cases(
    ("axis", "masked"), [(-2, True), (-1, False), (0, True), (1, False)], product((-3, -2, -1, 0, 1, 2), (False, True))
)
def test_log_softmax_is_the_textbook_formula(axis, masked):
    # The third class of every row along every axis that is masked stays in, so that no row is empty.
    where = jnp.arange(30).reshape(SHAPE) % 3 != 1 if masked else None
    live = jnp.ones(SHAPE, bool) if where is None else where

    def finite(log_softmax, logits):
        return jnp.where(live, log_softmax(logits, axis, where=where), 0)

    floats = {"logits": normal(SHAPE, 0, F64)}
    got = value_and_grads(lambda logits: finite(jaxce.log_softmax, logits), floats)
    want = value_and_grads(lambda logits: finite(jaxce.reference.log_softmax, logits), floats)
    assert_trees_close(got, want)
    if masked:
        assert np.all(np.asarray(jaxce.log_softmax(floats["logits"], axis, where=where))[~np.asarray(where)] == -np.inf)


@cases(("axis", "probabilities"), [(-3, False), (1, True)], [(-3, True), (1, False)])
def test_the_class_axis_may_be_anywhere(axis, probabilities):
    batch = SHAPE[: axis % 3] + SHAPE[axis % 3 + 1 :]
    floats = {
        "logits": normal(SHAPE, 0, F64),
        "weight": positive(SHAPE[axis], 1, F64),
        "sample_weight": positive(batch, 2, F64),
    }
    options = {"axis": axis, "where": jnp.ones(batch, bool).at[0, 0].set(False)}
    if probabilities:
        floats["labels"] = distributions(SHAPE, axis, dtype=F64)
    else:
        options["labels"] = indices(batch, SHAPE[axis])
    for ours, theirs, name in [
        (jaxce.cross_entropy, jaxce.reference.cross_entropy, "logits"),
        (jaxce.nll_loss, jaxce.reference.nll_loss, "log_probs"),
    ]:
        named = {name if key == "logits" else key: value for key, value in floats.items()}
        assert_trees_close(value_and_grads(ours, named, **options), value_and_grads(theirs, named, **options))


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 1, 3, 7)])
def test_any_number_of_batch_axes(shape):
    logits, labels = normal(shape, 0, F64), indices(shape[:-1], shape[-1])
    (value, gradient), (want, want_gradient) = (
        jax.jit(jax.value_and_grad(loss))(logits, labels, z_loss=0.1)
        for loss in (jaxce.cross_entropy, jaxce.reference.cross_entropy)
    )
    assert_close(value, want)
    assert_close(gradient, want_gradient)
