"""`token_log_probs` and `linear_token_log_probs`: what post-training needs of each token."""

from jax import lax
from jax.typing import ArrayLike

from jaxce._api.projections import layout_of, projected_arrays
from jaxce._api.results import Strategy, TokenStats
from jaxce._arguments.arrays import as_array
from jaxce._arguments.labels import class_indices
from jaxce._arguments.options import integer, loss_options, optional_integer, projection_options
from jaxce._arguments.shapes import class_axis
from jaxce._calls.of_projections import loss_of_projection
from jaxce._calls.of_scores import loss_of_logits
from jaxce._mesh.layout import for_logits, mesh_of
from jaxce._mesh.sharding import Sharding
from jaxce._platform import platform_of


def token_log_probs(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    num_classes: int | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    sharding: Sharding | None = None,
) -> TokenStats:
    r"""Log-probability of each label, log Z and entropy of each token's distribution.

    .. math:: \log p_i = x_{i,y_i} / \tau_i - \log Z_i, \qquad \log Z_i = \log \sum_c e^{x_{i,c} / \tau_i}, \qquad
              H_i = -\sum_c p_{i,c} \log p_{i,c}

    Equivalent to `jax.nn.log_softmax(logits / temperature)` at the labels, without storing it, and differentiable in
    all three numbers at once. What PPO (Schulman et al., 2017, arXiv:1707.06347), DPO (Rafailov et al., 2023,
    arXiv:2305.18290) and GRPO (Shao et al., 2024, arXiv:2402.03300) need.

    Args:
      logits: unnormalized log-probabilities; a float array of any shape with the class axis at `axis`.
      labels: class indices, integers of the shape of `logits` without the class axis.
      axis: the class axis.
      num_classes: how many of the classes are real, all by default. Those behind are padding.
      temperature: divides the logits, after the soft cap; a positive number, or an array of floats, a scalar or of the
        batch shape, differentiable. NaN for a token whose temperature in an array isn't positive.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first.
      ignore_index: a token with this label is left out: 0 in all three numbers, gradient 0. Any integer.
      where: False leaves a token out in the same way; bool, broadcastable to the batch shape.
      sharding: `OnMesh` of logits on a mesh, or `InShardMap`; by default, as types and arrays tell.

    Returns:
      `TokenStats(log_prob, log_z, entropy)` in nats, of the batch shape, float32, or float64 for float64 logits. NaN
      for the log-probability of a label that is out of range.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: an argument has a wrong shape or value.
      JaxRuntimeError: under `jax.experimental.checkify`, a label is out of range.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> stats = jaxce.token_log_probs(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([2]), temperature=2.0)
      >>> print(f"{stats.log_prob[0]:.4f} {stats.log_z[0]:.4f} {stats.entropy[0]:.4f}")
      -0.6803 2.1803 1.0202
    """
    labels, options = loss_options(
        labels, temperature=temperature, logit_softcap=logit_softcap, ignore_index=ignore_index, where=where
    )
    logits, labels = as_array("logits", logits), class_indices(labels)
    axis = class_axis("logits", logits, integer("axis", axis), labels)
    return loss_of_logits(
        logits,
        labels,
        options,
        axis=axis,
        num_classes=optional_integer("num_classes", num_classes),
        layout=for_logits(sharding, "logits", logits, labels, axis),
        output="tokens",
    )


def linear_token_log_probs(
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
    temperature: ArrayLike = 1.0,
    logit_softcap: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
    sharding: Sharding | None = None,
) -> TokenStats:
    r"""`token_log_probs` of the logits `hidden @ kernel + bias`, without storing the logits.

    .. math:: \log p_i = x_{i,y_i} / \tau_i - \log Z_i, \qquad x_i = h_i \cdot K + b

    Equivalent to `token_log_probs(hidden @ kernel + bias, labels)` with float32 accumulation, without storing an array
    of tokens by classes: by the loops of `linear_cross_entropy`, with any gradients for each token's numbers.

    Args:
      hidden: features of the tokens, floats of shape (..., D).
      kernel: weights of the output projection, floats of shape (D, C); (C, D) with `transpose_kernel`.
      labels: class indices, integers of the shape of `hidden` without the last axis.
      bias: added to the logits; shape (C,).
      transpose_kernel: the kernel is (C, D), as an embedding table or `torch.nn.Linear.weight`.
      num_classes: how many columns of a padded kernel are real, all by default.
      chunk_size: how many tokens ("tokens") or classes ("classes") are worked on at a time.
      strategy: "tokens" is a loop over tokens, "classes" one over classes; "auto" is "classes" but on a mesh with
        automatic axes. Both make the logits again for the gradient, and have four matmuls in all.
      precision: of the matmuls, as for `jax.lax.dot_general`.
      temperature: divides the logits, after the soft cap; a positive number, or an array of floats, a scalar or of the
        batch shape, differentiable. NaN for a token whose temperature in an array isn't positive.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first.
      ignore_index: a token with this label is left out: 0 in all three numbers, gradient 0. Any integer.
      where: False leaves a token out in the same way; bool, broadcastable to the batch shape.
      sharding: `OnMesh` of hidden states and kernel on a mesh, or `InShardMap`; by default, as types and arrays tell.

    Returns:
      `TokenStats(log_prob, log_z, entropy)` in nats, of the batch shape, float32, or float64 for float64 inputs. NaN
      for the log-probability of a label that is out of range.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: an argument has a wrong shape or value.
      JaxRuntimeError: under `jax.experimental.checkify`, a label is out of range.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> hidden, kernel = jnp.ones((1, 2)), jnp.array([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]])
      >>> stats = jaxce.linear_token_log_probs(hidden, kernel, jnp.array([2]), temperature=2.0)
      >>> print(f"{stats.log_prob[0]:.4f} {stats.log_z[0]:.4f} {stats.entropy[0]:.4f}")
      -0.6803 2.1803 1.0202
    """
    labels, options = loss_options(
        labels, temperature=temperature, logit_softcap=logit_softcap, ignore_index=ignore_index, where=where
    )
    labels = class_indices(labels)
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
    return loss_of_projection(arrays, labels, options, projection=projection, layout=layout, output="tokens")
