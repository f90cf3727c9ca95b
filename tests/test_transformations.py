"""JAX's transformations, and meshes."""

import re
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FLOAT_DTYPES,
    assert_close,
    assert_trees_close,
    cases,
    distributions,
    indices,
    normal,
    positive,
)
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce

pytestmark = pytest.mark.values

LOGITS, LABELS = normal((4, 6)), indices(4, 6)
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 3.0}
WANT = jax.jit(jax.value_and_grad(jaxce.reference.cross_entropy))(LOGITS, LABELS)


def of_logits(loss, **options):
    return lambda x: loss(x, LABELS, **options)


LOSSES = {
    "plain": (of_logits(jaxce.cross_entropy), of_logits(jaxce.reference.cross_entropy)),
    "options": (of_logits(jaxce.cross_entropy, **EVERYTHING), of_logits(jaxce.reference.cross_entropy, **EVERYTHING)),
    "nll_loss": (
        lambda x: jaxce.nll_loss(jaxce.log_softmax(x), LABELS),
        lambda x: jaxce.reference.nll_loss(jaxce.reference.log_softmax(x), LABELS),
    ),
    "log_softmax": (lambda x: (jaxce.log_softmax(x) ** 2).sum(), lambda x: (jaxce.reference.log_softmax(x) ** 2).sum()),
}


@cases("name", ["options", "nll_loss"], LOSSES)
def test_jit_and_grad(name):
    ours, theirs = LOSSES[name]
    want = jax.jit(jax.value_and_grad(theirs))(LOGITS)
    assert_close(jax.jit(ours)(LOGITS), want[0], 1e-6)
    assert_close(jax.jit(jax.grad(ours))(LOGITS), want[1], 1e-5)
    assert_close(jax.grad(jax.checkpoint(ours))(LOGITS), want[1], 1e-5)


@cases("name", ["options", "log_softmax"], LOSSES)
def test_hessian(name):
    got, want = (jax.jit(jax.hessian(loss))(LOGITS) for loss in LOSSES[name])
    assert_close(got, want, 1e-5)


@cases("name", ["options", "nll_loss"], LOSSES)
def test_hessian_vector_product(name):
    def product(loss):
        return jax.jit(lambda x, direction: jax.jvp(jax.grad(loss), (x,), (direction,))[1])(LOGITS, normal((4, 6), 1))

    got, want = map(product, LOSSES[name])
    assert_close(got, want, 1e-5)


@cases("name", ["plain", "log_softmax"], LOSSES)
def test_reverse_over_reverse(name):
    ours, theirs = LOSSES[name]
    assert_close(jax.jit(jax.jacrev(jax.jacrev(ours)))(LOGITS), jax.jit(jax.hessian(theirs))(LOGITS), 1e-5)


WITH_LABELS = {
    "cross_entropy": jaxce.cross_entropy,
    "nll_loss": lambda x, y: jaxce.nll_loss(jaxce.log_softmax(x), y),
    "tokens": lambda x, y: jaxce.linear_cross_entropy(x, jnp.eye(6), y, strategy="tokens"),
    "classes": lambda x, y: jaxce.linear_cross_entropy(x, jnp.eye(6), y, strategy="classes"),
}


@cases("name", ["classes"], WITH_LABELS)
def test_reverse_over_reverse_where_an_example_is_left_out(name):
    got = jax.jit(jax.jacrev(jax.jacrev(WITH_LABELS[name])))(LOGITS, LABELS.at[1].set(-100))
    kept = jnp.array([0, 2, 3])
    want = jax.jit(jax.hessian(jaxce.reference.cross_entropy))(LOGITS[kept], LABELS[kept])
    assert not got[1].any()
    assert_close(got[kept][:, :, kept], want, 1e-5)


def test_jacrev():
    got, want = (
        jax.jit(jax.jacrev(of_logits(loss, reduction="none")))(LOGITS)
        for loss in (jaxce.cross_entropy, jaxce.reference.cross_entropy)
    )
    assert_close(got, want, 1e-5)


def test_vmap_of_grad_over_every_argument():
    smoothing = jnp.array([0.01, 0.1, 0.5, 0.9])

    def gradient(loss):
        of_one = jax.grad(lambda x, y, e: loss(x, y, label_smoothing=e), (0, 2))
        return jax.jit(jax.vmap(of_one))(LOGITS, LABELS, smoothing)

    for got, want in zip(gradient(jaxce.cross_entropy), gradient(jaxce.reference.cross_entropy), strict=True):
        assert_close(got, want, 1e-5)


def test_scan():
    def step(total, example):
        return total + jaxce.cross_entropy(*example), None

    def loss(x):
        return jax.lax.scan(step, jnp.zeros(()), (x, LABELS))[0] / 4

    value, gradient = jax.jit(jax.value_and_grad(loss))(LOGITS)
    assert_close(value, WANT[0], 1e-6)
    assert_close(gradient, WANT[1], 1e-5)


WAYS = {"eager": lambda f: f, "jit": jax.jit, "grad": jax.grad}


@cases(
    ("loss", "bad", "way"),
    [(jaxce.cross_entropy, -1, "eager"), (jaxce.nll_loss, 6, "jit"), (jaxce.cross_entropy, 6, "grad")],
    product([jaxce.cross_entropy, jaxce.nll_loss], [-1, 6], WAYS),
)
def test_checkify_names_the_label_and_the_number_of_classes(loss, bad, way):
    checked = checkify.checkify(WAYS[way](loss))
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
WIDE_WANT = jax.jit(jax.value_and_grad(jaxce.reference.cross_entropy))(WIDE, WIDE_LABELS)


def assert_wide(got):
    assert_close(got[0], WIDE_WANT[0], 1e-6)
    assert_close(got[1], WIDE_WANT[1], 1e-5)


@SPECS
def test_sharded_arrays_under_jit(logits_spec, labels_spec):
    mesh = mesh_of(AxisType.Auto)
    logits = jax.device_put(WIDE, NamedSharding(mesh, logits_spec))
    labels = jax.device_put(WIDE_LABELS, NamedSharding(mesh, labels_spec))
    assert_wide(jax.jit(jax.value_and_grad(jaxce.cross_entropy))(logits, labels))


BY_BATCH, BY_CLASSES = (P("x"), P("x")), (P(None, "x"), P())


@cases(
    ("dtype", "num_classes", "logits_spec", "labels_spec"),
    [
        (jnp.bfloat16, 65_536, *BY_CLASSES),
        (jnp.float32, 4096, *BY_CLASSES),
        (jnp.float16, 50_257, *BY_BATCH),
        (jnp.float32, 65_536, *BY_BATCH),
    ],
    [
        *((dtype, c, *BY_BATCH) for dtype in FLOAT_DTYPES for c in (4096, 65_536, 50_257)),
        *((dtype, c, *BY_CLASSES) for dtype in FLOAT_DTYPES for c in (4096, 65_536)),
    ],
)
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


@cases(
    ("loss", "probabilities"),
    [(jaxce.cross_entropy, False), (jaxce.nll_loss, True)],
    [(jaxce.cross_entropy, True), (jaxce.nll_loss, False)],
)
def test_gradients_inside_shard_map_of_what_is_the_same_everywhere(loss, probabilities):
    labels = distributions((8, 16)) if probabilities else WIDE_LABELS
    options = {"weight": positive((16,), 1)}
    if loss is jaxce.cross_entropy:
        options |= {"label_smoothing": jnp.array(0.1), "z_loss": jnp.array(0.1), "logit_softcap": jnp.array(3.0)}

    def total(x, labels, options):
        return loss(x, labels, reduction="sum", **options)

    def local(*arrays):
        return jax.lax.psum(total(*arrays), "x")

    sharded = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=(P("x"), P("x"), P()), out_specs=P())
    got, want = (jax.jit(jax.grad(f, (0, 2)))(WIDE, labels, options) for f in (sharded, total))
    assert_trees_close(got, want, 1e-5)


def test_log_softmax_inside_shard_map_of_logits_that_are_the_same_everywhere():
    masks = normal((4, 16)) > 0

    def total(x, masks):
        return jnp.where(masks, jaxce.log_softmax(jnp.broadcast_to(x, masks.shape), where=masks), 0)[:, :8].sum()

    def local(x, mask):
        log_probs = jaxce.log_softmax(x, where=mask[0])
        return jax.lax.psum(jnp.where(mask[0], log_probs, 0)[:8].sum(), "x")

    sharded = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=(P(), P("x")), out_specs=P())
    got, want = (jax.jit(jax.grad(f))(WIDE[0], masks) for f in (sharded, total))
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("loss", [jaxce.cross_entropy, jaxce.reference.cross_entropy], ids=["ours", "reference"])
def test_smoothing_has_its_gradient_at_zero(loss):
    log_p = jax.nn.log_softmax(LOGITS)
    want = (jnp.take_along_axis(log_p, LABELS[:, None], -1)[:, 0] - log_p.mean(-1)).mean()
    assert_close(jax.grad(lambda e: loss(LOGITS, LABELS, label_smoothing=e))(jnp.zeros(())), want, 1e-5)


@cases(
    ("names", "logits_spec", "labels_spec"),
    [(("weight",), *BY_BATCH), (("label_smoothing", "z_loss"), *BY_CLASSES)],
    [(names, *specs) for names in [(), ("weight",), ("label_smoothing", "z_loss")] for specs in (BY_BATCH, BY_CLASSES)],
)
def test_explicit_mesh(names, logits_spec, labels_spec):
    every = {"weight": positive((16,), 1), "label_smoothing": 0.1, "z_loss": 0.1}
    options = {name: every[name] for name in names}
    logits, labels = normal((8, 16)), indices((8,), 16)
    gradient = jax.jit(jax.value_and_grad(lambda x, y: jaxce.cross_entropy(x, y, **options)))
    want = gradient(logits, labels)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, NamedSharding(mesh, logits_spec))
        got = gradient(placed, jax.device_put(labels, NamedSharding(mesh, labels_spec)))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-5)


@cases("spec", [P(None, "x")], [P("x", None)])
def test_explicit_mesh_of_one_device_with_long_rows(spec):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    logits, labels = normal((2, 40_000)), indices(2, 40_000)
    want = jax.jit(jax.value_and_grad(jaxce.reference.cross_entropy))(logits, labels)
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, NamedSharding(mesh, spec))
        got = jax.jit(jax.value_and_grad(jaxce.cross_entropy))(
            placed, jax.device_put(labels, NamedSharding(mesh, P(spec[0])))
        )
    assert jax.typeof(got[1]).sharding.spec == spec
    assert_trees_close(got, want, 1e-5)


# The projection. Tokens lie over the mesh, or classes.
PLACES = [(P("x", None, None), P(None, None)), (P(None, None, None), P(None, "x"))]


TYPES_AND_LOOPS = [(AxisType.Auto, "tokens"), (AxisType.Explicit, "tokens"), (AxisType.Explicit, "classes")]


@cases(
    ("axis_type", "loop", "of_tokens", "of_kernel"),
    [(AxisType.Explicit, "classes", *PLACES[0])],
    [(*types, *places) for types, places in product(TYPES_AND_LOOPS, PLACES)],
)
def test_projection_on_a_mesh(axis_type, loop, of_tokens, of_kernel):
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


@cases("loop", ["classes"], ["tokens"])
def test_projection_inside_shard_map(loop):
    # Chunks that divide neither the 7 tokens of a device nor the classes.
    hidden, kernel, labels = normal((28, 5)), normal((5, 24), 1), indices(28, 24)

    def loss(hidden, kernel, labels):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, strategy=loop, chunk_size=3, label_smoothing=0.1)

    def local(*arrays):
        return jax.lax.pmean(loss(*arrays), "x")

    sharded = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=(P("x"), P(), P("x")), out_specs=P())
    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, kernel, labels) for f in (sharded, loss))
    assert_trees_close(got, want, 1e-5)
