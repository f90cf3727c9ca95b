"""The numbers of one example that every loss of labels is made of, and their one hand-written gradient.

With logits x, their maximum m or a number near it, p = softmax x, a target t (one-hot for a class index) and class
weights w:

    log_sum     log Σ_c exp(x_c - m)
    log_z       m + log_sum
    nll         Σ_c t_c (log_z - x_c)   =   Σ_c t_c (m - x_c) + log_sum·Σ_c t_c
    smooth_nll  Σ_c w_c (log_z - x_c)   =   Σ_c w_c (m - x_c) + log_sum·Σ_c w_c
    entropy     log_sum - Σ_c p_c (x_c - m)

`x - m` is taken before anything is summed: `log_z - x_y` would lose three digits at an offset of 1e5.

Every sum is over some of the classes of an example (`partial_sums`); `merge` puts disjoint parts together, and
`read_stats` reads the numbers off. So a whole row, a loop over slabs of a kernel and a row that lies on several
devices are the same code. A class whose logit is -inf can't happen: it has no share of the smoothing, and no gradient.

An example has its classes on axis 0. Axes behind it hold more examples, where the class axis of the logits isn't the
last: to move it would be a copy of them. Numbers are then of the shape of those axes, and `beside` the classes.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

# An integer, the index of the class; or the (C,) probabilities of the classes.
Target: TypeAlias = Array

# An array with an entry for each example; None where it wasn't asked for.
Number: TypeAlias = Any

Tree = TypeVar("Tree")


class Stats(NamedTuple):
    """Scalars of one example; `smooth_nll` is 0 where it wasn't asked for. As cotangents of them, None is zero."""

    nll: Number = None
    smooth_nll: Number = None
    log_z: Number = None
    entropy: Number = None
    predicted: Number = None  # the class of the largest logit, where it was asked for; not differentiable


class Shares(NamedTuple):
    """Of a distribution u over the classes, which needn't sum to 1: the target, or what smoothing spreads over."""

    gap: Array  # u·(m - x)
    mass: Array  # u


class Terms(NamedTuple):
    """What is summed over the classes, relative to m; None where it isn't asked for."""

    exp: Array  # exp(x - m)
    exp_x: Array  # exp(x - m)·(x - m)
    target: Shares | None
    smooth: Shares | None


class Sums(NamedTuple):
    """The largest logit of some of the classes, and the sums over them."""

    maximum: Array
    reference: Array  # m, the maximum or another number that isn't far below it
    total: Terms
    predicted: Array | None = None  # the class of the largest logit


class Normalizer(NamedTuple):
    """What the gradient needs of the whole row, besides the logits themselves."""

    reference: Array  # m
    exp: Array
    entropy: Array
    target_mass: Array
    smooth_mass: Array


class Gradients(NamedTuple):
    """Of some of the classes, in the dtype of computation; None for what isn't there or isn't differentiated."""

    logits: Array
    target: Array | None
    weight: Array | None
    softcap: Array | None


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for 16-bit inputs, else the input's own."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def is_index(target: Target) -> bool:
    return jnp.issubdtype(target.dtype, jnp.integer)


def keep(counts_in: Array | None, tree: Tree) -> Tree:
    """`tree` where the example counts, else zeros: selected, not multiplied, since NaN·0 is NaN."""
    if counts_in is None:
        return tree
    return jax.tree.map(lambda leaf: jnp.where(counts_in, leaf, 0), tree)


def cap_logits(logits: Array, softcap: Array | None) -> Array:
    """cap·tanh(x / cap), in the dtype of computation. An impossible class stays impossible."""
    x = logits.astype(compute_dtype(logits.dtype))
    if softcap is None:
        return x
    cap = softcap.astype(x.dtype)
    possible = x != -jnp.inf
    return jnp.where(possible, cap * jnp.tanh(jnp.where(possible, x, 0) / cap), -jnp.inf)


def final_logits(logits: Array, softcap: Array | None, inverse_temperature: Array | None) -> Array:
    """cap·tanh(x / cap) / temperature, in the dtype of computation."""
    x = cap_logits(logits, softcap)
    if inverse_temperature is None:
        return x
    # An impossible class stays impossible, and has no share in the gradient of the temperature.
    possible = x != -jnp.inf
    return jnp.where(possible, jnp.where(possible, x, 0) * inverse_temperature.astype(x.dtype), -jnp.inf)


def final_logits_and_pull(
    logits: Array, softcap: Array | None, inverse_temperature: Array | None, counts_in: Array | None
) -> tuple[Array, Callable[[Array], Any]]:
    """`final_logits`, and its gradients, which NaN of what is left out must not reach."""
    logits = keep(None if counts_in is None else counts_in[None], logits)
    return jax.vjp(final_logits, logits, softcap, keep(counts_in, inverse_temperature))


def beside(numbers: Tree) -> Tree:
    """The numbers of an example, so that they broadcast against its classes."""
    return jax.tree.map(lambda number: number[None], numbers)


def finite(maximum: Array) -> Array:
    """What logits are taken relative to: their maximum, or 0 where every class is impossible."""
    return jnp.where(maximum == -jnp.inf, 0, maximum)


def class_weight(weight: Array | None, x: Array) -> Array:
    return jnp.ones((), x.dtype) if weight is None else weight.astype(x.dtype)


def target_share(target: Target, weight: Array | None, x: Array, first_class: Array | int) -> Array:
    """t_c: 1 for the label's class and 0 for the others, or the class probabilities times the class weights."""
    if is_index(target):
        return (lax.broadcasted_iota(jnp.int32, x.shape, 0) == beside(target - first_class)).astype(x.dtype)
    return target.astype(x.dtype) * class_weight(weight, x)


def smooth_share(weight: Array | None, x: Array) -> Array:
    """w_c: the class weights of the classes that can happen."""
    return jnp.where(x == -jnp.inf, 0, class_weight(weight, x))


def shares(u: Array, m: Array, x: Array) -> Shares:
    return Shares(gap=jnp.where(u == 0, 0, u * (m - x)), mass=u)


def terms(
    x: Array, m: Array, target: Target | None, weight: Array | None, *, smooth: bool, first_class: Array | int
) -> Terms:
    """What is summed over the classes."""
    exp = jnp.exp(x - m)
    return Terms(
        exp=exp,
        exp_x=jnp.where(exp == 0, 0, exp * (x - m)),
        target=None if target is None else shares(target_share(target, weight, x, first_class), m, x),
        smooth=shares(smooth_share(weight, x), m, x) if smooth else None,
    )


def partial_sums(
    logits: Array,
    target: Target | None,
    weight: Array | None,
    softcap: Array | None,
    reference: Array | None = None,
    *,
    smooth: bool,
    first_class: Array | int = 0,
) -> Sums:
    """The sums over the classes whose logits, target and weight these are; `first_class` is the index of the first.

    They are relative to `reference`, or else to the largest logit. The numbers of the example are the same for any.
    """
    x = cap_logits(logits, softcap)
    maximum = lax.stop_gradient(x.max(0))
    m = finite(maximum) if reference is None else reference
    rows = terms(x, beside(m), target, weight, smooth=smooth, first_class=first_class)
    return Sums(maximum, m, jax.tree.map(lambda row: row.sum(0), rows))


class Merging(NamedTuple):
    """How numbers of disjoint parts of the classes become one: parts along an axis, or on the devices of a mesh."""

    largest: Callable[[Array], Array]
    total: Callable[[Array], Array]
    first_largest: Callable[[Array, Array], Array]  # of each part's maximum and its class; NaN above all, as in argmax


def first_of_stacked(maximum: Array, index: Array) -> Array:
    def ahead(before: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[Array, Array]:
        (most, first), (other, later) = before, part
        larger = (other > most) | (jnp.isnan(other) & ~jnp.isnan(most))
        return jnp.where(larger, other, most), jnp.where(larger, later, first)

    # Not by an argmax over the parts, which a TPU would take its time for.
    return reduce(ahead, zip(maximum, index, strict=True))[1]


STACKED = Merging(lambda parts: parts.max(0), lambda parts: parts.sum(0), first_of_stacked)


def merge(parts: Sums, over: Merging = STACKED) -> Sums:
    """The sums over all classes, from those over disjoint parts of them."""
    maximum = over.largest(parts.maximum)
    rise = finite(maximum) - parts.reference
    factor = jnp.where(parts.maximum == -jnp.inf, 0, jnp.exp(-rise))

    def merge_shares(part: Shares | None) -> Shares | None:
        if part is None:
            return None
        return Shares(gap=over.total(part.gap + part.mass * rise), mass=over.total(part.mass))

    exp, exp_x, target, smooth = parts.total
    merged = Terms(
        exp=over.total(factor * exp),
        exp_x=over.total(factor * (exp_x - jnp.where(factor == 0, 0, rise) * exp)),
        target=merge_shares(target),
        smooth=merge_shares(smooth),
    )
    predicted = None if parts.predicted is None else over.first_largest(parts.maximum, parts.predicted)
    return Sums(maximum, finite(maximum), merged, predicted)


def read_stats(sums: Sums, target: Target) -> tuple[Stats, Normalizer]:
    """The numbers of the example, and what their gradient needs; a negative index is a bad label and gives NaN."""
    m, total = sums.reference, sums.total
    log_sum = jnp.where(sums.maximum == -jnp.inf, jnp.nan, jnp.log(total.exp))
    entropy = log_sum - total.exp_x / total.exp
    nothing = Shares(jnp.zeros_like(m), jnp.zeros_like(m))
    gap, mass = total.target or nothing
    if is_index(target):
        mass = jnp.where(target < 0, jnp.nan, jnp.ones_like(gap))
    smooth = total.smooth or nothing
    stats = Stats(
        nll=gap + mass * log_sum,
        smooth_nll=smooth.gap + smooth.mass * log_sum,
        log_z=m + log_sum,
        entropy=entropy,
        predicted=sums.predicted,
    )
    return stats, Normalizer(m, total.exp, entropy, mass, smooth.mass)


def partial_gradients(
    logits: Array,
    target: Target,
    weight: Array | None,
    softcap: Array | None,
    counts_in: Array | None,
    normalizer: Normalizer,
    g: Stats,
    *,
    first_class: Array | int = 0,
) -> Gradients:
    """Softmax minus target, for some of the classes; zeros where the example doesn't count.

        d nll = p·Σt - t,    d smooth_nll = p·Σw - w,    d log_z = p,    d entropy = -p·(log p + entropy)

    and, with respect to the target and to the weights, -log p of what they multiply.
    """
    counts_in, normalizer, g = beside((counts_in, normalizer, g))
    # What is left out may be NaN, which must not reach the gradient of the cap.
    x, pull = jax.vjp(cap_logits, logits if softcap is None else keep(counts_in, logits), softcap)
    possible = x != -jnp.inf
    p = jnp.exp(x - normalizer.reference) * (1 / normalizer.exp)
    surprise = jnp.where(possible, jnp.log(normalizer.exp) - (x - normalizer.reference), 0)  # -log p
    dx, dtarget, dweight = (jnp.zeros_like(x) for _ in range(3))
    if g.nll is not None:
        t = jnp.where(possible, target_share(target, weight, x, first_class), 0)
        dx += g.nll * normalizer.target_mass * p - g.nll * t
        dtarget += g.nll * surprise * class_weight(weight, x)
        dweight += 0 if is_index(target) else g.nll * surprise * target.astype(x.dtype)
    if g.smooth_nll is not None:
        dx += g.smooth_nll * normalizer.smooth_mass * p - g.smooth_nll * smooth_share(weight, x)
        dweight += g.smooth_nll * surprise
    if g.log_z is not None:
        dx += g.log_z * p
    if g.entropy is not None:
        dx += g.entropy * p * (surprise - normalizer.entropy)
    dx, dtarget, dweight = keep(counts_in, (dx, dtarget, dweight))
    dlogits, dsoftcap = pull(dx)
    return Gradients(
        dlogits,
        None if is_index(target) else dtarget,
        None if weight is None else dweight.sum(range(1, x.ndim), keepdims=True),
        dsoftcap,
    )


class Form(NamedTuple):
    """How the sums and gradients are made: as above, or as suits a platform (`_forms`), with the same results."""

    sums: Callable[..., Sums]
    gradients: Callable[..., Gradients]


TEXTBOOK = Form(partial_sums, partial_gradients)


@jax.custom_vjp
def negative_log_prob(log_probs: Array, target: Target, weight: Array | None, counts_in: Array | None) -> Array:
    """Σ_c t_c·(-log p_c) of one example; 0 where it is left out."""
    return _negative_log_prob_fwd(log_probs, target, weight, counts_in)[0]


def _negative_log_prob_fwd(
    log_probs: Array, target: Target, weight: Array | None, counts_in: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    x = cap_logits(log_probs, None)
    t = target_share(target, weight, x, 0)
    nll = jnp.where(t == 0, 0, -t * x).sum(0)
    if is_index(target):
        nll = jnp.where(target < 0, jnp.nan, nll)
    return keep(counts_in, nll), (log_probs, target, weight, counts_in)


def _negative_log_prob_bwd(residuals: tuple[Any, ...], g: Array) -> tuple[Array | None, ...]:
    log_probs, target, weight, counts_in = residuals
    counts_in, g = beside((counts_in, g))
    x = cap_logits(log_probs, None)
    surprise = jnp.where(x == -jnp.inf, 0, -x)
    dx = -g * target_share(target, weight, x, 0)
    dtarget, dweight = None, None
    if is_index(target):
        dx = jnp.where(beside(target < 0), jnp.nan, dx)
    else:
        dtarget = keep(counts_in, g * surprise * class_weight(weight, x)).astype(target.dtype)
        if weight is not None:
            dweight = keep(counts_in, g * surprise * target.astype(x.dtype))
            dweight = dweight.sum(range(1, x.ndim), keepdims=True).astype(weight.dtype)
    return keep(counts_in, dx).astype(log_probs.dtype), dtarget, dweight, None


negative_log_prob.defvjp(_negative_log_prob_fwd, _negative_log_prob_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def log_probs(form: Form, over: Merging | None, logits: Array, where: Array | None) -> Array:
    """`log_softmax` of one row, or of a part of it `over` the others; -inf for the classes that `where` leaves out."""
    return _log_probs_fwd(form, over, logits, where)[0]


def _log_probs_fwd(
    form: Form, over: Merging | None, logits: Array, where: Array | None
) -> tuple[Array, tuple[Array, Array]]:
    x = logits if where is None else jnp.where(where, logits, -jnp.inf)
    sums = form.sums(x, None, None, None, smooth=False)
    if over is not None:
        sums = merge(sums, over)
    out = (cap_logits(x, None) - beside(sums.maximum)) - beside(jnp.log(sums.total.exp))
    if where is not None:
        out = jnp.where(where, out, -jnp.inf)
    return out, (out, jnp.zeros((), logits.dtype))


def _log_probs_bwd(form: Form, over: Merging | None, residuals: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    log_p, like = residuals
    g = jnp.where(log_p == -jnp.inf, 0, g)
    total = g.sum(0) if over is None else over.total(g.sum(0))
    return (g - jnp.exp(log_p) * beside(total)).astype(like.dtype), None


log_probs.defvjp(_log_probs_fwd, _log_probs_bwd)
