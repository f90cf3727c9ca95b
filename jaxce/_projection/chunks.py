"""What every loop is made of: the numbers and the gradients of a chunk of the tokens and a slab of the classes.

A loop runs over whole chunks and then, outside of it, over what is left, so that nothing is padded or counted twice.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._math.composition import is_read
from jaxce._math.quantity import Example, Quantity, Sums
from jaxce._mesh.devices import Axes, first_class, merging_over
from jaxce._mesh.layout import CLASSES, TOKENS
from jaxce._projection.inputs import Head, Inputs, Wanted, axes_of_inputs, by_axes, cut

Numbers: TypeAlias = Any  # of every token, as the plan's quantity has them

# The largest logit of so many classes is the first reference.
FIRST_CLASSES = 128


class Plan(NamedTuple):
    """What is known of a loop when the function is traced."""

    quantity: Quantity
    summed: bool  # a sum of the losses is wanted, whose cotangent is the same for all tokens
    strategy: str
    platform: str
    num_classes: int
    columns: int  # of the kernel, those that are worked on here; others are padding
    chunk_size: int | None = None  # tokens or classes at a time
    # On a mesh.
    class_axes: Axes = ()  # each device along these has its own classes, the same number of them
    token_groups: int = 1  # which may lie on different devices: a chunk has as many tokens of each
    gathers_slabs: bool = False  # no device gathers more than a slab of the kernel at a time

    def first_class(self, column: Array | int = 0) -> Array | int:
        """Which of all classes a column of the kernel is."""
        return first_class(self.class_axes, self.columns) + column

    def merge_devices(self, sums: Sums) -> Sums:
        """The sums over all classes, from those over each device's."""
        return self.quantity.merge(sums, merging_over(self.class_axes)) if self.class_axes else sums


def scan_chunks(
    step: Callable[[Any, Array | int, int], tuple[Any, Any]], carry: Any, length: int, size: int
) -> tuple[Any, list[Any]]:
    """`carry, out = step(carry, start, width)` over the whole chunks in a loop, then over the rest.

    Returns the last carry, and the outputs of the chunks, stacked, and of the rest.
    """
    size = min(size, length)
    whole = length // size if size else 0
    outs = []
    if whole > 1:
        carry, out = lax.scan(lambda carry, i: step(carry, i * size, size), carry, jnp.arange(whole, dtype=jnp.int32))
        outs.append(out)
    elif whole == 1:
        carry, out = step(carry, 0, size)
        outs.append(jax.tree.map(lambda leaf: leaf[None], out))
    rest = length - whole * size
    if rest or not whole:
        carry, out = step(carry, whole * size, rest)
        outs.append(jax.tree.map(lambda leaf: leaf[None], out))
    return carry, outs


def example_of(inputs: Inputs, logits: tuple[Array, ...]) -> Example:
    """What the numbers of the tokens are made of, from their logits on."""
    heads = inputs.heads
    return Example(
        logits,
        softcap=tuple(head.softcap for head in heads),
        inverse_temperature=tuple(head.inverse_temperature for head in heads),
        target=inputs.target,
        chosen=inputs.chosen,
        class_weight=inputs.class_weight,
        counts_in=inputs.counts_in,
    )


def token_axis(inputs: Inputs) -> Example:
    """The axis of each array of `example_of` that holds tokens, as `jax.vmap` takes it; None where there is none."""
    axes = axes_of_inputs(inputs)
    in_axes = example_of(axes, ("tokens",) * len(axes.heads))  # type: ignore[arg-type]
    return jax.tree.map(lambda names: 0 if TOKENS in names.split() else None, in_axes)


def sums_of(plan: Plan, inputs: Inputs, logits: tuple[Array, ...], start: Array | int, reference: Any = None) -> Sums:
    """The sums of each token over the (N, C) logits of classes from the column `start`."""

    def of_one(example: Example, reference: Any) -> Sums:
        return plan.quantity.sums(example, reference, first_class=plan.first_class(start))

    return jax.vmap(of_one, (token_axis(inputs), 0))(example_of(inputs, logits), reference)


def sums_of_classes_first(plan: Plan, inputs: Inputs, start: Array, reference: Any) -> Sums:
    """The same from (C, N) logits, along whose first axis the mathematics adds up by itself."""
    logits = tuple(head.logits_of_classes(inputs.real) for head in inputs.heads)
    example = example_of(inputs, logits)
    if example.class_weight is not None:
        example = example._replace(class_weight=example.class_weight[:, None])
    return plan.quantity.sums(example, reference, first_class=plan.first_class(start))


def read(plan: Plan, inputs: Inputs, sums: Sums) -> tuple[Numbers, Any]:
    """The numbers of each token, and what their gradients need of its whole row."""
    # Of the logits, nothing but the sums.
    example = example_of(inputs, (None,) * len(inputs.heads))  # type: ignore[arg-type]
    return jax.vmap(plan.quantity.read, (0, token_axis(inputs)))(sums, example)


def chunk_gradients(
    plan: Plan,
    wanted: Wanted,
    inputs: Inputs,
    logits: tuple[Array, ...],
    whole_rows: Any,
    cotangents: Any,
    start: Array | int = 0,
) -> Inputs:
    """What these tokens and the classes from the column `start` add to each gradient that is wanted."""

    def of_one(example: Example, whole_row: Any, cotangents: Any) -> Example:
        return plan.quantity.gradients(example, whole_row, cotangents, first_class=plan.first_class(start))

    found = jax.vmap(of_one, (token_axis(inputs), 0, 0))(example_of(inputs, logits), whole_rows, cotangents)
    heads = []
    for place, (head, is_wanted, of_logits) in enumerate(
        zip(inputs.heads, wanted.flags.heads, found.logits, strict=True)
    ):
        # In the inputs' dtype, so that the backward matmuls are too; and stored, or each of them would make it again.
        narrow = lax.optimization_barrier(of_logits.astype(head.dtype))
        gradients: Any = {
            "hidden": head.hidden_gradient(narrow, inputs.real) if is_wanted.hidden else None,
            "kernel": head.kernel_gradient(narrow) if is_wanted.kernel else None,
            "bias": of_logits,
            "softcap": found.softcap[place],
            "inverse_temperature": found.inverse_temperature[place],
        }
        heads.append(dataclasses.replace(head, **gradients))
    of_tokens = wanted.of(Inputs(tuple(heads), found.target, class_weight=found.class_weight))
    return by_axes(add_tokens, inputs, of_tokens)


def first_reference(plan: Plan, inputs: Inputs, classes: int) -> Any:
    """For each token the largest logit of the first few of so many classes; -inf where none of them can happen."""
    few = cut_slab(plan, inputs, 0, min(FIRST_CLASSES, classes))
    return lax.stop_gradient(sums_of(plan, few, few.logits(), 0).maximum)


def cut_slab(plan: Plan, inputs: Inputs, start: Array | int, size: int) -> Inputs:
    """The inputs as they concern the classes from `start`, with all features of their kernels."""
    slab = cut(inputs, CLASSES, start, size)
    return slab.with_heads(Head.gather_features) if plan.gathers_slabs else slab


def gather_kernels(plan: Plan, inputs: Inputs) -> Inputs:
    """The inputs with all features of their kernels, unless a loop gathers them slab by slab."""
    return inputs if plan.gathers_slabs else inputs.with_heads(Head.gather_features)


def scatter_kernels(gradients: Inputs) -> Inputs:
    """The gradients with those of the kernels summed over the devices, of the features that each has."""

    def scatter(head: Head) -> Head:
        return head if head.kernel is None else dataclasses.replace(head, kernel=head.scatter_features(head.kernel))

    return gradients.with_heads(scatter)


def composed(plan: Plan, numbers: Numbers, weights: Any, options: Any) -> Array:
    """The sum of the losses."""
    return plan.quantity.losses(numbers, weights, options).sum()


def composed_gradients(plan: Plan, numbers: Numbers, weights: Any, options: Any) -> tuple[Any, Any, Any]:
    """The gradients of the sum of the losses; None for a number that no term of the loss reads."""
    loss, pull = jax.vjp(lambda *of_loss: composed(plan, *of_loss), numbers, weights, options)
    of_numbers, of_weights, of_options = pull(jnp.ones_like(loss))
    read = is_read(plan.quantity.losses, numbers, weights, options)
    return jax.tree.map(lambda is_needed, g: g if is_needed else None, read, of_numbers), of_weights, of_options


def add_tokens(axes: list[str], array: Array, gradient: Array | None) -> Array | None:
    """The sum over the tokens of the gradient of an array that has none of them, if it isn't one already."""
    if gradient is None or TOKENS in axes or gradient.ndim == array.ndim:
        return gradient
    return gradient.sum(0)
