"""The mathematics of one example; and every form of a platform gives what the textbook gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, distributions, normal, positive

from jaxce import _forms
from jaxce._forms import cpu_few_classes, cpu_long_rows, cpu_one_pass, cpu_recomputed, cpu_short_rows, gpu_soft_cap
from jaxce._softmax import TEXTBOOK, Cotangents, Stats, is_index, merge, partial_sums, read_stats

pytestmark = pytest.mark.usefixtures("x64")

F64 = np.float64
CLASSES, IMPOSSIBLE = 12, 2
POSSIBLE = np.delete(np.arange(CLASSES), IMPOSSIBLE)
TARGETS = pytest.mark.parametrize("target", [0, CLASSES - 1, "probabilities"])


def example(target):
    """Logits with an impossible class, a target, class weights and a cap."""
    logits = (3 * normal(CLASSES, 0, F64)).at[IMPOSSIBLE].set(-jnp.inf)
    if target == "probabilities":
        target = distributions(CLASSES, 0, 1, F64).at[IMPOSSIBLE].set(0)
    return logits, jnp.asarray(target), positive(CLASSES, 2, F64), jnp.asarray(5.0, F64)


def cotangents():
    return Cotangents(*(jnp.asarray(number, F64) for number in (0.7, -0.3, 1.1, 0.6)))


def formulas(x, t, weight, softcap):
    """The numbers as textbooks write them, of classes that can happen and a target for each."""
    x = softcap * jnp.tanh(x / softcap)
    log_p, log_z = jax.nn.log_softmax(x), jax.nn.logsumexp(x)
    return Stats(-(t * log_p).sum(), -(weight * log_p).sum(), log_z, -(jnp.exp(log_p) * log_p).sum())


@TARGETS
def test_numbers_and_their_gradients_are_the_formulas(target):
    logits, target, weight, softcap = example(target)

    def of_possible(logits, target, weight, softcap):
        t = jax.nn.one_hot(target, CLASSES) if is_index(target) else target * weight
        return formulas(logits[POSSIBLE], t[POSSIBLE], weight[POSSIBLE], softcap)

    arrays = (logits, target, weight, softcap)
    stats, normalizer = read_stats(partial_sums(*arrays, smooth=True), target)
    want, pull = jax.vjp(of_possible, *arrays)
    assert_trees_close(stats, want)
    got = TEXTBOOK.gradients(*arrays, None, normalizer, cotangents())
    expected = pull(Stats(*cotangents()))
    for gradient, exact in zip(got, expected, strict=True):
        if gradient is not None:
            assert_close(gradient, exact)
    assert got.logits[IMPOSSIBLE] == 0
    assert (got.target is None) == is_index(target)


@TARGETS
@pytest.mark.parametrize("cuts", [(5,), (2, 3, 7)], ids=["two parts", "a part of an impossible class alone"])
def test_merged_parts_are_the_whole(target, cuts):
    logits, target, weight, softcap = example(target)
    parts = []
    for start, end in zip((0, *cuts), (*cuts, CLASSES), strict=True):
        of_part = target if is_index(target) else target[start:end]
        part = (logits[start:end], of_part, weight[start:end], softcap)
        parts.append(partial_sums(*part, smooth=True, first_class=start))
    merged = merge(jax.tree.map(lambda *numbers: jnp.stack(numbers), *parts))
    whole = partial_sums(logits, target, weight, softcap, smooth=True)
    assert_trees_close(read_stats(merged, target)[0], read_stats(whole, target)[0])


SUMS = {
    form.__name__.rsplit(".", 1)[-1]: form.sums for form in (cpu_few_classes, cpu_long_rows, cpu_one_pass, gpu_soft_cap)
}


@TARGETS
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("first_class", [0, 4])
@pytest.mark.parametrize("form", SUMS)
def test_forms_of_sums(form, first_class, smooth, target, monkeypatch):
    monkeypatch.setattr(cpu_long_rows, "LONGEST", 6)
    monkeypatch.setattr(cpu_long_rows, "SHORTEST_SLAB", 1)
    arrays, (capped, cap) = example(target), (example(target), None)
    for inputs in (capped, (*arrays[:2], None, cap)):
        want = TEXTBOOK.sums(*inputs, smooth=smooth, first_class=first_class)
        got = SUMS[form](TEXTBOOK.sums, *inputs, smooth=smooth, first_class=first_class)
        numbers, exact = (read_stats(sums, arrays[1]) for sums in (got, want))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), numbers, exact)


GRADIENTS = {"cpu_short_rows": cpu_short_rows.gradients, "cpu_recomputed": cpu_recomputed.gradients}


@TARGETS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("live", [None, False, True])
@pytest.mark.parametrize("form", GRADIENTS)
def test_forms_of_gradients(form, live, weighted, target):
    logits, target, weight, softcap = example(target)
    arrays = (logits, target, weight, softcap) if weighted else (logits, target, None, None)
    _, normalizer = read_stats(TEXTBOOK.sums(*arrays, smooth=True), target)
    if live is False:
        arrays = (arrays[0].at[0].set(jnp.nan), *arrays[1:])
    live = None if live is None else jnp.asarray(live)
    want = TEXTBOOK.gradients(*arrays, live, normalizer, cotangents())
    got = GRADIENTS[form](TEXTBOOK.gradients, *arrays, live, normalizer, cotangents(), first_class=0)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), got, want)
    assert bool(jnp.any(got.logits)) == (live is None or bool(live))


@pytest.mark.parametrize("probabilities", [0.1, 0.0])
def test_a_probability_of_an_impossible_class_is_infinite_in_every_form(probabilities):
    target = distributions(CLASSES, 0, 1, F64).at[IMPOSSIBLE].set(probabilities)
    for sums in (*SUMS.values(), lambda _, *arrays, **options: TEXTBOOK.sums(*arrays, **options)):
        total = sums(TEXTBOOK.sums, example(0)[0], target, None, None, smooth=False, first_class=0)
        assert bool(jnp.isinf(read_stats(total, target)[0].nll)) == (probabilities > 0)


@pytest.mark.form("all")
def test_the_forms_are_behind_the_door():
    assert _forms.chosen() != TEXTBOOK
    text = jax.jit(lambda x: _forms.chosen().sums(x, None, None, None, smooth=False).total.exp).lower(jnp.zeros(9))
    assert text.compile().as_text().count(" reduce(") >= 1
