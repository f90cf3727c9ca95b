"""`linear_cross_entropy`: the output projection and the loss in one, without the logits of all tokens at a time."""

from typing import Any, Literal, Unpack, overload

from jax import Array, lax
from jax.typing import ArrayLike

from jaxce._api.results import LossKeywords, LossStats, Reduction, Strategy
from jaxce._arguments.arrays import as_array, as_optional_array
from jaxce._arguments.options import ProjectionOptions, loss_options, projection_options
from jaxce._arguments.shapes import matmul
from jaxce._calls.of_projections import loss_of_projection
from jaxce._mesh.layout import Layout, for_projection, mesh_of
from jaxce._mesh.sharding import Sharding
from jaxce._platform import platform_of


class ProjectionKeywords(LossKeywords, total=False):
    """The keywords of `linear_cross_entropy` besides `return_stats`."""

    bias: ArrayLike | None
    transpose_kernel: bool
    strategy: Strategy
    chunk_size: int | None
    precision: lax.PrecisionLike


@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[ProjectionKeywords],
) -> Array: ...


@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    return_stats: Literal[True],
    **options: Unpack[ProjectionKeywords],
) -> tuple[Array, LossStats]: ...


def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    transpose_kernel: bool = False,
    num_classes: int | None = None,
    strategy: Strategy = "auto",
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    sharding: Sharding | None = None,
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
      strategy: "tokens" is a loop over tokens with three matmuls: the gradients are made in the forward pass and held
        in float32. "classes" is a loop over classes with four matmuls, each of which finishes a part of a gradient: it
        takes the least memory. "auto" picks by the platform of the arrays or of their mesh, else by the one that JAX
        runs on. On a TPU it is "classes". On a GPU it is "tokens" where N tokens are many for D features, 16·D at most
        N times the bytes of an entry of `hidden`; on a CPU where the kernel is small, D·C at most 2²¹: there it is
        faster, and its float32 gradients are small beside the logits. Else, and for `reduction="none"`, it is
        "classes"; on a CPU with float32 that keeps the logits of D tokens where the kernel's gradient will be, and has
        3 matmuls for up to D tokens, 4 - D/N for more. Under `jax.set_mesh` with automatic axes it is "tokens", in
        chunks of tokens from all devices: there, `sharding` makes it faster and leaner.
      chunk_size: how many tokens ("tokens") or classes ("classes") are worked on at a time; by default as many as suit
        the platform and take little memory beside the gradients. It need not divide anything.
      precision: of the matmuls, as for `jax.lax.dot_general`.
      weight: weight of each class, shape (num_classes,).
      sample_weight: weight of each token, of the labels' batch shape.
      ignore_index: a token with this label is left out; any integer.
      where: False leaves a token out; bool, broadcastable to the batch shape.
      label_smoothing: the share, from 0 to 1, of the target that is spread over all classes.
      z_loss: factor of the squared log Z.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first.
      temperature: divides the logits, after the soft cap; as in `cross_entropy`.
      reduction: "none", "sum", or "mean", which divides by the total weight of the tokens left in.
      return_stats: also return `LossStats`.
      sharding: `OnMesh` of hidden states and kernel on a mesh, or `InShardMap`; by default, as types and arrays tell.

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
    labels, options = loss_options(
        labels,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        where=where,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        temperature=temperature,
        reduction=reduction,
        return_stats=return_stats,
    )
    arrays = projected_arrays(hidden=hidden, kernel=kernel, bias=bias)
    projection = projection_options(
        transpose_kernel=transpose_kernel,
        num_classes=num_classes,
        chunk_size=chunk_size,
        strategy=strategy,
        precision=precision,
        platform=platform_of(arrays, mesh_of(sharding)),
    )
    layout = layout_of(arrays, labels, projection, sharding)
    return loss_of_projection(arrays, labels, options, projection=projection, layout=layout)


def projected_arrays(**arrays: ArrayLike | None) -> dict[str, Any]:
    """The arrays of a head as `jax.jit` takes them; a bias may be missing."""
    return {
        name: as_optional_array(name, array) if name.endswith("bias") else as_array(name, array)  # type: ignore[arg-type]
        for name, array in arrays.items()
    }


def layout_of(
    arrays: dict[str, Any], labels: Array | None, projection: ProjectionOptions, sharding: Sharding | None
) -> Layout:
    """How they lie; shapes that don't fit each other are an error of their own."""
    matmul(arrays["hidden"], arrays["kernel"], projection.transposed[0], labels=labels)
    return for_projection(
        sharding,
        arrays["hidden"],
        arrays["kernel"],
        labels,
        transposed=projection.transposed,
        strategy=projection.strategy,
        teacher_kernel=arrays.get("teacher_kernel"),
    )
