"""`linear_cross_entropy`: the output projection and the loss in one, without the logits of all tokens at a time."""

import math
from functools import partial
from typing import Any, Literal, TypeAlias, cast, overload

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, auto_axes
from jax.typing import ArrayLike

from jaxce import _checks, _forms
from jaxce._checks import LossOptions, ProjectionOptions
from jaxce._compose import Options, divide, example_losses, example_weights, weight_sum
from jaxce._loops import Config, Inputs, Loop, choose_loop, linear_stats, matmul_dtype, summed_loss
from jaxce._losses import LossStats, Reduction
from jaxce._mesh import explicit_mesh, vary_alike
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
        3 matmuls for up to D tokens, 4 - D/N for more.
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


@partial(jax.jit, static_argnames=("projection",))
def _linear_cross_entropy(
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    labels: Array,
    options: LossOptions,
    *,
    projection: ProjectionOptions,
) -> Array | tuple[Array, LossStats]:
    num_classes = _checks.projection(hidden, kernel, bias, projection)
    batch = hidden.shape[:-1]
    targets, live = _checks.examples(
        "logits", (*batch, num_classes), len(batch), labels, options, source=f"hidden {hidden.shape}"
    )
    class_weight = options.class_weight_within(targets)
    inputs = Inputs(hidden, kernel, bias, targets, class_weight, options.logit_softcap, live)
    config = configure(projection, num_classes, inputs, options)
    compute = partial(_loss_and_stats, config, options)
    mesh = explicit_mesh(inputs)
    if mesh is not None:
        # Inside of it, XLA places the arrays.
        of_batch: Any = NamedSharding(mesh, PartitionSpec(*jax.typeof(hidden).sharding.spec[: len(batch)]))
        scalar: Any = NamedSharding(mesh, PartitionSpec())
        out = of_batch if options.reduction == "none" else scalar
        stats = LossStats(of_batch, of_batch, of_batch, of_batch, scalar)
        compute = auto_axes(compute, out_sharding=(out, stats) if options.return_stats else out)
    return compute(inputs, options.sample_weight, options.weight, Options(options.label_smoothing, options.z_loss))


def configure(projection: ProjectionOptions, num_classes: int, inputs: Inputs, options: LossOptions) -> Config:
    """What is known of the loop when the function is traced."""
    auto = projection.strategy == "auto"
    return Config(
        platform=projection.platform,
        loop=choose_loop(projection.platform, inputs, options.reduction) if auto else cast(Loop, projection.strategy),
        # Over tokens, a TPU takes more memory and seldom less time, also with a matmul less.
        either_loop=auto and projection.platform != "tpu",
        # With more devices than one, the tokens could lie on others than the gradient of the kernel.
        keeps_logits=auto and projection.platform == "cpu" and jax.device_count() == 1,
        chunk_size=projection.chunk_size,
        num_classes=num_classes,
        transpose_kernel=projection.transpose_kernel,
        precision=projection.precision,
        smooth=options.label_smoothing is not None,
        form=_forms.chosen(),
    )


def _loss_and_stats(
    config: Config,
    loss_options: LossOptions,
    inputs: Inputs,
    sample_weight: Array | None,
    weight: Array | None,
    options: Options,
) -> Array | tuple[Array, LossStats]:
    """The loss of arguments that have been checked, and its stats if they are wanted."""
    inputs, sample_weight, weight, options = vary_alike((inputs, sample_weight, weight, options))
    # The batch axes become one axis of tokens.
    batch = inputs.hidden.shape[:-1]
    tokens = math.prod(batch)
    hidden, targets, live, sample_weight = jax.tree.map(
        lambda array: array.reshape(tokens, *array.shape[len(batch) :]),
        (inputs.hidden, inputs.targets, inputs.live, sample_weight),
    )
    inputs = inputs._replace(hidden=hidden, targets=targets, live=live)
    dtype = compute_dtype(matmul_dtype(hidden, inputs.kernel))
    weights = example_weights(targets, live, sample_weight, weight, dtype)
    total_weight = weight_sum(weights, live, jax.ShapeDtypeStruct((tokens,), dtype))
    if loss_options.reduction == "none":
        stats, predicted = linear_stats(config, inputs)
        loss = example_losses(stats, weights, config.num_classes, options).reshape(batch)
    else:
        loss, (stats, predicted) = summed_loss(config, inputs, weights, options)
        if loss_options.reduction == "mean":
            loss = divide(loss, total_weight)
    if not loss_options.return_stats:
        return loss
    if inputs.class_weight is not None and not is_index(targets):
        stats, _ = linear_stats(config._replace(smooth=False), inputs._replace(class_weight=None))
    per_token = (stats.nll, stats.log_z, stats.entropy, predicted)
    nll, log_z, entropy, predicted = (array.reshape(batch) for array in per_token)
    return loss, lax.stop_gradient(LossStats(nll, log_z, entropy, predicted, total_weight))
