"""Labels out of range, named where `jax.experimental.checkify` looks; nothing at all anywhere else.

`checkify.debug_check` would do, were it not for an effect that it leaves on every function, which `jax.export` can't
serialize. So this is an identity on the labels, which lowers to nothing, and which checkify has a rule for.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import checkify  # The table of rules has no public name.
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_named_labels_p = Primitive("named_labels")


def name_bad_labels(labels: Array, fine: Array, num_classes: int) -> Array:
    """`labels`, whose largest entry that isn't `fine` checkify names in its error."""
    return _named_labels_p.bind(labels, fine, num_classes=num_classes)


def _identity(labels: Any, fine: Any, *, num_classes: int) -> Any:
    return labels


_named_labels_p.def_impl(_identity)
_named_labels_p.def_abstract_eval(_identity)
mlir.register_lowering(_named_labels_p, lambda context, labels, fine, *, num_classes: [labels])


def _batch(args: tuple[Array, Array], dims: tuple[Any, Any], *, num_classes: int) -> tuple[Array, int]:
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    labels, fine = (
        jnp.broadcast_to(arg, (size, *arg.shape)) if dim is None else jnp.moveaxis(arg, dim, 0)
        for arg, dim in zip(args, dims, strict=True)
    )
    return name_bad_labels(labels, fine, num_classes), 0


batching.primitive_batchers[_named_labels_p] = _batch


def _checkify(*args: Any, num_classes: int) -> tuple[Any, Array]:
    *context, error, enabled, labels, fine = args  # Newer JAX passes a context first; 0.10.2 has none.
    if checkify.FailedCheckError in enabled and labels.size:
        found = checkify.FailedCheckError(
            checkify.get_traceback(),
            f"labels must be from 0 to {num_classes - 1}, or ignore_index; got {{label}} with {num_classes} classes",
            label=jnp.where(fine, jnp.iinfo(labels.dtype).min, labels).max(),
        )
        error = checkify.assert_func(*context, error, ~fine.all(), found)  # type: ignore[call-arg]
    return error, labels


checkify.error_checks[_named_labels_p] = _checkify
