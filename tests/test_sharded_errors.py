"""The whole messages for arrays that don't fit their mesh, all raised when the function is traced."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxce import sharded

pytestmark = pytest.mark.every_case

HIDDEN, KERNEL, LABELS = jnp.ones((8, 16)), jnp.ones((16, 24)), jnp.zeros(8, int)
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
SPECS = {"mesh": MESH, "hidden_spec": P("data"), "kernel_spec": P(None, "model")}


def raised(call, kind=ValueError):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


NO_MESH = (
    "there is no mesh: pass mesh=jax.make_mesh(...), or call this under jax.set_mesh(mesh), or with arrays that lie on "
    "a mesh; without one, jaxce.cross_entropy and jaxce.linear_cross_entropy are the same losses"
)
PROJECTIONS = {
    "no mesh": ({"mesh": None, "hidden_spec": None, "kernel_spec": None}, NO_MESH),
    "no spec": (
        {"hidden_spec": None},
        "hidden_spec must say how hidden lies on the mesh (data=4, model=2): inside of jax.jit or jax.grad an array on "
        "a mesh with automatic axes doesn't tell; for example hidden_spec=P('data')",
    ),
    "no spec of the kernel": (
        {"kernel_spec": None},
        "kernel_spec must say how kernel lies on the mesh (data=4, model=2): inside of jax.jit or jax.grad an array on "
        "a mesh with automatic axes doesn't tell; for example kernel_spec=P(None, 'model')",
    ),
    "unknown axis": (
        {"kernel_spec": P(None, "modell")},
        "kernel_spec must name axes of the mesh (data=4, model=2); got P(None, 'modell'): did you mean 'model'?",
    ),
    "too many entries": (
        {"hidden_spec": P("data", None, None)},
        "hidden_spec must have at most 2 entries, one an axis of hidden; got P('data', None, None)",
    ),
    "an axis twice": (
        {"kernel_spec": P("model", "model")},
        "kernel_spec must name a mesh axis once; got 'model' twice in P('model', 'model')",
    ),
    "unconstrained": (
        {"hidden_spec": P(P.UNCONSTRAINED)},
        f"hidden_spec must say of each axis how it is sharded; got {P(P.UNCONSTRAINED)}: None says that it isn't",
    ),
    "features": (
        {"hidden_spec": P("data", "model")},
        "hidden must have all of its features on each device; got its last axis sharded over 'model': the logits would "
        "have to be summed across devices. Gather it first, for example with jax.lax.with_sharding_constraint or "
        "jax.sharding.reshard",
    ),
    "uneven classes": (
        {"kernel": jnp.ones((16, 23))},
        "axis 1 of kernel, of length 23, must be divisible by 2, the devices along 'model': pad it to 24, and pass "
        "num_classes=23",
    ),
    "uneven features": (
        {"hidden": jnp.ones((8, 15)), "kernel": jnp.ones((15, 24)), "kernel_spec": P("data", "model")},
        "axis 0 of kernel, of length 15, must be divisible by 4, the devices along 'data': shard it over fewer devices",
    ),
    "uneven tokens": (
        {"hidden": jnp.ones((6, 16)), "labels": jnp.zeros(6, int)},
        "axis 0 of hidden, of length 6, must be divisible by 4, the devices along 'data': pad it to 8, and leave the "
        "padding out with ignore_index or where",
    ),
    "slabs over tokens": (
        {"kernel_gather": "slabs", "strategy": "tokens"},
        "kernel_gather='slabs' needs the loop over classes; got strategy='tokens', which takes the whole kernel for "
        "each chunk of tokens: strategy='classes' or 'auto'",
    ),
    "slabs of classes": (
        {"kernel_gather": "slabs", "kernel_spec": P(None, ("model", "data")), "hidden": jnp.ones((800, 16))},
        "kernel_gather='slabs' needs a kernel that is sharded over the axes of the tokens by its features; got its "
        "classes sharded over 'data': move them to axis 0",
    ),
    "another word": (
        {"kernel_gather": "slab"},
        "kernel_gather must be one of 'whole' and 'slabs'; got 'slab': did you mean 'slabs'?",
    ),
    "both ways": (
        {"class_axes": "model"},
        "mesh is for whole arrays; got it with batch_axes or class_axes, which are for the parts of them inside of a "
        "jax.shard_map: pass one or the other",
    ),
    "no shard_map": (
        {"mesh": None, "hidden_spec": None, "kernel_spec": None, "class_axes": "model"},
        "class_axes must name axes of the jax.shard_map that this is called in; got 'model': there is none around this "
        "call",
    ),
    "kernel": (
        {"kernel": jnp.ones((24, 16))},
        "kernel must have shape (D, C) with D = 16, the last axis of hidden (8, 16); got (24, 16): it fits with "
        "transpose_kernel=True",
    ),
}


@pytest.mark.parametrize(("changed", "message"), PROJECTIONS.values(), ids=PROJECTIONS.keys())
def test_projection(changed, message):
    given = {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS, **SPECS, **changed}
    assert raised(lambda: sharded.linear_cross_entropy(**given)) == message


LOGITS = {
    "no mesh": ({"mesh": None}, NO_MESH),
    "uneven": (
        {"logits": jnp.ones((8, 23)), "logits_spec": P(None, "model")},
        "axis 1 of logits, of length 23, must be divisible by 2, the devices along 'model': pad it to 24, and pass "
        "num_classes=23",
    ),
    "too many classes": (
        {"num_classes": 25},
        "num_classes must be from 1 to 24, the classes of logits; got 25",
    ),
}


@pytest.mark.parametrize(("changed", "message"), LOGITS.values(), ids=LOGITS.keys())
def test_logits(changed, message):
    given = {"logits": jnp.ones((8, 24)), "labels": LABELS, "mesh": MESH, "logits_spec": P("data"), **changed}
    assert raised(lambda: sharded.cross_entropy(**given)) == message


def test_what_is_no_mesh_or_spec():
    def call(**how):
        return raised(lambda: sharded.cross_entropy(jnp.ones((8, 24)), LABELS, **how), TypeError)

    assert call(mesh="data") == "mesh must be a jax.sharding.Mesh, or None; got str: 'data'"
    assert call(mesh=MESH, logits_spec="data") == "logits_spec must be a jax.sharding.PartitionSpec; got str: 'data'"


INSIDE = {
    "slabs": (
        {"kernel_gather": "slabs"},
        "kernel_gather='slabs' is for whole arrays and their specs; got it inside of a jax.shard_map, where a device "
        "has all features of its classes: leave it out",
    ),
    "no axes at all": (
        {"batch_axes": None, "class_axes": None},
        "batch_axes and class_axes must say which axes of the jax.shard_map, 'data', 'model', hold tokens and which "
        "hold classes; got neither, and no hidden_spec",
    ),
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
    names = {"batch_axes": "data", "class_axes": "model", "kernel_gather": "whole"}
    of_call |= {key: changed[key] for key in of_call if key in changed}
    names |= {key: changed[key] for key in names if key in changed}
    *specs, check_vma = of_call.values()
    loss = jax.shard_map(
        lambda *arrays: sharded.linear_cross_entropy(*arrays, **names),
        mesh=MESH,
        in_specs=tuple(specs),
        out_specs=P(),
        check_vma=check_vma,
    )
    assert raised(lambda: jax.eval_shape(loss, HIDDEN, KERNEL, LABELS)) == message
