"""`token_log_probs` and `linear_token_log_probs`: what post-training needs of each token."""

from jax import Array, lax
from jax.typing import ArrayLike

from jaxce import _checks
from jaxce._checks import LossOptions
from jaxce._linear import Strategy, _linear_cross_entropy
from jaxce._losses import TokenStats, _cross_entropy
from jaxce._platform import platform_of


def token_log_probs(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    temperature: ArrayLike = 1.0,
    logit_softcap: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
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
      temperature: divides the logits, after the soft cap; a positive number, or an array of floats, a scalar or of the
        batch shape, differentiable. NaN for a token whose temperature in an array isn't positive.
      logit_softcap: replaces the logits by `cap * tanh(logits / cap)` first.
      ignore_index: a token with this label is left out: 0 in all three numbers, gradient 0. Any integer.
      where: False leaves a token out in the same way; bool, broadcastable to the batch shape.

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
    labels, options = token_options(labels, temperature, logit_softcap, ignore_index, where)
    logits = _checks.as_array("logits", logits)
    return _cross_entropy(logits, labels, options, axis=_checks.integer("axis", axis), output="tokens")


def linear_token_log_probs(
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
    temperature: ArrayLike = 1.0,
    logit_softcap: ArrayLike | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
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
    labels, options = token_options(labels, temperature, logit_softcap, ignore_index, where)
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
        output="tokens",
    )


def token_options(
    labels: ArrayLike,
    temperature: ArrayLike,
    logit_softcap: ArrayLike | None,
    ignore_index: int,
    where: ArrayLike | None,
) -> tuple[Array, LossOptions]:
    """The labels and options as `jax.jit` takes them; each token has gradients of its own, as with "none"."""
    labels, options = _checks.loss_options(
        labels,
        weight=None,
        sample_weight=None,
        ignore_index=ignore_index,
        where=where,
        logit_softcap=logit_softcap,
        temperature=temperature,
        reduction="none",
    )
    return _checks.class_indices(labels), options
