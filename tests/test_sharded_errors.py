"""The whole messages for arrays that don't fit their mesh, all raised when the function is traced."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import InShardMap, OnMesh

HIDDEN, KERNEL, LABELS = jnp.ones((8, 16)), jnp.ones((16, 24)), jnp.zeros(8, int)
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
SPECS = {"mesh": MESH, "hidden": P("data"), "kernel": P(None, "model")}


def raised(call, kind=ValueError):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


NO_MESH = (
    "there is no mesh: pass OnMesh(mesh=jax.make_mesh(...)), or call this under jax.set_mesh(mesh), or with arrays "
    "that lie on a mesh; without one, leave sharding out"
)
PROJECTIONS = {
    "no mesh": ({"mesh": None, "hidden": None, "kernel": None}, NO_MESH),
    "no spec": (
        {"hidden": None},
        "OnMesh(hidden=...) must say how hidden lies on the mesh (data=4, model=2): inside of jax.jit or jax.grad an "
        "array on a mesh with automatic axes doesn't tell; for example OnMesh(hidden=P('data'))",
    ),
    "no spec of the kernel": (
        {"kernel": None},
        "OnMesh(kernel=...) must say how kernel lies on the mesh (data=4, model=2): inside of jax.jit or jax.grad an "
        "array on a mesh with automatic axes doesn't tell; for example OnMesh(kernel=P(None, 'model'))",
    ),
    "unknown axis": (
        {"kernel": P(None, "modell")},
        "OnMesh(kernel=...) must name axes of the mesh (data=4, model=2); got P(None, 'modell'): did you mean 'model'?",
    ),
    "too many entries": (
        {"hidden": P("data", None, None)},
        "OnMesh(hidden=...) must have at most 2 entries, one an axis of hidden; got P('data', None, None)",
    ),
    "an axis twice": (
        {"kernel": P("model", "model")},
        "OnMesh(kernel=...) must name a mesh axis once; got 'model' twice in P('model', 'model')",
    ),
    "unconstrained": (
        {"hidden": P(P.UNCONSTRAINED)},
        f"OnMesh(hidden=...) must say of each axis how it is sharded; got {P(P.UNCONSTRAINED)}: None says that it "
        "isn't",
    ),
    "features": (
        {"hidden": P("data", "model")},
        "hidden must have all of its features on each device; got its last axis sharded over 'model': the logits would "
        "have to be summed across devices. Gather it first, for example with jax.lax.with_sharding_constraint or "
        "jax.sharding.reshard",
    ),
    "uneven classes": (
        {"arrays": {"kernel": jnp.ones((16, 23))}},
        "axis 1 of kernel, of length 23, must be divisible by 2, the devices along 'model': pad it to 24, and pass "
        "num_classes=23",
    ),
    "uneven features": (
        {"arrays": {"hidden": jnp.ones((8, 15)), "kernel": jnp.ones((15, 24))}, "kernel": P("data", "model")},
        "axis 0 of kernel, of length 15, must be divisible by 4, the devices along 'data': shard it over fewer devices",
    ),
    "uneven tokens": (
        {"arrays": {"hidden": jnp.ones((6, 16)), "labels": jnp.zeros(6, int)}},
        "axis 0 of hidden, of length 6, must be divisible by 4, the devices along 'data': pad it to 8, and leave the "
        "padding out with ignore_index or where",
    ),
    "slabs over tokens": (
        {"kernel_gather": "slabs", "arrays": {"strategy": "tokens"}},
        "kernel_gather='slabs' needs the loop over classes; got strategy='tokens', which takes the whole kernel for "
        "each chunk of tokens: strategy='classes' or 'auto'",
    ),
    "slabs of classes": (
        {
            "kernel_gather": "slabs",
            "kernel": P(None, ("model", "data")),
            "arrays": {"hidden": jnp.ones((800, 16)), "labels": jnp.zeros(800, int)},
        },
        "kernel_gather='slabs' needs a kernel that is sharded over the axes of the tokens by its features; got its "
        "classes sharded over 'data': move them to axis 0",
    ),
    "logits": (
        {"logits": P("data")},
        "OnMesh(logits=...) is of no array of this function, which takes hidden and kernel: leave it out",
    ),
    "a teacher": (
        {"teacher_kernel": P("data")},
        "OnMesh(teacher_kernel=...) is of no array of this function, which takes hidden and kernel: leave it out",
    ),
    "kernel": (
        {"arrays": {"kernel": jnp.ones((24, 16))}},
        "kernel must have shape (D, C) with D = 16, the last axis of hidden (8, 16); got (24, 16): it fits with "
        "transpose_kernel=True",
    ),
}


@pytest.mark.parametrize(("changed", "message"), PROJECTIONS.values(), ids=PROJECTIONS.keys())
def test_projection(changed, message):
    specs = SPECS | changed
    given = {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS, **specs.pop("arrays", {})}
    assert raised(lambda: jaxce.linear_cross_entropy(**given, sharding=OnMesh(**specs))) == message


LOGITS = {
    "no mesh": ({"mesh": None}, NO_MESH),
    "log-probabilities": (
        {"mesh": None, "logits": None},
        NO_MESH,
    ),
    "uneven": (
        {"array": jnp.ones((8, 23)), "logits": P(None, "model")},
        "axis 1 of logits, of length 23, must be divisible by 2, the devices along 'model': pad it to 24, and pass "
        "num_classes=23",
    ),
    "too many classes": (
        {"num_classes": 25},
        "num_classes must be from 1 to 24, the classes of logits; got 25",
    ),
    "hidden": (
        {"hidden": P("data")},
        "OnMesh(hidden=...) is of no array of this function, which takes logits: leave it out",
    ),
}


@pytest.mark.parametrize(("changed", "message"), LOGITS.values(), ids=LOGITS.keys())
def test_logits(changed, message):
    lie = OnMesh(mesh=changed.get("mesh", MESH), logits=changed.get("logits", P("data")), hidden=changed.get("hidden"))
    given = {"num_classes": changed.get("num_classes"), "sharding": lie}
    assert raised(lambda: jaxce.cross_entropy(changed.get("array", jnp.ones((8, 24))), LABELS, **given)) == message


def test_what_is_no_mesh_or_spec():
    assert (
        raised(lambda: OnMesh(mesh="data"), TypeError) == "mesh must be a jax.sharding.Mesh, or None; got str: 'data'"
    )
    message = "logits must be a jax.sharding.PartitionSpec, or None; got str: 'data'"
    assert raised(lambda: OnMesh(logits="data"), TypeError) == message
    message = "kernel_gather must be one of 'whole' and 'slabs'; got 'slab': did you mean 'slabs'?"
    assert raised(lambda: OnMesh(kernel_gather="slab")) == message
    message = "class_axes must be the name of an axis, or a sequence of names; got None: () is none"
    assert raised(lambda: InShardMap(batch_axes="data", class_axes=None), TypeError) == message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("data", "got str"),
        (P("data"), "got a PartitionSpec: wrap it in jaxce.OnMesh, with a spec for each array"),
        (NamedSharding(MESH, P()), "got a NamedSharding: wrap it in jaxce.OnMesh, with a spec for each array"),
    ],
)
def test_what_is_no_sharding(value, message):
    message = f"sharding must be jaxce.OnMesh(...), jaxce.InShardMap(...) or None; {message}"
    logits, teacher = jnp.ones((8, 24)), (HIDDEN, KERNEL)
    calls = [
        lambda: jaxce.cross_entropy(logits, LABELS, sharding=value),
        lambda: jaxce.nll_loss(logits, LABELS, sharding=value),
        lambda: jaxce.log_softmax(logits, sharding=value),
        lambda: jaxce.token_log_probs(logits, LABELS, sharding=value),
        lambda: jaxce.linear_cross_entropy(HIDDEN, KERNEL, LABELS, sharding=value),
        lambda: jaxce.linear_token_log_probs(HIDDEN, KERNEL, LABELS, sharding=value),
        lambda: jaxce.linear_distillation_loss(HIDDEN, KERNEL, *teacher, sharding=value),
    ]
    assert {raised(call, TypeError) for call in calls} == {message}


def test_no_shard_map():
    message = "class_axes must name axes of the jax.shard_map that this is called in; got 'model': there is none around"
    own = InShardMap(batch_axes=(), class_axes="model")
    assert raised(lambda: jaxce.linear_cross_entropy(HIDDEN, KERNEL, LABELS, sharding=own)) == f"{message} this call"


INSIDE = {
    "unknown axis": (
        {"class_axes": "modell"},
        "class_axes must name axes of the jax.shard_map that this is called in; got 'modell': those are "
        "'data', 'model'",
    ),
    "an axis for both": (
        {"class_axes": ("data", "model")},
        "an axis holds examples or classes; got 'data' in batch_axes and in class_axes",
    ),
    "a kernel that is the same everywhere": (
        {"kernel_spec": P()},
        "kernel must be this device's classes; got the same array on all devices along 'model': give it a spec with "
        "'model' in the in_specs of jax.shard_map, or leave 'model' out of class_axes",
    ),
    "tokens that are the same everywhere": (
        {"hidden_spec": P()},
        "hidden must be this device's tokens; got the same array on all devices along 'data': give it a spec with "
        "'data' in the in_specs of jax.shard_map, or leave 'data' out of batch_axes",
    ),
    "labels that differ": (
        {"labels_spec": P(("data", "model")), "hidden_spec": P(("data", "model"))},
        "labels must be the same on all devices along 'model', an axis of class_axes; got labels that may differ: "
        "gather them, and hidden, before the jax.shard_map",
    ),
    "nothing known of what varies": (
        {"check_vma": False},
        "a loss inside of a jax.shard_map must know over which axes an array varies; got check_vma=False: leave it "
        "True",
    ),
}


@pytest.mark.parametrize(("changed", "message"), INSIDE.values(), ids=INSIDE.keys())
def test_inside_of_a_shard_map(changed, message):
    of_call = {"hidden_spec": P("data"), "kernel_spec": P(None, "model"), "labels_spec": P("data"), "check_vma": True}
    names = {"batch_axes": "data", "class_axes": "model"}
    of_call |= {key: changed[key] for key in of_call if key in changed}
    names |= {key: changed[key] for key in names if key in changed}
    *specs, check_vma = of_call.values()
    loss = jax.shard_map(
        lambda *arrays: jaxce.linear_cross_entropy(*arrays, sharding=InShardMap(**names)),
        mesh=MESH,
        in_specs=tuple(specs),
        out_specs=P(),
        check_vma=check_vma,
    )
    assert raised(lambda: jax.eval_shape(loss, HIDDEN, KERNEL, LABELS)) == message


def test_a_mesh_inside_of_a_shard_map():
    message = (
        "sharding must be InShardMap(batch_axes=..., class_axes=...) inside of a jax.shard_map, to say which of its "
        "axes, 'data', 'model', hold tokens and which hold classes; got OnMesh without hidden"
    )
    loss = jax.shard_map(
        lambda *arrays: jaxce.linear_cross_entropy(*arrays, sharding=OnMesh()),
        mesh=MESH,
        in_specs=(P("data"), P(None, "model"), P("data")),
        out_specs=P(),
    )
    assert raised(lambda: jax.eval_shape(loss, HIDDEN, KERNEL, LABELS)) == message
