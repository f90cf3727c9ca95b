"""The losses, and the numbers of each token, of scores that are a projection of hidden states."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce import _forms
from jaxce._api.results import LossStats
from jaxce._arguments import labels as label_checks
from jaxce._arguments import shapes
from jaxce._arguments.options import LossOptions, ProjectionOptions, inverse_temperature
from jaxce._calls.of_scores import Output, outputs, token_stats
from jaxce._math.chosen import OfChosen
from jaxce._math.composition import (
    ExampleWeights,
    divide,
    example_weights,
    reads_smoothing,
    reduce_losses,
    times,
    weight_sum,
)
from jaxce._math.divergence import OfTwo
from jaxce._math.example import compute_dtype, is_index, keep
from jaxce._math.labels import OfLabels
from jaxce._math.quantity import Quantity
from jaxce._mesh.devices import total
from jaxce._mesh.layout import TOKENS, Layout
from jaxce._projection.devices import OfDevice, Task, of_device, specs_of, with_batch
from jaxce._projection.inputs import Head, Inputs
from jaxce._projection.loops import numbers_of_tokens, summed_loss


def head_of(
    arrays: dict[str, Any],
    projection: ProjectionOptions,
    softcap: Array | None,
    temperature: Array | None,
    of: str = "",
) -> Head:
    """The head of the student or, with "teacher_" before the names, of the teacher; with the batch axes as they are."""
    hidden, kernel = arrays[f"{of}hidden"], arrays[f"{of}kernel"]
    head = Head(
        hidden=hidden,
        kernel=kernel,
        bias=arrays[f"{of}bias"],
        softcap=softcap,
        inverse_temperature=None,
        transpose_kernel=projection.transposed[1 if of else 0],
        precision=projection.precision,
    )
    inverse = inverse_temperature(temperature, hidden.shape[:-1], compute_dtype(head.dtype))
    return dataclasses.replace(head, inverse_temperature=inverse)


def check_head(arrays: dict[str, Any], projection: ProjectionOptions, parts: int, labels: Array | None) -> int:
    """Checks that the student's logits are right; how many of all columns are classes."""
    columns = shapes.matmul(arrays["hidden"], arrays["kernel"], projection.transposed[0], labels=labels)
    shapes.check_bias("bias", arrays["bias"], columns)
    shapes.check_chunk_size(projection.chunk_size)
    return shapes.classes("kernel", columns * parts, projection.num_classes)


def task_of(
    projection: ProjectionOptions, layout: Layout, quantity: Quantity, num_classes: int, *, summed: bool
) -> Task:
    return Task(quantity, summed, projection.strategy, projection.platform, num_classes, projection.chunk_size, layout)


@partial(jax.jit, static_argnames=("projection", "layout", "output"))
def loss_of_projection(
    arrays: dict[str, Any],
    labels: Array,
    options: LossOptions,
    *,
    projection: ProjectionOptions,
    layout: Layout,
    output: Output = "loss",
) -> Any:
    """`linear_cross_entropy`, or `linear_token_log_probs`."""
    parts = layout.class_parts
    num_classes = check_head(arrays, projection, parts, labels)
    hidden = arrays["hidden"]
    batch = hidden.shape[:-1]
    arrays |= layout.as_given(hidden=hidden, kernel=arrays["kernel"])
    head = head_of(arrays, projection, options.logit_softcap, options.temperature)
    targets, counts_in = label_checks.examples(
        "logits",
        (*batch, num_classes),
        len(batch),
        labels,
        options,
        source=f"hidden {hidden.shape}",
        classes_here=num_classes if parts == 1 else head.columns,
    )
    if not is_index(targets):
        targets = layout.pad_classes(targets, len(batch), head.columns)
    factors = options.factors()
    smooth = output == "loss" and reads_smoothing(num_classes, factors)
    within = options.weight if smooth or not is_index(targets) else None
    inputs = Inputs((head,), targets, class_weight=within, counts_in=counts_in)
    quantity = OfLabels(_forms.FORM, num_classes, smooth=smooth, predict=True)
    summed = output == "loss" and options.reduction != "none"
    task = task_of(projection, layout, quantity, num_classes, summed=summed)
    arguments = inputs, options.sample_weight, options.weight, factors
    of_batch, everywhere = layout.spec(TOKENS), layout.spec("")
    specs = specs_of(layout, inputs), of_batch, everywhere, everywhere
    compute = partial(loss_and_stats, task, options) if output == "loss" else partial(stats_of_tokens, task)
    return layout.run(compute, arguments, specs, outputs(output, options))


def stats_of_tokens(task: Task, inputs: Inputs, *_: Any) -> Any:
    """The numbers of each token, of what a device has."""
    found = of_device(task, inputs, None, None)
    return with_batch(found, token_stats(numbers_of_tokens(found.plan, found.inputs)))


def loss_and_stats(
    task: Task,
    options: LossOptions,
    inputs: Inputs,
    sample_weight: Array | None,
    weight: Array | None,
    factors: LossOptions,
) -> Array | tuple[Array, LossStats]:
    """The loss of what a device has, and its stats if they are wanted."""
    found = of_device(task, inputs, sample_weight, (weight, factors))
    plan, inputs, (sample_weight, (weight, factors)), _ = found
    targets, counts_in = inputs.target, inputs.counts_in
    weights = example_weights(targets, counts_in, sample_weight, weight, inputs.dtype)
    loss, numbers, total_weight = reduced(found, options.reduction, weights, factors, task.layout)
    if not options.return_stats:
        return loss
    if inputs.class_weight is not None and not is_index(targets):
        alone = plan._replace(quantity=OfLabels(_forms.FORM, plan.num_classes))
        numbers = numbers_of_tokens(alone, inputs._replace(class_weight=None))._replace(predicted=numbers.predicted)
    nll, log_z, entropy, predicted = with_batch(found, (numbers.nll, numbers.log_z, numbers.entropy, numbers.predicted))
    return loss, lax.stop_gradient(LossStats(nll, log_z, entropy, predicted, total_weight))


def reduced(
    found: OfDevice,
    reduction: str,
    weights: ExampleWeights,
    factors: Any,
    layout: Layout,
    divisor: ExampleWeights | None = None,
) -> tuple[Array, Any, Array]:
    """The loss of the tokens of all devices, the numbers of each of this device's, and what a mean divides by.

    That is the weight of the tokens, or another one that is given as `divisor`.
    """
    plan, inputs, token_axes = found.plan, found.inputs, layout.token_axes
    like = jax.ShapeDtypeStruct((inputs.tokens,), inputs.dtype)
    total_weight = weight_sum(weights if divisor is None else divisor, inputs.counts_in, like, token_axes)
    if not plan.summed:
        numbers = numbers_of_tokens(plan, inputs)
        return with_batch(found, plan.quantity.losses(numbers, weights, factors)), numbers, total_weight
    loss, numbers = summed_loss(plan, inputs, weights, factors)
    loss = total(loss, token_axes)
    return divide(loss, total_weight) if reduction == "mean" else loss, numbers, total_weight


# Distillation.


@partial(jax.jit, static_argnames=("projection", "layout", "reverse"))
def loss_of_two(
    arrays: dict[str, Any],
    options: LossOptions,
    teacher_softcap: Array | None,
    top_k: tuple[Array, Array] | None,
    *,
    projection: ProjectionOptions,
    layout: Layout,
    reverse: bool,
) -> Array:
    """`linear_distillation_loss`."""
    parts = layout.class_parts
    num_classes = check_head(arrays, projection, parts, None)
    hidden = arrays["hidden"]
    batch = hidden.shape[:-1]
    counts_in = label_checks.tokens_left_in(options.where, batch, hidden)
    label_checks.check_sample_weight(options.sample_weight, batch)
    arrays |= layout.as_given(hidden=hidden, kernel=arrays["kernel"])
    head = head_of(arrays, projection, options.logit_softcap, options.temperature)
    temperature = options.temperature
    squared = (
        None
        if temperature is None
        else jnp.broadcast_to(jnp.asarray(temperature, compute_dtype(head.dtype)) ** 2, batch)
    )
    per_token = options.sample_weight, squared
    of_batch = layout.spec(TOKENS)
    out = TOKENS if options.reduction == "none" else ""
    if top_k is not None:
        indices = shapes.top_k(*top_k, batch, num_classes, counts_in)
        inputs = Inputs((head,), chosen=indices, counts_in=counts_in)
        task = task_of(projection, layout, OfChosen(), num_classes, summed=False)
        compute = partial(loss_of_top_k, task, options.reduction, reverse)
        specs = specs_of(layout, inputs), of_batch, layout.spec(f"{TOKENS} chosen")
        probabilities = lax.stop_gradient(top_k[1])
        return layout.run(compute, (inputs, per_token, probabilities), specs, out)
    shapes.teacher(arrays["teacher_hidden"], arrays["teacher_kernel"], projection.transposed[1], batch, head.columns)
    shapes.check_bias("teacher_bias", arrays["teacher_bias"], head.columns)
    fixed = lax.stop_gradient((arrays, teacher_softcap))
    teacher = head_of(fixed[0], projection, fixed[1], options.temperature, "teacher_")
    inputs = Inputs((head, teacher), counts_in=counts_in)
    task = task_of(projection, layout, OfTwo(reverse), num_classes, summed=options.reduction != "none")
    compute = partial(loss_of_pair, task, options.reduction)
    return layout.run(compute, (inputs, per_token), (specs_of(layout, inputs), of_batch), out)


def loss_of_pair(task: Task, reduction: str, inputs: Inputs, per_token: tuple[Array | None, Array | None]) -> Array:
    """The divergence over all classes, of what a device has."""
    found = of_device(task, inputs, per_token, None)
    sample, weights = divergence_weights(found)
    return reduced(found, reduction, weights, None, task.layout, sample)[0]


def divergence_weights(found: OfDevice) -> tuple[ExampleWeights, ExampleWeights]:
    """The weights of the tokens that a mean divides by; and those times the temperature squared."""
    sample, squared = found.of_loss[0]
    counts_in, dtype = found.inputs.counts_in, found.inputs.dtype
    sample = None if sample is None else keep(counts_in, sample.astype(dtype))
    weight = sample if squared is None else times(sample, keep(counts_in, squared.astype(dtype)))
    return ExampleWeights(sample, sample), ExampleWeights(weight, weight)


def loss_of_top_k(
    task: Task,
    reduction: str,
    reverse: bool,
    inputs: Inputs,
    per_token: tuple[Array | None, Array | None],
    probabilities: Array,
) -> Array:
    """The divergence over k classes and the rest, of what a device has; NaN where an index is no class."""
    found = of_device(task, inputs, per_token, probabilities)
    indices, counts_in = found.inputs.chosen, found.inputs.counts_in
    chosen = numbers_of_tokens(found.plan, found.inputs)
    p = found.of_loss[1].reshape(indices.shape).astype(chosen.logits.dtype)
    rest = 1 - p.sum(1, keepdims=True)
    # What rounding alone may have left is nothing.
    rest = jnp.where(rest > p.shape[1] * jnp.finfo(p.dtype).eps, rest, 0)
    log_p = jnp.log(jnp.concatenate([p, rest], 1))
    logits = jnp.concatenate([jnp.where(indices < 0, jnp.nan, chosen.logits), chosen.log_rest[:, None]], 1)
    log_q = logits - jax.nn.logsumexp(logits, 1, keepdims=True)
    losses = keep(counts_in, divergence(*((log_q, log_p) if reverse else (log_p, log_q))))
    sample, weights = divergence_weights(found)
    token_axes = task.layout.token_axes
    losses = times(weights.total, losses)
    total_weight = weight_sum(sample, counts_in, losses, token_axes)
    return reduce_losses(with_batch(found, losses), total_weight, reduction, token_axes)


def divergence(log_p: Array, log_q: Array) -> Array:
    """Σ_c p_c (log p_c - log q_c), of classes along the last axis."""
    possible = log_p != -jnp.inf
    terms = jnp.exp(log_p) * (jnp.where(possible, log_p, 0) - jnp.where(possible, log_q, 0))
    return jnp.where(possible, terms, 0).sum(-1)
