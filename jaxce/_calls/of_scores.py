"""The losses, and the numbers of each token, of scores that are arrays."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce import _forms
from jaxce._api.results import LossStats, TokenStats
from jaxce._arguments import labels as label_checks
from jaxce._arguments import shapes
from jaxce._arguments.options import LossOptions, inverse_temperature
from jaxce._math.composition import (
    ExampleWeights,
    example_losses,
    example_weights,
    reads_smoothing,
    reduce_losses,
    times,
    weight_sum,
)
from jaxce._math.example import Form, Stats, compute_dtype, is_index, log_probs, negative_log_prob
from jaxce._math.labels import OfLabels
from jaxce._math.quantity import Example, Quantity, numbers
from jaxce._mesh.devices import axes_of, first_class, merging_over, own_part, real_part, vary_alike, vary_over
from jaxce._mesh.layout import CLASSES, TOKENS, Layout

# What a function returns: the loss of all examples, with `LossStats` if wanted; or `TokenStats`.
Output: TypeAlias = Literal["loss", "tokens"]

# Of an array with all axes of the scores.
WHOLE = f"{TOKENS} {CLASSES}"


def token_stats(stats: Stats) -> TokenStats:
    """The numbers as `TokenStats`. Rounding may not bring a probability above 1, or an entropy below 0."""

    def at_least_0(x: Array) -> Array:
        return x + lax.stop_gradient(jnp.maximum(x, 0) - x)

    return TokenStats(-at_least_0(stats.nll), stats.log_z, at_least_0(stats.entropy))


def outputs(output: Output, options: LossOptions) -> Any:
    """Which axes what a function returns has."""
    of_token: Any = TOKENS
    if output == "tokens":
        return TokenStats(of_token, of_token, of_token)
    loss: Any = of_token if options.reduction == "none" else ""
    scalar: Any = ""
    return (loss, LossStats(of_token, of_token, of_token, of_token, scalar)) if options.return_stats else loss


@dataclasses.dataclass(frozen=True)
class AcrossDevices:
    """A quantity of rows of which each device along the axes has as many classes."""

    quantity: Quantity
    axes: tuple[str, ...]
    classes: int

    def sums(self, example: Example) -> Any:
        """Over all classes."""
        own = self.quantity.sums(example, first_class=first_class(self.axes, self.classes))
        return self.quantity.merge(own, merging_over(self.axes)) if self.axes else own

    def read(self, sums: Any, example: Example) -> tuple[Any, Any]:
        """As the quantity does."""
        return self.quantity.read(sums, example)

    def gradients(self, example: Example, whole_row: Any, cotangents: Any) -> Example:
        """Of this device's classes."""
        own = first_class(self.axes, self.classes)
        return self.quantity.gradients(example, whole_row, cotangents, first_class=own)


def over_examples(function: Callable[..., Any], axis: int, in_axes: tuple[Any, ...]) -> Callable[..., Any]:
    """`function` of examples with classes on axis 0, vmapped over the axes before the class axis."""
    for _ in range(axis):
        function = jax.vmap(function, in_axes)
    return function


def numbers_of(
    example: Example, axis: int, num_classes: int, layout: Layout, weight: Array | None, *, smooth: bool
) -> Stats:
    """The numbers of every example; `weight` is that of all classes, where it has a part in them."""
    (logits,), target = example.logits, example.target
    columns, class_axes = logits.shape[axis], layout.class_axes
    axes = axes_of((example, weight))
    along_tokens = axes - set(class_axes)
    of_classes = example._replace(target=None, counts_in=None, class_weight=own_part(class_axes, weight, columns))
    example = vary_over(of_classes, axes)._replace(
        target=vary_over(target, along_tokens if is_index(target) else axes),
        counts_in=vary_over(example.counts_in, along_tokens),
    )
    example = example._replace(class_weight=along_classes(example.class_weight, logits, axis))
    quantity = OfLabels(_forms.FORM, num_classes, smooth=smooth)
    one = partial(numbers, AcrossDevices(quantity, class_axes, columns))
    in_axes = Example(
        logits=(0,),
        softcap=(None,),
        inverse_temperature=(0,),
        target=0,
        counts_in=0,
    )
    return over_examples(one, axis, (in_axes,))(example)


def along_classes(weight: Array | None, scores: Array, axis: int) -> Array | None:
    """Class weights that broadcast against the scores behind the class axis."""
    return None if weight is None else weight.reshape(-1, *(1,) * (scores.ndim - axis - 1))


@partial(jax.jit, static_argnames=("axis", "num_classes", "layout", "output"))
def loss_of_logits(
    logits: Array,
    labels: Array,
    options: LossOptions,
    *,
    axis: int,
    num_classes: int | None,
    layout: Layout,
    output: Output = "loss",
) -> Any:
    """`cross_entropy`, or `token_log_probs`."""
    columns = logits.shape[axis]
    num_classes = shapes.classes("logits", columns * layout.class_parts, num_classes)
    shape = (*logits.shape[:axis], num_classes, *logits.shape[axis + 1 :])
    here = num_classes if layout.class_parts == 1 else columns
    targets, counts_in = label_checks.examples("logits", shape, axis, labels, options, classes_here=here)
    batch, dtype = shape[:axis] + shape[axis + 1 :], compute_dtype(logits.dtype)
    example = Example(
        logits=(layout.as_given(logits=logits)["logits"],),
        softcap=(options.logit_softcap,),
        inverse_temperature=(inverse_temperature(options.temperature, batch, dtype),),
        target=targets if is_index(targets) else layout.pad_classes(targets, axis, columns),
        counts_in=counts_in,
    )
    axes: Any = Example(
        logits=(WHOLE,),
        softcap=("",),
        inverse_temperature=(TOKENS,),
        target=TOKENS if is_index(targets) else WHOLE,
        chosen="",
        class_weight="",
        counts_in=TOKENS,
    )
    arguments = example, options.weight, options.sample_weight, options.factors()
    specs = jax.tree.map(layout.spec, (axes, "", TOKENS, ""))
    compute = partial(loss_and_stats if output == "loss" else stats_of_tokens, axis, num_classes, options, layout)
    return layout.run(compute, arguments, specs, outputs(output, options))


def stats_of_tokens(
    axis: int, num_classes: int, options: LossOptions, layout: Layout, example: Example, *_: Any
) -> Any:
    """The numbers of each token, of what a device has."""
    example = without_padding(axis, num_classes, layout, example)
    return token_stats(numbers_of(example, axis, num_classes, layout, None, smooth=False))


def without_padding(axis: int, num_classes: int, layout: Layout, example: Example) -> Example:
    """The example with logits of -inf for classes that are padding."""
    (logits,) = example.logits
    real = real_part(layout.class_axes, logits.shape[axis], num_classes)
    if real is None:
        return example
    real, target = real.reshape(-1, *(1,) * (logits.ndim - axis - 1)), example.target
    if target is not None and not is_index(target) and target.shape != logits.shape:
        lacking = [(0, long - short) for long, short in zip(logits.shape, target.shape, strict=True)]
        target = jnp.pad(target, lacking)
    return example._replace(logits=(jnp.where(real, logits, -jnp.inf),), target=target)


def loss_and_stats(
    axis: int,
    num_classes: int,
    options: LossOptions,
    layout: Layout,
    example: Example,
    weight: Array | None,
    sample_weight: Array | None,
    factors: LossOptions,
) -> Array | tuple[Array, LossStats]:
    """The loss of what a device has, and its stats if they are wanted."""
    example = without_padding(axis, num_classes, layout, example)
    (logits,), targets, counts_in = example.logits, example.target, example.counts_in
    smooth = reads_smoothing(num_classes, factors)
    within = weight if smooth or not is_index(targets) else None
    stats = numbers_of(example, axis, num_classes, layout, within, smooth=smooth)
    weights = example_weights(targets, counts_in, sample_weight, weight, stats.nll.dtype)
    losses = example_losses(stats, weights, num_classes, factors)
    total_weight = weight_sum(weights, counts_in, losses, layout.token_axes)
    loss = reduce_losses(losses, total_weight, options.reduction, layout.token_axes)
    if not options.return_stats:
        return loss
    if within is not None and not is_index(targets):
        stats = numbers_of(example, axis, num_classes, layout, None, smooth=False)
    read = LossStats(stats.nll, stats.log_z, stats.entropy, predicted(logits, axis, layout), total_weight)
    return loss, lax.stop_gradient(read)


def predicted(logits: Array, axis: int, layout: Layout) -> Array:
    """The class of the largest logit of each example."""
    again = _forms.read_again(logits)
    own = first_class(layout.class_axes, logits.shape[axis]) + jnp.argmax(again, axis).astype(jnp.int32)
    return merging_over(layout.class_axes).first_largest(again.max(axis), own) if layout.class_axes else own


@partial(jax.jit, static_argnames=("axis", "layout"))
def loss_of_log_probs(log_probs: Array, labels: Array, options: LossOptions, *, axis: int, layout: Layout) -> Array:
    """`nll_loss`."""
    columns = log_probs.shape[axis]
    num_classes = columns * layout.class_parts
    shape = (*log_probs.shape[:axis], num_classes, *log_probs.shape[axis + 1 :])
    targets, counts_in = label_checks.examples("log_probs", shape, axis, labels, options, classes_here=columns)
    of_targets = TOKENS if is_index(targets) else WHOLE
    specs = jax.tree.map(layout.spec, (WHOLE, of_targets, TOKENS, "", TOKENS))
    arguments = log_probs, targets, counts_in, options.weight, options.sample_weight
    compute = partial(nll_and_reduction, axis, options.reduction, layout)
    return layout.run(compute, arguments, specs, TOKENS if options.reduction == "none" else "")


def nll_and_reduction(
    axis: int,
    reduction: str,
    layout: Layout,
    log_probs: Array,
    targets: Array,
    counts_in: Array | None,
    weight: Array | None,
    sample_weight: Array | None,
) -> Array:
    """`nll_loss` of what a device has."""
    class_axes, columns = layout.class_axes, log_probs.shape[axis]
    class_weight = along_classes(own_part(class_axes, weight, columns), log_probs, axis)
    arrays = vary_alike((log_probs, own_index(class_axes, targets, columns), class_weight, counts_in))
    nll = over_examples(negative_log_prob, axis, (0, 0, None, 0))(*arrays)
    if class_axes:
        nll = lax.psum(nll, class_axes)
    weights = example_weights(targets, counts_in, sample_weight, weight, nll.dtype)
    losses = times(weights.total, nll)
    total_weight = weight_sum(ExampleWeights(*weights), counts_in, nll, layout.token_axes)
    return reduce_losses(losses, total_weight, reduction, layout.token_axes)


def own_index(class_axes: tuple[str, ...], targets: Array, columns: int) -> Array:
    """Indices among this device's classes; one beyond the last for a class of another device, -1 for a bad label."""
    if not class_axes or not is_index(targets):
        return targets
    own = targets - first_class(class_axes, columns)
    return jnp.where(targets < 0, -1, jnp.where((own >= 0) & (own < columns), own, columns))


@partial(jax.jit, static_argnames=("axis", "layout"))
def log_probs_of_logits(logits: Array, where: Array | None, *, axis: int, layout: Layout) -> Array:
    """`log_softmax`."""
    where = shapes.class_mask(where, logits.shape)
    specs = jax.tree.map(layout.spec, (WHOLE, WHOLE))
    over = merging_over(layout.class_axes) if layout.class_axes else None
    form: Form = _forms.FORM

    def compute(logits: Array, where: Array | None) -> Array:
        one = partial(log_probs, form, over)
        return over_examples(one, axis, (0, 0))(*vary_alike((logits, where)))

    return layout.run(compute, (logits, where), specs, WHOLE)
