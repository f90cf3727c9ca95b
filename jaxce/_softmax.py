"""The numbers of one example that every loss is made of, and their one hand-written gradient.

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
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

# An integer, the index of the class; or the (C,) probabilities of the classes.
Target: TypeAlias = Array

Tree = TypeVar("Tree")


class Stats(NamedTuple):
    """Scalars of one example; `smooth_nll` is 0 where it wasn't asked for."""

    nll: Array
    smooth_nll: Array
    log_z: Array
    entropy: Array


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


class Normalizer(NamedTuple):
    """What the gradient needs of the whole row, besides the logits themselves."""

    reference: Array  # m
    exp: Array
    entropy: Array
    target_mass: Array
    smooth_mass: Array


class Cotangents(NamedTuple):
    """Of the numbers of an example; None is zero."""

    nll: Array | None
    smooth_nll: Array | None = None
    log_z: Array | None = None
    entropy: Array | None = None


class Gradients(NamedTuple):
    """Of some of the classes, in the dtype of computation; None for what isn't there or isn't differentiated."""

    logits: Array
    target: Array | None
    weight: Array | None
    softcap: Array | None
    scale: Array | None = None


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for 16-bit inputs, else the input's own."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def is_index(target: Target) -> bool:
    return jnp.issubdtype(target.dtype, jnp.integer)


def keep(live: Array | None, tree: Tree) -> Tree:
    """`tree` where the example is live, else zeros: selected, not multiplied, since NaN·0 is NaN."""
    if live is None:
        return tree
    return jax.tree.map(lambda leaf: jnp.where(live, leaf, 0), tree)


def cap_logits(logits: Array, softcap: Array | None) -> Array:
    """cap·tanh(x / cap), in the dtype of computation. An impossible class stays impossible."""
    x = logits.astype(compute_dtype(logits.dtype))
    if softcap is None:
        return x
    cap = softcap.astype(x.dtype)
    possible = x != -jnp.inf
    return jnp.where(possible, cap * jnp.tanh(jnp.where(possible, x, 0) / cap), -jnp.inf)


def scale_logits(logits: Array, softcap: Array | None, scale: Array) -> Array:
    """cap·tanh(x / cap) / temperature, where `scale` is one over the example's temperature."""
    return cap_logits(logits, softcap) * scale.astype(compute_dtype(logits.dtype))


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


def merge(
    parts: Sums,
    largest: Callable[[Array], Array] = lambda parts: parts.max(0),
    total: Callable[[Array], Array] = lambda parts: parts.sum(0),
) -> Sums:
    """The sums over all classes, from those over disjoint parts of them, stacked along axis 0.

    Or from parts that lie elsewhere, as on the devices of a mesh: `largest` and `total` reduce over them.
    """
    maximum = largest(parts.maximum)
    rise = finite(maximum) - parts.reference
    scale = jnp.where(parts.maximum == -jnp.inf, 0, jnp.exp(-rise))

    def merge_shares(part: Shares | None) -> Shares | None:
        if part is None:
            return None
        return Shares(gap=total(part.gap + part.mass * rise), mass=total(part.mass))

    exp, exp_x, target, smooth = parts.total
    merged = Terms(
        exp=total(scale * exp),
        exp_x=total(scale * (exp_x - jnp.where(scale == 0, 0, rise) * exp)),
        target=merge_shares(target),
        smooth=merge_shares(smooth),
    )
    return Sums(maximum, finite(maximum), merged)


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
    )
    return stats, Normalizer(m, total.exp, entropy, mass, smooth.mass)


def partial_gradients(
    logits: Array,
    target: Target,
    weight: Array | None,
    softcap: Array | None,
    live: Array | None,
    normalizer: Normalizer,
    g: Cotangents,
    *,
    first_class: Array | int = 0,
) -> Gradients:
    """Softmax minus target, for some of the classes; zeros where the example isn't live.

        d nll = p·Σt - t,    d smooth_nll = p·Σw - w,    d log_z = p,    d entropy = -p·(log p + entropy)

    and, with respect to the target and to the weights, -log p of what they multiply.
    """
    live, normalizer, g = beside((live, normalizer, g))
    # What is left out may be NaN, which must not reach the gradient of the cap.
    x, pull = jax.vjp(cap_logits, logits if softcap is None else keep(live, logits), softcap)
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
    dx, dtarget, dweight = keep(live, (dx, dtarget, dweight))
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


def scaled_sums(
    form: Form,
    logits: Array,
    target: Target | None,
    weight: Array | None,
    softcap: Array | None,
    scale: Array | None,
    *reference: Array | None,
    **options: Any,
) -> Sums:
    """The form's sums, at a temperature if `scale` is there."""
    if scale is not None:
        logits, softcap = scale_logits(logits, softcap, scale), None
    return form.sums(logits, target, weight, softcap, *reference, **options)


def scaled_gradients(
    form: Form,
    logits: Array,
    target: Target,
    weight: Array | None,
    softcap: Array | None,
    scale: Array | None,
    live: Array | None,
    normalizer: Normalizer,
    g: Cotangents,
    **options: Any,
) -> Gradients:
    """The form's gradients, at a temperature if `scale` is there."""
    if scale is None:
        return form.gradients(logits, target, weight, softcap, live, normalizer, g, **options)
    # What is left out may be NaN, which must not reach the gradient of the cap.
    logits, scale = keep(None if live is None else live[None], logits), keep(live, scale)
    x, pull = jax.vjp(scale_logits, logits, softcap, scale)
    gradients = form.gradients(x, target, weight, None, live, normalizer, g, **options)
    dlogits, dsoftcap, dscale = pull(gradients.logits)
    return gradients._replace(logits=dlogits.astype(x.dtype), softcap=dsoftcap, scale=dscale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def softmax_stats(
    form: Form,
    smooth: bool,
    logits: Array,
    target: Target,
    weight: Array | None,
    softcap: Array | None,
    scale: Array | None,
    live: Array | None,
) -> Stats:
    """The numbers of one example: (C,) logits, its target, class weights, and whether it counts at all.

    An example left out has zeros for numbers and for gradients, whatever its logits hold.
    """
    stats, _ = read_stats(scaled_sums(form, logits, target, weight, softcap, scale, smooth=smooth), target)
    return keep(live, stats)


def _softmax_stats_fwd(form: Form, smooth: bool, *inputs: Any) -> tuple[Stats, tuple[Any, ...]]:
    logits, target, weight, softcap, scale, live = primal_values(inputs)
    sums = scaled_sums(form, logits, target, weight, softcap, scale, smooth=smooth)
    stats, normalizer = read_stats(sums, target)
    return keep(live, stats), (logits, target, weight, softcap, scale, live, normalizer)


def _softmax_stats_bwd(form: Form, smooth: bool, residuals: tuple[Any, ...], g: Stats) -> tuple[Array | None, ...]:
    *inputs, live, normalizer = residuals
    gradients = scaled_gradients(form, *inputs, live, normalizer, cotangents_of(g))  # type: ignore[call-arg]
    return *(d if d is None else d.astype(x.dtype) for d, x in zip(gradients, inputs, strict=True)), None


softmax_stats.defvjp(_softmax_stats_fwd, _softmax_stats_bwd, symbolic_zeros=True)


def primal_values(tree: Any) -> Any:
    """The arrays that a forward rule is given with `symbolic_zeros`."""
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))


def cotangents_of(stats: Stats) -> Cotangents:
    """The cotangents that a backward rule is given with `symbolic_zeros`."""
    return Cotangents(*(None if isinstance(g, SymbolicZero) else g for g in stats))


@jax.custom_vjp
def negative_log_prob(log_probs: Array, target: Target, weight: Array | None, live: Array | None) -> Array:
    """Σ_c t_c·(-log p_c) of one example; 0 where it is left out."""
    return _negative_log_prob_fwd(log_probs, target, weight, live)[0]


def _negative_log_prob_fwd(
    log_probs: Array, target: Target, weight: Array | None, live: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    x = cap_logits(log_probs, None)
    t = target_share(target, weight, x, 0)
    nll = jnp.where(t == 0, 0, -t * x).sum(0)
    if is_index(target):
        nll = jnp.where(target < 0, jnp.nan, nll)
    return keep(live, nll), (log_probs, target, weight, live)


def _negative_log_prob_bwd(residuals: tuple[Any, ...], g: Array) -> tuple[Array | None, ...]:
    log_probs, target, weight, live = residuals
    live, g = beside((live, g))
    x = cap_logits(log_probs, None)
    surprise = jnp.where(x == -jnp.inf, 0, -x)
    dx = -g * target_share(target, weight, x, 0)
    dtarget, dweight = None, None
    if is_index(target):
        dx = jnp.where(beside(target < 0), jnp.nan, dx)
    else:
        dtarget = keep(live, g * surprise * class_weight(weight, x)).astype(target.dtype)
        if weight is not None:
            dweight = keep(live, g * surprise * target.astype(x.dtype))
            dweight = dweight.sum(range(1, x.ndim), keepdims=True).astype(weight.dtype)
    return keep(live, dx).astype(log_probs.dtype), dtarget, dweight, None


negative_log_prob.defvjp(_negative_log_prob_fwd, _negative_log_prob_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def log_probs(form: Form, logits: Array, where: Array | None) -> Array:
    """`log_softmax` of one row; -inf for the classes that `where` leaves out."""
    return _log_probs_fwd(form, logits, where)[0]


def _log_probs_fwd(form: Form, logits: Array, where: Array | None) -> tuple[Array, tuple[Array, Array]]:
    x = logits if where is None else jnp.where(where, logits, -jnp.inf)
    sums = form.sums(x, None, None, None, smooth=False)
    out = (cap_logits(x, None) - beside(sums.maximum)) - beside(jnp.log(sums.total.exp))
    if where is not None:
        out = jnp.where(where, out, -jnp.inf)
    return out, (out, jnp.zeros((), logits.dtype))


def _log_probs_bwd(form: Form, residuals: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    log_p, like = residuals
    g = jnp.where(log_p == -jnp.inf, 0, g)
    return (g - jnp.exp(log_p) * beside(g.sum(0))).astype(like.dtype), None


log_probs.defvjp(_log_probs_fwd, _log_probs_bwd)
