"""What the package promises of itself: names, imports, memory, and compilations."""

import inspect
import os
import subprocess
import sys
import typing
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import planted_bugs
import pytest
from helpers import cases, for_figures, indices, normal

import jaxce
from jaxce._api.projections import ProjectionKeywords
from jaxce._api.scores import ScoresKeywords


def test_public_names():
    assert set(jaxce.__all__) == {
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
    }
    assert all(hasattr(jaxce, name) for name in jaxce.__all__)


@pytest.mark.parametrize(
    ("function", "keywords"),
    [(jaxce.cross_entropy, ScoresKeywords), (jaxce.linear_cross_entropy, ProjectionKeywords)],
    ids=["cross_entropy", "linear_cross_entropy"],
)
def test_signatures_are_what_the_overloads_say(function, keywords):
    """`help()` shows the one, and type checkers go by the others."""
    shown = {
        name: parameter.annotation
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY and name != "return_stats"
    }
    assert shown == typing.get_type_hints(keywords)
    for overload in typing.get_overloads(function):
        *_, stats, options = inspect.signature(overload).parameters.values()
        assert stats.name == "return_stats"
        assert options.annotation == typing.Unpack[keywords]
    assert len(typing.get_overloads(function)) == 2


def test_import_changes_no_setting_and_starts_no_backend():
    # A backend of that name can't start, so that anything that computes or compiles fails.
    program = """
import jax
before = dict(jax.config.values)
import jaxce
assert dict(jax.config.values) == before
try:
    jax.devices()
except RuntimeError:
    print("no backend")
"""
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no backend\n"


def test_import_works_where_checkify_is_not_what_it_was():
    """Then labels out of range still give NaN; the message under checkify is lost."""
    program = """
import sys
import jax
import jax.extend.core
from jax.experimental import checkify
sys.modules["jax._src.checkify"] = None
del jax._src.checkify
import jaxce, jax.numpy as jnp
assert jnp.isnan(jaxce.cross_entropy(jnp.zeros((1, 3)), jnp.array([3])))
error, loss = checkify.checkify(jaxce.cross_entropy)(jnp.zeros((1, 3)), jnp.array([3]))
assert jnp.isnan(loss)
print(error.get())
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n"


def test_planted_bugs_fit_the_source():
    assert list(planted_bugs.misfits()) == []
    assert len(planted_bugs.BUGS) >= 30


def compiled(function, shape, dtype):
    labels = jax.ShapeDtypeStruct(shape[:-1], jnp.int32)
    return jax.jit(function).lower(jax.ShapeDtypeStruct(shape, dtype), labels).compile()


SHORT = [(4096, 1000), (256, 32_000)]
# Rows with a divisor of 16, and with an odd one: GPT-2's 50,257 is 29 · 1733.
LONG = [(512, 128_256), (128, 50_257)]


IMAGES = (4, 150, 64, 64)
SMOOTHED, OF_PROBABILITIES = {"label_smoothing": 0.1, "weight": True}, {"probabilities": True, "weight": True}
CAPPED, WITH_STATS = {"logit_softcap": 5.0, "z_loss": 0.1}, {"return_stats": True}


@pytest.mark.form("cpu_one_pass, cpu_long_rows and cpu_recomputed")
@cases(
    ("shape", "options", "derivative", "dtype"),
    [
        (SHORT[0], {}, True, jnp.float32),
        (SHORT[0], OF_PROBABILITIES, True, jnp.bfloat16),
        (SHORT[0], CAPPED, False, jnp.bfloat16),
        (SHORT[1], {}, True, jnp.bfloat16),
        (LONG[0], SMOOTHED, True, jnp.bfloat16),
        (LONG[0], WITH_STATS, False, jnp.float32),
        (LONG[0], CAPPED, True, jnp.float32),
        (LONG[1], {}, True, jnp.float32),
        (IMAGES, {"axis": 1}, True, jnp.bfloat16),
        (IMAGES, {"axis": 1, "label_smoothing": 0.1}, True, jnp.float32),
    ],
    [
        (*case, derivative, dtype)
        for case, derivative, dtype in product(
            [
                *((shape, {}) for shape in SHORT + LONG),
                *product((SHORT[0], LONG[0]), (SMOOTHED, OF_PROBABILITIES, CAPPED, WITH_STATS)),
                (IMAGES, {"axis": 1}),
                (IMAGES, {"axis": 1, "label_smoothing": 0.1}),
            ],
            (False, True),
            (jnp.float32, jnp.bfloat16),
        )
    ],
)
def test_no_temporary_array_of_the_logits_size(shape, options, derivative, dtype):
    if dtype == jnp.bfloat16 and jax.__version_info__ < (0, 12):
        pytest.skip("before JAX 0.12, XLA:CPU stores a float32 copy of 16-bit logits")
    axis = options.get("axis", -1) % len(shape)
    options, batch = dict(options), shape[:axis] + shape[axis + 1 :]
    logits, labels = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(batch, jnp.int32)
    if options.pop("probabilities", False):
        labels = jax.ShapeDtypeStruct(shape, jnp.float32)
    if options.get("weight"):
        options["weight"] = jnp.ones(shape[axis])

    def function(x, y):
        return jaxce.cross_entropy(x, y, **options)

    if derivative:
        function = jax.value_and_grad(function, has_aux="return_stats" in options)
    program = for_figures(jax.jit(function).lower(logits, labels))
    assert "scatter" not in program.as_text()
    temporaries = program.memory_analysis().temp_size_in_bytes
    # 5% of the logits; or sixteen numbers an example, where that is more.
    assert temporaries <= max(0.05 * np.prod(shape) * jnp.dtype(dtype).itemsize, 16 * 4 * np.prod(batch))


OFF = {
    "weight": None,
    "sample_weight": None,
    "where": None,
    "label_smoothing": 0.0,
    "z_loss": 0,
    "logit_softcap": None,
    "axis": 1,
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.value_and_grad], ids=["loss", "gradient"])
@pytest.mark.parametrize(
    "same",
    [
        lambda x, y: jaxce.cross_entropy(x, y, **OFF),
        lambda x, y: jaxce.cross_entropy(x, y, return_stats=True)[0],
    ],
    ids=["options that are off", "stats that nobody reads"],
)
def test_what_is_off_costs_nothing(same, wrap):
    costs = [compiled(wrap(f), (64, 300), jnp.float32).cost_analysis() for f in (jaxce.cross_entropy, same)]
    assert costs[0]["flops"] > 0
    assert costs[0] == costs[1]
    more = compiled(wrap(lambda x, y: jaxce.cross_entropy(x, y, label_smoothing=0.1)), (64, 300), jnp.float32)
    assert more.cost_analysis()["flops"] > costs[0]["flops"]


ROW = jax.ShapeDtypeStruct((4,), jnp.int32)


@pytest.mark.parametrize(
    ("loss", "arrays"),
    [
        (jaxce.cross_entropy, [(4, 300)]),
        (jaxce.cross_entropy, [(4, 65_536)]),
        (partial(jaxce.linear_cross_entropy, strategy="tokens", chunk_size=2), [(4, 8), (8, 300)]),
        (partial(jaxce.linear_cross_entropy, strategy="classes", chunk_size=100), [(4, 8), (8, 300)]),
    ],
    ids=["short rows", "slabs", "tokens", "classes"],
)
def test_the_entropy_costs_nothing_where_nobody_reads_it(loss, arrays):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arrays]

    def flops(read):
        return jax.jit(read).lower(*arrays, ROW).compile().cost_analysis()["flops"]

    alone, read = flops(loss), flops(lambda *a: (loss(*a), loss(*a, return_stats=True)[1].entropy))
    # Two operations for each logit of a slab.
    assert read > 1.2 * alone


def test_new_values_compile_nothing(compilations):
    logits, labels = np.asarray(normal((3, 11))), np.asarray(indices(3, 11))
    jaxce.cross_entropy(logits, labels, label_smoothing=0.1)
    assert compilations, "the counter must see a compilation where there is one"
    # What turns a list or an array into the loss's own inputs is compiled once as well.
    jaxce.cross_entropy(logits.tolist(), labels.tolist(), label_smoothing=0.1)
    jaxce.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), label_smoothing=0.1)
    count = len(compilations)
    for smoothing in (0.2, 0.3, np.float64(0.4), np.float32(0.5)):
        jaxce.cross_entropy(logits + 1, labels[::-1].copy(), label_smoothing=smoothing)
        jaxce.cross_entropy(logits.tolist(), labels.tolist(), label_smoothing=smoothing)
        jaxce.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing)
    assert compilations[count:] == []
