"""Labels, and what they and the options say of each example."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxce._arguments.arrays import Shape, assert_real, assert_shape, broadcasts, describe, is_float, is_int
from jaxce._arguments.bad_labels import name_bad_labels
from jaxce._arguments.options import LossOptions

DEFAULT_IGNORE_INDEX = -100


def class_indices(labels: Array) -> Array:
    """Labels that are class indices, not probabilities."""
    if is_float(labels):
        raise TypeError(
            f"labels must be class indices, whose log-probabilities are asked for; got {describe(labels)}: for "
            "distributions, cross_entropy takes class probabilities"
        )
    return labels


class Examples(NamedTuple):
    """What labels, `ignore_index` and `where` say of each example."""

    targets: Array  # int32 indices of the batch shape, -1 for a bad label; or probabilities, of the scores' shape
    counts_in: Array | None  # bool, of the batch shape: False is left out; None if all are in


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
    classes = shape[axis] if classes_here is None or not is_float(labels) else classes_here
    there = (*shape[:axis], classes, *shape[axis + 1 :])
    examples = _examples_of(name, there, axis, batch, labels, options.ignore_index, options.where, source)
    check_weight(options.weight, shape[axis])
    check_sample_weight(options.sample_weight, batch)
    return examples


def _examples_of(
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
    counts_in = None if where is None else examples_where(name, shape, batch, where, origin)
    if labels.dtype == bool:
        raise TypeError(
            f"labels must be class indices (integers) or class probabilities (floats); got {describe(labels)}: "
            "for two classes, labels.astype(int) gives the indices"
        )
    if is_float(labels):
        check_probabilities(name, shape, batch, labels, ignore_index)
        return Examples(labels, counts_in)
    if not is_int(labels):
        raise TypeError(
            f"labels must be class indices (integers) or class probabilities (floats); got {describe(labels)}"
        )
    assert_shape(labels, batch, lambda: label_shape_message(name, shape, axis, batch, labels, origin))
    return index_examples(labels, shape[axis], ignore_index, counts_in)


def index_examples(labels: Array, num_classes: int, ignore_index: int | None, counts_in: Array | None) -> Examples:
    labels = jnp.asarray(labels)
    limits = jnp.iinfo(labels.dtype)
    if ignore_index is not None and limits.min <= ignore_index <= limits.max:
        kept = labels != jnp.asarray(ignore_index, labels.dtype)
        counts_in = kept if counts_in is None else kept & counts_in
    # In the labels' own dtype: an int64 that wraps around to a valid int32 is still a bad label, and so that an
    # int8 can be compared with 1,000 classes.
    valid = labels >= 0
    if num_classes <= limits.max:
        valid &= labels < jnp.asarray(num_classes, labels.dtype)
    # A label that is left out is as good as any: NaN for it would be selected away, but not out of second derivatives.
    fine = valid if counts_in is None else valid | ~counts_in
    labels = name_bad_labels(labels, fine, num_classes)
    return Examples(jnp.where(valid, labels.astype(jnp.int32), jnp.where(fine, 0, -1)), counts_in)


def examples_where(name: str, shape: Shape, batch: Shape, where: Array, origin: str) -> Array:
    if where.dtype != bool:
        raise TypeError(f"where must be bool; got {describe(where)}: where != 0 makes it one")
    if broadcasts(where.shape, batch):
        return jnp.broadcast_to(where, batch)
    message = f"where must be broadcastable to shape {batch}, that of {origin}; got {where.shape}"
    if where.shape == shape:
        message += f": it says which examples count; to rule out classes, use jnp.where(mask, {name}, -jnp.inf)"
    raise ValueError(message)


def check_probabilities(name: str, shape: Shape, batch: Shape, labels: Array, ignore_index: int) -> None:
    def message() -> str:
        text = (
            f"labels of a float dtype are class probabilities and must have the shape of {name}, {shape}; "
            f"got {describe(labels)}"
        )
        return text + (": labels.astype(int) makes class indices of them" if labels.shape == batch else "")

    assert_shape(labels, shape, message)
    if ignore_index != DEFAULT_IGNORE_INDEX:
        raise ValueError(
            f"ignore_index applies to class indices, not to class probabilities; got ignore_index={ignore_index} with "
            f"{describe(labels)} labels: where=(…) leaves examples out"
        )


def label_shape_message(name: str, shape: Shape, axis: int, batch: Shape, labels: Array, origin: str) -> str:
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


def check_weight(value: Array | None, num_classes: int) -> None:
    if value is None:
        return
    assert_real("weight", value)
    assert_shape(
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
    assert_real("sample_weight", value)
    assert_shape(
        value,
        batch,
        lambda: f"sample_weight must have shape {batch}, one weight an example; got {value.shape}",
    )


def tokens_left_in(where: Array | None, batch: Shape, hidden: Array) -> Array | None:
    """`where` of tokens, of the batch shape."""
    origin = f"hidden {hidden.shape} without the last axis"
    return None if where is None else examples_where("hidden", hidden.shape, batch, where, origin)
