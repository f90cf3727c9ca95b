"""Every assertion on shapes, dtypes and options; the only file that imports chex.

Checks run where a function is traced, so they cost nothing from call to call, and raise the same in eager code and
under `jax.jit`. chex makes the assertions and our own words explain them; what chex would let through after
`chex.disable_asserts()` is refused all the same, so that nothing broadcasts silently.
"""

import dataclasses
import difflib
import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxce._label_check import name_bad_labels

REDUCTIONS = ("none", "mean", "sum")
STRATEGIES = ("auto", "tokens", "classes")
DEFAULT_IGNORE_INDEX = -100

Shape = tuple[int, ...]


def as_array(name: str, value: ArrayLike) -> Array:
    """`value` as something that `jax.jit` takes; JAX and NumPy arrays as they are."""
    if isinstance(value, jax.Array):
        return value
    if not isinstance(value, str | bytes | dict | set | type(None)):
        try:
            array = value if isinstance(value, np.ndarray | np.generic) else jnp.asarray(value)
            if array.dtype != object:
                return array  # type: ignore[return-value]
        except (TypeError, ValueError):
            pass
    message = f"{name} must be an array, or what jnp.asarray makes into one; got {type(value).__name__}: "
    if name.endswith("kernel") and callable(value):
        message += "pass the layer's array, such as layer.kernel, or, "
        raise TypeError(f"{message}with transpose_{name}=True, layer.weight or layer.embedding")
    raise TypeError(message + _brief(value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The options of a loss, None where one is off. `jax.jit` traces the arrays and knows the others."""

    weight: Array | None
    sample_weight: Array | None
    where: Array | None
    label_smoothing: Array | None
    z_loss: Array | None
    logit_softcap: Array | None
    temperature: Array | None
    ignore_index: int = dataclasses.field(metadata={"static": True})
    reduction: str = dataclasses.field(metadata={"static": True})
    return_stats: bool = dataclasses.field(metadata={"static": True})

    def specs(self, of_batch: PartitionSpec) -> "LossOptions":
        """How the options lie on a mesh: all is everywhere but what is of an example."""
        everywhere = jax.tree.map(lambda _: PartitionSpec(), self)
        return dataclasses.replace(everywhere, sample_weight=of_batch)

    def without_examples(self) -> "LossOptions":
        """The options after `where` and `temperature` were read, whose shapes may be any that broadcast."""
        return dataclasses.replace(self, where=None, temperature=None)

    def class_weight_within(self, targets: Array) -> Array | None:
        """The class weights, where they enter an example's numbers: one alone only multiplies the example's loss."""
        return self.weight if self.label_smoothing is not None or not _is_int(targets) else None


def loss_options(
    labels: ArrayLike,
    *,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    ignore_index: int,
    where: ArrayLike | None,
    reduction: str,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    return_stats: bool = False,
) -> tuple[Array, LossOptions]:
    """The labels and options of a loss as `jax.jit` takes them; shapes are checked where it is traced."""
    labels, ignore_index = as_labels(labels, integer("ignore_index", ignore_index))
    return labels, LossOptions(
        weight=as_optional_array("weight", weight),
        sample_weight=as_optional_array("sample_weight", sample_weight),
        where=as_optional_array("where", where),
        label_smoothing=as_scalar(
            "label_smoothing", label_smoothing, off=0, valid=lambda v: 0 <= v <= 1, rule="a number from 0 to 1"
        ),
        z_loss=as_scalar("z_loss", z_loss, off=0, valid=lambda v: v >= 0, rule="a number that isn't negative"),
        logit_softcap=as_scalar(
            "logit_softcap", logit_softcap, off=None, valid=lambda v: v > 0, rule="a positive number, or None"
        ),
        temperature=as_temperature(temperature),
        ignore_index=ignore_index,
        reduction=choice("reduction", reduction, REDUCTIONS),
        return_stats=flag("return_stats", return_stats),
    )


class ProjectionOptions(NamedTuple):
    """How `linear_cross_entropy` projects; known when it is traced."""

    transpose_kernel: bool
    num_classes: int | None
    chunk_size: int | None
    strategy: str
    precision: lax.PrecisionLike
    platform: str  # that it will run on


def projection_options(
    *,
    transpose_kernel: bool,
    num_classes: int | None,
    chunk_size: int | None,
    strategy: str,
    precision: lax.PrecisionLike,
    platform: str,
) -> ProjectionOptions:
    """The options of the projection, checked one by one."""
    return ProjectionOptions(
        transpose_kernel=flag("transpose_kernel", transpose_kernel),
        num_classes=None if num_classes is None else integer("num_classes", num_classes),
        chunk_size=None if chunk_size is None else integer("chunk_size", chunk_size),
        strategy=choice("strategy", strategy, STRATEGIES),
        precision=precision,
        platform=platform,
    )


def as_labels(labels: ArrayLike, ignore_index: int) -> tuple[Array, int]:
    """Labels, and their `ignore_index`, that `jax.jit` doesn't wrap around when it makes 32 bits of NumPy's 64."""
    array = as_array("labels", labels)
    if isinstance(array, jax.Array) or jax.config.jax_enable_x64 or array.dtype.kind not in "iu":
        return array, ignore_index
    if array.dtype.itemsize < 8:
        return array, ignore_index
    limits = np.iinfo(np.int32)
    narrow = np.clip(array, limits.min + 1, limits.max).astype(np.int32)
    if not limits.min < ignore_index <= limits.max:
        narrow, ignore_index = np.where(array == ignore_index, limits.min, narrow), limits.min
    return narrow, int(ignore_index)


def as_optional_array(name: str, value: ArrayLike | None) -> Array | None:
    return None if value is None else as_array(name, value)


def as_scalar(
    name: str,
    value: ArrayLike | None,
    *,
    off: float | None,
    valid: Callable[[float], bool],
    rule: str,
) -> Array | None:
    """A float option, a Python number or an array; None where it is off. The range of an array isn't known."""
    if value is None:
        if off is None:
            return None
        raise TypeError(f"{name} must be {rule}; got None: {off} turns it off")
    if isinstance(value, numbers.Real):
        if isinstance(value, bool) or not valid(float(value)):
            raise ValueError(f"{name} must be {rule}; got {value!r}")
        return None if value == off else float(value)
    array = as_array(name, value)
    if array.shape != () or not (_is_float(array) or _is_int(array)):
        raise ValueError(f"{name} must be a real number or a scalar array; got {_describe(array)}")
    return array


def as_temperature(value: ArrayLike) -> Array | None:
    """A temperature, a Python number or an array of them; None where it is 1. The range of an array isn't known."""
    rule = "temperature must be a positive number, or an array of floats"
    if isinstance(value, numbers.Real):
        if isinstance(value, bool) or not value > 0:
            raise ValueError(f"{rule}; got {value!r}: the limit at 0 is argmax of the logits")
        return None if value == 1 else float(value)
    array = as_array("temperature", value)
    if not _is_float(array):
        raise TypeError(f"{rule}; got {_describe(array)}: temperature.astype(float) makes it one")
    return array


def inverse_temperature(temperature: Array | None, batch: Shape, dtype: jnp.dtype) -> Array | None:
    """One over the temperature of each example, NaN where that isn't positive; None where it is 1."""
    if temperature is None:
        return None
    temperature = jnp.asarray(temperature, dtype)
    if temperature.shape not in ((), batch):
        raise ValueError(
            f"temperature must be a scalar, or have shape {batch}, one an example; got {temperature.shape}"
        )
    return jnp.broadcast_to(jnp.where(temperature > 0, 1 / temperature, jnp.nan), batch)


def class_indices(labels: Array) -> Array:
    """Labels that are class indices, not probabilities."""
    if _is_float(labels):
        raise TypeError(
            f"labels must be class indices, whose log-probabilities are asked for; got {_describe(labels)}: for "
            "distributions, cross_entropy takes class probabilities"
        )
    return labels


def integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a Python integer; got {_static(value)}") from None


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """One of a few words."""
    if not (isinstance(value, str) and value in choices):
        *most, last = map(repr, choices)
        close = difflib.get_close_matches(str(value).lower(), choices, n=1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must be one of {', '.join(most)} and {last}; got {value!r}{hint}")
    return value


def flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {_static(value)}")
    return bool(value)


def _static(value: Any) -> str:
    """What came for an option that must be known when the function is traced."""
    if isinstance(value, jax.core.Tracer):
        return "a tracer: name it in static_argnames of jax.jit, or bind it first with functools.partial"
    return f"{type(value).__name__}: {_brief(value)}"


def class_axis(name: str, array: Array, axis: int, labels: Array | None = None) -> int:
    """The class axis of `array`, counted from the front."""
    _assert_order(labels, **{name: array})
    _assert_float(name, array)
    if array.ndim == 0:
        raise ValueError(f"{name} must have a class axis; got a scalar: one example has shape (C,), one entry a class")
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(
            f"axis must be from {-array.ndim} to {array.ndim - 1} for {name} of shape {array.shape}; got {axis}"
        )
    axis %= array.ndim
    if array.shape[axis] == 0:
        raise ValueError(f"{name} must have at least one class; got shape {array.shape} with axis={axis}")
    return axis


class Examples(NamedTuple):
    """What labels, `ignore_index` and `where` say of each example."""

    targets: Array  # int32 indices of the batch shape, -1 for a bad label; or probabilities, of the scores' shape
    live: Array | None  # bool, of the batch shape: False is left out; None if all are in


def examples(
    name: str,
    shape: Shape,
    axis: int,
    labels: Array,
    options: LossOptions,
    source: str | None = None,
    classes_here: int | None = None,
) -> Examples:
    """Checks labels and options of scores `name` of that shape, and reads off them which examples count.

    `source` says where the batch shape comes from, if not from the scores themselves; `classes_here`, of how many
    classes class probabilities are, if not of all.
    """
    batch = shape[:axis] + shape[axis + 1 :]
    if _is_float(labels) and classes_here is not None:
        there = (*shape[:axis], classes_here, *shape[axis + 1 :])
    else:
        there = shape
    examples = _examples(name, there, axis, batch, labels, options.ignore_index, options.where, source)
    _check_weight(options.weight, shape[axis])
    check_sample_weight(options.sample_weight, batch)
    return examples


def _examples(
    name: str,
    shape: Shape,
    axis: int,
    batch: Shape,
    labels: Array,
    ignore_index: int,
    where: Array | None,
    source: str | None,
) -> Examples:
    origin = f"{name} {shape} without the class axis" if source is None else f"{source} without the last axis"
    live = None if where is None else _live(name, shape, batch, where, origin)
    if labels.dtype == bool:
        raise TypeError(
            f"labels must be class indices (integers) or class probabilities (floats); got {_describe(labels)}: "
            "for two classes, labels.astype(int) gives the indices"
        )
    if _is_float(labels):
        _check_probabilities(name, shape, batch, labels, ignore_index)
        return Examples(labels, live)
    if not _is_int(labels):
        raise TypeError(
            f"labels must be class indices (integers) or class probabilities (floats); got {_describe(labels)}"
        )
    _assert_shape(labels, batch, lambda: _label_shape_message(name, shape, axis, batch, labels, origin))
    return _index_examples(labels, shape[axis], ignore_index, live)


def _index_examples(labels: Array, num_classes: int, ignore_index: int | None, live: Array | None) -> Examples:
    labels = jnp.asarray(labels)
    limits = jnp.iinfo(labels.dtype)
    if ignore_index is not None and limits.min <= ignore_index <= limits.max:
        kept = labels != jnp.asarray(ignore_index, labels.dtype)
        live = kept if live is None else kept & live
    # In the labels' own dtype: an int64 that wraps around to a valid int32 is still a bad label, and so that an
    # int8 can be compared with 1,000 classes.
    valid = labels >= 0
    if num_classes <= limits.max:
        valid &= labels < jnp.asarray(num_classes, labels.dtype)
    # A label that is left out is as good as any: NaN for it would be selected away, but not out of second derivatives.
    fine = valid if live is None else valid | ~live
    labels = name_bad_labels(labels, fine, num_classes)
    return Examples(jnp.where(valid, labels.astype(jnp.int32), jnp.where(fine, 0, -1)), live)


def _live(name: str, shape: Shape, batch: Shape, where: Array, origin: str) -> Array:
    if where.dtype != bool:
        raise TypeError(f"where must be bool; got {_describe(where)}: where != 0 makes it one")
    if _broadcasts(where.shape, batch):
        return jnp.broadcast_to(where, batch)
    message = f"where must be broadcastable to shape {batch}, that of {origin}; got {where.shape}"
    if where.shape == shape:
        message += f": it says which examples count; to rule out classes, use jnp.where(mask, {name}, -jnp.inf)"
    raise ValueError(message)


def _check_probabilities(name: str, shape: Shape, batch: Shape, labels: Array, ignore_index: int) -> None:
    def message() -> str:
        text = (
            f"labels of a float dtype are class probabilities and must have the shape of {name}, {shape}; "
            f"got {_describe(labels)}"
        )
        return text + (": labels.astype(int) makes class indices of them" if labels.shape == batch else "")

    _assert_shape(labels, shape, message)
    if ignore_index != DEFAULT_IGNORE_INDEX:
        raise ValueError(
            f"ignore_index applies to class indices, not to class probabilities; got ignore_index={ignore_index} with "
            f"{_describe(labels)} labels: where=(…) leaves examples out"
        )


def _label_shape_message(name: str, shape: Shape, axis: int, batch: Shape, labels: Array, origin: str) -> str:
    got = labels.shape
    if batch == ():
        message = f"labels must be a scalar, the class of the one example in {name} of shape {shape}; got {got}"
    else:
        message = f"labels must have shape {batch}, that of {origin}; got {got}"
    others = [a for a in range(len(shape)) if a != axis and shape[:a] + shape[a + 1 :] == got]
    extra = [a for a in range(len(got)) if got[:a] + got[a + 1 :] == batch and got[a] == 1]
    if batch == () and got == (1,):
        return f"{message}: labels[0] is the scalar"
    if got == shape or batch == ():
        hint = "labels.argmax() is the index of a one-hot vector, labels.astype(float) are probabilities"
        hint = hint.replace("()", f"({axis})") if batch else hint
        return f"{message}: {hint}"
    if got == (*batch, 1):
        return f"{message}: drop the last axis with labels[..., 0]"
    if extra:
        return f"{message}: drop axis {extra[0]} with jnp.squeeze(labels, {extra[0]})"
    if others:
        other, like = (1, ", as PyTorch has them") if 1 in others else (others[0], "")
        return f"{message}: if the classes are on axis {other}{like}, pass axis={other}"
    if labels.size == 1:
        return f"{message}: jnp.full({batch}, label) is one label for every row"
    return message


def _check_weight(value: Array | None, num_classes: int) -> None:
    if value is None:
        return
    _assert_real("weight", value)
    _assert_shape(
        value,
        (num_classes,),
        lambda: (
            f"weight must have shape ({num_classes},), one weight a class; got {value.shape}: "
            "sample_weight is one weight an example"
        ),
    )


def check_sample_weight(value: Array | None, batch: Shape) -> None:
    if value is None:
        return
    _assert_real("sample_weight", value)
    _assert_shape(
        value,
        batch,
        lambda: f"sample_weight must have shape {batch}, one weight an example; got {value.shape}",
    )


def projection(
    hidden: Array, kernel: Array, bias: Array | None, labels: Array, options: ProjectionOptions, shards: int = 1
) -> int:
    """Checks that `hidden @ kernel + bias` is right; how many of its columns are classes.

    With `shards`, the kernel is one of so many parts of as many columns.
    """
    columns = matmul(hidden, kernel, options.transpose_kernel, labels=labels)
    check_bias("bias", bias, columns)
    check_chunk_size(options.chunk_size)
    return classes("kernel", columns * shards, options.num_classes)


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None; got {chunk_size}")


def check_bias(name: str, bias: Array | None, columns: int) -> None:
    if bias is not None:
        _assert_float(name, bias)
        _assert_shape(
            bias, (columns,), lambda: f"{name} must have shape ({columns},), one entry a class; got {bias.shape}"
        )


def teacher(hidden: Array, kernel: Array, transpose: bool, batch: Shape, columns: int) -> None:
    """Checks that a teacher has as many tokens and columns as its student."""
    found = matmul(hidden, kernel, transpose, "teacher_")
    _assert_shape(
        hidden,
        (*batch, hidden.shape[-1]),
        lambda: f"teacher_hidden must have the batch shape of hidden, {batch}; got {hidden.shape}",
    )
    if found != columns:
        raise ValueError(
            f"teacher_kernel must have the {columns} classes of kernel; got {found}: pad the smaller one, and pass "
            "num_classes"
        )


def top_k(indices: Array, probabilities: Array, batch: Shape, num_classes: int, live: Array | None) -> Array:
    """Checks a teacher's likeliest classes; int32 indices, -1 for a bad one."""
    if not _is_int(indices) or not _is_float(probabilities):
        raise TypeError(
            "teacher_top_k must be a pair of class indices (integers) and of their probabilities (floats); got "
            f"{_describe(indices)} and {_describe(probabilities)}"
        )
    if indices.ndim != len(batch) + 1 or indices.shape[:-1] != batch or probabilities.shape != indices.shape:
        raise ValueError(
            f"teacher_top_k must be two arrays of shape ({', '.join(map(str, (*batch, 'k')))}), k classes for each "
            f"token of hidden; got {indices.shape} and {probabilities.shape}"
        )
    live = None if live is None else jnp.broadcast_to(live[..., None], indices.shape)
    return _index_examples(indices, num_classes, None, live).targets


def tokens_left_in(where: Array | None, batch: Shape, hidden: Array) -> Array | None:
    """`where` of tokens, of the batch shape."""
    origin = f"hidden {hidden.shape} without the last axis"
    return None if where is None else _live("hidden", hidden.shape, batch, where, origin)


def classes(name: str, columns: int, num_classes: int | None) -> int:
    """How many of the columns are classes."""
    if num_classes is not None and not 1 <= num_classes <= columns:
        raise ValueError(f"num_classes must be from 1 to {columns}, the classes of {name}; got {num_classes}")
    return columns if num_classes is None else num_classes


def matmul(hidden: Array, kernel: Array, transpose_kernel: bool, of: str = "", labels: Array | None = None) -> int:
    """Checks that `hidden @ kernel` is right; how many columns it has. `of` goes before the names."""
    _assert_order(labels, hidden=hidden, kernel=kernel)
    _assert_float(f"{of}hidden", hidden)
    _assert_float(f"{of}kernel", kernel)
    if hidden.ndim == 0:
        raise ValueError(f"{of}hidden must have a last axis of features; got a scalar")
    columns = _columns(hidden, kernel, transpose_kernel, of)
    if columns == 0:
        raise ValueError(f"{of}kernel must have at least one class; got shape {kernel.shape}")
    return columns


def _columns(hidden: Array, kernel: Array, transpose_kernel: bool, of: str) -> int:
    """How many columns `hidden @ kernel` has."""
    features, option = hidden.shape[-1], f"transpose_{of}kernel"
    layout = f"(C, D) with {option}=True" if transpose_kernel else "(D, C)"
    if kernel.ndim != 2:
        raise ValueError(f"{of}kernel must have two axes, {layout}; got shape {kernel.shape}")
    rows, columns = kernel.shape[::-1] if transpose_kernel else kernel.shape
    if rows != features:
        message = (
            f"{of}kernel must have shape {layout} with D = {features}, the last axis of {of}hidden {hidden.shape}; "
            f"got {kernel.shape}"
        )
        if columns == features:
            message += f": it fits with {option}={not transpose_kernel}"
        raise ValueError(message)
    return columns


def class_mask(where: Array | None, shape: Shape) -> Array | None:
    """`where` of `log_softmax`, which is about classes, in the shape of the logits."""
    if where is None:
        return None
    if where.dtype != bool:
        raise TypeError(f"where must be bool; got {_describe(where)}: where != 0 makes it one")
    if not _broadcasts(where.shape, shape):
        raise ValueError(f"where must be broadcastable to the shape of logits, {shape}; got {where.shape}")
    return jnp.broadcast_to(where, shape)


def _broadcasts(shape: Shape, to: Shape) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def _assert_shape(array: Array, shape: Shape, message: Callable[[], str]) -> None:
    try:
        chex.assert_shape(array, shape)
    except AssertionError:
        raise ValueError(message()) from None
    if array.shape != shape:
        raise ValueError(message())


def _assert_order(labels: Array | None, **floats: Array) -> None:
    """Asks whether arguments are swapped: labels are floats, and integers have the shape of labels."""
    if labels is None or not _is_float(labels):
        return
    arrays = {**floats, "labels": labels}
    axes = [array.ndim for array in arrays.values() if _is_float(array)]
    if any(_is_int(x) and (x.ndim + 1 in axes or x.shape == labels.shape) for x in floats.values()):
        got = ", ".join(f"{name} {_describe(array)}" for name, array in arrays.items())
        raise TypeError(
            f"{' and '.join(floats)} must be of a float dtype; got {got}: are they swapped? The order is "
            f"{', '.join(arrays)}"
        )


def _assert_float(name: str, array: Array) -> None:
    text = f"{name} must be of a float dtype; got {_describe(array)}"
    if _is_int(array) or array.dtype == bool:
        text += f": {name}.astype(jnp.float32) converts them"
    try:
        chex.assert_type(array, float)
    except AssertionError:
        raise TypeError(text) from None
    if not _is_float(array):
        raise TypeError(text)


def _assert_real(name: str, array: Array) -> None:
    if not (_is_float(array) or _is_int(array)):
        raise TypeError(f"{name} must be real numbers; got {_describe(array)}")


def _is_float(array: Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _is_int(array: Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.integer))


def _describe(array: Array) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
