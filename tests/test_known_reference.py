"""The loops of a GPU and a TPU, tried out on a CPU: sums relative to a number that is known before the logits are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, cases, distributions, indices, normal, positive

import jaxce
from jaxce import _platform
from jaxce._math.example import partial_sums
from jaxce._projection import chunks
from jaxce._projection.loops import auto, one_pass

N, D, C = 12, 5, 40
LABELS = indices((N,), C, 3).at[4].set(-100)
pytestmark = pytest.mark.any_jax
LOOPS = pytest.mark.parametrize("loop", ["tokens", "classes"])


@pytest.fixture(autouse=True, scope="module")
def short_first_slabs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "FIRST_CLASSES", 4)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def elsewhere(request, monkeypatch):
    """On a TPU, or with the loop over tokens on a GPU: there they go without maxima."""
    options = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    monkeypatch.setattr(_platform, "pretended", "gpu" if options.get("loop") == "tokens" else "tpu")


def problem(bias=0.0, scale=0.5, dtype=np.float64):
    """The bias makes some classes far likelier than others; -inf rules a class out."""
    return {
        "hidden": normal((N, D), 0, dtype),
        "kernel": (normal((D, C), 1, dtype) * scale).astype(dtype),
        "bias": jnp.broadcast_to(jnp.asarray(bias, dtype), (C,)),
    }


def dense(hidden, kernel, labels, *, bias, **options):
    return jaxce.reference.cross_entropy(hidden @ kernel + bias, labels, **options)


def loss(loop, **options):
    return partial(jaxce.linear_cross_entropy, strategy=loop, chunk_size=7, precision="highest", **options)


def value_and_grads(loss, arrays, labels=LABELS):
    return jax.jit(jax.value_and_grad(lambda arrays, labels: loss(**arrays, labels=labels)))(arrays, labels)


LAST, FIRST = np.arange(C) == C - 1, np.arange(C) < 15
BIASES = {
    "a hot class in the last slab": np.where(LAST, 1e4, 0.0),
    "each slab above the one before": 100.0 * (np.arange(C) // 7),
    "each slab below the one before": -100.0 * (np.arange(C) // 7),
    "first slabs impossible": np.where(FIRST, -np.inf, 0.0),
    "first slabs impossible, the others small": np.where(FIRST, -np.inf, -1000.0),
    "first classes impossible, the others small": np.where(np.arange(C) < 4, -np.inf, -1000.0),
    "last slab impossible": np.where(np.arange(C) >= 35, -np.inf, 0.0),
    "all classes but one impossible": np.where(LAST, 0.0, -np.inf),
}


@pytest.fixture(scope="module")
def compiled():
    """The losses and their gradients, compiled once for all of the biases."""
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    losses = {loop: loss(loop, **options) for loop in ("tokens", "classes")} | {"dense": partial(dense, **options)}
    return {name: jax.jit(partial(value_and_grads, loss)) for name, loss in losses.items()}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@LOOPS
def test_a_far_reference_changes_nothing(loop, bias, compiled, x64):
    arrays = problem(bias)
    # The label is a class that can happen.
    labels = jnp.where(jnp.isinf(arrays["bias"][LABELS]) & (LABELS != -100), int(np.argmax(bias)), LABELS)
    assert_trees_close(compiled[loop](arrays, labels), compiled["dense"](arrays, labels), 1e-10)


@LOOPS
def test_stats_relative_to_a_far_reference(loop, x64):
    arrays = problem(BIASES["each slab above the one before"])
    _, got = loss(loop, return_stats=True)(**arrays, labels=LABELS)
    logits = arrays["hidden"] @ arrays["kernel"] + arrays["bias"]
    _, want = jaxce.cross_entropy(logits, LABELS, return_stats=True)
    for name in ("nll", "log_z", "entropy"):
        assert_close(getattr(got, name), getattr(want, name), 1e-11)
    assert got.predicted[LABELS != -100].tolist() == want.predicted[LABELS != -100].tolist()


@cases(("reduction", "probabilities"), [("none", True)], [("mean", False)])
def test_blocks_of_tokens_beside_a_slab(reduction, probabilities, monkeypatch, x64):
    """Blocks of 5 tokens, and a rest of 2."""
    monkeypatch.setattr(auto, "tokens_beside_a_slab", lambda plan, inputs: 5)
    arrays = problem() | {"weight": positive((C,), 5, np.float64)}
    labels = distributions((N, C), dtype=np.float64) if probabilities else LABELS
    options = {"reduction": reduction, "label_smoothing": 0.1}

    def weighted(loss):
        return lambda labels, **arrays: (positive((N,), 7, np.float64) * loss(**arrays, labels=labels)).sum()

    ours, theirs = (weighted(f) for f in (loss("classes", **options), partial(dense, **options)))
    assert_trees_close(value_and_grads(ours, arrays, labels), value_and_grads(theirs, arrays, labels), 1e-10)
    if probabilities:
        of_labels = (jax.jit(jax.grad(lambda labels, f=f: f(labels, **arrays)))(labels) for f in (ours, theirs))
        assert_close(*of_labels, 1e-10)


@cases("transposed", [True], [False])
def test_kernels_that_a_tpu_lays_out_the_other_way(transposed, x64):
    """Their last axis isn't a multiple of 128, the other one is."""
    features, classes = (6, 128) if transposed else (128, 40)
    kernel = normal((128, 6) if transposed else (128, 40), 1, np.float64)
    arrays, labels = {"hidden": normal((N, features), 0, np.float64), "kernel": kernel}, indices((N,), classes, 3)

    def of_logits(hidden, kernel, labels):
        return jaxce.reference.cross_entropy(hidden @ (kernel.T if transposed else kernel), labels)

    got = value_and_grads(loss("classes", transpose_kernel=transposed), arrays, labels)
    assert_trees_close(got, value_and_grads(of_logits, arrays, labels), 1e-10)


@cases("loop", ["classes"], ["tokens"])
def test_one_column_300_times_the_others_in_16_bits(loop):
    arrays = problem(dtype=np.float32)
    arrays = jax.tree.map(lambda a: a.astype(jnp.float16), arrays | {"kernel": arrays["kernel"].at[:, -3].mul(300)})
    got = value_and_grads(loss(loop), arrays)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
    value, gradients = value_and_grads(dense, exact)
    assert_close(got[0], value, 1e-5)
    assert_trees_close(jax.tree.map(lambda g: g.astype(jnp.float32), got[1]), gradients, 3e-3)


@cases("loop", ["tokens"], ["classes"])
def test_nan_stays_where_it_is(loop):
    arrays = problem(dtype=np.float32)
    arrays["hidden"] = arrays["hidden"].at[2].set(jnp.nan).at[4].set(jnp.inf)
    arrays["bias"] = arrays["bias"].at[20].set(1e4)
    losses = loss(loop, reduction="none")(**arrays, labels=LABELS)
    assert jnp.isnan(losses).tolist() == [i == 2 for i in range(N)]
    impossible = loss(loop)(**{**arrays, "bias": jnp.full(C, -jnp.inf)}, labels=LABELS)
    assert jnp.isnan(impossible)


@cases("loop", ["tokens"], ["classes"])
def test_vmap_where_one_of_the_models_is_far(loop, x64):
    biases = jnp.stack([jnp.zeros(C), jnp.asarray(BIASES["a hot class in the last slab"]), jnp.zeros(C)])
    arrays = problem()
    grads, want = (
        jax.jit(jax.vmap(lambda bias, each=each: value_and_grads(each, arrays | {"bias": bias})))(biases)
        for each in (loss(loop), dense)
    )
    assert_trees_close(grads, want, 1e-10)


@pytest.mark.thorough
@cases("loop", ["classes"], ["tokens"])
def test_second_derivatives_relative_to_a_far_reference(loop, x64):
    arrays = problem(BIASES["each slab above the one before"] / 50)
    direction = jax.tree.map(lambda a: normal(a.shape, 9, np.float64), arrays)

    def derivatives(loss):
        """A Hessian-vector product, and the gradient of the gradient's square."""
        gradient = jax.grad(lambda a: loss(**a, labels=LABELS))

        @jax.jit
        def both(arrays, direction):
            square = jax.grad(lambda a: sum((g**2).sum() for g in jax.tree.leaves(gradient(a))))
            return jax.jvp(gradient, (arrays,), (direction,))[1], square(arrays)

        return both(arrays, direction)

    assert_trees_close(derivatives(loss(loop)), derivatives(dense), 1e-9)


def test_sums_are_made_again_only_where_the_reference_was_far(x64):
    logits, labels = normal((3, C), 0, np.float64), jnp.arange(3, dtype=jnp.int32)

    def sums(reference, logits):
        of_one = jax.vmap(lambda *row: partial_sums(row[0], row[1], None, None, row[2], smooth=False))
        return of_one(logits, labels, reference)

    reference = logits.max(1) - jnp.array([0.0, 5.0, one_pass.FAR - 1])
    assert jnp.array_equal(one_pass.relative_to(sums, reference, logits).reference, reference)
    reference = reference.at[1].set(-one_pass.FAR)
    again = one_pass.relative_to(sums, reference, logits)
    assert jnp.array_equal(again.reference, logits.max(1))
    assert_trees_close(again.total, sums(logits.max(1), logits).total)
    assert jnp.array_equal(one_pass.relative_to(sums, jnp.full(3, -jnp.inf), logits).reference, logits.max(1))


@jax.custom_vjp
def rounds_its_gradient(logits, like):
    return logits


rounds_its_gradient.defvjp(
    lambda logits, like: (logits, like), lambda like, g: (g.astype(like.dtype).astype(g.dtype), None)
)


# With few classes the rounding of the logit gradients shows, which keeps the matmuls in 16 bits.
FEW = [(96, jnp.bfloat16, 1, 1.3), (96, jnp.float16, 30, 1.3), (96, jnp.float16, 1e4, 1.3)]
# With a vocabulary it drowns in that of the gradients themselves.
MANY = (8192, jnp.bfloat16, 1, 1.02)


@cases(
    ("loop", "c", "dtype", "scale", "allowed"),
    [("tokens", *FEW[0]), ("classes", *FEW[2])],
    [(loop, *case) for loop in ("tokens", "classes") for case in (*FEW, MANY)],
)
def test_error_in_16_bits_beside_that_of_dense(loop, c, dtype, scale, allowed):
    """Against float64, beside the dense loss with float32 logits: whose gradients a TPU's matmuls round, or nobody."""
    n, d = 256, 16
    arrays = normal((n, d), 0).astype(dtype), (normal((d, c), 1) / 4 * scale).astype(dtype)
    labels = indices((n,), c)

    def plain(hidden, kernel):
        return jaxce.reference.cross_entropy(jnp.dot(hidden, kernel, preferred_element_type=jnp.float32), labels)

    def as_a_tpu_multiplies(hidden, kernel):
        logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        return jaxce.reference.cross_entropy(rounds_its_gradient(logits, hidden), labels, reduction="sum") / n

    def fused(hidden, kernel):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, strategy=loop, chunk_size=c // 12)

    with jax.enable_x64(True):
        exact = tuple(a.astype(jnp.float64) for a in arrays)
        want = jax.jit(jax.value_and_grad(lambda h, w: jaxce.reference.cross_entropy(h @ w, labels), (0, 1)))(*exact)

    def errors(loss):
        (value, grads), (true, true_grads) = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays), want
        yield abs(float(value) - float(true)) / float(true)
        for gradient, true in zip(grads, true_grads, strict=True):
            exact = np.asarray(true)
            yield np.linalg.norm(np.asarray(gradient, np.float64) - exact) / np.linalg.norm(exact)

    # Logits that are made twice, in an order of additions each, differ by the rounding of float32.
    rounding = float(jnp.finfo(jnp.float32).eps) * float(
        jnp.abs(arrays[0].astype(jnp.float32) @ arrays[1].astype(jnp.float32)).max()
    )
    for ours, theirs, on_a_tpu in zip(errors(fused), errors(plain), errors(as_a_tpu_multiplies), strict=True):
        assert ours <= allowed * theirs + rounding
        assert ours <= on_a_tpu + rounding


@cases("loop", ["classes"], ["tokens"])
def test_each_platform_carries_its_own_loop(loop, monkeypatch):
    monkeypatch.setattr(_platform, "pretended", None)
    arrays = problem(BIASES["a hot class in the last slab"], dtype=np.float32)
    gradient = jax.jit(jax.value_and_grad(lambda a: loss(loop)(**a, labels=LABELS)))

    def conditionals(platform):
        text = jax.export.export(gradient, platforms=[platform])(arrays).mlir_module()
        return text.count("stablehlo.case")

    # Each slab or chunk asks whether its reference was far.
    assert "conditional(" not in gradient.lower(arrays).compile().as_text()
    assert (conditionals("tpu") > conditionals("cpu")) == (loop == "classes")
    assert (conditionals("cuda") > conditionals("cpu")) == (loop == "tokens")
    everywhere = jax.export.export(gradient, platforms=["cpu", "cuda", "rocm", "tpu"])(arrays)
    got = jax.export.deserialize(everywhere.serialize()).call(arrays)
    assert_trees_close(got, value_and_grads(dense, arrays), 1e-5)
