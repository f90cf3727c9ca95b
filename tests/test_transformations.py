"""JAX's transformations, and meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT_DTYPES, assert_close, assert_trees_close, distributions, indices, normal, positive
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce

LOGITS, LABELS = normal((4, 6)), indices(4, 6)
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 3.0}
WANT = jax.value_and_grad(jaxce.reference.cross_entropy)(LOGITS, LABELS)


def of_logits(loss, **options):
    return lambda x: loss(x, LABELS, **options)


LOSSES = [
    (of_logits(jaxce.cross_entropy), of_logits(jaxce.reference.cross_entropy)),
    (of_logits(jaxce.cross_entropy, **EVERYTHING), of_logits(jaxce.reference.cross_entropy, **EVERYTHING)),
    (
        lambda x: jaxce.nll_loss(jaxce.log_softmax(x), LABELS),
        lambda x: jaxce.reference.nll_loss(jaxce.reference.log_softmax(x), LABELS),
    ),
    (lambda x: (jaxce.log_softmax(x) ** 2).sum(), lambda x: (jaxce.reference.log_softmax(x) ** 2).sum()),
]
every_loss = pytest.mark.parametrize(("ours", "theirs"), LOSSES, ids=["plain", "options", "nll_loss", "log_softmax"])


@every_loss
def test_jit_and_grad(ours, theirs):
    assert_close(jax.jit(ours)(LOGITS), theirs(LOGITS), 1e-6)
    assert_close(jax.jit(jax.grad(ours))(LOGITS), jax.grad(theirs)(LOGITS), 1e-5)
    assert_close(jax.grad(jax.checkpoint(ours))(LOGITS), jax.grad(theirs)(LOGITS), 1e-5)


@every_loss
def test_hessian(ours, theirs):
    assert_close(jax.hessian(ours)(LOGITS), jax.hessian(theirs)(LOGITS), 1e-5)


@every_loss
def test_hessian_vector_product(ours, theirs):
    got, want = (jax.jvp(jax.grad(f), (LOGITS,), (normal((4, 6), 1),))[1] for f in (ours, theirs))
    assert_close(got, want, 1e-5)


@every_loss
def test_reverse_over_reverse(ours, theirs):
    assert_close(jax.jacrev(jax.jacrev(ours))(LOGITS), jax.hessian(theirs)(LOGITS), 1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        jaxce.cross_entropy,
        lambda x, y: jaxce.nll_loss(jaxce.log_softmax(x), y),
        lambda x, y: jaxce.linear_cross_entropy(x, jnp.eye(6), y, strategy="tokens"),
        lambda x, y: jaxce.linear_cross_entropy(x, jnp.eye(6), y, strategy="classes"),
    ],
    ids=["cross_entropy", "nll_loss", "tokens", "classes"],
)
def test_reverse_over_reverse_where_an_example_is_left_out(loss):
    got = jax.jacrev(jax.jacrev(loss))(LOGITS, LABELS.at[1].set(-100))
    kept = jnp.array([0, 2, 3])
    want = jax.hessian(jaxce.reference.cross_entropy)(LOGITS[kept], LABELS[kept])
    assert not got[1].any()
    assert_close(got[kept][:, :, kept], want, 1e-5)


def test_jacrev():
    got, want = (
        jax.jacrev(of_logits(loss, reduction="none"))(LOGITS)
        for loss in (jaxce.cross_entropy, jaxce.reference.cross_entropy)
    )
    assert_close(got, want, 1e-5)


def test_vmap_of_grad_over_every_argument():
    smoothing = jnp.array([0.01, 0.1, 0.5, 0.9])

    def gradient(loss):
        return jax.vmap(jax.grad(lambda x, y, e: loss(x, y, label_smoothing=e), (0, 2)))(LOGITS, LABELS, smoothing)

    for got, want in zip(gradient(jaxce.cross_entropy), gradient(jaxce.reference.cross_entropy), strict=True):
        assert_close(got, want, 1e-5)


def test_scan():
    def step(total, example):
        return total + jaxce.cross_entropy(*example), None

    def loss(x):
        return jax.lax.scan(step, jnp.zeros(()), (x, LABELS))[0] / 4

    value, gradient = jax.value_and_grad(loss)(LOGITS)
    assert_close(value, WANT[0], 1e-6)
    assert_close(gradient, WANT[1], 1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.grad], ids=["eager", "jit", "grad"])
@pytest.mark.parametrize("bad", [-1, 6])
@pytest.mark.parametrize("loss", [jaxce.cross_entropy, jaxce.nll_loss])
def test_checkify_names_the_label_and_the_number_of_classes(loss, bad, wrap):
    checked = checkify.checkify(wrap(loss))
    error, _ = checked(LOGITS, LABELS.at[2].set(bad))
    message = f"labels must be from 0 to 5, or ignore_index; got {bad} with 6 classes"
    assert error.get().startswith(message)
    error, _ = checked(LOGITS, LABELS.at[2].set(-100))
    assert error.get() is None


def test_export_for_every_platform():
    function = jax.jit(jax.value_and_grad(jaxce.cross_entropy))
    exported = jax.export.export(function, platforms=("cpu", "cuda", "rocm", "tpu"))(LOGITS, LABELS)
    value, gradient = exported.call(LOGITS, LABELS)
    assert_close(value, WANT[0], 1e-6)
    assert_close(gradient, WANT[1], 1e-5)


def test_an_exported_loss_can_be_stored():
    exported = jax.export.export(jax.jit(jaxce.cross_entropy))(LOGITS, LABELS)
    assert_close(jax.export.deserialize(exported.serialize()).call(LOGITS, LABELS), WANT[0], 1e-6)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_scatter_or_gather_on_an_accelerator(platform):
    # Both are serial on a TPU, and neither is split over a sharded class axis.
    exported = jax.export.export(jax.jit(jax.value_and_grad(jaxce.cross_entropy)), platforms=[platform])
    text = exported(jax.ShapeDtypeStruct((8, 40_000), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)).mlir_module()
    assert "stablehlo.exponential" in text
    assert not re.search(r"stablehlo\.\w*(scatter|gather|dynamic_slice)", text)


def mesh_of(axis_type):
    return jax.make_mesh((4,), ("x",), axis_types=(axis_type,))


SPECS = pytest.mark.parametrize(
    ("logits_spec", "labels_spec"), [(P("x"), P("x")), (P(None, "x"), P())], ids=["batch", "classes"]
)
WIDE, WIDE_LABELS = normal((8, 16)), indices(8, 16)
WIDE_WANT = jax.value_and_grad(jaxce.reference.cross_entropy)(WIDE, WIDE_LABELS)


def assert_wide(got):
    assert_close(got[0], WIDE_WANT[0], 1e-6)
    assert_close(got[1], WIDE_WANT[1], 1e-5)


@SPECS
def test_sharded_arrays_under_jit(logits_spec, labels_spec):
    mesh = mesh_of(AxisType.Auto)
    logits = jax.device_put(WIDE, NamedSharding(mesh, logits_spec))
    labels = jax.device_put(WIDE_LABELS, NamedSharding(mesh, labels_spec))
    assert_wide(jax.jit(jax.value_and_grad(jaxce.cross_entropy))(logits, labels))


@pytest.mark.parametrize(
    ("num_classes", "logits_spec", "labels_spec"),
    [(c, P("x"), P("x")) for c in (4096, 65_536, 50_257)] + [(c, P(None, "x"), P()) for c in (4096, 65_536)],
)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sharded_logits_are_not_gathered(dtype, num_classes, logits_spec, labels_spec):
    mesh = mesh_of(AxisType.Auto)
    logits = jax.ShapeDtypeStruct((8, num_classes), dtype, sharding=NamedSharding(mesh, logits_spec))
    labels = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=NamedSharding(mesh, labels_spec))
    step = jax.jit(jax.value_and_grad(jaxce.cross_entropy), out_shardings=(None, NamedSharding(mesh, logits_spec)))
    text = step.lower(logits, labels).compile().as_text()
    assert re.search(r"all-reduce|all-gather", text)  # the mean, or the row's sums, cross the mesh
    moved = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute|all-reduce)", text)
    assert all(np.prod([int(n) for n in size.split(",") if n]) <= 64 for size in moved)


def test_shard_map():
    def local(logits, labels):
        return jax.lax.pmean(jaxce.cross_entropy(logits, labels), "x")

    sharded = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=(P("x"), P("x")), out_specs=P())
    assert_wide(jax.jit(jax.value_and_grad(sharded))(WIDE, WIDE_LABELS))


@pytest.mark.parametrize("loss", [jaxce.cross_entropy, jaxce.nll_loss])
@pytest.mark.parametrize("labels", [WIDE_LABELS, distributions((8, 16))], ids=["indices", "probabilities"])
def test_gradients_inside_shard_map_of_what_is_the_same_everywhere(loss, labels):
    options = {"weight": positive((16,), 1)}
    if loss is jaxce.cross_entropy:
        options |= {"label_smoothing": jnp.array(0.1), "z_loss": jnp.array(0.1), "logit_softcap": jnp.array(3.0)}

    def total(x, labels, options):
        return loss(x, labels, reduction="sum", **options)

    def local(*arrays):
        return jax.lax.psum(total(*arrays), "x")

    sharded = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=(P("x"), P("x"), P()), out_specs=P())
    got, want = (jax.grad(f, (0, 2))(WIDE, labels, options) for f in (sharded, total))
    assert_trees_close(got, want, 1e-5)


def test_log_softmax_inside_shard_map_of_logits_that_are_the_same_everywhere():
    masks = normal((4, 16)) > 0

    def total(x, masks):
        return jnp.where(masks, jaxce.log_softmax(jnp.broadcast_to(x, masks.shape), where=masks), 0)[:, :8].sum()

    def local(x, mask):
        log_probs = jaxce.log_softmax(x, where=mask[0])
        return jax.lax.psum(jnp.where(mask[0], log_probs, 0)[:8].sum(), "x")

    sharded = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=(P(), P("x")), out_specs=P())
    assert_close(jax.grad(sharded)(WIDE[0], masks), jax.grad(total)(WIDE[0], masks), 1e-5)


@pytest.mark.parametrize("loss", [jaxce.cross_entropy, jaxce.reference.cross_entropy], ids=["ours", "reference"])
def test_smoothing_has_its_gradient_at_zero(loss):
    log_p = jax.nn.log_softmax(LOGITS)
    want = (jnp.take_along_axis(log_p, LABELS[:, None], -1)[:, 0] - log_p.mean(-1)).mean()
    assert_close(jax.grad(lambda e: loss(LOGITS, LABELS, label_smoothing=e))(jnp.zeros(())), want, 1e-5)


@pytest.mark.parametrize("options", [{}, {"weight": positive((16,), 1)}, {"label_smoothing": 0.1, "z_loss": 0.1}])
@pytest.mark.parametrize(
    ("logits_spec", "labels_spec"),
    [(P("x"), P("x")), (P(None, "x"), P())],
    ids=["batch", "classes"],
)
def test_explicit_mesh(logits_spec, labels_spec, options):
    logits, labels = normal((8, 16)), indices((8,), 16)
    gradient = jax.jit(jax.value_and_grad(lambda x, y: jaxce.cross_entropy(x, y, **options)))
    want = gradient(logits, labels)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, NamedSharding(mesh, logits_spec))
        got = gradient(placed, jax.device_put(labels, NamedSharding(mesh, labels_spec)))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")])
def test_explicit_mesh_of_one_device_with_long_rows(spec):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    logits, labels = normal((2, 40_000)), indices(2, 40_000)
    want = jax.value_and_grad(jaxce.reference.cross_entropy)(logits, labels)
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, NamedSharding(mesh, spec))
        got = jax.jit(jax.value_and_grad(jaxce.cross_entropy))(
            placed, jax.device_put(labels, NamedSharding(mesh, P(spec[0])))
        )
    assert jax.typeof(got[1]).sharding.spec == spec
    assert_trees_close(got, want, 1e-5)


# The projection. Tokens lie over the mesh, or classes.
PLACES = [(P("x", None, None), P(None, None)), (P(None, None, None), P(None, "x"))]


@pytest.mark.parametrize(
    ("axis_type", "loop"),
    [(AxisType.Auto, "tokens"), (AxisType.Explicit, "tokens"), (AxisType.Explicit, "classes")],
)
@pytest.mark.parametrize(("of_tokens", "of_kernel"), PLACES)
def test_projection_on_a_mesh(loop, of_tokens, of_kernel, axis_type):
    hidden, kernel, labels = normal((8, 2, 5)), normal((5, 24), 1), indices((8, 2), 24).at[3].set(-100)

    def losses(hidden, kernel, labels):
        options = {"strategy": loop, "chunk_size": 4, "label_smoothing": 0.1}
        mean, stats = jaxce.linear_cross_entropy(hidden, kernel, labels, return_stats=True, **options)
        each = jaxce.linear_cross_entropy(hidden, kernel, labels, reduction="none", **options)
        return mean + (each**2).sum(), (stats, each)

    gradient = jax.jit(jax.value_and_grad(losses, (0, 1), has_aux=True))
    want = gradient(hidden, kernel, labels)
    mesh = mesh_of(axis_type)
    of_batch = P(*of_tokens[:2])
    arrays = ((hidden, of_tokens), (kernel, of_kernel), (labels, of_batch))
    placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in arrays]
    got = gradient(*placed)
    assert_trees_close(got, want, 1e-5)
    if axis_type == AxisType.Explicit:
        (_, (stats, each)), of_inputs = got
        assert [jax.typeof(a).sharding.spec for a in of_inputs] == [of_tokens, of_kernel]
        assert {jax.typeof(a).sharding.spec for a in (each, *stats[:4])} == {of_batch}


@pytest.mark.parametrize("loop", ["tokens", "classes"])
def test_projection_inside_shard_map(loop):
    # Chunks that divide neither the 7 tokens of a device nor the classes.
    hidden, kernel, labels = normal((28, 5)), normal((5, 24), 1), indices(28, 24)

    def loss(hidden, kernel, labels):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, strategy=loop, chunk_size=3, label_smoothing=0.1)

    def local(*arrays):
        return jax.lax.pmean(loss(*arrays), "x")

    sharded = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=(P("x"), P(), P("x")), out_specs=P())
    got, want = (jax.value_and_grad(f, (0, 1))(hidden, kernel, labels) for f in (sharded, loss))
    assert_trees_close(got, want, 1e-5)
