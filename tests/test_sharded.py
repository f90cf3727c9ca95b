"""The losses on eight virtual devices: the numbers, gradients and layouts of what lies on one device."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, cases, distributions, indices, normal, positive
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import InShardMap, OnMesh, _platform

AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]

# Eight sequences of six tokens; 24 columns.
BATCH, FEATURES, COLUMNS = (8, 6), 16, 24
# How the hidden states and the kernel lie.
LAYOUTS = {
    "data": (P("data"), P()),
    "data, both axes": (P(("data", "model")), P()),
    "classes": (P(), P(None, "model")),
    "classes, both axes": (P(), P(None, ("model", "data"))),
    "data and classes": (P("data"), P(None, "model")),
    "FSDP": (P(("data", "model")), P("data")),
    "FSDP and classes": (P("data"), P("data", "model")),
    "FSDP by classes": (P(("data", "model")), P(None, ("data", "model"))),
    "FSDP by classes and classes": (P("data"), P(None, ("data", "model"))),
    "FSDP over an axis without tokens": (P("model"), P("data", "model")),
    "sequences": (P(None, "model"), P("data", "model")),
    "data, sequences and classes": (P("data", "model"), P(None, "model")),
    "data, sequences, FSDP and classes": (P("data", "model"), P("data", "model")),
}


def mesh_of(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def problem(num_classes=COLUMNS):
    """Hidden states, kernel and labels, some of them ignored; padding of the kernel holds NaN."""
    kernel = normal((FEATURES, COLUMNS), 1, np.float64) / 4
    labels = indices(BATCH, num_classes).at[1, 2].set(-100).at[5].set(-100)
    return normal((*BATCH, FEATURES), 0, np.float64), kernel.at[:, num_classes:].set(jnp.nan), labels


def place(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


def of_batch(spec):
    return P(*spec[:2])


pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.values]


def options_of(name, num_classes=COLUMNS):
    """Options, and arrays whose gradients are compared too."""
    weight = positive((num_classes,), 3, np.float64)
    probabilities = distributions((*BATCH, num_classes), seed=5, dtype=np.float64)
    arrays = {
        "bias": normal((COLUMNS,), 2, np.float64),
        "weight": weight,
        "sample_weight": positive(BATCH, 4, np.float64),
        "label_smoothing": jnp.asarray(0.1),
        "z_loss": jnp.asarray(0.05),
        "logit_softcap": jnp.asarray(3.0),
    }
    return {
        "plain": ({}, {}),
        "sum": ({"reduction": "sum"}, {}),
        "none": ({"reduction": "none"}, {}),
        "everything": ({"where": normal(BATCH, 9) > -1}, arrays),
        "probabilities": ({}, {"labels": probabilities, "weight": weight}),
        "transposed": ({"transpose_kernel": True, "label_smoothing": 0.1}, {}),
    }[name]


OPTIONS = ["plain", "sum", "none", "everything", "probabilities", "transposed"]


def with_gradients(loss, hidden, kernel, labels, statics, arrays):
    """The loss with its stats, and the gradient of a weighting of it in every float array."""

    def weighted(floats):
        given = {"labels": labels, **floats, **statics}
        value, stats = loss(**given, return_stats=True)
        return (positive(value.shape, 7, value.dtype) * value).sum(), (value, stats)

    floats = {"hidden": hidden, "kernel": kernel, **arrays}
    (_, found), gradients = jax.value_and_grad(weighted, has_aux=True)(floats)
    return found, gradients


@cache
def unsharded(option, num_classes):
    """The loss and gradients on one device."""
    statics, arrays = options_of(option, num_classes)
    hidden, kernel, labels = problem(num_classes)
    kernel = kernel.T if statics.get("transpose_kernel") else kernel
    statics |= {"num_classes": num_classes, "chunk_size": 24}
    step = partial(with_gradients, jaxce.linear_cross_entropy, statics=statics, arrays=arrays)
    return jax.jit(step)(hidden, kernel, labels)


def compare(layout, axis_type, strategy, option="everything", num_classes=COLUMNS, specs=True, kernel_gather="whole"):
    """The loss on a mesh beside the loss on one device; returns the gradients."""
    hidden, kernel, labels = problem(num_classes)
    of_hidden, of_kernel = layout
    statics, arrays = options_of(option, num_classes)
    if statics.get("transpose_kernel"):
        kernel, of_kernel = kernel.T, P(*(*of_kernel, None, None)[:2][::-1])
    statics = {**statics, "strategy": strategy, "chunk_size": 5, "num_classes": num_classes}
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        placed = place(mesh, hidden, of_hidden), place(mesh, kernel, of_kernel)
        given = {"hidden": of_hidden, "kernel": of_kernel} if axis_type == AxisType.Auto else {}
        how = {"sharding": OnMesh(kernel_gather=kernel_gather, **given)} if specs else {}
        loss = partial(jaxce.linear_cross_entropy, **how)
        step = partial(with_gradients, loss, statics=statics, arrays=arrays)
        got = jax.jit(step)(*placed, place(mesh, labels, P(*of_hidden[:2])))
    assert_trees_close(got, unsharded(option, num_classes))
    _, gradients = got
    for name, array in zip(("hidden", "kernel"), placed, strict=True):
        if specs:
            assert gradients[name].sharding.is_equivalent_to(array.sharding, array.ndim)
    return gradients


@cases(
    "layout",
    ["classes, both axes", "FSDP by classes and classes", "data, sequences, FSDP and classes"],
    LAYOUTS,
)
def test_layouts(layout):
    compare(LAYOUTS[layout], AxisType.Auto, "classes")


@cases(
    "layout",
    ["data, sequences and classes"],
    ["data", "FSDP by classes and classes", "FSDP over an axis without tokens"],
)
def test_layouts_that_types_tell(layout):
    compare(LAYOUTS[layout], AxisType.Explicit, "classes")


@cases(
    ("option", "strategy"),
    [("probabilities", "classes"), ("everything", "tokens")],
    product(OPTIONS, ("tokens", "classes")),
)
def test_options(option, strategy):
    compare(LAYOUTS["data, sequences, FSDP and classes"], AxisType.Auto, strategy, option)


@cases(
    ("layout", "strategy", "option"),
    [("FSDP by classes", "classes", "everything")],
    [
        ("classes, both axes", "tokens", "probabilities"),
        ("FSDP and classes", "tokens", "everything"),
        ("FSDP and classes", "classes", "probabilities"),
        ("FSDP by classes", "tokens", "probabilities"),
        ("classes, both axes", "classes", "everything"),
    ],
)
def test_classes_that_devices_cannot_share_evenly(layout, strategy, option):
    """The last devices have fewer than the others, or none."""
    gradients = compare(LAYOUTS[layout], AxisType.Auto, strategy, option, num_classes=11)
    assert not gradients["kernel"][:, 11:].any()


@cases(
    ("layout", "option"),
    [("FSDP and classes", "everything")],
    [
        ("FSDP and classes", "none"),
        ("FSDP", "probabilities"),
        ("data, sequences, FSDP and classes", "transposed"),
    ],
)
def test_kernel_gathered_slab_by_slab(layout, option):
    compare(LAYOUTS[layout], AxisType.Auto, "classes", option, kernel_gather="slabs")


@cases(
    ("layout", "strategy", "option"),
    [("FSDP and classes", "auto", "everything")],
    [
        ("FSDP and classes", "tokens", "none"),
        ("FSDP and classes", "classes", "everything"),
        ("data, sequences and classes", "auto", "probabilities"),
    ],
)
def test_plain_function_on_an_automatic_mesh(layout, strategy, option):
    compare(LAYOUTS[layout], AxisType.Auto, strategy, option, num_classes=23, specs=False)


@pytest.mark.thorough
@cases(("strategy", "how"), [("classes", {"kernel_gather": "slabs"})], [("tokens", {}), ("classes", {})])
def test_a_slab_that_one_device_does_again(strategy, how, monkeypatch):
    """A hot class for some tokens on one device: far above the reference, there alone."""
    monkeypatch.setattr(_platform, "pretended", "tpu")
    jax.clear_caches()
    hidden, kernel, labels = problem()
    hidden, kernel = hidden.at[:2].multiply(300), kernel.at[:, 17].multiply(30)
    want = jax.jit(plain_gradients(lambda h, w, y: jaxce.reference.cross_entropy(h @ w, y)))(hidden, kernel, labels)
    loss = partial(on_mesh(**how), strategy=strategy, chunk_size=5)
    assert_trees_close(jax.jit(plain_gradients(loss))(hidden, kernel, labels), want, 1e-10)
    jax.clear_caches()


@cases(
    ("wanted", "strategy"),
    [(("hidden",), "auto")],
    [(("hidden",), "classes"), (("kernel",), "auto"), (("kernel",), "classes")],
)
def test_frozen_hidden_states_or_kernel(wanted, strategy):
    hidden, kernel, labels = problem()
    loss = partial(on_mesh(), strategy=strategy, chunk_size=5)
    argnums = tuple(("hidden", "kernel").index(name) for name in wanted)
    got, want = (
        jax.jit(jax.value_and_grad(each, argnums))(hidden, kernel, labels)
        for each in (loss, jaxce.linear_cross_entropy)
    )
    assert_trees_close(got, want)


@cases(
    ("dtype", "kernel_gather"),
    [(jnp.bfloat16, "slabs")],
    [(jnp.bfloat16, "whole"), (jnp.float16, "whole"), (jnp.float16, "slabs")],
)
def test_16_bits(dtype, kernel_gather):
    """Parts of a gradient are rounded before they are summed over devices, as the partitioner's are."""
    hidden, kernel, labels = problem()
    hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    want = jax.jit(plain_gradients())(hidden.astype(jnp.float64), kernel.astype(jnp.float64), labels)
    loss = partial(on_mesh(kernel_gather=kernel_gather), chunk_size=5)
    value, gradients = jax.jit(plain_gradients(loss))(hidden, kernel, labels)
    assert value.dtype == jnp.float32
    assert_close(value.astype(jnp.float64), want[0], 1e-5)
    for gradient, exact in zip(gradients, want[1], strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient.astype(jnp.float64), exact, 4 * float(jnp.finfo(dtype).eps))


# Logits.


def of_logits(logits, labels, options, loss):
    value, pull, stats = jax.vjp(lambda x, o: loss(x, labels, **o, return_stats=True), logits, options, has_aux=True)
    return value, stats, pull(positive(value.shape, 7, value.dtype))


SPECS_AND_AXES = [
    (P("data"), -1),
    (P(None, None, ("data", "model")), -1),
    (P("data", "model", None), 1),
    (P("model", "data"), 1),
]


@cases(
    ("axis_type", "spec", "axis", "num_classes", "reduction"),
    [
        (AxisType.Auto, *SPECS_AND_AXES[1], COLUMNS, "mean"),
        (AxisType.Explicit, *SPECS_AND_AXES[2], 11, "none"),
    ],
    [
        (axis_type, *spec, *how)
        for axis_type, spec, how in product(AXIS_TYPES, SPECS_AND_AXES, [(COLUMNS, "mean"), (11, "none")])
    ],
)
def test_logits(axis_type, spec, axis, num_classes, reduction):
    shape = (8, 6, COLUMNS) if axis == -1 else (8, COLUMNS, 6)
    logits = normal(shape, 0, np.float64)
    padded = jnp.where(jnp.arange(COLUMNS) < num_classes, jnp.moveaxis(logits, axis, -1), jnp.nan)
    logits, cut = jnp.moveaxis(padded, -1, axis), jnp.moveaxis(padded[..., :num_classes], -1, axis)
    labels = indices((8, 6), num_classes).at[1, 2].set(-100).at[5].set(-100)
    options = {
        "weight": positive((num_classes,), 3, np.float64),
        "sample_weight": positive((8, 6), 4, np.float64),
        "label_smoothing": jnp.asarray(0.1),
        "z_loss": jnp.asarray(0.05),
        "logit_softcap": jnp.asarray(3.0),
    }
    how = {"axis": axis, "reduction": reduction}
    one = jax.jit(partial(of_logits, loss=partial(jaxce.cross_entropy, **how)))
    value, stats, (of_scores, of_options) = one(cut, labels, options)
    padding = [(0, 0)] * 3
    padding[axis] = (0, COLUMNS - num_classes)
    want = value, stats, (jnp.pad(of_scores, padding), of_options)
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        placed = place(mesh, logits, spec)
        lie = OnMesh() if axis_type == AxisType.Explicit else OnMesh(logits=spec)
        loss = partial(jaxce.cross_entropy, num_classes=num_classes, sharding=lie, **how)
        got = jax.jit(partial(of_logits, loss=loss))(placed, labels, options)
    assert_trees_close(got, want)
    assert got[2][0].sharding.is_equivalent_to(placed.sharding, 3)


def test_class_probabilities_beside_logits():
    logits, labels = normal((8, 11), 0, np.float64), distributions((8, 11), dtype=np.float64)
    padded = jnp.pad(logits, [(0, 0), (0, 1)], constant_values=jnp.nan)
    mesh = mesh_of(AxisType.Auto)
    lie = OnMesh(mesh=mesh, logits=P("model", "data"))
    loss = partial(jaxce.cross_entropy, sharding=lie, num_classes=11)
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(padded, labels)
    want, (of_scores, of_labels) = jax.jit(jax.value_and_grad(jaxce.cross_entropy, (0, 1)))(logits, labels)
    assert_trees_close(got, (want, (jnp.pad(of_scores, [(0, 0), (0, 1)]), of_labels)))


# Where the mesh and the specs come from.

SPECS = {"hidden": P("data"), "kernel": P("data", "model")}


def on_mesh(**how):
    """The loss on a mesh with automatic axes."""
    return partial(jaxce.linear_cross_entropy, sharding=OnMesh(mesh=mesh_of(AxisType.Auto), **SPECS, **how))


def plain_gradients(loss=jaxce.linear_cross_entropy, **options):
    return jax.value_and_grad(partial(loss, **options), (0, 1))


def test_arrays_that_tell_where_they_lie():
    hidden, kernel, labels = problem()
    mesh = mesh_of(AxisType.Auto)
    placed = place(mesh, hidden, P("data")), place(mesh, kernel, P("data", "model"))
    want = jaxce.linear_cross_entropy(hidden, kernel, labels)
    assert_close(jaxce.linear_cross_entropy(*placed, labels, sharding=OnMesh()), want)
    assert_close(jaxce.linear_cross_entropy(*placed, labels), want)


def test_mesh_and_specs_that_are_passed():
    hidden, kernel, labels = problem()
    got, want = (jax.jit(each)(hidden, kernel, labels) for each in (plain_gradients(on_mesh()), plain_gradients()))
    assert_trees_close(got, want)


@cases("layout", ["FSDP and classes"], ["data, sequences and classes"])
def test_on_an_explicit_mesh_types_tell(layout):
    hidden, kernel, labels = problem()
    of_hidden, of_kernel = LAYOUTS[layout]
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        arguments = place(mesh, hidden, of_hidden), place(mesh, kernel, of_kernel), labels
        plain, ours = (
            jax.jit(plain_gradients(loss)).lower(*arguments).as_text()
            for loss in (jaxce.linear_cross_entropy, partial(jaxce.linear_cross_entropy, sharding=OnMesh()))
        )
        logits = place(mesh, normal((8, COLUMNS)), P("data", "model"))
        of_scores, ours_of_scores = (
            jax.jit(jax.value_and_grad(loss)).lower(logits, labels[:, 0]).as_text()
            for loss in (jaxce.cross_entropy, partial(jaxce.cross_entropy, sharding=OnMesh()))
        )
    assert plain == ours
    assert of_scores == ours_of_scores
    assert "manual_computation" in plain


def test_plain_function_on_an_explicit_mesh_that_holds_features():
    """No device could do its part of it, so that XLA places what is inside."""
    hidden, kernel, labels = problem()
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = place(mesh, hidden, P(None, None, "data")), place(mesh, kernel, P("data", "model"))
        got = jax.jit(plain_gradients())(*placed, labels)
    assert_trees_close(got, jax.jit(plain_gradients())(hidden, kernel, labels))


@cases(
    ("option", "strategy"),
    [("none", "classes")],
    product(("everything", "probabilities", "none"), ("tokens", "classes")),
)
def test_inside_of_a_shard_map(option, strategy):
    hidden, kernel, labels = problem()
    statics, arrays = options_of(option)
    where = statics.pop("where", None)
    statics |= {"strategy": strategy, "chunk_size": 5}
    of_arrays = {
        "sample_weight": P("data"),
        "bias": P("model"),
        "labels": P("data", None, "model"),
    }

    def local(given, where):
        own = InShardMap(batch_axes="data", class_axes="model")
        return jaxce.linear_cross_entropy(**given, **statics, where=where, sharding=own)

    given = {"hidden": hidden, "kernel": kernel, "labels": labels} | arrays
    specs = {name: of_arrays.get(name, P()) for name in given}
    specs |= {"hidden": P("data"), "kernel": P(None, "model")}
    if option != "probabilities":
        specs["labels"] = P("data")
    out = P("data") if statics.get("reduction") == "none" else P()
    loss = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=(specs, P("data")), out_specs=out)
    floats = {name: array for name, array in given.items() if jnp.issubdtype(array.dtype, jnp.floating)}

    def weighted(floats, loss):
        value = loss(given | floats, where)
        return (positive(value.shape, 7, value.dtype) * value).sum()

    def whole(given, where):
        return jaxce.linear_cross_entropy(**given, **statics, where=where)

    got, want = (jax.jit(jax.value_and_grad(partial(weighted, loss=each)))(floats) for each in (loss, whole))
    assert_trees_close(got, want)


def test_logits_inside_of_a_shard_map():
    logits, labels = normal((8, COLUMNS), 0, np.float64), indices((8,), 23)

    def local(logits, labels):
        own = InShardMap(batch_axes="model", class_axes="data")
        return jaxce.cross_entropy(logits, labels, sharding=own, num_classes=23)

    loss = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=(P("model", "data"), P("model")), out_specs=P())
    want, gradient = jax.value_and_grad(jaxce.cross_entropy)(logits[:, :23], labels)
    assert_trees_close(jax.jit(jax.value_and_grad(loss))(logits, labels), (want, jnp.pad(gradient, [(0, 0), (0, 1)])))


# What XLA makes of them.


@pytest.mark.thorough
@cases("strategy", ["classes"], ["tokens"])
def test_second_derivatives_and_vmap(strategy):
    hidden, kernel, labels = problem()
    direction = normal(kernel.shape, 8, np.float64)
    options = {"strategy": strategy, "chunk_size": 5}

    def of_kernel(loss):
        gradient = jax.grad(lambda kernel: loss(hidden, kernel, labels, **options))
        return jax.jvp(gradient, (kernel,), (direction,))[1]

    def each(loss):
        return jax.vmap(lambda scale: loss(hidden, scale * kernel, labels, **options))(jnp.asarray([1.0, 2.0]))

    ours = on_mesh()
    for function in (of_kernel, each):
        got, want = (jax.jit(partial(function, loss))() for loss in (ours, jaxce.linear_cross_entropy))
        assert_close(got, want, 1e-10)


# The other functions of logits, and what the losses share with log-probabilities.


BOTH_SHARDED, CLASSES_SHARDED = P("data", "model"), P(None, ("model", "data"))


@cases(
    ("axis_type", "spec", "reduction"),
    [(AxisType.Auto, BOTH_SHARDED, "mean"), (AxisType.Explicit, CLASSES_SHARDED, "none")],
    product(AXIS_TYPES, (BOTH_SHARDED, CLASSES_SHARDED), ("mean", "sum", "none")),
)
def test_nll_loss_of_sharded_classes(axis_type, spec, reduction):
    log_probs = jax.nn.log_softmax(normal((8, COLUMNS), 0, np.float64))
    labels = indices((8,), COLUMNS).at[2].set(-100)
    options = {"weight": positive((COLUMNS,), 3, np.float64), "sample_weight": positive((8,), 4, np.float64)}

    def gradients(log_probs, options, **how):
        loss = partial(jaxce.nll_loss, labels=labels, reduction=reduction, **how)
        value, pull = jax.vjp(lambda x, o: loss(x, **o), log_probs, options)
        return value, pull(positive(value.shape, 7, value.dtype))

    want = gradients(log_probs, options)
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        placed = place(mesh, log_probs, spec)
        lie = OnMesh() if axis_type == AxisType.Explicit else OnMesh(logits=spec)
        got = jax.jit(partial(gradients, sharding=lie))(placed, options)
    assert_trees_close(got, want)
    assert got[1][0].sharding.is_equivalent_to(placed.sharding, 2)


def test_nll_loss_of_probabilities_and_bad_labels_on_a_mesh():
    log_probs = jax.nn.log_softmax(normal((8, COLUMNS), 0, np.float64))
    labels = distributions((8, COLUMNS), dtype=np.float64)
    lie = OnMesh(mesh=mesh_of(AxisType.Auto), logits=P("data", "model"))
    got, want = (jax.grad(partial(jaxce.nll_loss, **how), (0, 1))(log_probs, labels) for how in ({"sharding": lie}, {}))
    assert_trees_close(got, want)
    for bad in (-1, COLUMNS):
        losses = jaxce.nll_loss(log_probs, jnp.arange(8).at[3].set(bad), reduction="none", sharding=lie)
        assert jnp.isnan(losses).tolist() == [row == 3 for row in range(8)]


@cases(
    ("axis_type", "spec", "axis", "masked"),
    [(AxisType.Explicit, P("data", "model"), 1, True), (AxisType.Auto, P("model", "data"), 0, False)],
    [
        (axis_type, *spec, masked)
        for axis_type, spec, masked in product(
            AXIS_TYPES, [(P("data", "model"), 1), (P("model", "data"), 0)], (False, True)
        )
    ],
)
def test_log_softmax_of_sharded_classes(axis_type, spec, axis, masked):
    logits = normal((8, COLUMNS), 0, np.float64)
    where = normal((8, COLUMNS), 1) > -1 if masked else None

    def gradients(logits, **how):
        value, pull = jax.vjp(lambda x: jaxce.log_softmax(x, axis, where=where, **how), logits)
        return jnp.exp(value), pull(normal(value.shape, 7, value.dtype))

    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        placed = place(mesh, logits, spec)
        lie = OnMesh() if axis_type == AxisType.Explicit else OnMesh(logits=spec)
        got = jax.jit(partial(gradients, sharding=lie))(placed)
    assert_trees_close(got, jax.jit(gradients)(logits))
    assert all(array.sharding.is_equivalent_to(placed.sharding, 2) for array in jax.tree.leaves(got))


def test_scores_inside_of_a_shard_map():
    logits, labels = normal((8, COLUMNS), 0, np.float64), indices((8,), COLUMNS)

    def local(logits, labels):
        own = InShardMap(batch_axes="data", class_axes="model")
        return jaxce.nll_loss(jaxce.log_softmax(logits, sharding=own), labels, sharding=own)

    loss = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=(P("data", "model"), P("data")), out_specs=P())
    got = jax.jit(jax.value_and_grad(loss))(logits, labels)
    assert_trees_close(got, jax.value_and_grad(jaxce.cross_entropy)(logits, labels))


def test_concrete_arrays_tell_a_plain_call():
    """Outside of `jax.jit`, arrays on a mesh with automatic axes are enough; where they don't fit, XLA places them."""
    mesh = mesh_of(AxisType.Auto)
    logits, labels = normal((8, COLUMNS), 0, np.float64), indices((8,), COLUMNS)
    placed = place(mesh, logits, P("data", "model"))
    assert_close(jaxce.cross_entropy(placed, labels), jaxce.cross_entropy(logits, labels))
    hidden, kernel, labels = problem()
    want = jaxce.linear_cross_entropy(hidden, kernel, labels)
    for of_hidden, of_kernel in [(P("data"), P("data", "model")), (P(None, None, "model"), P()), (P("data"), P())]:
        arrays = place(mesh, hidden, of_hidden), place(mesh, kernel, of_kernel)
        assert_close(jaxce.linear_cross_entropy(*arrays, labels), want)
    assert_close(jaxce.linear_cross_entropy(place(mesh, hidden, P("data")), kernel, labels), want)
