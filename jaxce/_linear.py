"""`linear_cross_entropy`: the output projection and the loss in one, without the logits of all tokens at a time."""

import math
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, auto_axes
from jax.typing import ArrayLike

from jaxce import _checks, _forms
from jaxce._checks import LossOptions, ProjectionOptions
from jaxce._compose import Options, divide, example_losses, example_weights, weight_sum
from jaxce._layout import Layout, constrain, layout_of_projection, layout_of_types, on_mesh
from jaxce._loops import Config, Inputs, Loop, choose_loop, linear_stats, matmul_dtype, summed_loss
from jaxce._losses import LossStats, Output, Reduction, TokenStats, out_specs, token_stats
from jaxce._mesh import automatic_devices, axes_of, explicit_mesh, own_part, real_part, size_along, total, vary_over
from jaxce._platform import platform_of
from jaxce._softmax import compute_dtype, is_index

Strategy: TypeAlias = Literal["auto", "tokens", "classes"]


@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
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
    r"""Cross-entropy of the logits `hidden @ kernel + bias`, without storing the logits.

    .. math:: \ell_i = \log \sum_c e^{h_i \cdot k_c + b_c} - (h_i \cdot k_{y_i} + b_{y_i})

    Equivalent to `cross_entropy(hidden @ kernel + bias, labels)` with float32 accumulation, without storing an array of
    tokens by classes. After Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*, 2024,
    arXiv:2411.09009, and Hsu et al., *Liger Kernel*, 2024, arXiv:2410.10989; no gradient is filtered.

    Args:
      hidden: features of the tokens, floats of shape (..., D).
      kernel: weights of the output projection, floats of shape (D, C); (C, D) with `transpose_kernel`.
      labels: class indices, integers of the shape of `hidden` without the last axis; or class probabilities, floats of
        that shape and a last axis of `num_classes`.
      bias: added to the logits; shape (C,).
      transpose_kernel: the kernel is (C, D), as an embedding table or `torch.nn.Linear.weight`.
      num_classes: how many columns of a padded kernel are real, all by default. The others count for nothing, and their
        gradient is 0.
      chunk_size: how many tokens ("tokens") or classes ("classes") are worked on at a time; by default as many as suit
        the platform and take little memory beside the gradients. It need not divide anything.
      strategy: "tokens" is a loop over tokens with three matmuls: the gradients are made in the forward pass and held
        in float32. "classes" is a loop over classes with four matmuls, each of which finishes a part of a gradient: it
        takes the least memory. "auto" picks by the platform of the arrays or of their mesh, else by the one that JAX
        runs on. On a TPU it is "classes". On a GPU it is "tokens" where N tokens are many for D features, 16·D at most
        N times the bytes of an entry of `hidden`; on a CPU where the kernel is small, D·C at most 2²¹: there it is
        faster, and its float32 gradients are small beside the logits. Else, and for `reduction="none"`, it is
        "classes"; on a CPU with float32 that keeps the logits of D tokens where the kernel's gradient will be, and has
        3 matmuls for up to D tokens, 4 - D/N for more. Under `jax.set_mesh` with automatic axes it is "tokens", in
        chunks of tokens from all devices: there, `jaxce.sharded.linear_cross_entropy` is faster and leaner.
      precision: of the matmuls, as for `jax.lax.dot_general`.
      weight: weight of each class, shape (num_classes,).
      sample_weight: weight of each token, of the labels' batch shape.
      ignore_index: a token with this label is left out; any integer.
      where: False leaves a token out; bool, broadcastable to the batch shape.
      label_smoothing: the share, from 0 to 1, of the target that is spread over all classes.
      z_loss: factor of the squared log Z.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first.
      reduction: "none", "sum", or "mean", which divides by the total weight of the tokens left in.
      return_stats: also return `LossStats`.

    Returns:
      The loss in nats: a scalar, or of the batch shape for "none"; float32, or float64 for float64 inputs. With
      `return_stats`, a pair of the loss and `LossStats`.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: an argument has a wrong shape or value.
      JaxRuntimeError: under `jax.experimental.checkify`, a label is out of range.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> hidden, kernel = jnp.eye(3), jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
      >>> print(f"{jaxce.linear_cross_entropy(hidden, kernel, [2, 1, 0]):.4f}")
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
    return _linear_cross_entropy(
        _checks.as_array("hidden", hidden),
        _checks.as_array("kernel", kernel),
        _checks.as_optional_array("bias", bias),
        labels,
        options,
        projection=_checks.projection_options(
            transpose_kernel=transpose_kernel,
            num_classes=num_classes,
            chunk_size=chunk_size,
            strategy=strategy,
            precision=precision,
            platform=platform_of((hidden, kernel)),
        ),
    )


@partial(jax.jit, static_argnames=("projection", "layout", "output"))
def _linear_cross_entropy(
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    labels: Array,
    options: LossOptions,
    *,
    projection: ProjectionOptions,
    layout: Layout | None = None,
    output: Output = "loss",
) -> Any:
    shards = 1 if layout is None or layout.mesh is not None else size_along(layout.classes)
    num_classes = _checks.projection(hidden, kernel, bias, labels, projection, shards)
    batch = hidden.shape[:-1]
    targets, live = _checks.examples(
        "logits",
        (*batch, num_classes),
        len(batch),
        labels,
        options,
        source=f"hidden {hidden.shape}",
        classes_here=num_classes if shards == 1 else columns_of(kernel, projection),
    )
    class_weight = options.class_weight_within(targets)
    scale = _checks.inverse_temperature(options.temperature, batch, compute_dtype(matmul_dtype(hidden, kernel)))
    inputs = Inputs(hidden, kernel, bias, targets, class_weight, options.logit_softcap, live, scale)
    arguments = inputs, options.sample_weight, options.weight, Options(options.label_smoothing, options.z_loss)
    compute = partial(_loss_and_stats if output == "loss" else _token_stats, projection, num_classes, options)
    mesh = explicit_mesh(inputs)
    if layout is None and mesh is not None:
        layout_of = partial(layout_of_projection, transpose=projection.transpose_kernel, gathers_slabs=False)
        layout = layout_of_types(mesh, layout_of, hidden=hidden, kernel=kernel)
        if layout is None:
            # Inside of it, XLA places the arrays.
            of_batch: Any = NamedSharding(mesh, PartitionSpec(*jax.typeof(hidden).sharding.spec[: len(batch)]))
            out = out_specs(output, options, of_batch, NamedSharding(mesh, PartitionSpec()))
            return auto_axes(partial(compute, None), out_sharding=out)(*arguments)
    if layout is None or layout.mesh is None:
        return compute(layout, *arguments)
    if not is_index(targets) and layout.classes:
        padding = [(0, 0)] * len(batch) + [(0, columns_of(kernel, projection) - num_classes)]
        inputs = inputs._replace(targets=jnp.pad(targets, padding))
    hidden, kernel = constrain(layout.mesh, (hidden, kernel), layout.given)
    inputs = inputs._replace(hidden=hidden, kernel=kernel)
    specs = in_specs(layout, inputs, projection.transpose_kernel)
    out = out_specs(output, options, layout.of_batch(), PartitionSpec())
    found = on_mesh(layout, partial(compute, layout), (inputs, *arguments[1:]), specs, out)
    if not any(layout.tokens_gathered):
        return found
    # What is of a token lies as the hidden states do.
    return constrain(
        layout.mesh, found, out_specs(output, options, PartitionSpec(*layout.hidden[:-1]), PartitionSpec())
    )


def columns_of(kernel: Array, projection: ProjectionOptions) -> int:
    return kernel.shape[0 if projection.transpose_kernel else 1]


def in_specs(layout: Layout, inputs: Inputs, transpose_kernel: bool) -> tuple[Any, ...]:
    """How the arguments of the loss lie on the mesh where its devices begin with them."""
    per_class, of_batch, everywhere = PartitionSpec(layout.classes), layout.of_batch(), PartitionSpec()
    specs: Any = {
        "hidden": layout.hidden,
        "kernel": layout.kernel(transpose_kernel),
        "bias": per_class,
        "targets": of_batch if is_index(inputs.targets) else layout.with_classes(len(layout.batch)),
        "class_weight": everywhere,
        "softcap": everywhere,
        "live": of_batch,
        "scale": of_batch,
    }
    return Inputs(**specs), of_batch, everywhere, everywhere


def configure(
    projection: ProjectionOptions, num_classes: int, layout: Layout | None, inputs: Inputs, options: LossOptions
) -> Config:
    """What is known of the loop when the function is traced."""
    auto = projection.strategy == "auto"
    tokens = inputs.hidden.shape[0]
    groups = math.gcd(tokens, automatic_devices()) if layout is None else 1
    gathers_slabs = layout is not None and layout.gathers_slabs and bool(layout.features)
    if gathers_slabs:
        loop: Loop = "classes"
    elif auto:
        loop = choose_loop(projection.platform, inputs, options.reduction, groups)
    else:
        loop = cast(Loop, projection.strategy)
    sharded = layout is not None and bool(layout.classes)
    return Config(
        platform=projection.platform,
        loop=loop,
        # Over tokens, a TPU takes more memory and seldom less time, also with a matmul less.
        either_loop=auto and projection.platform != "tpu" and not gathers_slabs,
        # With more devices than one, the tokens could lie on others than the gradient of the kernel.
        keeps_logits=auto and projection.platform == "cpu" and jax.device_count() == 1,
        chunk_size=projection.chunk_size,
        num_classes=num_classes,
        columns=columns_of(inputs.kernel, projection) if sharded else num_classes,
        transpose_kernel=projection.transpose_kernel,
        precision=projection.precision,
        smooth=options.label_smoothing is not None,
        form=_forms.chosen(),
        class_axes=() if layout is None else layout.classes,
        groups=groups,
        feature_axes=() if layout is None else layout.features,
        gathers_slabs=gathers_slabs,
    )


class Prepared(NamedTuple):
    """What a device works on."""

    config: Config
    inputs: Inputs  # with one axis of tokens
    others: Any
    batch: tuple[int, ...]


def prepare(
    projection: ProjectionOptions,
    num_classes: int,
    loss_options: LossOptions,
    layout: Layout | None,
    inputs: Inputs,
    sample_weight: Array | None = None,
    others: Any = None,
) -> Prepared:
    """The arguments of a loop; on a mesh, of what a device has."""
    if layout is not None:
        inputs = inputs._replace(
            hidden=layout.gather_hidden(inputs.hidden),
            kernel=layout.gather_kernel(inputs.kernel, projection.transpose_kernel),
        )
    # The batch axes become one axis of tokens.
    batch = inputs.hidden.shape[:-1]
    tokens = math.prod(batch)
    hidden, targets, live, scale, sample_weight = jax.tree.map(
        lambda array: array.reshape(tokens, *array.shape[len(batch) :]),
        (inputs.hidden, inputs.targets, inputs.live, inputs.scale, sample_weight),
    )
    inputs = inputs._replace(hidden=hidden, targets=targets, live=live, scale=scale)
    config = configure(projection, num_classes, layout, inputs, loss_options)
    return Prepared(config, *spread(config, inputs, (sample_weight, others)), batch)


def _token_stats(
    projection: ProjectionOptions,
    num_classes: int,
    loss_options: LossOptions,
    layout: Layout | None,
    inputs: Inputs,
    *_: Any,
) -> TokenStats:
    """The numbers of each token, of arguments that have been checked."""
    prepared = prepare(projection, num_classes, loss_options, layout, inputs)
    stats, _predicted = linear_stats(prepared.config, prepared.inputs)
    return jax.tree.map(lambda array: array.reshape(prepared.batch), token_stats(stats))


def _loss_and_stats(
    projection: ProjectionOptions,
    num_classes: int,
    loss_options: LossOptions,
    layout: Layout | None,
    inputs: Inputs,
    sample_weight: Array | None,
    weight: Array | None,
    options: Options,
) -> Array | tuple[Array, LossStats]:
    """The loss of arguments that have been checked, and its stats if they are wanted."""
    given = (inputs, sample_weight, (weight, options))
    prepared = prepare(projection, num_classes, loss_options, layout, *given)
    config, inputs, (sample_weight, (weight, options)), batch = prepared
    hidden, targets, live = inputs.hidden, inputs.targets, inputs.live
    tokens = hidden.shape[0]
    token_axes = () if layout is None else layout.token_axes
    dtype = compute_dtype(matmul_dtype(hidden, inputs.kernel))
    weights = example_weights(targets, live, sample_weight, weight, dtype)
    total_weight = weight_sum(weights, live, jax.ShapeDtypeStruct((tokens,), dtype), token_axes)
    if loss_options.reduction == "none":
        stats, predicted = linear_stats(config, inputs)
        loss = example_losses(stats, weights, config.num_classes, options).reshape(batch)
    else:
        loss, (stats, predicted) = summed_loss(config, inputs, weights, options)
        loss = total(loss, token_axes)
        if loss_options.reduction == "mean":
            loss = divide(loss, total_weight)
    if not loss_options.return_stats:
        return loss
    if inputs.class_weight is not None and not is_index(targets):
        stats, _ = linear_stats(config._replace(smooth=False), inputs._replace(class_weight=None))
    per_token = (stats.nll, stats.log_z, stats.entropy, predicted)
    nll, log_z, entropy, predicted = (array.reshape(batch) for array in per_token)
    return loss, lax.stop_gradient(LossStats(nll, log_z, entropy, predicted, total_weight))


def spread(config: Config, inputs: Inputs, others: Any) -> tuple[Inputs, Any]:
    """What differs from class to class varies over all axes; what is of a token or of all, not over the class axes.

    And each device takes what is of its own classes.
    """
    axes = axes_of((inputs, others))
    targets, live, others = vary_over((inputs.targets, inputs.live, others), axes - set(config.class_axes))
    if not is_index(targets):
        targets = vary_over(targets, axes)
    of_classes = (inputs.hidden, inputs.kernel, inputs.bias, inputs.class_weight, inputs.softcap, inputs.scale)
    hidden, kernel, bias, class_weight, softcap, scale = vary_over(of_classes, axes)
    class_weight = own_part(config.class_axes, class_weight, config.columns)
    real = real_part(config.class_axes, config.columns, config.num_classes)
    return Inputs(hidden, kernel, bias, targets, class_weight, softcap, live, scale, real), others
