"""The losses of arrays that lie on a mesh, and log-probabilities of tokens.

They return what the functions of the same names in `jaxce` return, in every option and every gradient. Each device
works on its own examples and its own classes; what crosses the mesh is a few numbers for each example, the gradient of
the hidden states and the parts of the kernel that a device lacks, never logits. docs/sharded.md says how much that is.

With `mesh` and specs, or arrays that tell them, a function is called on whole arrays, in a `jax.jit` or outside of it.
Inside of your own `jax.shard_map` each array is what one device has: say with `batch_axes` and `class_axes` which axes
hold examples and which hold classes.

    from jax.sharding import PartitionSpec as P

    jaxce.sharded.linear_cross_entropy(hidden, kernel, labels, hidden_spec=P("data"), kernel_spec=P("data", "model"))
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxce import _checks, _layout
from jaxce._layout import Layout
from jaxce._linear import Strategy, _linear_cross_entropy
from jaxce._log_probs import token_options
from jaxce._losses import LossStats, Reduction, TokenStats, _cross_entropy
from jaxce._mesh import Axes, axes_of
from jaxce._platform import platform_of

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_token_log_probs", "token_log_probs"]

AxisNames: TypeAlias = str | Sequence[str]
KernelGather: TypeAlias = Literal["whole", "slabs"]


@overload
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    logits_spec: PartitionSpec | None = None,
    batch_axes: AxisNames | None = None,
    class_axes: AxisNames | None = None,
    num_classes: int | None = None,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_stats: Literal[False] = False,
) -> Array: ...


@overload
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    logits_spec: PartitionSpec | None = None,
    batch_axes: AxisNames | None = None,
    class_axes: AxisNames | None = None,
    num_classes: int | None = None,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_stats: Literal[True],
) -> tuple[Array, LossStats]: ...


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    logits_spec: PartitionSpec | None = None,
    batch_axes: AxisNames | None = None,
    class_axes: AxisNames | None = None,
    num_classes: int | None = None,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_stats: bool = False,
) -> Array | tuple[Array, LossStats]:
    """`jaxce.cross_entropy` of logits on a mesh, whose classes may be sharded.

    Equivalent to `jaxce.cross_entropy(logits, labels)`, without gathering logits: what crosses the class axes is a
    maximum and a few sums for each example, and what crosses the batch axes is two scalars.

    Args:
      logits: unnormalized log-probabilities; floats of any shape with the class axis at `axis`. Inside of a
        `jax.shard_map`, what this device has.
      labels: class indices, of all classes wherever they lie, or class probabilities; as in `jaxce.cross_entropy`.
      mesh: the mesh; by default that of the logits, or the one of `jax.set_mesh`.
      logits_spec: how the logits lie on it; by default as their type says, or as they themselves do. Inside of
        `jax.jit` or `jax.grad` an array on a mesh with automatic axes doesn't tell.
      batch_axes: inside of a `jax.shard_map`, the names of the axes that hold examples: one, several, or none as `()`.
        The loss is that of all examples along them.
      class_axes: inside of a `jax.shard_map`, the names of the axes that hold classes.
      num_classes: how many of the classes are real, where the class axis was padded to share it evenly.
      axis: the class axis.
      weight: weight of each class, shape (num_classes,); also inside of a `jax.shard_map` that of all classes.
      sample_weight: weight of each example, of the batch shape.
      ignore_index: an example with this label is left out.
      where: False leaves an example out; bool, broadcastable to the batch shape.
      label_smoothing: the share, from 0 to 1, of the target that is spread over all classes.
      z_loss: factor of the squared log Z.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first.
      reduction: "none", "sum", or "mean", over the examples of all devices.
      return_stats: also return `LossStats`.

    Returns:
      The loss in nats, the same on every device; for "none", and in `LossStats`, arrays that lie as the examples do.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: an argument has a wrong shape or value, or doesn't fit the mesh.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))  # as many devices as there are
      >>> logits, labels = jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), jnp.array([2, 1])
      >>> print(f"{jaxce.sharded.cross_entropy(logits, labels, mesh=mesh, logits_spec=P('data', 'model')):.4f}")
      0.9076
    """
    labels, options = _checks.loss_options(
        labels,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        where=where,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        reduction=reduction,
        return_stats=return_stats,
    )
    logits = _checks.as_array("logits", logits)
    axis = _checks.class_axis("logits", logits, _checks.integer("axis", axis), labels)
    return _cross_entropy(
        logits,
        labels,
        options,
        axis=axis,
        num_classes=None if num_classes is None else _checks.integer("num_classes", num_classes),
        layout=_layout_of_logits(logits, labels, axis, mesh, logits_spec, batch_axes, class_axes),
    )


@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    hidden_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    batch_axes: AxisNames | None = None,
    class_axes: AxisNames | None = None,
    kernel_gather: KernelGather = "whole",
    bias: ArrayLike | None = None,
    transpose_kernel: bool = False,
    num_classes: int | None = None,
    chunk_size: int | None = None,
    strategy: Strategy = "auto",
    precision: lax.PrecisionLike = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_stats: Literal[False] = False,
) -> Array: ...


@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    hidden_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    batch_axes: AxisNames | None = None,
    class_axes: AxisNames | None = None,
    kernel_gather: KernelGather = "whole",
    bias: ArrayLike | None = None,
    transpose_kernel: bool = False,
    num_classes: int | None = None,
    chunk_size: int | None = None,
    strategy: Strategy = "auto",
    precision: lax.PrecisionLike = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_stats: Literal[True],
) -> tuple[Array, LossStats]: ...


def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    hidden_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    batch_axes: AxisNames | None = None,
    class_axes: AxisNames | None = None,
    kernel_gather: KernelGather = "whole",
    bias: ArrayLike | None = None,
    transpose_kernel: bool = False,
    num_classes: int | None = None,
    chunk_size: int | None = None,
    strategy: Strategy = "auto",
    precision: lax.PrecisionLike = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_stats: bool = False,
) -> Array | tuple[Array, LossStats]:
    """`jaxce.linear_cross_entropy` of hidden states and a kernel on a mesh, without storing logits.

    Equivalent to `jaxce.linear_cross_entropy(hidden, kernel, labels)`. The axes in the batch dimensions of `hidden`
    hold tokens, those in the class dimension of `kernel` hold classes (tensor parallel). A kernel whose features are
    sharded over axes of tokens (FSDP) is gathered, and its gradient scattered. Where an axis holds both tokens and
    classes (sequence parallel, or FSDP by classes), whichever are fewer are gathered. Across the class axes go a
    maximum and a few sums for each token, and the gradient of the hidden states.

    Args:
      hidden: features of the tokens, floats of shape (..., D), D not sharded. Inside of a `jax.shard_map`, what this
        device has; so are the others, unless they say otherwise.
      kernel: weights of the output projection, floats of shape (D, C); (C, D) with `transpose_kernel`.
      labels: class indices, of all classes wherever they lie, or class probabilities; as in
        `jaxce.linear_cross_entropy`.
      mesh: the mesh; by default that of the arrays, or the one of `jax.set_mesh`.
      hidden_spec: how `hidden` lies on it; by default as its type says, or as it does itself. Inside of `jax.jit` or
        `jax.grad` an array on a mesh with automatic axes doesn't tell.
      kernel_spec: how `kernel` lies on it; likewise.
      batch_axes: inside of a `jax.shard_map`, the names of the axes that hold tokens: one, several, or none as `()`.
        The loss is that of all tokens along them.
      class_axes: inside of a `jax.shard_map`, the names of the axes that hold classes. Features of the kernel that are
        elsewhere must have been gathered.
      kernel_gather: "whole" gathers a device's classes of an FSDP kernel once. "slabs" gathers a slab of them at a
        time, once for each pass, and scatters its gradient, so that a device holds no more of the kernel than its own
        part and a slab: usually the least memory, for a gather more. It is always the loop over classes.
      bias: added to the logits; shape (C,).
      transpose_kernel: the kernel is (C, D).
      num_classes: how many of the columns are real, where the kernel was padded to share its classes evenly.
      chunk_size: as in `jaxce.linear_cross_entropy`, of a device's own tokens or classes.
      strategy: the loop of each device, "tokens", "classes" or "auto".
      precision: of the matmuls, as for `jax.lax.dot_general`.
      weight: weight of each class, shape (num_classes,); also inside of a `jax.shard_map` that of all classes.
      sample_weight: weight of each token, of the labels' batch shape.
      ignore_index: a token with this label is left out.
      where: False leaves a token out; bool, broadcastable to the batch shape.
      label_smoothing: the share, from 0 to 1, of the target that is spread over all classes.
      z_loss: factor of the squared log Z.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first.
      reduction: "none", "sum", or "mean", over the tokens of all devices.
      return_stats: also return `LossStats`.

    Returns:
      The loss in nats, the same on every device; for "none", and in `LossStats`, arrays that lie as the tokens do.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: an argument has a wrong shape or value, or doesn't fit the mesh.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))  # as many devices as there are
      >>> hidden, kernel, labels = jnp.eye(3), jnp.array([[1.0, 2.0, 3.0]] * 3), jnp.array([2, 1, 0])
      >>> loss = jaxce.sharded.linear_cross_entropy(
      ...     hidden, kernel, labels, mesh=mesh, hidden_spec=P("data"), kernel_spec=P("data", "model")
      ... )
      >>> print(f"{loss:.4f}")
      1.4076
    """
    labels, options = _checks.loss_options(
        labels,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        where=where,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        reduction=reduction,
        return_stats=return_stats,
    )
    hidden, kernel = _checks.as_array("hidden", hidden), _checks.as_array("kernel", kernel)
    bias = _checks.as_optional_array("bias", bias)
    return _linear_cross_entropy(
        hidden,
        kernel,
        bias,
        labels,
        options,
        projection=_checks.projection_options(
            transpose_kernel=transpose_kernel,
            num_classes=num_classes,
            chunk_size=chunk_size,
            strategy=strategy,
            precision=precision,
            platform=platform_of((hidden, kernel), mesh),
        ),
        layout=_layout_of_projection(
            hidden,
            kernel,
            labels,
            transpose_kernel=transpose_kernel,
            strategy=strategy,
            kernel_gather=kernel_gather,
            mesh=mesh,
            specs=(hidden_spec, kernel_spec),
            axes=(batch_axes, class_axes),
        ),
    )


def token_log_probs(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    logits_spec: PartitionSpec | None = None,
    batch_axes: AxisNames | None = None,
    class_axes: AxisNames | None = None,
    num_classes: int | None = None,
    axis: int = -1,
    temperature: ArrayLike = 1.0,
    logit_softcap: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
) -> TokenStats:
    """`jaxce.token_log_probs` of logits on a mesh, whose classes may be sharded.

    Args:
      logits: as in `cross_entropy` of this module, and so are `mesh`, `logits_spec`, `batch_axes`, `class_axes`,
        `num_classes` and `axis`.
      labels: class indices, of all classes wherever they lie.
      mesh: the mesh.
      logits_spec: how the logits lie on it.
      batch_axes: inside of a `jax.shard_map`, the names of the axes that hold tokens.
      class_axes: inside of a `jax.shard_map`, the names of the axes that hold classes.
      num_classes: how many of the classes are real.
      axis: the class axis.
      temperature: divides the logits; a number or an array, as in `jaxce.token_log_probs`.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first.
      ignore_index: a token with this label is left out.
      where: False leaves a token out; bool, broadcastable to the batch shape.

    Returns:
      `TokenStats`, arrays that lie as the tokens do.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: an argument has a wrong shape or value, or doesn't fit the mesh.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))  # as many devices as there are
      >>> logits, labels = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([2])
      >>> stats = jaxce.sharded.token_log_probs(logits, labels, mesh=mesh, logits_spec=P("data", "model"))
      >>> print(f"{stats.log_prob[0]:.4f}")
      -0.4076
    """
    labels, options = token_options(labels, temperature, logit_softcap, ignore_index, where)
    logits = _checks.as_array("logits", logits)
    axis = _checks.class_axis("logits", logits, _checks.integer("axis", axis))
    return _cross_entropy(
        logits,
        labels,
        options,
        axis=axis,
        num_classes=None if num_classes is None else _checks.integer("num_classes", num_classes),
        layout=_layout_of_logits(logits, labels, axis, mesh, logits_spec, batch_axes, class_axes),
        output="tokens",
    )


def linear_token_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    hidden_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    batch_axes: AxisNames | None = None,
    class_axes: AxisNames | None = None,
    kernel_gather: KernelGather = "whole",
    bias: ArrayLike | None = None,
    transpose_kernel: bool = False,
    num_classes: int | None = None,
    chunk_size: int | None = None,
    strategy: Strategy = "auto",
    precision: lax.PrecisionLike = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
) -> TokenStats:
    """`jaxce.linear_token_log_probs` of hidden states and a kernel on a mesh, without storing logits.

    Args:
      hidden: as in `linear_cross_entropy` of this module, and so are `kernel`, `mesh` and all up to `precision`.
      kernel: weights of the output projection.
      labels: class indices, of all classes wherever they lie.
      mesh: the mesh.
      hidden_spec: how `hidden` lies on it.
      kernel_spec: how `kernel` lies on it.
      batch_axes: inside of a `jax.shard_map`, the names of the axes that hold tokens.
      class_axes: inside of a `jax.shard_map`, the names of the axes that hold classes.
      kernel_gather: "whole" or "slabs".
      bias: added to the logits; shape (C,).
      transpose_kernel: the kernel is (C, D).
      num_classes: how many of the columns are real.
      chunk_size: of a device's own tokens or classes.
      strategy: the loop of each device.
      precision: of the matmuls.
      temperature: divides the logits; a number or an array, as in `jaxce.token_log_probs`.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first.
      ignore_index: a token with this label is left out.
      where: False leaves a token out; bool, broadcastable to the batch shape.

    Returns:
      `TokenStats`, arrays that lie as the tokens do.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: an argument has a wrong shape or value, or doesn't fit the mesh.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))  # as many devices as there are
      >>> hidden, kernel, labels = jnp.eye(3), jnp.array([[1.0, 2.0, 3.0]] * 3), jnp.array([2, 1, 0])
      >>> stats = jaxce.sharded.linear_token_log_probs(
      ...     hidden, kernel, labels, mesh=mesh, hidden_spec=P("data"), kernel_spec=P("data", "model")
      ... )
      >>> print(f"{stats.log_prob.mean():.4f}")
      -1.4076
    """
    labels, options = token_options(labels, temperature, logit_softcap, ignore_index, where)
    hidden, kernel = _checks.as_array("hidden", hidden), _checks.as_array("kernel", kernel)
    return _linear_cross_entropy(
        hidden,
        kernel,
        _checks.as_optional_array("bias", bias),
        labels,
        options,
        projection=_checks.projection_options(
            transpose_kernel=transpose_kernel,
            num_classes=num_classes,
            chunk_size=chunk_size,
            strategy=strategy,
            precision=precision,
            platform=platform_of((hidden, kernel), mesh),
        ),
        layout=_layout_of_projection(
            hidden,
            kernel,
            labels,
            transpose_kernel=transpose_kernel,
            strategy=strategy,
            kernel_gather=kernel_gather,
            mesh=mesh,
            specs=(hidden_spec, kernel_spec),
            axes=(batch_axes, class_axes),
        ),
        output="tokens",
    )


def _layout_of_logits(
    logits: Array,
    labels: Array,
    axis: int,
    mesh: Mesh | AbstractMesh | None,
    logits_spec: PartitionSpec | None,
    batch_axes: AxisNames | None,
    class_axes: AxisNames | None,
) -> Layout:
    """How logits lie on the mesh; or, inside of a `jax.shard_map`, what this device has of them."""
    if batch_axes is None and class_axes is None:
        mesh = _layout.find_mesh(mesh, [logits])
        placed = _layout.place(mesh, "logits", logits, logits_spec, "P('data', 'model')")
        return _layout.layout_of_logits(mesh, placed, axis)
    layout = _inside(batch_axes, class_axes, ("logits", logits), labels, mesh=mesh, logits_spec=logits_spec)
    _check_parts("logits", logits, "classes", "class_axes", layout.classes)
    return layout


def _layout_of_projection(
    hidden: Array,
    kernel: Array,
    labels: Array,
    *,
    transpose_kernel: bool,
    strategy: Strategy,
    kernel_gather: KernelGather,
    mesh: Mesh | AbstractMesh | None,
    specs: tuple[PartitionSpec | None, PartitionSpec | None],
    axes: tuple[AxisNames | None, AxisNames | None],
) -> Layout:
    """How hidden states and kernel lie on the mesh; or, inside of a `jax.shard_map`, what this device has of them."""
    transpose_kernel = _checks.flag("transpose_kernel", transpose_kernel)
    gathers_slabs = _checks.choice("kernel_gather", kernel_gather, ("whole", "slabs")) == "slabs"
    if gathers_slabs and strategy == "tokens":
        raise ValueError(
            "kernel_gather='slabs' needs the loop over classes; got strategy='tokens', which takes the whole kernel "
            "for each chunk of tokens: strategy='classes' or 'auto'"
        )
    hidden_spec, kernel_spec = specs
    if axes != (None, None):
        if gathers_slabs:
            raise ValueError(
                "kernel_gather='slabs' is for whole arrays and their specs; got it inside of a jax.shard_map, where a "
                "device has all features of its classes: leave it out"
            )
        given: Any = {"mesh": mesh, "hidden_spec": hidden_spec, "kernel_spec": kernel_spec}
        layout = _inside(*axes, ("hidden", hidden), labels, **given)
        _check_parts("kernel", kernel, "classes", "class_axes", layout.classes)
        return layout
    mesh = _layout.find_mesh(mesh, [hidden, kernel])
    _checks.matmul(hidden, kernel, transpose_kernel, labels=labels)
    return _layout.layout_of_projection(
        mesh,
        _layout.place(mesh, "hidden", hidden, hidden_spec, "P('data')"),
        _layout.place(mesh, "kernel", kernel, kernel_spec, "P(None, 'model')"),
        transpose=transpose_kernel,
        gathers_slabs=gathers_slabs,
    )


def _inside(
    batch_axes: AxisNames | None, class_axes: AxisNames | None, scores: tuple[str, Array], labels: Array, **others: Any
) -> Layout:
    """The layout inside of a caller's own `jax.shard_map`, of the array that holds tokens or examples."""
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{name} is for whole arrays; got it with batch_axes or class_axes, which are for the parts of them "
                "inside of a jax.shard_map: pass one or the other"
            )
    of_batch, of_classes = _names("batch_axes", batch_axes), _names("class_axes", class_axes)
    both = set(of_batch) & set(of_classes)
    if both:
        raise ValueError(f"an axis holds examples or classes; got {both.pop()!r} in batch_axes and in class_axes")
    differs = [axis for axis in of_classes if axis in axes_of(labels)]
    if differs and jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be the same on all devices along {differs[0]!r}, an axis of class_axes; got labels that "
            "may differ: gather them, and hidden, before the jax.shard_map"
        )
    _check_parts(*scores, "tokens" if scores[0] == "hidden" else "examples", "batch_axes", of_batch)
    return _layout.inside_shard_map(of_classes, of_batch, labels.ndim)


def _names(name: str, axes: AxisNames | None) -> Axes:
    """The names of axes of the `jax.shard_map` around the call."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    manual = tuple(map(str, jax.sharding.get_abstract_mesh().manual_axes))
    for axis in names:
        if axis not in manual:
            among = f"those are {', '.join(map(repr, manual))}" if manual else "there is none around this call"
            raise ValueError(
                f"{name} must name axes of the jax.shard_map that this is called in; got {axis!r}: {among}"
            )
        if axis not in axes_of(lax.axis_index(axis)):
            raise ValueError(
                "a loss inside of a jax.shard_map must know over which axes an array varies; got check_vma=False: "
                "leave it True"
            )
    return names


def _check_parts(name: str, array: Array, what: str, axes_name: str, axes: Axes) -> None:
    """Each device has its own."""
    for axis in axes:
        if axis not in axes_of(array):
            raise ValueError(
                f"{name} must be this device's {what}; got the same array on all devices along {axis!r}: give it a "
                f"spec with {axis!r} in the in_specs of jax.shard_map, or leave {axis!r} out of {axes_name}"
            )
