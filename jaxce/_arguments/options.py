"""Options, one by one, and the pytree that carries those of a loss."""

import dataclasses
import difflib
import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxce._arguments.arrays import Shape, as_array, as_labels, as_optional_array, brief, describe, is_float, is_int

REDUCTIONS = ("none", "mean", "sum")
STRATEGIES = ("auto", "tokens", "classes")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The options of a loss, None where one is off. `jax.jit` traces the arrays and knows the others."""

    weight: Array | None
    sample_weight: Array | None
    where: Array | None
    temperature: Array | None
    logit_softcap: Array | None
    label_smoothing: Array | None
    z_loss: Array | None
    ignore_index: int = dataclasses.field(metadata={"static": True})
    reduction: str = dataclasses.field(metadata={"static": True})
    return_stats: bool = dataclasses.field(metadata={"static": True})

    def factors(self) -> "LossOptions":
        """What the terms of a loss read besides the numbers and weights of its examples: scalars."""
        scalars = dataclasses.replace(
            self, weight=None, sample_weight=None, where=None, temperature=None, logit_softcap=None
        )
        return jax.tree.map(jnp.asarray, scalars)


class Rule(NamedTuple):
    """What a scalar option may be."""

    off: float | None  # the value that turns it off
    valid: Callable[[float], bool]
    words: str


SCALARS = {
    "label_smoothing": Rule(0, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "z_loss": Rule(0, lambda value: value >= 0, "a number that isn't negative"),
    "logit_softcap": Rule(None, lambda value: value > 0, "a positive number, or None"),
}


def loss_options(
    labels: ArrayLike,
    *,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: str = "none",
    return_stats: bool = False,
    **scalars: ArrayLike | None,
) -> tuple[Array, LossOptions]:
    """The labels and options of a loss as `jax.jit` takes them; shapes are checked where it is traced."""
    labels, ignore_index = as_labels(labels, integer("ignore_index", ignore_index))
    of_name: Any = {name: as_scalar(name, scalars.get(name, rule.off), rule) for name, rule in SCALARS.items()}
    return labels, LossOptions(
        weight=as_optional_array("weight", weight),
        sample_weight=as_optional_array("sample_weight", sample_weight),
        where=as_optional_array("where", where),
        temperature=as_temperature(temperature),
        ignore_index=ignore_index,
        reduction=choice("reduction", reduction, REDUCTIONS),
        return_stats=flag("return_stats", return_stats),
        **of_name,
    )


class ProjectionOptions(NamedTuple):
    """How a function of hidden states and kernels makes their logits; known when it is traced."""

    transposed: tuple[bool, ...]  # of each kernel
    num_classes: int | None
    chunk_size: int | None
    strategy: str
    precision: lax.PrecisionLike
    platform: str  # that it will run on


def projection_options(
    *,
    num_classes: int | None,
    chunk_size: int | None,
    strategy: str,
    precision: lax.PrecisionLike,
    platform: str,
    **transpose: bool,
) -> ProjectionOptions:
    """The options of the projection, checked one by one."""
    return ProjectionOptions(
        transposed=tuple(flag(name, value) for name, value in transpose.items()),
        num_classes=optional_integer("num_classes", num_classes),
        chunk_size=optional_integer("chunk_size", chunk_size),
        strategy=choice("strategy", strategy, STRATEGIES),
        precision=precision,
        platform=platform,
    )


def as_scalar(name: str, value: ArrayLike | None, rule: Rule) -> Array | None:
    """A float option, a Python number or an array; None where it is off. The range of an array isn't known."""
    if value is None:
        if rule.off is None:
            return None
        raise TypeError(f"{name} must be {rule.words}; got None: {rule.off} turns it off")
    if isinstance(value, numbers.Real):
        if isinstance(value, bool) or not rule.valid(float(value)):
            raise ValueError(f"{name} must be {rule.words}; got {value!r}")
        return None if value == rule.off else float(value)
    array = as_array(name, value)
    if array.shape != () or not (is_float(array) or is_int(array)):
        raise ValueError(f"{name} must be a real number or a scalar array; got {describe(array)}")
    return array


def as_temperature(value: ArrayLike) -> Array | None:
    """A temperature, a Python number or an array of them; None where it is 1. The range of an array isn't known."""
    rule = "temperature must be a positive number, or an array of floats"
    if isinstance(value, numbers.Real):
        if isinstance(value, bool) or not value > 0:
            raise ValueError(f"{rule}; got {value!r}: the limit at 0 is argmax of the logits")
        return None if value == 1 else float(value)
    array = as_array("temperature", value)
    if not is_float(array):
        raise TypeError(f"{rule}; got {describe(array)}: temperature.astype(float) makes it one")
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


def integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a Python integer; got {came_as(value)}") from None


def optional_integer(name: str, value: Any) -> int | None:
    return None if value is None else integer(name, value)


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
        raise TypeError(f"{name} must be True or False; got {came_as(value)}")
    return bool(value)


def came_as(value: Any) -> str:
    """What came for an option that must be known when the function is traced."""
    if isinstance(value, jax.core.Tracer):
        return "a tracer: name it in static_argnames of jax.jit, or bind it first with functools.partial"
    return f"{type(value).__name__}: {brief(value)}"
