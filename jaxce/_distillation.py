"""`linear_distillation_loss`: the divergence of a student's distribution from a teacher's, without logits of either."""

import math
import numbers
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxce import _checks
from jaxce._compose import ExampleWeights, reduce_losses, times, weight_sum
from jaxce._loops import Config, Inputs
from jaxce._loops.distill import Model, pair, top_and_rest
from jaxce._losses import Reduction
from jaxce._mesh import vary_alike
from jaxce._platform import platform_of
from jaxce._softmax import TEXTBOOK, keep


class Options(NamedTuple):
    """What is known when the loss is traced."""

    reverse: bool
    temperature: float
    transpose_kernel: bool
    transpose_teacher_kernel: bool
    num_classes: int | None
    chunk_size: int | None
    precision: lax.PrecisionLike
    reduction: str
    platform: str


def linear_distillation_loss(
    hidden: ArrayLike,
    kernel: ArrayLike,
    teacher_hidden: ArrayLike | None = None,
    teacher_kernel: ArrayLike | None = None,
    *,
    teacher_top_k: tuple[ArrayLike, ArrayLike] | None = None,
    reverse: bool = False,
    temperature: float = 1.0,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    transpose_kernel: bool = False,
    transpose_teacher_kernel: bool = False,
    num_classes: int | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    logit_softcap: ArrayLike | None = None,
    teacher_logit_softcap: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Divergence of a student's distribution over the classes from a teacher's, without storing logits of either.

    .. math:: \ell_i = \tau^2 \sum_c p_{i,c} \log \frac{p_{i,c}}{q_{i,c}}, \qquad p_i = \mathrm{softmax}(t_i / \tau),
              \quad q_i = \mathrm{softmax}(x_i / \tau)

    with the teacher's logits t and the student's x; with `reverse`, p is the student's and q the teacher's. After
    Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015, arXiv:1503.02531, whose factor of the
    temperature squared keeps the size of the gradients, and, for the reverse, Gu et al., *MiniLLM*, 2023,
    arXiv:2306.08543. By a loop over classes with six matmuls: the logits of both twice, and two for the student's
    gradients. The teacher has none.

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
      temperature: divides the logits of both, after the soft cap; a positive number.
      bias: added to the student's logits; shape (C,).
      teacher_bias: added to the teacher's logits; shape (C,).
      transpose_kernel: the student's kernel is (C, D).
      transpose_teacher_kernel: the teacher's kernel is (C, E).
      num_classes: how many columns of padded kernels are real, all by default.
      chunk_size: how many classes are worked on at a time.
      precision: of the matmuls, as for `jax.lax.dot_general`.
      logit_softcap: replaces the student's logits by `cap * tanh(logits / cap)` first.
      teacher_logit_softcap: the same for the teacher.
      sample_weight: weight of each token, of the batch shape.
      where: False leaves a token out: loss 0, gradient 0; bool, broadcastable to the batch shape.
      reduction: "none", "sum", or "mean", which divides by the total weight of the tokens left in.

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
    if not isinstance(temperature, numbers.Real) or isinstance(temperature, bool) or not temperature > 0:
        raise ValueError(f"temperature must be a positive number; got {temperature!r}")
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
    arrays = {
        "hidden": hidden,
        "kernel": kernel,
        "teacher_hidden": teacher_hidden,
        "teacher_kernel": teacher_kernel,
        "bias": bias,
        "teacher_bias": teacher_bias,
        "sample_weight": sample_weight,
        "where": where,
    }
    caps = {"logit_softcap": logit_softcap, "teacher_logit_softcap": teacher_logit_softcap}
    top_k = None
    if teacher_top_k is not None:
        indices, probabilities = teacher_top_k
        top_k = _checks.as_array("teacher_top_k[0]", indices), _checks.as_array("teacher_top_k[1]", probabilities)
    return _distill(
        {name: _checks.as_optional_array(name, value) for name, value in arrays.items()},
        {
            name: _checks.as_scalar(name, value, off=None, valid=lambda v: v > 0, rule="a positive number, or None")
            for name, value in caps.items()
        },
        top_k,
        options=Options(
            reverse=_checks.flag("reverse", reverse),
            temperature=float(temperature),
            transpose_kernel=_checks.flag("transpose_kernel", transpose_kernel),
            transpose_teacher_kernel=_checks.flag("transpose_teacher_kernel", transpose_teacher_kernel),
            num_classes=None if num_classes is None else _checks.integer("num_classes", num_classes),
            chunk_size=None if chunk_size is None else _checks.integer("chunk_size", chunk_size),
            precision=precision,
            reduction=_checks.choice("reduction", reduction, _checks.REDUCTIONS),
            platform=platform_of((hidden, kernel)),
        ),
    )


@partial(jax.jit, static_argnames=("options",))
def _distill(
    arrays: dict[str, Any], caps: dict[str, Any], top_k: tuple[Array, Array] | None, *, options: Options
) -> Array:
    arrays, caps, top_k = vary_alike((arrays, caps, top_k))
    hidden, kernel = arrays["hidden"], arrays["kernel"]
    columns = _checks.matmul(hidden, kernel, options.transpose_kernel)
    num_classes = _checks.classes("kernel", columns, options.num_classes)
    _checks.check_bias("bias", arrays["bias"], columns)
    _checks.check_chunk_size(options.chunk_size)
    batch = hidden.shape[:-1]
    live = _checks.tokens_left_in(arrays["where"], batch, hidden)
    _checks.check_sample_weight(arrays["sample_weight"], batch)
    student = model("", arrays, caps, live, options, num_classes)
    if top_k is None:
        _checks.teacher(
            arrays["teacher_hidden"], arrays["teacher_kernel"], options.transpose_teacher_kernel, batch, columns
        )
        _checks.check_bias("teacher_bias", arrays["teacher_bias"], columns)
        teacher = model("teacher_", arrays, caps, live, options, num_classes)
        losses = of_two_models(student, teacher, options.reverse)
    else:
        indices = _checks.top_k(*top_k, batch, num_classes, live)
        losses = of_top_k(student, flat(indices, batch), flat(top_k[1], batch), options.reverse)
    live = None if live is None else flat(live, batch)
    losses = keep(live, options.temperature**2 * losses)
    sample = arrays["sample_weight"]
    if sample is not None:
        sample = keep(live, flat(sample, batch).astype(losses.dtype))
    losses = times(sample, losses)
    total_weight = weight_sum(ExampleWeights(sample, sample), live, losses)
    return reduce_losses(losses.reshape(batch), total_weight, options.reduction)


def flat(array: Array, batch: tuple[int, ...]) -> Array:
    """The batch axes become one axis of tokens."""
    return array.reshape(math.prod(batch), *array.shape[len(batch) :])


def model(
    name: str, arrays: dict[str, Any], caps: dict[str, Any], live: Array | None, options: Options, num_classes: int
) -> tuple[Model, Inputs]:
    """The student, or with "teacher_" for a name the teacher."""
    hidden = arrays[f"{name}hidden"]
    batch = hidden.shape[:-1]
    config = Config(
        platform=options.platform,
        loop="classes",
        either_loop=False,
        keeps_logits=False,
        chunk_size=options.chunk_size,
        num_classes=num_classes,
        columns=num_classes,
        transpose_kernel=options.transpose_teacher_kernel if name else options.transpose_kernel,
        precision=options.precision,
        smooth=False,
        form=TEXTBOOK,
    )
    inputs = Inputs(
        hidden=flat(hidden, batch),
        kernel=arrays[f"{name}kernel"],
        bias=arrays[f"{name}bias"],
        targets=jnp.zeros(math.prod(batch), jnp.int32),  # there are no labels
        class_weight=None,
        softcap=caps[f"{name}logit_softcap"],
        live=None if live is None else flat(live, batch),
    )
    return Model(config, options.temperature), inputs


def of_two_models(student: tuple[Model, Inputs], teacher: tuple[Model, Inputs], reverse: bool) -> Array:
    """The divergence over all classes."""
    (ours, of_student), (theirs, of_teacher) = student, teacher
    log_z_x, log_z_u, expected = pair(ours, theirs, reverse, of_student, lax.stop_gradient(of_teacher))
    return expected - log_z_x + log_z_u


def of_top_k(student: tuple[Model, Inputs], indices: Array, p: Array, reverse: bool) -> Array:
    """The divergence over k classes and the rest; NaN where an index is no class."""
    top, log_rest = top_and_rest(*student, indices)
    p = lax.stop_gradient(p).astype(top.dtype)
    rest = 1 - p.sum(1, keepdims=True)
    # What rounding alone may have left is nothing.
    rest = jnp.where(rest > p.shape[1] * jnp.finfo(p.dtype).eps, rest, 0)
    log_p = jnp.log(jnp.concatenate([p, rest], 1))
    logits = jnp.concatenate([jnp.where(indices < 0, jnp.nan, top), log_rest[:, None]], 1)
    log_q = logits - jax.nn.logsumexp(logits, 1, keepdims=True)
    if reverse:
        log_p, log_q = log_q, log_p
    possible = log_p != -jnp.inf
    terms = jnp.exp(log_p) * (jnp.where(possible, log_p, 0) - jnp.where(possible, log_q, 0))
    return jnp.where(possible, terms, 0).sum(1)
