"""Shapes of logits, and of what makes them."""

import jax.numpy as jnp
from jax import Array

from jaxce._arguments.arrays import (
    Shape,
    assert_float,
    assert_order,
    assert_shape,
    broadcasts,
    describe,
    is_float,
    is_int,
)
from jaxce._arguments.labels import index_examples


def class_axis(name: str, array: Array, axis: int, labels: Array | None = None) -> int:
    """The class axis of `array`, counted from the front."""
    assert_order(labels, **{name: array})
    assert_float(name, array)
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


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None; got {chunk_size}")


def check_bias(name: str, bias: Array | None, columns: int) -> None:
    if bias is not None:
        assert_float(name, bias)
        assert_shape(
            bias, (columns,), lambda: f"{name} must have shape ({columns},), one entry a class; got {bias.shape}"
        )


def teacher(hidden: Array, kernel: Array, transpose: bool, batch: Shape, columns: int) -> None:
    """Checks that a teacher has as many tokens and columns as its student."""
    found = matmul(hidden, kernel, transpose, "teacher_")
    assert_shape(
        hidden,
        (*batch, hidden.shape[-1]),
        lambda: f"teacher_hidden must have the batch shape of hidden, {batch}; got {hidden.shape}",
    )
    if found != columns:
        raise ValueError(
            f"teacher_kernel must have the {columns} classes of kernel; got {found}: pad the smaller one, and pass "
            "num_classes"
        )


def top_k(indices: Array, probabilities: Array, batch: Shape, num_classes: int, counts_in: Array | None) -> Array:
    """Checks a teacher's likeliest classes; int32 indices, -1 for a bad one."""
    if not is_int(indices) or not is_float(probabilities):
        raise TypeError(
            "teacher_top_k must be a pair of class indices (integers) and of their probabilities (floats); got "
            f"{describe(indices)} and {describe(probabilities)}"
        )
    if indices.ndim != len(batch) + 1 or indices.shape[:-1] != batch or probabilities.shape != indices.shape:
        raise ValueError(
            f"teacher_top_k must be two arrays of shape ({', '.join(map(str, (*batch, 'k')))}), k classes for each "
            f"token of hidden; got {indices.shape} and {probabilities.shape}"
        )
    counts_in = None if counts_in is None else jnp.broadcast_to(counts_in[..., None], indices.shape)
    return index_examples(indices, num_classes, None, counts_in).targets


def classes(name: str, columns: int, num_classes: int | None) -> int:
    """How many of the columns are classes."""
    if num_classes is not None and not 1 <= num_classes <= columns:
        raise ValueError(f"num_classes must be from 1 to {columns}, the classes of {name}; got {num_classes}")
    return columns if num_classes is None else num_classes


def matmul(hidden: Array, kernel: Array, transpose_kernel: bool, of: str = "", labels: Array | None = None) -> int:
    """Checks that `hidden @ kernel` is right; how many columns it has. `of` goes before the names."""
    assert_order(labels, hidden=hidden, kernel=kernel)
    assert_float(f"{of}hidden", hidden)
    assert_float(f"{of}kernel", kernel)
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
        raise TypeError(f"where must be bool; got {describe(where)}: where != 0 makes it one")
    if not broadcasts(where.shape, shape):
        raise ValueError(f"where must be broadcastable to the shape of logits, {shape}; got {where.shape}")
    return jnp.broadcast_to(where, shape)
