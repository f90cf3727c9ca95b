"""Mistakes, and the whole message that each of them gets, in eager code and under jit."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce import OnMesh

LOGITS = np.zeros((4, 10), np.float32)
LABELS = np.array([1, 2, 3, 0], np.int32)
ONE_HOT = np.eye(10, dtype=np.float32)[LABELS]
IMAGES = np.zeros((4, 10, 3), np.float32)

LABELS_4 = "labels must have shape (4,), that of logits (4, 10) without the class axis; got "
ONE_EXAMPLE = "labels must be a scalar, the class of the one example in logits of shape (10,); got "
ONE_HOT_HINT = "is the index of a one-hot vector, labels.astype(float) are probabilities"
PROBABILITIES = "labels of a float dtype are class probabilities and must have the shape of logits, "
KINDS = "labels must be class indices (integers) or class probabilities (floats); got "
WHERE_4 = "where must be broadcastable to shape (4,), that of logits (4, 10) without the class axis; got "
WHERE_HINT = ": it says which examples count; to rule out classes, use jnp.where(mask, logits, -jnp.inf)"
NUMBERS = "must be an array, or what jnp.asarray makes into one; got "
STATIC = "got a tracer: name it in static_argnames of jax.jit, or bind it first with functools.partial"

# Arrays, which jit traces; options; the message.
SHAPES = {
    "one-hot vector for one example": (
        (LOGITS[0], ONE_HOT[0].astype(int)),
        {},
        f"{ONE_EXAMPLE}(10,): labels.argmax() {ONE_HOT_HINT}",
    ),
    "integer one-hot rows": (
        (LOGITS, ONE_HOT.astype(int)),
        {},
        f"{LABELS_4}(4, 10): labels.argmax(1) {ONE_HOT_HINT}",
    ),
    "float indices": (
        (LOGITS, LABELS.astype(np.float32)),
        {},
        f"{PROBABILITIES}(4, 10); got float32 of shape (4,): labels.astype(int) makes class indices of them",
    ),
    "probabilities of other classes": (
        (LOGITS, ONE_HOT[:, :5]),
        {},
        f"{PROBABILITIES}(4, 10); got float32 of shape (4, 5)",
    ),
    "probabilities that would broadcast": (
        (LOGITS, ONE_HOT[:1]),
        {},
        f"{PROBABILITIES}(4, 10); got float32 of shape (1, 10)",
    ),
    "labels (N, 1)": ((LOGITS, LABELS[:, None]), {}, f"{LABELS_4}(4, 1): drop the last axis with labels[..., 0]"),
    "labels (N, 1, H) as in mask files": (
        (IMAGES, np.zeros((4, 1, 3), int)),
        {"axis": 1},
        "labels must have shape (4, 3), that of logits (4, 10, 3) without the class axis; got (4, 1, 3): "
        "drop axis 1 with jnp.squeeze(labels, 1)",
    ),
    "labels (1, N)": ((LOGITS, LABELS[None]), {}, f"{LABELS_4}(1, 4): drop axis 0 with jnp.squeeze(labels, 0)"),
    "a scalar label for many rows": (
        (LOGITS, LABELS[0]),
        {},
        f"{LABELS_4}(): jnp.full((4,), label) is one label for every row",
    ),
    "one label for many rows": (
        (LOGITS, LABELS[:1]),
        {},
        f"{LABELS_4}(1,): jnp.full((4,), label) is one label for every row",
    ),
    "too few labels": ((LOGITS, LABELS[:3]), {}, f"{LABELS_4}(3,)"),
    "PyTorch's layout": (
        (IMAGES, np.zeros((4, 3), int)),
        {},
        "labels must have shape (4, 10), that of logits (4, 10, 3) without the class axis; got (4, 3): "
        "if the classes are on axis 1, as PyTorch has them, pass axis=1",
    ),
    "PyTorch's layout of images": (
        (IMAGES[..., None], np.zeros((4, 3, 1), int)),
        {},
        "labels must have shape (4, 10, 3), that of logits (4, 10, 3, 1) without the class axis; got (4, 3, 1): "
        "if the classes are on axis 1, as PyTorch has them, pass axis=1",
    ),
    "the axis of PyTorch for classes on the last one": (
        (IMAGES, np.zeros((4, 10), int)),
        {"axis": 1},
        "labels must have shape (4, 3), that of logits (4, 10, 3) without the class axis; got (4, 10): "
        "if the classes are on axis 2, pass axis=2",
    ),
    "axes 0 and 1 that both fit": (
        (IMAGES[:, :4], np.zeros((4, 3), int)),
        {},
        "labels must have shape (4, 4), that of logits (4, 4, 3) without the class axis; got (4, 3): "
        "if the classes are on axis 1, as PyTorch has them, pass axis=1",
    ),
    "weight of the wrong length": (
        (LOGITS, LABELS),
        {"weight": np.ones(4, np.float32)},
        "weight must have shape (10,), one weight a class; got (4,): sample_weight is one weight an example",
    ),
    "weight that would broadcast": (
        (LOGITS, LABELS),
        {"weight": np.ones(1, np.float32)},
        "weight must have shape (10,), one weight a class; got (1,): sample_weight is one weight an example",
    ),
    "sample_weight that would broadcast": (
        (LOGITS, LABELS),
        {"sample_weight": np.ones((4, 1), np.float32)},
        "sample_weight must have shape (4,), one weight an example; got (4, 1)",
    ),
    "where of the logits' shape": ((LOGITS, LABELS), {"where": LOGITS > 0}, f"{WHERE_4}(4, 10){WHERE_HINT}"),
    "where of the wrong length": ((LOGITS, LABELS), {"where": np.ones(3, bool)}, f"{WHERE_4}(3,)"),
    "no class axis": (
        (LOGITS[0, 0], LABELS[0]),
        {},
        "logits must have a class axis; got a scalar: one example has shape (C,), one entry a class",
    ),
    "no classes": (
        (LOGITS[:, :0], LABELS),
        {},
        "logits must have at least one class; got shape (4, 0) with axis=1",
    ),
}
VALUES = {
    "a misspelt reduction": (
        {"reduction": "Mean"},
        "reduction must be one of 'none', 'mean' and 'sum'; got 'Mean': did you mean 'mean'?",
    ),
    "a reduction like no other": (
        {"reduction": "avg"},
        "reduction must be one of 'none', 'mean' and 'sum'; got 'avg'",
    ),
    "smoothing above 1": ({"label_smoothing": 1.5}, "label_smoothing must be a number from 0 to 1; got 1.5"),
    "negative smoothing": ({"label_smoothing": -0.1}, "label_smoothing must be a number from 0 to 1; got -0.1"),
    "smoothing that isn't a number": (
        {"label_smoothing": float("nan")},
        "label_smoothing must be a number from 0 to 1; got nan",
    ),
    "smoothing for each row": (
        {"label_smoothing": np.ones(4, np.float32)},
        "label_smoothing must be a real number or a scalar array; got float32 of shape (4,)",
    ),
    "negative z_loss": ({"z_loss": -1.0}, "z_loss must be a number that isn't negative; got -1.0"),
    "a soft cap of zero": ({"logit_softcap": 0.0}, "logit_softcap must be a positive number, or None; got 0.0"),
    "axis too large": ({"axis": 2}, "axis must be from -2 to 1 for logits of shape (4, 10); got 2"),
    "axis too small": ({"axis": -3}, "axis must be from -2 to 1 for logits of shape (4, 10); got -3"),
}
TYPES = {
    "bool labels": (
        (LOGITS, LABELS > 1),
        {},
        f"{KINDS}bool of shape (4,): for two classes, labels.astype(int) gives the indices",
    ),
    "complex labels": ((LOGITS, LABELS.astype(np.complex64)), {}, f"{KINDS}complex64 of shape (4,)"),
    "integer logits": (
        (LOGITS.astype(np.int32), LABELS),
        {},
        "logits must be of a float dtype; got int32 of shape (4, 10): logits.astype(jnp.float32) converts them",
    ),
    "labels before logits": (
        (LABELS, LOGITS),
        {},
        "logits must be of a float dtype; got logits int32 of shape (4,), labels float32 of shape (4, 10): are they "
        "swapped? The order is logits, labels",
    ),
    "integer logits with probabilities": (
        (LOGITS.astype(np.int32), ONE_HOT),
        {},
        "logits must be of a float dtype; got logits int32 of shape (4, 10), labels float32 of shape (4, 10): are they "
        "swapped? The order is logits, labels",
    ),
    "bool logits": (
        (LOGITS > 0, LABELS),
        {},
        "logits must be of a float dtype; got bool of shape (4, 10): logits.astype(jnp.float32) converts them",
    ),
    "complex logits": (
        (LOGITS.astype(np.complex64), LABELS),
        {},
        "logits must be of a float dtype; got complex64 of shape (4, 10)",
    ),
    "where of integers": (
        (LOGITS, LABELS),
        {"where": LABELS},
        "where must be bool; got int32 of shape (4,): where != 0 makes it one",
    ),
    "bool weight": (
        (LOGITS, LABELS),
        {"weight": np.ones(10, bool)},
        "weight must be real numbers; got bool of shape (10,)",
    ),
}
NOT_ARRAYS = {
    "None for logits": ((None, LABELS), {}, f"logits {NUMBERS}NoneType: None"),
    "text for logits": (("logits", LABELS), {}, f"logits {NUMBERS}str: 'logits'"),
    "None for labels": ((LOGITS, None), {}, f"labels {NUMBERS}NoneType: None"),
    "a ragged list": (([[0.0], [0.0, 1.0]], LABELS), {}, f"logits {NUMBERS}list: [[0.0], [0.0, 1.0]]"),
    "a dict for weight": ((LOGITS, LABELS), {"weight": {"a": 1}}, f"weight {NUMBERS}dict: {{'a': 1}}"),
    "float ignore_index": (
        (LOGITS, LABELS),
        {"ignore_index": 1.0},
        "ignore_index must be a Python integer; got float: 1.0",
    ),
    "float axis": ((LOGITS, LABELS), {"axis": 1.0}, "axis must be a Python integer; got float: 1.0"),
    "None for label_smoothing": (
        (LOGITS, LABELS),
        {"label_smoothing": None},
        "label_smoothing must be a number from 0 to 1; got None: 0 turns it off",
    ),
    "None for z_loss": (
        (LOGITS, LABELS),
        {"z_loss": None},
        "z_loss must be a number that isn't negative; got None: 0 turns it off",
    ),
    "int return_stats": ((LOGITS, LABELS), {"return_stats": 1}, "return_stats must be True or False; got int: 1"),
}


def table(cases):
    return pytest.mark.parametrize(("arrays", "options", "message"), cases.values(), ids=cases)


def assert_raises(error, message, call, *arrays):
    with pytest.raises(error) as caught:
        call(*arrays)
    assert type(caught.value) is error
    assert str(caught.value) == message


def both_ways(error, message, arrays, options):
    """Arrays among the options are traced as well."""
    traced = {name: value for name, value in options.items() if isinstance(value, np.ndarray)}
    static = {name: value for name, value in options.items() if name not in traced}

    def call(arrays, traced):
        return jaxce.cross_entropy(*arrays, **traced, **static)

    assert_raises(error, message, call, arrays, traced)
    assert_raises(error, message, jax.jit(call), arrays, traced)


@table(SHAPES)
def test_shapes(arrays, options, message):
    both_ways(ValueError, message, arrays, options)


@table(SHAPES)
def test_shapes_without_chex(arrays, options, message):
    chex.disable_asserts()
    try:
        both_ways(ValueError, message, arrays, options)
    finally:
        chex.enable_asserts()


@table({name: ((LOGITS, LABELS), *case) for name, case in VALUES.items()})
def test_values(arrays, options, message):
    both_ways(ValueError, message, arrays, options)


@table(TYPES)
def test_dtypes(arrays, options, message):
    both_ways(TypeError, message, arrays, options)


@table(NOT_ARRAYS)
def test_what_is_no_array_or_number(arrays, options, message):
    assert_raises(TypeError, message, lambda: jaxce.cross_entropy(*arrays, **options))


def test_ignore_index_with_probabilities():
    message = (
        "ignore_index applies to class indices, not to class probabilities; got ignore_index=3 with float32 of shape "
        "(4, 10) labels: where=(…) leaves examples out"
    )
    both_ways(ValueError, message, (LOGITS, ONE_HOT), {"ignore_index": 3})


@pytest.mark.parametrize("jit", [False, True])
def test_nll_loss_speaks_of_log_probs(jit):
    call = jax.jit(jaxce.nll_loss) if jit else jaxce.nll_loss
    message = "labels must have shape (4,), that of log_probs (4, 10) without the class axis; got (3,)"
    assert_raises(ValueError, message, call, LOGITS, LABELS[:3])
    message = "log_probs must be of a float dtype; got int32 of shape (4,): log_probs.astype(jnp.float32) converts them"
    assert_raises(TypeError, message, call, LABELS, LABELS)
    message = (
        "log_probs must be of a float dtype; got log_probs int32 of shape (4,), labels float32 of shape (4, 10): are "
        "they swapped? The order is log_probs, labels"
    )
    assert_raises(TypeError, message, call, LABELS, LOGITS)


@pytest.mark.parametrize("order", ["hyk", "yhk", "ykh"])
@pytest.mark.parametrize("batch", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_swapped_arguments_of_a_projection(order, batch, jit):
    arrays = {
        "h": np.zeros((*batch, 6), np.float32),
        "k": np.zeros((6, 10), np.float32),
        "y": np.zeros(batch, np.int32),
    }
    given = [arrays[name] for name in order]
    hidden, kernel, labels = (f"{array.dtype} of shape {array.shape}" for array in given)
    message = (
        f"hidden and kernel must be of a float dtype; got hidden {hidden}, kernel {kernel}, labels {labels}: are they "
        "swapped? The order is hidden, kernel, labels"
    )
    call = jaxce.linear_cross_entropy
    assert_raises(TypeError, message, jax.jit(call) if jit else call, *given)


def test_swapped_arguments_on_a_mesh():
    message = (
        "logits must be of a float dtype; got logits int32 of shape (4,), labels float32 of shape (4, 10): are they "
        "swapped? The order is logits, labels"
    )
    mesh = jax.make_mesh((1,), ("data",))
    assert_raises(TypeError, message, lambda: jaxce.cross_entropy(LABELS, LOGITS, sharding=OnMesh(mesh=mesh)))
    message = (
        "hidden and kernel must be of a float dtype; got hidden float32 of shape (10, 4), kernel int32 of shape (10,), "
        "labels float32 of shape (4, 10): are they swapped? The order is hidden, kernel, labels"
    )
    call = partial(jaxce.linear_cross_entropy, sharding=OnMesh(mesh=mesh))
    assert_raises(TypeError, message, lambda: call(LOGITS.T, np.arange(10, dtype=np.int32), LOGITS))


class Linear:
    """A layer, as of Flax or Equinox."""

    def __call__(self, x):
        return x


def test_a_layer_for_its_kernel():
    message = (
        f"kernel {NUMBERS}Linear: pass the layer's array, such as layer.kernel, or, with transpose_kernel=True, "
        "layer.weight or layer.embedding"
    )
    assert_raises(TypeError, message, lambda: jaxce.linear_cross_entropy(LOGITS, Linear(), LABELS))
    message = message.replace("kernel must", "teacher_kernel must").replace("transpose_", "transpose_teacher_")
    kernel = np.zeros((10, 10), np.float32)
    assert_raises(
        TypeError, message, lambda: jaxce.linear_distillation_loss(LOGITS, kernel, LOGITS, teacher_kernel=Linear())
    )


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("ignore_index", 255, "a Python integer"),
        ("num_classes", 9, "a Python integer"),
        ("chunk_size", 9, "a Python integer"),
        ("transpose_kernel", True, "True or False"),
        ("return_stats", True, "True or False"),
    ],
)
def test_options_that_jit_traces(name, value, rule):
    call, kernel = jax.jit(jaxce.linear_cross_entropy), np.zeros((10, 10), np.float32)
    assert_raises(TypeError, f"{name} must be {rule}; {STATIC}", lambda: call(LOGITS, kernel, LABELS, **{name: value}))


def test_axis_that_jit_traces():
    message = f"axis must be a Python integer; {STATIC}"
    assert_raises(TypeError, message, lambda: jax.jit(jaxce.cross_entropy)(LOGITS, LABELS, axis=1))
    assert_raises(TypeError, message, lambda: jax.jit(jaxce.log_softmax)(LOGITS, 1))


def test_log_softmax():
    where = "where must be broadcastable to the shape of logits, (4, 10); got (3,)"
    axis = "axis must be from -2 to 1 for logits of shape (4, 10); got 2"
    assert_raises(ValueError, where, lambda: jaxce.log_softmax(LOGITS, where=np.ones(3, bool)))
    assert_raises(ValueError, axis, lambda: jaxce.log_softmax(LOGITS, 2))
    assert_raises(TypeError, f"logits {NUMBERS}NoneType: None", lambda: jaxce.log_softmax(None))


def test_a_correct_call_passes_without_chex():
    chex.disable_asserts()
    try:
        assert np.isclose(jaxce.cross_entropy(jnp.asarray(LOGITS), LABELS), np.log(10))
    finally:
        chex.enable_asserts()
