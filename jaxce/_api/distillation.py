"""`linear_distillation_loss`: the divergence of a student's distribution from a teacher's, without logits of either."""

import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxce._api.projections import layout_of, projected_arrays
from jaxce._api.results import Reduction, Strategy
from jaxce._arguments.arrays import as_array
from jaxce._arguments.options import SCALARS, as_scalar, flag, loss_options, projection_options
from jaxce._calls.of_projections import loss_of_two
from jaxce._mesh.layout import mesh_of
from jaxce._mesh.sharding import Sharding
from jaxce._platform import platform_of


def linear_distillation_loss(
    hidden: ArrayLike,
    kernel: ArrayLike,
    teacher_hidden: ArrayLike | None = None,
    teacher_kernel: ArrayLike | None = None,
    *,
    teacher_top_k: tuple[ArrayLike, ArrayLike] | None = None,
    reverse: bool = False,
    temperature: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    transpose_kernel: bool = False,
    transpose_teacher_kernel: bool = False,
    num_classes: int | None = None,
    strategy: Strategy = "auto",
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    logit_softcap: ArrayLike | None = None,
    teacher_logit_softcap: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    sharding: Sharding | None = None,
) -> Array:
    r"""Divergence of a student's distribution over the classes from a teacher's, without storing logits of either.

    .. math:: \ell_i = \tau^2 \sum_c p_{i,c} \log \frac{p_{i,c}}{q_{i,c}}, \qquad p_i = \mathrm{softmax}(t_i / \tau),
              \quad q_i = \mathrm{softmax}(x_i / \tau)

    with the teacher's logits t and the student's x; with `reverse`, p is the student's and q the teacher's. After
    Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015, arXiv:1503.02531, whose factor of the
    temperature squared keeps the size of the gradients, and, for the reverse, Gu et al., *MiniLLM*, 2023,
    arXiv:2306.08543. By the loops of `linear_cross_entropy`: over classes with six matmuls, the logits of both
    twice and two for the student's gradients; over tokens with four. The teacher has no gradient.

    Args:
      hidden: the student's features of the tokens, floats of shape (..., D).
      kernel: the student's output projection, floats of shape (D, C); (C, D) with `transpose_kernel`.
      teacher_hidden: the teacher's features, floats of shape (..., E) with the batch shape of `hidden`.
      teacher_kernel: the teacher's output projection, floats of shape (E, C); (C, E) with `transpose_teacher_kernel`.
      teacher_top_k: instead of those two, the teacher's likeliest classes at the temperature: a pair of class indices
        and of probabilities, of shape (..., k) each. What they lack to 1 is the probability of all other classes
        together, which are one outcome then. The indices of a token are different from each other; one that is no
        class makes the token's loss NaN.
      reverse: the divergence of the teacher from the student, which seeks its modes.
      temperature: divides the logits of both, after the soft cap; a positive number, or an array of floats, a scalar or
        of the batch shape, differentiable. NaN for a token whose temperature in an array isn't positive.
      bias: added to the student's logits; shape (C,).
      teacher_bias: added to the teacher's logits; shape (C,).
      transpose_kernel: the student's kernel is (C, D).
      transpose_teacher_kernel: the teacher's kernel is (C, E).
      num_classes: how many columns of padded kernels are real, all by default.
      strategy: the loop, "tokens", "classes" or "auto", as in `linear_cross_entropy`.
      chunk_size: how many tokens ("tokens") or classes ("classes") are worked on at a time.
      precision: of the matmuls, as for `jax.lax.dot_general`.
      logit_softcap: replaces the student's logits by `cap * tanh(logits / cap)` first.
      teacher_logit_softcap: the same for the teacher.
      sample_weight: weight of each token, of the batch shape.
      where: False leaves a token out: loss 0, gradient 0; bool, broadcastable to the batch shape.
      reduction: "none", "sum", or "mean", which divides by the total weight of the tokens left in.
      sharding: `OnMesh` of hidden states and both kernels on a mesh, or `InShardMap`; by default, as types and arrays
        tell. A teacher's hidden states lie as the student's do, and its classes as the student's.

    Returns:
      The divergence in nats, times the temperature squared: a scalar, or of the batch shape for "none"; float32, or
      float64 for float64 inputs.

    Raises:
      TypeError: an argument has the wrong type or dtype.
      ValueError: an argument has a wrong shape or value.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> hidden, student, teacher = jnp.eye(2), jnp.array([[0.0, 0.0]] * 2), jnp.array([[0.0, 1.0]] * 2)
      >>> print(f"{jaxce.linear_distillation_loss(hidden, student, hidden, teacher):.4f}")
      0.1109
    """
    teachers = {"teacher_hidden": teacher_hidden, "teacher_kernel": teacher_kernel, "teacher_top_k": teacher_top_k}
    given = [name for name, value in teachers.items() if value is not None]
    if given not in (["teacher_hidden", "teacher_kernel"], ["teacher_top_k"]):
        raise ValueError(
            "the teacher must be given as teacher_hidden and teacher_kernel, or else as teacher_top_k; got "
            f"{', '.join(given) or 'none of them'}"
        )
    if teacher_top_k is not None and (teacher_bias is not None or teacher_logit_softcap is not None):
        raise ValueError(
            "teacher_top_k holds probabilities; got it with teacher_bias or teacher_logit_softcap, which are for logits"
        )
    _, options = loss_options(
        np.zeros(0, np.int32),  # there are no labels
        temperature=temperature,
        logit_softcap=logit_softcap,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
    )
    teacher_softcap = as_scalar("teacher_logit_softcap", teacher_logit_softcap, SCALARS["logit_softcap"])
    arrays = projected_arrays(hidden=hidden, kernel=kernel, bias=bias)
    projection = projection_options(
        transpose_kernel=transpose_kernel,
        transpose_teacher_kernel=transpose_teacher_kernel,
        num_classes=num_classes,
        chunk_size=chunk_size,
        strategy=strategy,
        precision=precision,
        platform=platform_of(arrays, mesh_of(sharding)),
    )
    top_k = None
    if teacher_top_k is None:
        arrays |= projected_arrays(
            teacher_hidden=teacher_hidden, teacher_kernel=teacher_kernel, teacher_bias=teacher_bias
        )
    else:
        indices, probabilities = teacher_top_k
        top_k = as_array("teacher_top_k[0]", indices), as_array("teacher_top_k[1]", probabilities)
    return loss_of_two(
        arrays,
        options,
        teacher_softcap,
        top_k,
        projection=projection,
        layout=layout_of(arrays, None, projection, sharding),
        reverse=flag("reverse", reverse),
    )
