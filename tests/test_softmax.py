"""The mathematics of one example; and every form of a platform gives what the textbook gives."""

import re
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, cases, distributions, normal, positive

import jaxce
from jaxce import _forms
from jaxce._math.example import TEXTBOOK, Stats, is_index, merge, partial_sums, read_stats

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


def cotangents(dtype=F64):
    return Stats(*(jnp.asarray(number, dtype) for number in (0.7, -0.3, 1.1, 0.6)))


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

    @jax.jit
    def both(*arrays):
        want, pull = jax.vjp(of_possible, *arrays)
        got = numbers_and_gradients(partial_sums(*arrays, smooth=True), *arrays)
        return got, (want, pull(Stats(*cotangents())))

    (stats, got), (want, expected) = both(logits, target, weight, softcap)
    assert_trees_close(stats, want)
    for gradient, exact in zip(got[: len(expected)], expected, strict=True):
        if gradient is not None:
            assert_close(gradient, exact)
    assert got.logits[IMPOSSIBLE] == 0
    assert (got.target is None) == is_index(target)


def numbers_and_gradients(sums, *arrays):
    """What the sums of a whole row say of the example."""
    stats, normalizer = read_stats(sums, arrays[1])
    return stats, TEXTBOOK.gradients(*arrays, None, normalizer, cotangents())


@TARGETS
@pytest.mark.parametrize("reference", [-40.0, 0.0, 40.0])
def test_numbers_and_gradients_are_the_same_relative_to_any_reference(reference, target):
    arrays = example(target)
    want = numbers_and_gradients(partial_sums(*arrays, smooth=True), *arrays)
    got = numbers_and_gradients(partial_sums(*arrays, jnp.asarray(reference, F64), smooth=True), *arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11), got, want)


@TARGETS
@pytest.mark.parametrize("cuts", [(5,), (2, 3, 7)], ids=["two parts", "a part of an impossible class alone"])
def test_merged_parts_are_the_whole(target, cuts):

    @jax.jit
    def in_parts_and_whole(logits, target, weight, softcap):
        parts = []
        for start, end in zip((0, *cuts), (*cuts, CLASSES), strict=True):
            of_part = target if is_index(target) else target[start:end]
            part = (logits[start:end], of_part, weight[start:end], softcap)
            # Some of the parts relative to another number than their largest logit.
            reference = jnp.asarray(-1.0, F64) if start % 2 else None
            parts.append(partial_sums(*part, reference, smooth=True, first_class=start))
        merged = merge(jax.tree.map(lambda *numbers: jnp.stack(numbers), *parts))
        whole = partial_sums(logits, target, weight, softcap, smooth=True)
        return tuple(read_stats(sums, target)[0] for sums in (merged, whole))

    assert_trees_close(*in_parts_and_whole(*example(target)))


def named(forms):
    return pytest.mark.parametrize("form", forms, ids=lambda form: form.__name__.rsplit(".", 1)[-1])


SUMS = [*_forms.CPU_SUMS, *_forms.GPU_SUMS]


@TARGETS
@cases(("first_class", "smooth"), [(4, False), (0, True)], product((0, 4), (False, True)))
@named(SUMS)
def test_forms_of_sums(form, first_class, smooth, target, monkeypatch):
    if hasattr(form, "LONGEST"):
        # So that a row of 12 classes is a long one.
        monkeypatch.setattr(form, "LONGEST", 6)
        monkeypatch.setattr(form, "SHORTEST_SLAB", 1)
    logits, target, weight, softcap = example(target)
    near = jnp.asarray(4.0, F64)  # to the largest logit
    inputs = [
        (logits, target, weight, softcap, None),
        (logits, target, None, None),
        (logits, target, weight, None, near),
    ]
    # What is for labels alone fits no probabilities.
    assert any(form.fits(*arrays) for arrays in inputs) or (form in _forms.GPU_SUMS and not is_index(target))
    for arrays in inputs:
        if form.fits(*arrays):
            want = TEXTBOOK.sums(*arrays, smooth=smooth, first_class=first_class)
            got = form.sums(TEXTBOOK.sums, *arrays, smooth=smooth, first_class=first_class)
            # Of a single part, `merge` makes sums relative to its largest logit.
            parts = (jax.tree.map(lambda number: number[None], sums) for sums in (got, want))
            numbers, exact = (read_stats(merge(part), target) for part in parts)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), numbers, exact)


@TARGETS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("live", [None, False, True])
@named(_forms.CPU_GRADIENTS)
def test_forms_of_gradients(form, live, weighted, target):
    logits, *rest = example(target)
    # Of 16 bits, which every form fits.
    arrays = (logits.astype(jnp.float16), *rest) if weighted else (logits.astype(jnp.float16), rest[0], None, None)
    _, normalizer = read_stats(TEXTBOOK.sums(*arrays, smooth=True), arrays[1])
    if live is False:
        arrays = (arrays[0].at[0].set(jnp.nan), *arrays[1:])
    live = None if live is None else jnp.asarray(live)
    inputs = (*arrays, live, normalizer, cotangents(np.float32))
    want = TEXTBOOK.gradients(*inputs)
    assert form.fits(*inputs) or weighted or live is None
    got = form.gradients(TEXTBOOK.gradients, *inputs, first_class=0) if form.fits(*inputs) else want
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, want)
    assert bool(jnp.any(got.logits)) == (live is None or bool(live))


@pytest.mark.parametrize("probabilities", [0.1, 0.0])
def test_a_probability_of_an_impossible_class_is_infinite_in_every_form(probabilities):
    target = distributions(CLASSES, 0, 1, F64).at[IMPOSSIBLE].set(probabilities)
    for sums in (*(partial(form.sums, TEXTBOOK.sums) for form in _forms.CPU_SUMS), TEXTBOOK.sums):
        total = sums(example(0)[0], target, None, None, smooth=False, first_class=0)
        assert bool(jnp.isinf(read_stats(total, target)[0].nll)) == (probabilities > 0)


@pytest.mark.form("any of them")
def test_each_platform_carries_its_own_forms():
    def program(platform):
        rows = jax.ShapeDtypeStruct((2, 40_960), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
        loss = jax.jit(partial(jaxce.cross_entropy, logit_softcap=30.0))
        return jax.export.export(loss, platforms=[platform])(*rows).mlir_module()

    programs = {platform: program(platform) for platform in ("cpu", "cuda", "tpu")}
    caps = {platform: len(re.findall("stablehlo.tanh|chlo.tanh", text)) for platform, text in programs.items()}
    assert caps["tpu"] < caps["cuda"]
    assert "optimization_barrier" in programs["cpu"]
    assert "optimization_barrier" not in programs["tpu"] + programs["cuda"]
