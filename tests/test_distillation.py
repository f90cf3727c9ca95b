"""`linear_distillation_loss` against the textbook in float64, with logits of both models in memory."""

import re
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, cases, for_figures, normal, positive
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import InShardMap, OnMesh, _platform

BATCH, CLASSES = (4, 3), 24
pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.values]
both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def problem():
    """A student with 5 features and a teacher with 7."""
    return {
        "hidden": normal((*BATCH, 5), 0, np.float64),
        "kernel": normal((5, CLASSES), 1, np.float64),
        "teacher_hidden": normal((*BATCH, 7), 2, np.float64),
        "teacher_kernel": normal((7, CLASSES), 3, np.float64) / 2,
    }


def log_probs(hidden, kernel, bias, cap, temperature):
    x = hidden @ kernel + (0 if bias is None else bias)
    x = x if cap is None else jnp.where(x == -jnp.inf, x, cap * jnp.tanh(x / cap))
    return jax.nn.log_softmax(x / temperature)


def divergence(log_p, log_q):
    possible = log_p != -jnp.inf
    return jnp.where(possible, jnp.exp(log_p) * (jnp.where(possible, log_p, 0) - jnp.where(possible, log_q, 0)), 0).sum(
        -1
    )


def textbook(
    hidden,
    kernel,
    teacher_hidden,
    teacher_kernel,
    *,
    bias=None,
    teacher_bias=None,
    logit_softcap=None,
    teacher_logit_softcap=None,
    temperature=1.0,
    reverse=False,
    sample_weight=None,
    where=None,
):
    """The mean, by definition."""
    student = log_probs(hidden, kernel, bias, logit_softcap, temperature)
    teacher = log_probs(teacher_hidden, teacher_kernel, teacher_bias, teacher_logit_softcap, temperature)
    losses = divergence(student, teacher) if reverse else divergence(teacher, student)
    weight = jnp.ones(BATCH) if sample_weight is None else sample_weight
    weight = weight if where is None else jnp.where(where, weight, 0)
    return temperature**2 * (losses * weight).sum() / weight.sum()


FLOATS = ("hidden", "kernel", "bias", "logit_softcap", "sample_weight")


def with_gradients(loss, arrays, **options):
    """The loss, and its gradients in what is of the student."""
    floats = {name: array for name, array in arrays.items() if name in FLOATS}
    fixed = {name: array for name, array in arrays.items() if name not in FLOATS}
    return jax.jit(jax.value_and_grad(lambda floats: loss(**floats, **fixed, **options)))(floats)


def everything():
    return {
        "bias": normal((CLASSES,), 4, np.float64),
        "teacher_bias": normal((CLASSES,), 5, np.float64),
        "logit_softcap": jnp.asarray(3.0),
        "teacher_logit_softcap": jnp.asarray(4.0),
        "sample_weight": positive(BATCH, 6, np.float64),
        "where": normal(BATCH, 7) > -1,
    }


@cases(
    ("temperature", "options", "chunk_size", "reverse"),
    [(2.5, everything, 5, False), (1.0, everything, 5, True)],
    product((1.0, 2.5), (dict, everything), (5, 24), (False, True)),
)
def test_two_models(reverse, chunk_size, options, temperature):
    arrays, how = problem() | options(), {"reverse": reverse, "temperature": temperature}
    ours = partial(with_gradients, partial(jaxce.linear_distillation_loss, chunk_size=chunk_size, **how))
    assert_trees_close(jax.jit(ours)(arrays), with_gradients(textbook, arrays, **how), 1e-10)


@pytest.mark.parametrize("teacher", [True, False], ids=["both", "student"])
@both_ways
def test_padding_and_transposed_kernels(reverse, teacher):
    arrays = problem()
    want, of_student = with_gradients(textbook, arrays, reverse=reverse)
    padded = {
        name: jnp.pad(arrays[name], [(0, 0), (0, 3)], constant_values=jnp.nan) for name in ("kernel", "teacher_kernel")
    }
    padded["kernel"] = padded["kernel"].T
    if teacher:
        padded["teacher_kernel"] = padded["teacher_kernel"].T
    options = {"transpose_kernel": True, "transpose_teacher_kernel": teacher, "num_classes": CLASSES, "chunk_size": 7}
    got = with_gradients(jaxce.linear_distillation_loss, arrays | padded, reverse=reverse, **options)
    of_student["kernel"] = jnp.pad(of_student["kernel"], [(0, 0), (0, 3)]).T
    assert_trees_close(got, (want, of_student), 1e-10)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_and_what_is_left_out(reduction):
    arrays, where = problem(), jnp.ones(BATCH, bool).at[1, 2].set(False)
    for name in ("hidden", "teacher_hidden"):
        arrays[name] = arrays[name].at[1, 2].set(jnp.nan)
    losses = partial(jaxce.linear_distillation_loss, where=where, chunk_size=5, reduction=reduction)
    got, gradients = with_gradients(lambda **given: losses(**given).sum(), arrays)
    clean = {name: jnp.nan_to_num(array) for name, array in arrays.items()}
    want, expected = with_gradients(lambda **given: textbook(**given, where=where) * where.sum().astype(float), clean)
    assert_trees_close((got, gradients), (want, expected), 1e-10)
    assert losses(**arrays).shape == (BATCH if reduction == "none" else ())
    assert not gradients["hidden"][1, 2].any()


def of_top(student, indices, p, *, reverse):
    """Over k classes and the others, which are one outcome."""
    rows = jnp.arange(student.shape[0])[:, None]
    q = jnp.exp(student)
    rest = 1 - q[rows, indices].sum(-1, keepdims=True)
    log_q = jnp.log(jnp.concatenate([q[rows, indices], rest], -1))
    log_p = jnp.log(jnp.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1))
    return divergence(log_q, log_p) if reverse else divergence(log_p, log_q)


@cases(("reverse", "temperature"), [(True, 2.5)], product((False, True), (1.0, 2.5)))
def test_likeliest_classes_of_a_teacher(reverse, temperature):
    arrays = problem()
    teacher = log_probs(arrays.pop("teacher_hidden"), arrays.pop("teacher_kernel"), None, None, temperature)
    p, indices = jax.lax.top_k(jnp.exp(teacher), 4)
    where = normal(BATCH, 7) > -1
    how = {"reverse": reverse, "temperature": temperature, "where": where, "chunk_size": 5}
    arrays |= {"bias": normal((CLASSES,), 4, np.float64), "logit_softcap": jnp.asarray(3.0)}

    def want(hidden, kernel, bias, logit_softcap):
        student = log_probs(hidden, kernel, bias, logit_softcap, temperature).reshape(-1, CLASSES)
        losses = of_top(student, indices.reshape(-1, 4), p.reshape(-1, 4), reverse=reverse)
        return temperature**2 * jnp.where(where.ravel(), losses, 0).sum() / where.sum().astype(float)

    ours = partial(with_gradients, partial(jaxce.linear_distillation_loss, teacher_top_k=(indices, p), **how))
    assert_trees_close(jax.jit(ours)(arrays), with_gradients(want, arrays), 1e-10)


@both_ways
def test_an_index_that_is_no_class_is_nan(reverse):
    arrays = problem()
    student = {name: arrays[name] for name in ("hidden", "kernel")}
    indices = jnp.zeros((*BATCH, 1), int).at[0, 0].set(CLASSES).at[1, 1].set(-1).at[2, 2].set(CLASSES)
    top_k = (indices.astype(jnp.int16), jnp.full((*BATCH, 1), 0.5))
    where = jnp.ones(BATCH, bool).at[2, 2].set(False)
    losses = jaxce.linear_distillation_loss(
        **student, teacher_top_k=top_k, where=where, reverse=reverse, reduction="none"
    )
    bad = jnp.isnan(losses)
    assert bad.sum() == 2
    assert bad[0, 0]
    assert bad[1, 1]
    assert losses[2, 2] == 0


def test_all_classes_of_a_teacher_are_the_teacher():
    arrays = problem()
    whole = jaxce.linear_distillation_loss(**arrays)
    teacher = log_probs(arrays.pop("teacher_hidden"), arrays.pop("teacher_kernel"), None, None, 1.0)
    p, indices = jax.lax.top_k(jnp.exp(teacher), CLASSES)
    assert_close(jaxce.linear_distillation_loss(**arrays, teacher_top_k=(indices, p)), whole, 1e-10)


@both_ways
def test_a_student_that_is_its_teacher(reverse):
    arrays = problem()
    twins = {"teacher_hidden": arrays["hidden"], "teacher_kernel": arrays["kernel"]}
    loss, gradients = with_gradients(jaxce.linear_distillation_loss, arrays | twins, reverse=reverse)
    assert abs(loss) < 1e-12
    assert all(abs(gradient).max() < 1e-12 for gradient in gradients.values())


@both_ways
def test_impossible_classes_and_large_logits(reverse):
    arrays = problem()
    impossible = jnp.zeros(CLASSES).at[3].set(-jnp.inf).at[20:].set(-jnp.inf)
    arrays |= {"bias": impossible, "teacher_bias": impossible}
    arrays["hidden"] = arrays["hidden"] * 1e3
    arrays["teacher_hidden"] = arrays["teacher_hidden"] * 1e3
    got = with_gradients(partial(jaxce.linear_distillation_loss, chunk_size=4), arrays, reverse=reverse)
    fixed = {**arrays, "bias": impossible}
    assert jnp.isfinite(got[0])
    assert all(jnp.isfinite(gradient).all() for gradient in got[1].values())
    assert_close(got[0], textbook(**fixed, reverse=reverse), 1e-8)


@both_ways
def test_tokens_of_several_devices(reverse):
    """Inside of a `shard_map`; the kernels are the same everywhere."""
    arrays = problem()
    names = tuple(arrays)

    def local(*given):
        losses = jaxce.linear_distillation_loss(
            **dict(zip(names, given, strict=True)), reverse=reverse, reduction="sum"
        )
        return jax.lax.psum(losses, "x")

    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    specs = tuple(P("x") if name.endswith("hidden") else P() for name in names)
    loss = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays.values())
    count = float(np.prod(BATCH))
    want, gradients = with_gradients(lambda **given: count * textbook(**given, reverse=reverse), arrays)
    assert_trees_close(got, (want, (gradients["hidden"], gradients["kernel"])), 1e-10)


# On every layout: the student's and the teacher's hidden states lie alike, their kernels each as they like.

LAYOUTS = {
    "data": (P("data"), P(), P()),
    "classes": (P(), P(None, "model"), P(None, "model")),
    "data and classes": (P("data"), P(None, "model"), P(None, "model")),
    "FSDP and classes": (P("data"), P("data", "model"), P("data", "model")),
    "FSDP by classes": (P(("data", "model")), P(None, ("data", "model")), P(None, ("data", "model"))),
    "another teacher": (P("data"), P("data", "model"), P("model")),
    "sequences": (P("data", "model"), P("data"), P("model", "data")),
}


def on_layout(features=(8, 12), num_classes=23):
    """Eight sequences of four tokens; the last of 24 columns is padding, which holds NaN."""
    d, e = features
    batch, padding = (8, 4), jnp.arange(CLASSES) >= num_classes
    arrays = {
        "hidden": normal((*batch, d), 0, np.float64),
        "kernel": jnp.where(padding, jnp.nan, normal((d, CLASSES), 1, np.float64)),
        "bias": normal((CLASSES,), 4, np.float64),
        "logit_softcap": jnp.asarray(3.0),
        "sample_weight": positive(batch, 6, np.float64),
        "temperature": positive(batch, 8, np.float64),
    }
    of_teacher = {
        "teacher_hidden": normal((*batch, e), 2, np.float64),
        "teacher_kernel": jnp.where(padding, jnp.nan, normal((e, CLASSES), 3, np.float64) / 2),
        "teacher_bias": normal((CLASSES,), 5, np.float64),
    }
    return arrays, of_teacher, {"where": normal(batch, 7) > -1, "num_classes": num_classes}


def gradients_of(loss, arrays, **fixed):
    return jax.jit(jax.value_and_grad(lambda arrays: loss(**arrays, **fixed)))(arrays)


def of_one_device(arrays, of_teacher, options, **how):
    """By definition, with every gradient, that of the temperatures included."""
    real = options["num_classes"]

    def cut(arrays):
        return {
            name: array[..., :real] if name.endswith(("kernel", "bias")) else array for name, array in arrays.items()
        }

    def loss(**arrays):
        tau = arrays.pop("temperature")
        given = cut(arrays | of_teacher)
        of_student = (given["hidden"], given["kernel"], given["bias"], given["logit_softcap"], tau[..., None])
        student = log_probs(*of_student)
        teacher = log_probs(*(given[f"teacher_{name}"] for name in ("hidden", "kernel", "bias")), None, tau[..., None])
        reverse = how.get("reverse", False)
        losses = tau**2 * (divergence(student, teacher) if reverse else divergence(teacher, student))
        weight = jnp.where(options["where"], given["sample_weight"], 0)
        return (losses * weight).sum() / weight.sum()

    return gradients_of(loss, arrays)


@cases(("strategy", "reverse"), [("tokens", True)], product(("tokens", "classes"), (False, True)))
def test_strategies_on_a_mesh(strategy, reverse):
    check_layout("data and classes", AxisType.Auto, strategy=strategy, reverse=reverse)


@cases(
    ("layout", "axis_type"),
    [("another teacher", AxisType.Auto), ("sequences", AxisType.Explicit)],
    product(LAYOUTS, (AxisType.Auto, AxisType.Explicit)),
)
def test_layouts(layout, axis_type):
    check_layout(layout, axis_type, strategy="classes", reverse=layout == "sequences")


def check_layout(layout, axis_type, kernel_gather="whole", **how):
    arrays, of_teacher, options = on_layout()
    of_hidden, of_kernel, of_teacher_kernel = LAYOUTS[layout]
    want = of_one_device(arrays, of_teacher, options, **how)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {"hidden": of_hidden, "kernel": of_kernel, "teacher_kernel": of_teacher_kernel}
    with jax.set_mesh(mesh):
        lie = OnMesh(kernel_gather=kernel_gather, **(specs if axis_type == AxisType.Auto else {}))
        loss = partial(jaxce.linear_distillation_loss, chunk_size=5, sharding=lie, **how)
        placed = {
            name: jax.device_put(array, NamedSharding(mesh, specs.get(name.replace("teacher_hidden", "hidden"), P())))
            for name, array in (arrays | of_teacher).items()
        }
        student = {name: placed[name] for name in arrays}
        teacher = {name: placed[name] for name in of_teacher}
        got = jax.jit(partial(gradients_of, loss, num_classes=options["num_classes"]))(
            student, where=options["where"], **teacher
        )
    assert_trees_close(got, want, 1e-10)
    for name in ("hidden", "kernel"):
        assert got[1][name].sharding.is_equivalent_to(student[name].sharding, student[name].ndim)


def test_kernels_gathered_slab_by_slab():
    check_layout("FSDP and classes", AxisType.Auto, kernel_gather="slabs", strategy="auto", reverse=True)


@cases("reverse", [True], [False])
def test_on_an_automatic_mesh_without_specs(reverse):
    arrays, of_teacher, options = on_layout()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        placed = arrays | {"hidden": jax.device_put(arrays["hidden"], NamedSharding(mesh, P("data")))}
        loss = partial(jaxce.linear_distillation_loss, reverse=reverse, num_classes=options["num_classes"])
        got = jax.jit(partial(gradients_of, loss))(placed, where=options["where"], **of_teacher)
    assert_trees_close(got, of_one_device(arrays, of_teacher, options, reverse=reverse), 1e-10)


@cases("reverse", [False], [True])
def test_classes_of_several_devices_inside_of_a_shard_map(reverse):
    arrays, of_teacher, options = on_layout()
    along = {"hidden": P("data"), "kernel": P(None, "model"), "bias": P("model"), "sample_weight": P("data")}
    along |= {f"teacher_{name}": along[name] for name in ("hidden", "kernel", "bias")}
    along |= {"temperature": P("data"), "where": P("data"), "logit_softcap": P()}

    def local(given):
        own = InShardMap(batch_axes="data", class_axes="model")
        num_classes = options["num_classes"]
        return jaxce.linear_distillation_loss(**given, reverse=reverse, num_classes=num_classes, sharding=own)

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {name: along[name] for name in (*arrays, *of_teacher, "where")}
    loss = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P())
    fixed = of_teacher | {"where": options["where"]}
    got = jax.jit(partial(gradients_of, lambda **given: loss(given)))(arrays, **fixed)
    assert_trees_close(got, of_one_device(arrays, of_teacher, options, reverse=reverse), 1e-10)


@cases(("how", "reverse"), [("specs", True)], product(("specs", "shard_map"), (False, True)))
def test_likeliest_classes_of_a_teacher_on_a_mesh(how, reverse):
    arrays, of_teacher, options = on_layout(num_classes=CLASSES)
    teacher = log_probs(of_teacher["teacher_hidden"], of_teacher["teacher_kernel"], None, None, 1.0)
    p, indices = jax.lax.top_k(jnp.exp(teacher), 4)
    options = {"reverse": reverse, "where": options["where"]}
    loss = partial(jaxce.linear_distillation_loss, reverse=reverse)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def on_mesh(**given):
        lie = OnMesh(mesh=mesh, hidden=P("data"), kernel=P("data", "model"))
        return loss(**given, chunk_size=5, sharding=lie)

    def inside(**given):
        specs = dict.fromkeys(given, P("data")) | {"kernel": P(None, "model"), "bias": P("model"), "logit_softcap": P()}
        own = InShardMap(batch_axes="data", class_axes="model")
        local = jax.shard_map(lambda given: loss(**given, sharding=own), mesh=mesh, in_specs=(specs,), out_specs=P())
        return local(given)

    fixed = {"teacher_top_k": (indices, p), "where": options["where"]}
    ours = {"specs": on_mesh, "shard_map": inside}[how]
    got = jax.jit(partial(gradients_of, ours))(arrays, **fixed)
    assert_trees_close(got, jax.jit(partial(gradients_of, loss))(arrays, **fixed), 1e-10)


@cases(
    ("reverse", "platform", "hot"),
    [(False, "tpu", 1e3), (True, "gpu", 1e3)],
    product((False, True), ("tpu", "gpu"), (None, 1e3)),
)
def test_as_on_another_platform(reverse, platform, hot, monkeypatch):
    """Sums relative to numbers that are known before the logits are, and made again where those are far below."""
    monkeypatch.setattr(_platform, "pretended", platform)
    arrays = problem() | everything()
    if hot is not None:
        arrays |= {"teacher_logit_softcap": jnp.asarray(1e5), "teacher_bias": arrays["teacher_bias"].at[17].set(hot)}
    strategy = {"tpu": "classes", "gpu": "tokens"}[platform]
    loss = partial(jaxce.linear_distillation_loss, strategy=strategy, chunk_size=5, reverse=reverse)
    got = jax.jit(partial(with_gradients, loss))(arrays)
    assert_trees_close(got, with_gradients(textbook, arrays, reverse=reverse), 1e-9)


def test_a_temperature_for_each_token_compiles_once(compilations):
    arrays, of_teacher, _ = on_layout(num_classes=CLASSES)
    del arrays["temperature"]
    step = jax.jit(lambda temperature: jaxce.linear_distillation_loss(**arrays, **of_teacher, temperature=temperature))
    by_number = [float(jaxce.linear_distillation_loss(**arrays, **of_teacher, temperature=t)) for t in (2.0, 3.0)]
    step(2.0)
    before = len(compilations)
    assert [float(step(t)) for t in (2.0, 3.0)] == pytest.approx(by_number)
    by_array = jaxce.linear_distillation_loss(**arrays, **of_teacher, temperature=jnp.asarray(2.5))
    assert by_number[0] != pytest.approx(by_number[1])
    again = len(compilations)
    jaxce.linear_distillation_loss(**arrays, **of_teacher, temperature=4.0)
    jaxce.linear_distillation_loss(**arrays, **of_teacher, temperature=jnp.asarray(3.5))
    assert len(compilations) == again
    assert again - before <= 2  # of an array, for the first time
    assert jnp.isfinite(by_array)


def test_a_frozen_student_head_and_a_learned_temperature():
    arrays, of_teacher, options = on_layout(num_classes=CLASSES)
    _, want = of_one_device(arrays, of_teacher, options)
    fixed = {name: array for name, array in arrays.items() if name != "temperature"}
    for strategy in ("auto", "classes"):
        loss = partial(jaxce.linear_distillation_loss, **fixed, **of_teacher, **options, strategy=strategy)
        got = jax.jit(jax.grad(lambda temperature, loss=loss: loss(temperature=temperature)))(arrays["temperature"])
        assert_close(got, want["temperature"], 1e-10)


def test_large_logits_lose_no_digits():
    """Logits of both models that are multiples of 1/16, exact in float32 at an offset of 1e5, too."""
    arrays = {name: jnp.round(array * 4).astype(jnp.float32) / 4 for name, array in problem().items()}
    offset = jnp.full(CLASSES, 1e5, jnp.float32)
    for how in ({}, {"reverse": True}):
        want, of_arrays = with_gradients(jaxce.linear_distillation_loss, arrays, **how)
        got, of_same = with_gradients(
            jaxce.linear_distillation_loss, arrays | {"bias": offset, "teacher_bias": offset}, **how
        )
        assert_close(got, want, 1e-5)
        assert_close(of_same["kernel"], of_arrays["kernel"], 1e-5)


def test_no_gradient_for_the_teacher():
    arrays = problem()
    of_teacher = jax.jit(
        jax.grad(
            lambda hidden, kernel: jaxce.linear_distillation_loss(
                arrays["hidden"], arrays["kernel"], hidden, kernel, chunk_size=5
            ),
            (0, 1),
        )
    )(arrays["teacher_hidden"], arrays["teacher_kernel"])
    assert not any(gradient.any() for gradient in of_teacher)


@both_ways
def test_second_derivatives(reverse):
    arrays = problem()
    direction = normal(arrays["kernel"].shape, 9, np.float64)

    def of_kernel(loss):
        gradient = jax.grad(lambda kernel: loss(**arrays | {"kernel": kernel}, reverse=reverse))
        return jax.jit(lambda kernel: jax.jvp(gradient, (kernel,), (direction,))[1])(arrays["kernel"])

    ours = partial(jaxce.linear_distillation_loss, chunk_size=5)
    assert_close(of_kernel(ours), of_kernel(textbook), 1e-9)


@cases(
    ("reverse", "dtype"),
    [(False, jnp.bfloat16), (True, jnp.float16)],
    [(True, jnp.bfloat16), (False, jnp.float16)],
)
def test_16_bits(reverse, dtype):
    """Gradients have the dtype of their inputs; their error is that of their rounding."""
    arrays = {name: array.astype(dtype) for name, array in problem().items()}
    exact = {name: array.astype(jnp.float64) for name, array in arrays.items()}
    loss, gradients = with_gradients(partial(jaxce.linear_distillation_loss, chunk_size=5), arrays, reverse=reverse)
    want, expected = with_gradients(textbook, exact, reverse=reverse)
    assert loss.dtype == jnp.float32
    assert_close(loss, want, 1e-5)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_close(gradient.astype(jnp.float64), expected[name], 4 * float(jnp.finfo(dtype).eps))


def test_no_logits_are_stored():
    n, d, c = 512, 32, 16_384
    given = [normal(shape, k, np.float32) / 4 for k, shape in enumerate([(n, d), (d, c), (n, d), (d, c)])]
    loss = partial(jaxce.linear_distillation_loss, strategy="classes", chunk_size=256)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    assert for_figures(step.lower(*given)).memory_analysis().temp_size_in_bytes <= 0.2 * 4 * n * c


ERRORS = {
    "temperature must be a positive number, or an array of floats; got 0: the limit at 0 is argmax of the logits": {
        "temperature": 0
    },
    "chunk_size must be at least 1, or None; got 0": {"chunk_size": 0},
    "the teacher must be given as teacher_hidden and teacher_kernel, or else as teacher_top_k; got teacher_hidden": {
        "teacher_kernel": None
    },
    "the teacher must be given as teacher_hidden and teacher_kernel, or else as teacher_top_k; got none of them": {
        "teacher_hidden": None,
        "teacher_kernel": None,
    },
    "teacher_top_k holds probabilities; got it with teacher_bias or teacher_logit_softcap, which are for logits": {
        "teacher_hidden": None,
        "teacher_kernel": None,
        "teacher_top_k": (np.zeros((4, 3, 2), int), np.ones((4, 3, 2))),
        "teacher_bias": np.ones(CLASSES),
    },
    "teacher_top_k must be two arrays of shape (4, 3, k), k classes for each token of hidden; got (4, 2) and (4, 2)": {
        "teacher_hidden": None,
        "teacher_kernel": None,
        "teacher_top_k": (np.zeros((4, 2), int), np.ones((4, 2))),
    },
    "teacher_kernel must have the 24 classes of kernel; got 23: pad the smaller one, and pass num_classes": {
        "teacher_kernel": np.ones((7, 23))
    },
    "teacher_hidden must have the batch shape of hidden, (4, 3); got (4, 7)": {"teacher_hidden": np.ones((4, 7))},
    "teacher_kernel must have shape (D, C) with D = 7, the last axis of teacher_hidden (4, 3, 7); got (24, 7): it fits "
    "with transpose_teacher_kernel=True": {"teacher_kernel": np.ones((24, 7))},
    "teacher_bias must have shape (24,), one entry a class; got (7,)": {"teacher_bias": np.ones(7)},
    "sample_weight must have shape (4, 3), one weight an example; got (4,)": {"sample_weight": np.ones(4)},
}


@pytest.mark.parametrize(("message", "changed"), ERRORS.items(), ids=range(len(ERRORS)))
def test_errors(message, changed):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        jaxce.linear_distillation_loss(**problem() | changed)
