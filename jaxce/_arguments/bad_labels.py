"""Labels out of range, named where `jax.experimental.checkify` looks; nothing at all anywhere else.

`checkify.debug_check` would do, were it not for an effect that it leaves on every function, which `jax.export` can't
serialize. So this is an identity on the labels, which lowers to nothing, and which checkify has a rule for. The table
of such rules has no public name: where it isn't what it was, the rule is left out, and with it the message.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
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


def _register_rule() -> None:
    """Teaches checkify to name a label, if its private parts are those that are known here."""
    try:
        from jax._src import checkify

        rules, failed, traceback, fail = (
            checkify.error_checks,
            checkify.FailedCheckError,
            checkify.get_traceback,
            checkify.assert_func,
        )
    except (ImportError, AttributeError):
        return

    def rule(*args: Any, num_classes: int) -> tuple[Any, Array]:
        *context, error, enabled, labels, fine = args  # Newer JAX passes a context first; 0.10.2 has none.
        if failed in enabled and labels.size:
            message = "labels must be from 0 to {}, or ignore_index; got {{label}} with {} classes"
            worst = jnp.where(fine, jnp.iinfo(labels.dtype).min, labels).max()
            found = failed(traceback(), message.format(num_classes - 1, num_classes), label=worst)
            error = fail(*context, error, ~fine.all(), found)  # type: ignore[call-arg]
        return error, labels

    rules[_named_labels_p] = rule


_register_rule()
