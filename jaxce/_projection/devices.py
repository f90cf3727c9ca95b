"""What each device works on, of the inputs of a projection: on a mesh, inside of a `jax.shard_map`, or alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import PartitionSpec

from jaxce._math.quantity import Quantity
from jaxce._mesh.devices import axes_of, own_part, real_part, vary_over
from jaxce._mesh.layout import CLASSES, KernelLayout, Layout
from jaxce._projection.chunks import Plan
from jaxce._projection.inputs import Head, Inputs, axes_of_inputs, flatten_batch


class Task(NamedTuple):
    """What is to be computed; known when the function is traced."""

    quantity: Quantity
    summed: bool  # a sum of the losses is wanted
    strategy: str
    platform: str
    num_classes: int
    chunk_size: int | None
    layout: Layout


class OfDevice(NamedTuple):
    """What a device works on."""

    plan: Plan
    inputs: Inputs  # with one axis of tokens
    of_loss: Any  # what else the losses are made of
    batch: tuple[int, ...]


def specs_of(layout: Layout, inputs: Inputs) -> Inputs:
    """How the inputs lie where the devices begin with them, as the table of axes says."""
    axes = axes_of_inputs(inputs)
    heads = tuple(
        jax.tree.map(lambda names, kernel=kernel: layout.spec(names, kernel), head)
        for head, kernel in zip(axes.heads, layout.kernels, strict=False)
    )
    of_others = jax.tree.map(layout.spec, axes._replace(heads=()))
    # Those of all classes are on each device, which takes its own.
    return of_others._replace(heads=heads, class_weight=PartitionSpec(), real=PartitionSpec())


def of_device(task: Task, inputs: Inputs, per_token: Any, of_loss: Any) -> OfDevice:
    """The plan and the arguments of a loop; `per_token` and `of_loss` are what else the losses are made of."""
    layout = task.layout
    inputs = gathered(layout, inputs)
    batch = inputs.heads[0].hidden.shape[:-1]
    inputs = flatten_batch(inputs, batch)
    per_token = jax.tree.map(lambda array: array.reshape(inputs.tokens), per_token)
    gathers_slabs = layout.gathers_slabs and any(head.feature_axes for head in inputs.heads)
    plan = Plan(
        quantity=task.quantity,
        summed=task.summed,
        strategy="classes" if gathers_slabs else task.strategy,
        platform=task.platform,
        num_classes=task.num_classes,
        columns=inputs.heads[0].columns if layout.class_axes else task.num_classes,
        chunk_size=task.chunk_size,
        class_axes=layout.class_axes,
        token_groups=layout.token_groups(inputs.tokens),
        gathers_slabs=gathers_slabs,
    )
    return OfDevice(plan, *spread(plan, inputs, (per_token, of_loss)), batch)


def gathered(layout: Layout, inputs: Inputs) -> Inputs:
    """The inputs with the tokens and classes that a device works on, and what it has of the kernels' features."""

    def gather(head: Head, kernel: KernelLayout) -> Head:
        whole = jax.tree.map(
            lambda array, names: None if array is None else layout.gather(names, array, kernel),
            head,
            head.axes,
            is_leaf=lambda leaf: leaf is None,
        )
        return dataclasses.replace(whole, feature_axes=kernel.features)

    return inputs._replace(heads=tuple(map(gather, inputs.heads, layout.kernels)))


def spread(plan: Plan, inputs: Inputs, of_loss: Any) -> tuple[Inputs, Any]:
    """Tells `shard_map` what differs between devices, and takes each device's own part of what is of classes.

    What enters a sum over classes varies over all axes; indices, masks and weights are the same along the class axes.
    """
    axes = axes_of((inputs, of_loss))
    along_tokens = axes - set(plan.class_axes)
    table = axes_of_inputs(inputs)

    def vary(array: Array | None, names: str) -> Array | None:
        return None if array is None else vary_over(array, axes if CLASSES in names.split() else along_tokens)

    of_tokens = jax.tree.map(
        vary, inputs._replace(heads=()), table._replace(heads=()), is_leaf=lambda leaf: leaf is None
    )
    return of_tokens._replace(
        heads=vary_over(inputs.heads, axes),
        class_weight=own_part(plan.class_axes, of_tokens.class_weight, plan.columns),
        real=real_part(plan.class_axes, plan.columns, plan.num_classes),
    ), vary_over(of_loss, along_tokens)


def with_batch(found: OfDevice, per_token: Any) -> Any:
    """Arrays whose first axis is that of tokens, with the batch axes again."""
    return jax.tree.map(lambda array: array.reshape(*found.batch, *array.shape[1:]), per_token)
