"""`token_log_probs` and `linear_token_log_probs`, on one device and on a mesh, against the textbook in float64."""

import re
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, cases, for_figures, indices, normal, positive
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import InShardMap, OnMesh, _platform

pytestmark = pytest.mark.values
BATCH, FEATURES, CLASSES = (4, 3), 5, 24


def textbook(logits, labels, *, temperature=1.0, logit_softcap=None, live=True):
    """The definitions."""
    x = logits
    if logit_softcap is not None:
        x = jnp.where(x == -jnp.inf, x, logit_softcap * jnp.tanh(x / logit_softcap))
    x = x / jnp.broadcast_to(temperature, labels.shape)[..., None]
    log_p = x - jax.nn.logsumexp(x, -1, keepdims=True)
    log_prob = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    entropy = -jnp.where(log_p == -jnp.inf, 0, jnp.exp(log_p) * log_p).sum(-1)
    numbers = (log_prob, jax.nn.logsumexp(x, -1), entropy)
    return tuple(jnp.where(live & (labels >= 0), number, 0) for number in numbers)


def dense(hidden, kernel, labels, *, bias=0.0, **options):
    return textbook(hidden @ kernel + bias, labels, **options)


def problem(dtype=np.float64):
    labels = indices(BATCH, CLASSES).at[1, 2].set(-100)
    return normal((*BATCH, FEATURES), 0, dtype), normal((FEATURES, CLASSES), 1, dtype), labels


def every_option():
    return {
        "bias": normal((CLASSES,), 2, np.float64),
        "temperature": positive(BATCH, 3, np.float64),
        "logit_softcap": jnp.asarray(3.0),
    }


OPTIONS = {
    "plain": dict,
    "temperature": lambda: {"temperature": jnp.asarray(0.7)},
    "temperatures": lambda: {"temperature": positive(BATCH, 3, np.float64)},
    "all": every_option,
}


def with_gradients(function, floats, labels, **statics):
    """The three numbers, and the gradients of a random weighting of all of them, of its own for each token."""

    def weighted(floats):
        numbers = tuple(function(**floats, labels=labels, **statics))
        weights = [normal(number.shape, 7 + k, number.dtype) for k, number in enumerate(numbers)]
        return sum((w * number).sum() for w, number in zip(weights, numbers, strict=True)), numbers

    (_, numbers), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(floats)
    return numbers, gradients


@cases(
    ("name", "strategy"),
    [("temperature", "classes"), ("all", "tokens")],
    product(OPTIONS, ["tokens", "classes"]),
)
def test_projection(x64, name, strategy):
    hidden, kernel, labels = problem()
    floats = {"hidden": hidden, "kernel": kernel, **OPTIONS[name]()}
    ours = partial(with_gradients, jaxce.linear_token_log_probs, strategy=strategy, chunk_size=5)
    assert_trees_close(jax.jit(ours)(floats, labels), with_gradients(dense, floats, labels), 1e-10)


@cases(
    ("axis", "name"),
    [(-1, "temperatures"), (1, "all")],
    product((-1, 1), ("plain", "temperatures", "all")),
)
def test_logits(x64, axis, name):
    hidden, kernel, labels = problem()
    options = {key: value for key, value in OPTIONS[name]().items() if key != "bias"}
    logits = hidden @ kernel
    want, of_floats = with_gradients(textbook, {"logits": logits, **options}, labels)
    floats = {"logits": jnp.moveaxis(logits, -1, axis), **options}
    got, gradients = with_gradients(jaxce.token_log_probs, floats, labels, axis=axis)
    assert_trees_close(got, want, 1e-10)
    gradients["logits"] = jnp.moveaxis(gradients["logits"], axis, -1)
    assert_trees_close(gradients, of_floats, 1e-10)


def test_padding_of_the_kernel_and_a_transposed_one(x64):
    hidden, kernel, labels = problem()
    cut = {"hidden": hidden, "kernel": kernel[:, :-3], "temperature": jnp.asarray(0.7)}
    labels = jnp.minimum(labels, CLASSES - 4)
    floats = cut | {"kernel": kernel.at[:, -3:].set(jnp.nan).T}
    ours = partial(jaxce.linear_token_log_probs, num_classes=CLASSES - 3, transpose_kernel=True)
    got, of_floats = with_gradients(ours, floats, labels)
    want, of_cut = with_gradients(dense, cut, labels)
    of_cut["kernel"] = jnp.pad(of_cut["kernel"], [(0, 0), (0, 3)]).T
    assert_trees_close((got, of_floats), (want, of_cut), 1e-10)


@cases("strategy", ["tokens"], ["classes"])
def test_second_derivatives(x64, strategy):
    hidden, kernel, labels = problem()
    temperature = positive(BATCH, 3, np.float64)

    def of_kernel(function):
        def weighted(kernel):
            numbers = function(hidden, kernel, labels, temperature=temperature, logit_softcap=3.0)
            return sum((normal(n.shape, 7 + k, n.dtype) * n**2).sum() for k, n in enumerate(numbers))

        return jax.jvp(jax.grad(weighted), (kernel,), (normal(kernel.shape, 9, np.float64),))[1]

    ours = partial(jaxce.linear_token_log_probs, strategy=strategy, chunk_size=5)
    got, want = (jax.jit(partial(of_kernel, each))() for each in (ours, dense))
    assert_close(got, want, 1e-9)


def test_a_batch_is_vmap_is_a_loop(x64):
    hidden, kernel, labels = problem()
    temperature = positive(BATCH, 3, np.float64)

    def one(hidden, labels, temperature):
        return jaxce.linear_token_log_probs(hidden, kernel, labels, temperature=temperature)

    batched = one(hidden, labels, temperature)
    mapped = jax.vmap(jax.vmap(one))(hidden, labels, temperature)
    assert_trees_close(mapped, batched)
    for place in ((0, 0), (1, 2), (3, 1)):
        single = one(hidden[place], labels[place], temperature[place])
        for number, whole in zip(single, batched, strict=True):
            assert abs(number - whole[place]) < 1e-12


# Of the losses too, a temperature divides the logits after the soft cap.


@cases(
    ("loss", "label_smoothing"),
    [("dense", 0.1), ("tokens", 0.1)],
    product(("dense", "tokens", "classes"), (0.0, 0.1)),
)
def test_temperature_of_a_loss(loss, label_smoothing, x64):
    hidden, kernel, labels = problem()
    floats = {"hidden": hidden, "kernel": kernel, "temperature": positive(labels.shape, 3, np.float64)}
    options = {"label_smoothing": label_smoothing, "z_loss": 0.1}

    def want(hidden, kernel, temperature):
        x = 3.0 * jnp.tanh(hidden @ kernel / 3.0) / temperature[..., None]
        return jaxce.reference.cross_entropy(x, labels, **options)

    def ours(hidden, kernel, temperature):
        how = {"temperature": temperature, "logit_softcap": 3.0, **options}
        if loss == "dense":
            return jaxce.cross_entropy(hidden @ kernel, labels, **how)
        return jaxce.linear_cross_entropy(hidden, kernel, labels, strategy=loss, chunk_size=5, **how)

    got, expected = (
        jax.jit(jax.value_and_grad(lambda floats, each=each: each(**floats)))(floats) for each in (ours, want)
    )
    assert_trees_close(got, expected, 1e-10)


@pytest.mark.parametrize("function", [jaxce.cross_entropy, jaxce.token_log_probs], ids=["loss", "log-probabilities"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_padding_of_logits_counts_for_nothing(function, axis, x64):
    logits, labels = normal((5, 7), 0, np.float64), indices((5,), 7)
    padded = jnp.moveaxis(jnp.pad(logits, [(0, 0), (0, 2)], constant_values=jnp.nan), -1, axis)

    def gradient(logits, **how):
        total = jax.grad(lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(function(x, labels, **how))))
        return jax.jit(total)(logits)

    got = jnp.moveaxis(gradient(padded, axis=axis, num_classes=7), axis, -1)
    assert_close(got[:, :7], gradient(logits))
    assert not got[:, 7:].any()


# On a mesh.


@cases(("kernel_gather", "name"), [("whole", "all")], product(("whole", "slabs"), ("plain", "all")))
def test_projection_on_a_mesh(x64, kernel_gather, name):
    hidden, kernel, labels = problem()
    hidden, kernel = jnp.tile(hidden, 2)[..., :8], jnp.tile(kernel, (2, 1))[:8]
    floats = {"hidden": hidden, "kernel": kernel, **OPTIONS[name]()}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    lie = OnMesh(mesh=mesh, hidden=P("data"), kernel=P("data", "model"), kernel_gather=kernel_gather)
    ours = partial(with_gradients, partial(jaxce.linear_token_log_probs, chunk_size=5, sharding=lie))
    assert_trees_close(jax.jit(ours)(floats, labels), with_gradients(dense, floats, labels), 1e-10)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_logits_on_a_mesh(x64, axis_type):
    hidden, kernel, labels = problem()
    floats = {"logits": hidden @ kernel, "temperature": positive(BATCH, 3, np.float64)}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    spec = P("data", None, "model")
    with jax.set_mesh(mesh):
        placed = floats | {"logits": jax.device_put(floats["logits"], jax.NamedSharding(mesh, spec))}
        lie = OnMesh(logits=spec) if axis_type == AxisType.Auto else OnMesh()
        got = jax.jit(partial(with_gradients, partial(jaxce.token_log_probs, sharding=lie)))(placed, labels)
    assert_trees_close(got, with_gradients(textbook, floats, labels), 1e-10)


def test_projection_inside_of_a_shard_map(x64):
    hidden, kernel, labels = problem()
    temperature = positive(BATCH, 3, np.float64)

    def local(hidden, kernel, temperature, labels):
        own = InShardMap(batch_axes="data", class_axes="model")
        return tuple(jaxce.linear_token_log_probs(hidden, kernel, labels, temperature=temperature, sharding=own))

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    in_specs = (P("data"), P(None, "model"), P("data"), P("data"))
    ours = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P("data"))
    floats = {"hidden": hidden, "kernel": kernel, "temperature": temperature}
    got = jax.jit(partial(with_gradients, lambda labels, **floats: ours(*floats.values(), labels)))(floats, labels)
    assert_trees_close(got, with_gradients(dense, floats, labels), 1e-10)


# What others fell into.


@pytest.fixture(params=["as on this platform", "as on a TPU"])
def platform(request, monkeypatch):
    if request.param == "as on a TPU":
        monkeypatch.setattr(_platform, "pretended", "tpu")
    jax.clear_caches()
    yield
    jax.clear_caches()


@cases(
    ("strategy", "scale", "dtype"),
    [("classes", 1e4, jnp.bfloat16)],
    product(("tokens", "classes"), (1.0, 1e4), (jnp.bfloat16, jnp.float16, jnp.float32)),
)
def test_no_probability_above_1_and_no_entropy_below_0(platform, strategy, scale, dtype):
    hidden = normal((64, 8), 0).astype(dtype)
    kernel = (normal((8, 40), 1) * scale).astype(dtype)
    labels = (hidden.astype(jnp.float32) @ kernel.astype(jnp.float32)).argmax(-1)
    stats = jaxce.linear_token_log_probs(hidden, kernel, labels, strategy=strategy, chunk_size=7)
    assert (stats.log_prob <= 0).all()
    assert (stats.entropy >= 0).all()
    logits = hidden.astype(jnp.float32) @ kernel.astype(jnp.float32)
    stats = jaxce.token_log_probs(jnp.clip(logits, -6e4, 6e4).astype(dtype), labels)
    assert (stats.log_prob <= 0).all()
    assert (stats.entropy >= 0).all()


def test_a_sure_token_has_its_gradient_all_the_same():
    """Where rounding is cut off, the gradient isn't."""
    logits = jnp.array([[20.0, 0.0, 0.0]])

    def log_prob(logits):
        return jaxce.token_log_probs(logits, jnp.array([0])).log_prob.sum()

    want = jax.grad(lambda x: jax.nn.log_softmax(x)[0, 0])(logits)
    assert_close(jax.grad(log_prob)(logits)[:, 1:], want[:, 1:], 1e-5)


def test_masked_classes_have_no_entropy():
    logits = jnp.array([[0.0, 0.0, -jnp.inf, -jnp.inf]])
    entropy, gradient = jax.value_and_grad(lambda x: jaxce.token_log_probs(x, jnp.array([0])).entropy.sum())(
        logits.at[0, 0].set(1.0)
    )
    p = jax.nn.softmax(jnp.array([1.0, 0.0]))
    assert_close(entropy, -(p * jnp.log(p)).sum(), 1e-6)
    assert jnp.isfinite(gradient).all()
    assert gradient[0, 2:].tolist() == [0, 0]


def test_left_out_is_0_and_out_of_range_is_nan():
    hidden, kernel, labels = problem(np.float32)
    hidden = hidden.at[0, 0].set(jnp.nan)
    where = jnp.ones(BATCH, bool).at[0, 0].set(False)
    labels = labels.at[2, 1].set(CLASSES)

    def numbers(hidden, temperature):
        return jaxce.linear_token_log_probs(hidden, kernel, labels, where=where, temperature=temperature)

    temperature = jnp.ones(BATCH).at[0, 0].set(-1.0)
    stats = numbers(hidden, temperature)
    for number in stats:
        assert (number[0, 0], number[1, 2]) == (0, 0)
    assert jnp.isnan(stats.log_prob).sum() == 1
    assert jnp.isnan(stats.log_prob[2, 1])
    of_hidden, of_temperature = jax.jit(jax.grad(lambda *a: numbers(*a).entropy.sum(), (0, 1)))(hidden, temperature)
    assert not of_hidden[0, 0].any()
    assert of_temperature[0, 0] == 0
    assert jnp.isfinite(of_hidden).all()


def test_a_traced_temperature_of_0_or_below_is_nan():
    logits, labels = normal((3, 8)), indices(3, 8)
    stats = jaxce.token_log_probs(logits, labels, temperature=jnp.array([1.0, 0.0, -1.0]))
    for number in stats:
        assert jnp.isnan(number).tolist() == [False, True, True]


@pytest.mark.parametrize("function", [jaxce.token_log_probs, partial(jaxce.linear_token_log_probs, jnp.ones((3, 8)))])
def test_errors(function):
    scores, labels = jnp.ones((8, 8)) if isinstance(function, partial) else jnp.ones((3, 8)), jnp.zeros(3, int)
    rule = "temperature must be a positive number, or an array of floats; got "
    cases = {
        f"{rule}0: the limit at 0 is argmax of the logits": {"temperature": 0},
        f"{rule}-0.5: the limit at 0 is argmax of the logits": {"temperature": -0.5},
        "temperature must be a scalar, or have shape (3,), one an example; got (4,)": {"temperature": jnp.ones(4)},
        "logit_softcap must be a positive number, or None; got -1": {"logit_softcap": -1},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            function(scores, labels, **options)
    with pytest.raises(TypeError, match=re.escape(f"{rule}int32 of shape (3,)")):
        function(scores, labels, temperature=jnp.ones(3, jnp.int32))
    message = (
        "labels must be class indices, whose log-probabilities are asked for; got float32 of shape (3, 8): for "
        "distributions, cross_entropy takes class probabilities"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        function(scores, jnp.ones((3, 8)))
    with pytest.raises(ValueError, match="labels must have shape"):
        function(scores, jnp.zeros(4, int))


# What it costs.


def flops(function, *arguments):
    """Counted with loops of one turn: the compiler counts a loop's body once."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_who_does_not_read_a_number_does_not_pay_for_it():
    hidden, kernel, labels = normal((64, 32), 0), normal((32, 256), 1), indices(64, 256)

    def read(*names):
        def summed(hidden, kernel):
            stats = jaxce.linear_token_log_probs(hidden, kernel, labels, chunk_size=256, strategy="classes")
            return sum(getattr(stats, name).sum() for name in names)

        return flops(summed, hidden, kernel), flops(jax.value_and_grad(summed, (0, 1)), hidden, kernel)

    with_entropy, without, entropy_alone = read("log_prob", "entropy"), read("log_prob"), read("entropy")
    assert without[0] < with_entropy[0]
    assert without[1] < with_entropy[1]
    assert entropy_alone[0] < with_entropy[0]
    assert entropy_alone[1] < with_entropy[1]


@cases("strategy", ["classes"], ["tokens"])
def test_no_logits_are_stored(strategy):
    n, d, c = 512, 64, 16_384
    hidden, kernel, labels = normal((n, d), 0), normal((d, c), 1) / 8, indices(n, c)

    def weighted(hidden, kernel, temperature):
        stats = jaxce.linear_token_log_probs(
            hidden, kernel, labels, strategy=strategy, temperature=temperature, chunk_size=64
        )
        return sum((number * positive(number.shape)).sum() for number in stats)

    step = jax.jit(jax.value_and_grad(weighted, (0, 1, 2)))
    memory = for_figures(step.lower(hidden, kernel, positive((n,)))).memory_analysis().temp_size_in_bytes
    # A chunk of logits a few times, and what the gradients are summed in.
    assert memory <= 4 * (5 * 64 * max(c if strategy == "tokens" else n, 1) + 2 * n * d + 2 * d * c)
    assert memory <= 0.8 * 4 * n * c
