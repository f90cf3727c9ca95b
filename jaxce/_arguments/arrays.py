"""Values as arrays, and what is asserted of an array alone."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

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
    raise TypeError(message + brief(value))


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


def broadcasts(shape: Shape, to: Shape) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def assert_shape(array: Array, shape: Shape, message: Callable[[], str]) -> None:
    try:
        chex.assert_shape(array, shape)
    except AssertionError:
        raise ValueError(message()) from None
    if array.shape != shape:
        raise ValueError(message())


def assert_order(labels: Array | None, **floats: Array) -> None:
    """Asks whether arguments are swapped: labels are floats, and integers have the shape of labels."""
    if labels is None or not is_float(labels):
        return
    arrays = {**floats, "labels": labels}
    axes = [array.ndim for array in arrays.values() if is_float(array)]
    if any(is_int(x) and (x.ndim + 1 in axes or x.shape == labels.shape) for x in floats.values()):
        got = ", ".join(f"{name} {describe(array)}" for name, array in arrays.items())
        raise TypeError(
            f"{' and '.join(floats)} must be of a float dtype; got {got}: are they swapped? The order is "
            f"{', '.join(arrays)}"
        )


def assert_float(name: str, array: Array) -> None:
    text = f"{name} must be of a float dtype; got {describe(array)}"
    if is_int(array) or array.dtype == bool:
        text += f": {name}.astype(jnp.float32) converts them"
    try:
        chex.assert_type(array, float)
    except AssertionError:
        raise TypeError(text) from None
    if not is_float(array):
        raise TypeError(text)


def assert_real(name: str, array: Array) -> None:
    if not (is_float(array) or is_int(array)):
        raise TypeError(f"{name} must be real numbers; got {describe(array)}")


def is_float(array: Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def is_int(array: Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.integer))


def describe(array: Array) -> str:
    return f"{array.dtype} of shape {array.shape}"


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
