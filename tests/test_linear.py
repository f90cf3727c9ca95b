"""`linear_cross_entropy`: the same numbers as `cross_entropy` of the logits, without the logits."""

from functools import partial
from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, cases, distributions, for_figures, indices, normal, positive
from jax.experimental import checkify
from jax.extend.core import jaxprs_in_params

import jaxce
from jaxce._projection.loops import auto

N, D, C = 12, 5, 17
LOOPS = ["tokens", "classes", "auto"]
# Below, chunks of 7 divide neither N nor C; 1 is the smallest, and 40 is more than there is.


@pytest.fixture(autouse=True, scope="module")
def auto_keeps_logits():
    """So that "auto" is the loop over classes that keeps logits: for small kernels, and beside virtual devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "SMALL_KERNEL", 0)
        patch.setattr(jax, "device_count", lambda: 1)
        jax.clear_caches()
        yield
    jax.clear_caches()


def problem(dtype=np.float64, classes=C):
    return {
        "hidden": normal((N, D), 0, dtype),
        "kernel": normal((D, classes), 1, dtype) / 2,
        "bias": normal((classes,), 2, dtype),
    }


LABELS = indices((N,), C, 3).at[4].set(-100)
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "all": {
        "weight": positive((C,), 5),
        "sample_weight": positive((N,), 6),
        "where": jnp.arange(N) != 2,
        # As arrays, so that their gradients are compared too.
        "label_smoothing": jnp.array(0.2),
        "z_loss": jnp.array(0.03),
        "logit_softcap": jnp.array(3.0),
    },
}


def dense(hidden, kernel, labels, *, bias=None, **options):
    logits = hidden @ kernel
    return jaxce.cross_entropy(logits if bias is None else logits + bias, labels, **options)


def gradients(loss, arrays, labels, **options):
    """The loss, and its gradients in every float input, weighted at random where it is one per token."""
    floats = {name: value for name, value in options.items() if isinstance(value, jax.Array) and value.dtype != bool}
    rest = {name: value for name, value in options.items() if name not in floats}
    if jnp.issubdtype(labels.dtype, jnp.floating):
        floats["labels"] = labels
    else:
        rest["labels"] = labels

    @jax.jit
    def weighted(inputs):
        value, pull = jax.vjp(lambda inputs: loss(**inputs, **rest), inputs)
        # Cotangents that differ from token to token, some of them 0.
        return value, pull(jnp.where(positive(value.shape, 7) < 0.5, 0, normal(value.shape, 8)).astype(value.dtype))[0]

    return weighted({**arrays, **floats})


SETS = [("plain", "mean", 1), ("smoothing", "none", 7), ("all", "mean", 7), ("all", "none", 40)]


@pytest.mark.values
@cases(
    ("loop", "options", "reduction", "chunk"),
    [("tokens", "all", "mean", 7), ("classes", "smoothing", "none", 7), ("auto", "all", "none", 40)],
    [(loop, *options) for loop, options in product(LOOPS, SETS)],
)
def test_equals_cross_entropy_of_the_logits(loop, options, reduction, chunk, x64):
    arrays, options = problem(), {**OPTIONS[options], "reduction": reduction}
    options = {k: v.astype(jnp.float64) if hasattr(v, "dtype") and v.dtype != bool else v for k, v in options.items()}
    want = gradients(dense, arrays, LABELS, **options)
    how = {"strategy": loop, "chunk_size": chunk, "precision": "highest"}
    assert_trees_close(gradients(jaxce.linear_cross_entropy, arrays, LABELS, **how, **options), want, 1e-11)


@pytest.mark.values
@cases(
    ("loop", "reduction", "smoothing"),
    [("classes", "mean", 0.2)],
    [(loop, *options) for loop, options in product(LOOPS, [("mean", 0.2), ("none", 0.0)])],
)
def test_class_probabilities(loop, reduction, smoothing, x64):
    labels, weight = distributions((N, C), dtype=np.float64), positive((C,), 5, np.float64)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    want = gradients(dense, problem(), labels, **options)
    got = gradients(jaxce.linear_cross_entropy, problem(), labels, strategy=loop, chunk_size=7, **options)
    assert_trees_close(got, want, 1e-11)


@pytest.mark.values
@cases("loop", ["classes"], ["tokens"])
def test_transposed_kernel_and_any_batch_axes(loop, x64):
    arrays = problem()
    batched = {**arrays, "hidden": arrays["hidden"].reshape(3, 4, D), "kernel": arrays["kernel"].T}
    loss = jaxce.linear_cross_entropy(
        **batched, labels=LABELS.reshape(3, 4), strategy=loop, transpose_kernel=True, reduction="none"
    )
    assert_close(loss, dense(**arrays, labels=LABELS, reduction="none").reshape(3, 4))
    gradient = jax.jit(
        jax.grad(
            lambda a: jaxce.linear_cross_entropy(
                **a, labels=LABELS.reshape(3, 4), strategy=loop, chunk_size=7, transpose_kernel=True
            )
        )
    )(batched)
    want = jax.jit(jax.grad(lambda a: dense(**a, labels=LABELS)))(arrays)
    assert_close(gradient["kernel"], want["kernel"].T)
    assert_close(gradient["hidden"], want["hidden"].reshape(3, 4, D))
    one = jaxce.linear_cross_entropy(
        arrays["hidden"][0], arrays["kernel"], LABELS[0], bias=arrays["bias"], strategy=loop
    )
    assert_close(one, dense(arrays["hidden"][0], arrays["kernel"], LABELS[0], bias=arrays["bias"]))


@pytest.mark.values
@cases(
    ("tokens", "reduction", "transposed"),
    [(N, "none", True)],
    [(2, "mean", False), (D, "mean", True), (N, "mean", False), (2, "none", True)],
)
def test_logits_in_the_room_of_the_kernels_gradient(transposed, reduction, tokens, x64):
    """Fewer tokens than there is room for, as many, and more."""
    arrays = problem(classes=C + 2)
    arrays["hidden"], options = arrays["hidden"][:tokens], {"reduction": reduction, "num_classes": C}
    given = {**arrays, "kernel": arrays["kernel"].T} if transposed else arrays

    def loss(kernel, **rest):
        return jaxce.linear_cross_entropy(
            kernel=kernel, strategy="auto", chunk_size=7, transpose_kernel=transposed, **rest
        )

    got, grads = gradients(loss, given, LABELS[:tokens], **options)
    cut = {**arrays, "kernel": arrays["kernel"][:, :C], "bias": arrays["bias"][:C]}
    want, want_grads = gradients(dense, cut, LABELS[:tokens], reduction=reduction)
    assert_close(got, want)
    kernel = grads["kernel"].T if transposed else grads["kernel"]
    assert_close(kernel[:, :C], want_grads["kernel"])
    assert not kernel[:, C:].any()
    assert_close(grads["hidden"], want_grads["hidden"])


# Slabs of 7 end in the padding, one of 40 would reach over it.
@pytest.mark.values
@cases(
    ("loop", "options", "fill", "chunk"),
    [("tokens", "all", np.nan, 7)],
    [(loop, *options) for loop, options in product(LOOPS, [("plain", 50.0, 40), ("all", np.nan, 7)])],
)
def test_padding_counts_for_nothing(loop, options, fill, chunk, x64):
    """Columns beyond `num_classes` can hold anything: the loss doesn't see them, and their gradient is 0."""
    real, options = problem(), OPTIONS[options]
    options = {k: v.astype(jnp.float64) if hasattr(v, "dtype") and v.dtype != bool else v for k, v in options.items()}
    padded = {
        "hidden": real["hidden"],
        "kernel": jnp.pad(real["kernel"], ((0, 0), (0, 3)), constant_values=fill),
        "bias": jnp.pad(real["bias"], (0, 3), constant_values=fill),
    }
    want, want_grads = gradients(dense, real, LABELS, **options)
    got, grads = gradients(
        jaxce.linear_cross_entropy, padded, LABELS, num_classes=C, strategy=loop, chunk_size=chunk, **options
    )
    assert_close(got, want)
    assert not grads["kernel"][:, C:].any()
    assert not grads["bias"][C:].any()
    cut = {**grads, "kernel": grads["kernel"][:, :C], "bias": grads["bias"][:C]}
    assert_trees_close(cut, want_grads, 1e-11)


@pytest.mark.values
@cases(("loop", "reduction"), [("classes", "none")], [("tokens", "mean"), ("auto", "mean")])
def test_what_is_left_out_reaches_no_gradient(loop, reduction):
    arrays = problem(np.float32)
    dirty = {**arrays, "hidden": arrays["hidden"].at[4].set(jnp.nan).at[2].set(jnp.inf)}
    kept = jnp.array([i for i in range(N) if i not in (2, 4)])
    options = {"where": jnp.arange(N) != 2, "strategy": loop, "chunk_size": 5, "reduction": "sum"}

    def loss(a, labels, **options):
        out = jaxce.linear_cross_entropy(**a, labels=labels, **options)
        return out.sum()

    def gradient(a, labels, **options):
        return jax.jit(jax.grad(lambda a: loss(a, labels, **options)))(a)

    grads = gradient(dirty, LABELS, **{**options, "reduction": "sum" if reduction == "mean" else "none"})
    clean = {**arrays, "hidden": arrays["hidden"][kept]}
    want = gradient(clean, LABELS[kept], strategy=loop, reduction="sum")
    assert not grads["hidden"][jnp.array([2, 4])].any()
    assert_close(grads["hidden"][kept], want["hidden"], 1e-5)
    assert_close(grads["kernel"], want["kernel"], 1e-5)
    assert_close(grads["bias"], want["bias"], 1e-5)


@pytest.mark.values
@cases("loop", ["tokens"], ["classes"])
def test_nothing_left_in(loop):
    arrays = problem(np.float32)

    @jax.jit
    @jax.value_and_grad
    def gradients(arrays, labels):
        return jaxce.linear_cross_entropy(**arrays, labels=labels, strategy=loop, chunk_size=5)

    value, grads = gradients(arrays, jnp.full(N, -100))
    assert value == 0
    assert not any(g.any() for g in jax.tree.leaves(grads))
    empty = {**arrays, "hidden": jnp.zeros((0, D))}
    value, grads = gradients(empty, jnp.zeros(0, int))
    assert value == 0
    assert not any(g.any() for g in jax.tree.leaves(grads))


@pytest.mark.values
@cases("loop", ["classes"], ["tokens"])
def test_bad_label_is_nan_in_its_own_row(loop):
    arrays = problem(np.float32)
    for bad in (-1, C):
        loss = jaxce.linear_cross_entropy(
            **arrays, labels=LABELS.at[1].set(bad), strategy=loop, chunk_size=5, reduction="none"
        )
        assert jnp.isnan(loss).tolist() == [i == 1 for i in range(N)]
    error, _ = checkify.checkify(lambda y: jaxce.linear_cross_entropy(**arrays, labels=y))(LABELS.at[1].set(C))
    assert f"got {C} with {C} classes" in error.get()


@pytest.mark.values
@cases("loop", ["classes"], ["tokens"])
def test_stats(loop):
    arrays = problem(np.float32)
    options = OPTIONS["all"] | {"return_stats": True}
    loss, got = jaxce.linear_cross_entropy(**arrays, labels=LABELS, strategy=loop, chunk_size=5, **options)
    want_loss, want = dense(**arrays, labels=LABELS, **options)
    assert_close(loss, want_loss, 1e-5)
    assert got.predicted.tolist() == want.predicted.tolist()
    for name in ("nll", "log_z", "entropy", "weight_sum"):
        assert_close(getattr(got, name), getattr(want, name), 1e-5)
    grads = jax.jit(jax.grad(lambda a: jaxce.linear_cross_entropy(**a, labels=LABELS, **options)[1].nll.sum()))(arrays)
    assert not any(g.any() for g in jax.tree.leaves(grads))


@pytest.mark.values
@cases("loop", ["tokens"], ["classes"])
def test_stats_of_probabilities_have_no_weights(loop):
    arrays, labels = problem(np.float32), distributions((N, C))
    options = {"weight": positive((C,), 5), "label_smoothing": 0.1, "return_stats": True}
    _, got = jaxce.linear_cross_entropy(**arrays, labels=labels, strategy=loop, chunk_size=5, **options)
    _, want = jaxce.cross_entropy(arrays["hidden"] @ arrays["kernel"] + arrays["bias"], labels, return_stats=True)
    assert_close(got.nll, want.nll, 1e-5)


# Precision


@pytest.mark.values
@cases(
    ("loop", "dtype"),
    [("tokens", jnp.bfloat16)],
    product(("tokens", "classes"), (jnp.bfloat16, jnp.float16)),
)
def test_error_in_16_bits_is_no_larger_than_dense(loop, dtype):
    """Against the dense loss with float32 logits from the same 16-bit inputs; many chunks must not add to the error."""
    n, d, c = 512, 16, 96
    hidden, kernel = normal((n, d), 0).astype(dtype), (normal((d, c), 1) / 4).astype(dtype)
    labels = indices((n,), c)

    def truth(h, w):
        return jaxce.reference.cross_entropy(h @ w, labels)

    want, want_grads = jax.jit(jax.value_and_grad(truth, (0, 1)))(*(a.astype(jnp.float32) for a in (hidden, kernel)))
    got, grads = jax.jit(
        jax.value_and_grad(lambda h, w: jaxce.linear_cross_entropy(h, w, labels, strategy=loop, chunk_size=2), (0, 1))
    )(hidden, kernel)
    assert got.dtype == jnp.float32
    assert_close(got, want, 1e-5)
    eps = float(jnp.finfo(dtype).eps)
    for gradient, exact in zip(grads, want_grads, strict=True):
        assert gradient.dtype == dtype
        error = jnp.linalg.norm(gradient.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
        assert error < 1.5 * eps


@pytest.mark.values
@cases("loop", ["tokens"], ["classes"])
def test_a_mean_over_many_tokens_stays_in_the_range_of_float16(loop):
    """Probabilities over the number of tokens are below float16's smallest number; their sum over tokens isn't."""
    n, d, c = 8192, 4, 2048
    hidden, kernel = jnp.ones((n, d), jnp.float16), normal((d, c), 1).astype(jnp.float16) / 16
    labels = jnp.zeros(n, int)
    gradient = jax.jit(jax.grad(lambda w: jaxce.linear_cross_entropy(hidden, w, labels, strategy=loop)))(kernel)
    logits = hidden[0].astype(jnp.float32) @ kernel.astype(jnp.float32)
    exact = jnp.broadcast_to(jax.nn.softmax(logits).at[0].add(-1), (d, c))
    assert_close(gradient.astype(jnp.float32)[:, 1:], exact[:, 1:], 2e-3)


@pytest.mark.values
def test_mixed_dtypes():
    arrays = problem(np.float32)
    mixed = {**arrays, "hidden": arrays["hidden"].astype(jnp.bfloat16)}
    loss, grads = jax.value_and_grad(lambda a: jaxce.linear_cross_entropy(**a, labels=LABELS))(mixed)
    want = dense(**{**arrays, "hidden": mixed["hidden"].astype(jnp.float32)}, labels=LABELS)
    assert_close(loss, want, 1e-5)
    assert [grads[k].dtype for k in ("hidden", "kernel")] == [jnp.bfloat16, jnp.float32]


# What is stored and computed


def equations(jaxpr):
    """Those of the jaxpr, and of the functions it calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def largest_array(jaxpr):
    """The most entries of an array in the jaxpr."""
    return max(v.aval.size for eqn in equations(jaxpr) for v in eqn.outvars if hasattr(v.aval, "size"))


def loss_of(loop, chunk=None, **options):
    def loss(hidden, kernel, labels):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, strategy=loop, chunk_size=chunk, **options)

    return loss


def shapes(n, d, c, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(s, t) for s, t in (((n, d), dtype), ((d, c), dtype), ((n,), jnp.int32))]


@cases(
    ("loop", "derivative", "all_options"),
    [("tokens", True, False), ("classes", True, True), ("auto", False, True)],
    product(LOOPS, (False, True), (False, True)),
)
def test_no_array_of_tokens_by_classes(loop, derivative, all_options):
    n, d, c = 4096, 8, 2048
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 5.0} if all_options else {}
    loss = loss_of(loop, 64, **options)
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)) if derivative else loss)(*shapes(n, d, c))
    assert largest_array(jaxpr.jaxpr) < n * c / 16


@pytest.mark.loop("a CPU")
@cases(
    ("loop", "wrt", "n", "matmuls"),
    [
        ("classes", None, 256, 1),
        ("tokens", (0, 1), 256, 3),
        ("auto", (0,), 256, 2),
        # The kernel's gradient has room for the logits of 256 tokens.
        ("auto", (0, 1), 256, 3),
        ("auto", (0, 1), 512, 3.5),
    ],
    [
        ("tokens", None, 256, 1),
        ("auto", (1,), 256, 2),
        ("tokens", (0,), 256, 2),
        ("tokens", (1,), 256, 2),
        ("auto", (0, 1), 128, 3),
    ],
)
def test_matmuls(loop, wrt, n, matmuls):
    """The compiler's count of flops; in one chunk, since it counts the body of a loop once."""
    d, c = 256, 256
    loss = loss_of(loop, 512)
    compiled = jax.jit(loss if wrt is None else jax.grad(loss, wrt)).lower(*shapes(n, d, c)).compile()
    flops = compiled.cost_analysis()["flops"] / (2 * n * d * c)
    assert matmuls <= flops < matmuls + 0.2


@cases(
    ("loop", "reduction", "dtype"),
    [("tokens", "none", jnp.bfloat16), ("classes", "mean", jnp.float16), ("auto", "mean", jnp.bfloat16)],
    product(LOOPS, ["mean", "none"], [jnp.bfloat16, jnp.float16]),
)
def test_matmuls_take_16_bits_and_sum_in_32(loop, reduction, dtype):
    loss = loss_of(loop, 8, reduction=reduction, precision="highest")
    gradient = jax.grad(lambda *a: loss(*a).sum(), (0, 1))
    found = equations(jax.make_jaxpr(gradient)(*shapes(20, 4, 30, dtype)).jaxpr)
    matmuls = [eqn for eqn in found if eqn.primitive.name == "dot_general"]
    assert len(matmuls) >= 3
    assert {v.aval.dtype for eqn in matmuls for v in eqn.invars} == {jnp.dtype(dtype)}
    assert {v.aval.dtype for eqn in matmuls for v in eqn.outvars} == {jnp.dtype(jnp.float32)}
    assert {eqn.params["precision"] for eqn in matmuls} == {(jax.lax.Precision.HIGHEST,) * 2}


def dots(compiled):
    return compiled.as_text().count(" dot(")


@pytest.mark.loop("a CPU")
def test_classes_makes_the_logits_again_in_the_backward_pass():
    # One dot for the first slab and one in the loop forward; three in the loop backward.
    assert dots(jax.jit(jax.grad(loss_of("classes", 64), (0, 1))).lower(*shapes(64, 64, 256)).compile()) == 5


@pytest.mark.loop("a CPU")
@cases("loop", ["auto"], ["classes"])
def test_temporary_memory(loop):
    n, d, c = 2048, 256, 32_000

    def temp(loss):
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes(n, d, c))
        return for_figures(lowered).memory_analysis().temp_size_in_bytes

    # A slab's logits and their gradient are a twenty-fifth of what dense stores. The rest is the library's that
    # multiplies, another one on another CPU: 4% to 7% in all were seen.
    assert temp(loss_of(loop)) <= 0.15 * temp(dense)


@cases(("probabilities", "transposed"), [(True, True)], product((False, True), repeat=2))
def test_logits_are_kept_in_no_memory_of_their_own(probabilities, transposed):
    n, d, c = 512, 256, 16_384
    hidden, kernel, labels = shapes(n, d, c)
    if transposed:
        kernel = jax.ShapeDtypeStruct((c, d), kernel.dtype)
    if probabilities:
        labels = jax.ShapeDtypeStruct((n, c), kernel.dtype)

    def temp(loop):
        loss = loss_of(loop, 1024, transpose_kernel=transposed)
        lowered = jax.jit(jax.grad(loss, (0, 1, 2) if probabilities else (0, 1))).lower(hidden, kernel, labels)
        return for_figures(lowered).memory_analysis().temp_size_in_bytes

    # The logits that are kept are as many as the kernel has entries; where they lie costs XLA a slab's more at most.
    assert temp("auto") <= temp("classes") + 0.1 * 4 * d * c


def test_frozen_kernel_has_no_array_of_its_size():
    n, d, c = 256, 512, 4096
    gradient = for_figures(jax.jit(jax.grad(loss_of("auto", 32), 0)).lower(*shapes(n, d, c)))
    assert gradient.memory_analysis().temp_size_in_bytes < d * c * 4


# Transformations


@pytest.mark.values
@cases("loop", ["classes"], ["tokens", "auto"])
def test_second_derivatives(loop, x64):
    arrays = problem()
    direction = jax.tree.map(lambda a: normal(a.shape, 9, np.float64), arrays)

    def derivatives(loss):
        """A Hessian-vector product, and the Hessian of three tokens."""

        @jax.jit
        def both(arrays, direction):
            gradient = jax.grad(lambda a: loss(**a, labels=LABELS))
            of_three = jax.hessian(lambda h: loss(h, arrays["kernel"], LABELS[:3]))
            return jax.jvp(gradient, (arrays,), (direction,))[1], of_three(arrays["hidden"][:3])

        return both(arrays, direction)

    ours = partial(jaxce.linear_cross_entropy, strategy=loop, chunk_size=5)
    assert_trees_close(derivatives(ours), derivatives(dense), 1e-10)


@pytest.mark.values
@cases("loop", ["tokens"], ["classes"])
def test_vmap_over_a_stacked_model(loop):
    stacked = jax.tree.map(lambda a: jnp.stack([a, -a, a / 2]), problem(np.float32))

    @jax.jit
    def grads(a):
        return jax.value_and_grad(
            lambda a: jaxce.linear_cross_entropy(**a, labels=LABELS, strategy=loop, chunk_size=5)
        )(a)

    want = [grads(jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(3)]
    assert_trees_close(jax.jit(jax.vmap(grads))(stacked), jax.tree.map(lambda *a: jnp.stack(a), *want), 1e-5)


@pytest.mark.thorough
@pytest.mark.values
@cases("loop", ["auto"], ["tokens"])
def test_checkpoint_scan_and_export(loop):
    arrays = problem(np.float32)
    want = jax.jit(jax.grad(lambda a: dense(**a, labels=LABELS)))(arrays)

    def loss(a):
        return jaxce.linear_cross_entropy(**a, labels=LABELS, strategy=loop, chunk_size=5)

    assert_trees_close(jax.jit(jax.grad(jax.checkpoint(loss)))(arrays), want, 1e-5)
    scanned = jax.grad(lambda a: jax.lax.scan(lambda total, _: (total + loss(a), None), 0.0, None, 2)[0] / 2)
    assert_trees_close(jax.jit(scanned)(arrays), want, 1e-5)
    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=["cpu", "cuda", "rocm", "tpu"])(arrays)
    assert_trees_close(jax.export.deserialize(exported.serialize()).call(arrays), want, 1e-5)


# Bad input


HIDDEN, KERNEL = jnp.zeros((4, 3)), jnp.zeros((3, 7))


@pytest.mark.parametrize("disabled", [False, True], ids=["chex", "chex disabled"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (
            ValueError,
            {"kernel": jnp.zeros((7, 3))},
            "kernel must have shape (D, C) with D = 3, the last axis of hidden (4, 3); got (7, 3): it fits with "
            "transpose_kernel=True",
        ),
        (
            ValueError,
            {"kernel": jnp.zeros((5, 7))},
            "kernel must have shape (D, C) with D = 3, the last axis of hidden (4, 3); got (5, 7)",
        ),
        (
            ValueError,
            {"kernel": jnp.zeros((3, 7)), "transpose_kernel": True},
            "kernel must have shape (C, D) with transpose_kernel=True with D = 3, the last axis of hidden (4, 3); got "
            "(3, 7): it fits with transpose_kernel=False",
        ),
        (ValueError, {"kernel": jnp.zeros(3)}, "kernel must have two axes, (D, C); got shape (3,)"),
        (ValueError, {"kernel": jnp.zeros((3, 0))}, "kernel must have at least one class; got shape (3, 0)"),
        (ValueError, {"bias": jnp.zeros(6)}, "bias must have shape (7,), one entry a class; got (6,)"),
        (ValueError, {"chunk_size": 0}, "chunk_size must be at least 1, or None; got 0"),
        (
            ValueError,
            {"strategy": "token"},
            "strategy must be one of 'auto', 'tokens' and 'classes'; got 'token': did you mean 'tokens'?",
        ),
        (ValueError, {"num_classes": 8}, "num_classes must be from 1 to 7, the classes of kernel; got 8"),
        (ValueError, {"num_classes": 0}, "num_classes must be from 1 to 7, the classes of kernel; got 0"),
        (
            ValueError,
            {"labels": jnp.zeros((4, 1), int)},
            "labels must have shape (4,), that of hidden (4, 3) without the last axis; got (4, 1): drop the last axis "
            "with labels[..., 0]",
        ),
        (
            TypeError,
            {"kernel": jnp.zeros((3, 7), int)},
            "kernel must be of a float dtype; got int32 of shape (3, 7): kernel.astype(jnp.float32) converts them",
        ),
        (
            TypeError,
            {"hidden": jnp.zeros((4, 3), int)},
            "hidden must be of a float dtype; got int32 of shape (4, 3): hidden.astype(jnp.float32) converts them",
        ),
    ],
)
def test_messages(error, arguments, message, wrap, disabled):
    arrays = {"hidden": HIDDEN, "kernel": KERNEL, "labels": jnp.zeros(4, int)}
    static = {k: v for k, v in arguments.items() if not isinstance(v, jax.Array)}
    arrays |= {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}
    if disabled:
        chex.disable_asserts()
    try:
        with pytest.raises(error) as raised:
            wrap(lambda a: jaxce.linear_cross_entropy(**a, **static))(arrays)
    finally:
        chex.enable_asserts()
    assert str(raised.value) == message


# PyTorch


@cases(
    ("loop", "chunked", "options"),
    # PyTorch's chunked loss has no smoothing: it falls back to the dense one.
    [
        ("tokens", False, {"label_smoothing": 0.1}),
        ("classes", False, {"weight": True}),
        ("tokens", True, {}),
        ("classes", True, {"weight": True, "reduction": "sum"}),
    ],
    [
        ("classes", False, {"label_smoothing": 0.1}),
        ("tokens", False, {"weight": True}),
        ("classes", True, {}),
        ("tokens", True, {"weight": True, "reduction": "sum"}),
    ],
)
def test_parity_with_torch(loop, chunked, options, x64):
    torch = pytest.importorskip("torch", reason="parity with PyTorch is skipped: torch is not installed")
    arrays, weight = problem(), positive((C,), 5, np.float64)
    ours, theirs = dict(options), dict(options)
    if options.get("weight"):
        ours["weight"], theirs["weight"] = weight, torch.tensor(np.asarray(weight))
    h, w, b = (
        torch.tensor(np.array(a), requires_grad=True) for a in (arrays["hidden"], arrays["kernel"].T, arrays["bias"])
    )
    want = torch.nn.functional.linear_cross_entropy(
        h,
        w,
        torch.tensor(np.asarray(LABELS), dtype=torch.int64),
        linear_bias=b,
        options=torch.nn.LinearCrossEntropyOptions() if chunked else None,
        **theirs,
    )
    want.backward()
    got, grads = jax.jit(
        jax.value_and_grad(
            lambda a: jaxce.linear_cross_entropy(**a, labels=LABELS, strategy=loop, chunk_size=7, **ours)
        )
    )(arrays)
    assert_close(got, want.detach().numpy(), 1e-11)
    for name, tensor in (("hidden", h), ("kernel", w), ("bias", b)):
        exact = tensor.grad.numpy().T if name == "kernel" else tensor.grad.numpy()
        assert_close(grads[name], exact, 1e-10)
