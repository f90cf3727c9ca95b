"""Numbers of two distributions over the classes of each token, by a loop over classes; logits of neither are stored.

With logits x of one distribution p and u of another q, both at the temperature, the divergence is

    KL(p, q) = E - log Z_x + log Z_u,    E = Σ_c p_c (x_c - u_c)

so that a loop needs two maxima and three sums of each token. The student is u in KL(teacher, student), and x in the
reverse. Where only the teacher's k likeliest classes are known, the divergence is made of the student's logits of those
and of the log of the sum of the others' exponentials.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._loops.over_classes import chunk_size, put, to_be_written
from jaxce._loops.shared import (
    Config,
    Inputs,
    Projection,
    Wanted,
    matmul_dtype,
    scan_chunks,
    take_slab,
    wanted_gradients,
    without_left_out,
    zeros,
)
from jaxce._softmax import cap_logits, compute_dtype, finite, keep, primal_values


class Model(NamedTuple):
    """A distribution over the classes of each token: what its logits are made of, and how."""

    config: Config
    temperature: float

    def logits(self, inputs: Inputs, start: Array | int, size: int) -> Array:
        """(N, size) logits at the temperature, zeros for tokens left out."""
        return self.at_temperature(self.product(take_slab(self.config, inputs, start, size)), inputs.softcap)

    def product(self, slab: Inputs) -> Array:
        logits = Projection(self.config).logits(slab)
        return logits if slab.live is None else jnp.where(slab.live[:, None], logits, 0)

    def at_temperature(self, logits: Array, softcap: Array | None) -> Array:
        return cap_logits(logits, softcap) / self.temperature


class Sum(NamedTuple):
    """Of exponentials of some of the classes, relative to the largest logit, and of these times something else."""

    maximum: Array
    exp: Array
    times: Array

    def add(self, x: Array, values: Array | float = 0.0) -> "Sum":
        """With more classes."""
        maximum = jnp.maximum(self.maximum, lax.stop_gradient(x.max(1)))
        m = finite(maximum)
        before = jnp.where(self.maximum == -jnp.inf, 0, jnp.exp(self.maximum - m))
        exp = jnp.exp(x - m[:, None])
        times = jnp.where(exp == 0, 0, exp * values).sum(1)
        return Sum(maximum, before * self.exp + exp.sum(1), before * self.times + times)

    @property
    def log(self) -> Array:
        return finite(self.maximum) + jnp.log(self.exp)


def nothing(inputs: Inputs) -> Sum:
    """Of no classes."""
    dtype = compute_dtype(matmul_dtype(inputs.hidden, inputs.kernel))
    zero = jnp.zeros_like(inputs.hidden[:, 0], dtype=dtype)
    return Sum(zero - jnp.inf, zero, zero)


def over_slabs(config: Config, inputs: Inputs, step: Callable[..., Any], carry: Any) -> Any:
    def each(carry: Any, start: Array | int, size: int) -> tuple[Any, None]:
        return step(carry, start, size), None

    return scan_chunks(each, carry, config.columns, chunk_size(config, inputs))[0]


class Pair(NamedTuple):
    """Scalars of each token."""

    log_z_x: Array
    log_z_u: Array
    expected: Array  # E


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def pair(student: Model, teacher: Model, reverse: bool, of_student: Inputs, of_teacher: Inputs) -> Pair:
    """The numbers of the two distributions; no gradient for the teacher."""
    return pair_numbers(student, teacher, reverse, of_student, of_teacher)


def pair_numbers(student: Model, teacher: Model, reverse: bool, of_student: Inputs, of_teacher: Inputs) -> Pair:
    def step(sums: tuple[Sum, Sum], start: Array | int, size: int) -> tuple[Sum, Sum]:
        x, u = x_and_u(student, teacher, reverse, of_student, of_teacher, start, size)
        of_x, of_u = sums
        return of_x.add(x, x - u), of_u.add(u)

    of_x, of_u = over_slabs(student.config, of_student, step, (nothing(of_student), nothing(of_student)))
    return Pair(of_x.log, of_u.log, of_x.times / of_x.exp)


def x_and_u(
    student: Model,
    teacher: Model,
    reverse: bool,
    of_student: Inputs,
    of_teacher: Inputs,
    start: Array | int,
    size: int,
) -> tuple[Array, Array]:
    ours = student.logits(of_student, start, size)
    theirs = teacher.logits(of_teacher, start, size).astype(ours.dtype)
    return (ours, theirs) if reverse else (theirs, ours)


def _pair_fwd(student: Model, teacher: Model, reverse: bool, of_student: Any, of_teacher: Any) -> tuple[Any, Any]:
    wanted = wanted_gradients(of_student)
    of_student, of_teacher = primal_values((of_student, of_teacher))
    numbers = pair_numbers(student, teacher, reverse, of_student, of_teacher)
    return numbers, (of_student, of_teacher, numbers, wanted)


def _pair_bwd(student: Model, teacher: Model, reverse: bool, residuals: Any, g: Any) -> tuple[Inputs, None]:
    of_student, of_teacher, numbers, wanted = residuals
    log_z_x, log_z_u, expected = (number[:, None] for number in numbers)
    g_x, g_u, g_expected = (instantiate(one, like)[:, None] for one, like in zip(g, numbers, strict=True))

    def gradient(ours: Array, start: Array | int, size: int) -> Array:
        theirs = teacher.logits(of_teacher, start, size).astype(ours.dtype)
        x, u = (ours, theirs) if reverse else (theirs, ours)
        p, q = jnp.exp(x - log_z_x), jnp.exp(u - log_z_u)
        if not reverse:
            return g_u * q - g_expected * p
        return g_x * p + g_expected * jnp.where(p == 0, 0, p * (1 + x - u - expected))

    return backward(student, wanted, of_student, gradient), None


pair.defvjp(_pair_fwd, _pair_bwd, symbolic_zeros=True)


class TopAndRest(NamedTuple):
    top: Array  # (N, k) logits of the classes asked for
    log_rest: Array  # (N,) the log of the sum of the other classes' exponentials


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def top_and_rest(student: Model, of_student: Inputs, indices: Array) -> TopAndRest:
    """Of (N, k) classes; at the temperature."""
    return top_and_rest_numbers(student, of_student, indices)


def top_and_rest_numbers(student: Model, of_student: Inputs, indices: Array) -> TopAndRest:
    def step(carry: tuple[Array, Sum], start: Array | int, size: int) -> tuple[Array, Sum]:
        top, rest = carry
        x = student.logits(of_student, start, size)
        here, place = inside(indices, start, size)
        top = jnp.where(here, jnp.take_along_axis(x, jnp.clip(place, 0, size - 1), 1), top)
        return top, rest.add(without(x, place, -jnp.inf))

    rest = nothing(of_student)
    top = jnp.full_like(indices, -jnp.inf, dtype=rest.exp.dtype)
    top, rest = over_slabs(student.config, of_student, step, (top, rest))
    return TopAndRest(top, rest.log)


def inside(indices: Array, start: Array | int, size: int) -> tuple[Array, Array]:
    """Which of the classes a slab has, and their columns in it; beyond it for the others."""
    place = indices - start
    here = (place >= 0) & (place < size)
    return here, jnp.where(here, place, size)


def without(x: Array, place: Array, value: Array | float) -> Array:
    """x with that value in these columns."""
    rows = jnp.arange(x.shape[0])[:, None]
    return x.at[rows, place].set(value, mode="drop")


def _top_and_rest_fwd(student: Model, of_student: Any, indices: Any) -> tuple[Any, Any]:
    wanted = wanted_gradients(of_student)
    of_student, indices = primal_values((of_student, indices))
    found = top_and_rest_numbers(student, of_student, indices)
    return found, (of_student, indices, found, wanted)


def _top_and_rest_bwd(student: Model, residuals: Any, g: Any) -> tuple[Inputs, None]:
    of_student, indices, found, wanted = residuals
    g_top, g_rest = (instantiate(one, like) for one, like in zip(g, found, strict=True))

    def gradient(x: Array, start: Array | int, size: int) -> Array:
        _, place = inside(indices, start, size)
        log_rest = found.log_rest[:, None]
        of_rest = jnp.where(log_rest == -jnp.inf, 0, g_rest[:, None] * jnp.exp(x - finite(log_rest)))
        return without(of_rest, place, g_top)

    return backward(student, wanted, of_student, gradient), None


top_and_rest.defvjp(_top_and_rest_fwd, _top_and_rest_bwd, symbolic_zeros=True)


def instantiate(g: Any, like: Array) -> Array:
    return g if isinstance(g, jax.Array) else jnp.zeros_like(like)


def backward(
    model: Model, wanted: Wanted, inputs: Inputs, gradient: Callable[[Array, Array | int, int], Array]
) -> Inputs:
    """The gradients of what a model's logits are made of, from those of a slab of its logits at the temperature."""
    config, project = model.config, Projection(model.config)
    dtype = matmul_dtype(inputs.hidden, inputs.kernel)
    clean = without_left_out(inputs)

    def step(sums: Any, start: Array | int, size: int) -> Any:
        slab = take_slab(config, clean, start, size)
        x, pull = jax.vjp(model.at_temperature, model.product(slab), slab.softcap)
        dlogits, dsoftcap = pull(keep(None if slab.live is None else slab.live[:, None], gradient(x, start, size)))
        narrow = lax.optimization_barrier(dlogits.astype(dtype))
        place = (start, 0) if config.transpose_kernel else (0, start)
        return sums._replace(
            hidden=None if sums.hidden is None else sums.hidden + project.hidden_gradient(narrow, slab),
            kernel=put(sums.kernel, project.kernel_gradient(slab.hidden, narrow) if wanted.kernel else None, place),
            bias=put(sums.bias, dlogits.sum(0), (start,)),
            softcap=None if sums.softcap is None else sums.softcap + dsoftcap,
        )

    accumulated = compute_dtype(dtype)
    gradients: Any = inputs
    sums = gradients._replace(
        hidden=zeros(inputs.hidden, wanted.hidden, accumulated),
        kernel=to_be_written(config, inputs.kernel, wanted.kernel),
        bias=zeros(inputs.bias, wanted.bias),
        softcap=zeros(inputs.softcap, wanted.softcap, accumulated),
        targets=None,
        live=None,
    )
    found = over_slabs(config, inputs, step, sums)
    rounded: Any = (None if g is None or x is None else g.astype(x.dtype) for g, x in zip(found, inputs, strict=True))
    return Inputs(*rounded)
