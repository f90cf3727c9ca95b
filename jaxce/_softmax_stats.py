"""The numbers of one example that every loss is made of, and their one hand-written gradient.

With logits `x`, their maximum `m` and `log_s = log Σ_c exp(x_c - m)`:

    nll         log_s - (x_y - m)              or  Σ_c t_c (log_z - x_c)  for class probabilities t
    smooth_nll  Σ_c w_c (log_z - x_c)          for label smoothing; w = 1 without class weights
    log_z       m + log_s
    entropy     log_s - Σ_c p_c (x_c - m)

All of it is written for some of the classes of one example (`partial_sums`), put together by `merge`, and read off
by `read_stats`, so that a whole row, a row in slabs, a loop over slabs of a kernel and a row spread over a mesh are
the same code. `x - m` is taken before anything is summed: `log_z - x_y` would lose three digits at an offset of 1e5.

"One example" has its classes on axis 0. Axes behind it hold more examples, for logits whose class axis isn't the last:
to move that axis would be a copy of them. The numbers are then arrays of the shape of those axes.
"""

from collections.abc import Callable, Iterable
from functools import partial, reduce
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


class Sums(NamedTuple):
    """Sums over some of the classes, taken relative to `maximum`; 0 where they weren't asked for."""

    maximum: Array
    exp: Array  # Σ exp(x - maximum)
    exp_x: Array  # Σ exp(x - maximum)·(x - maximum)
    label_logit: Array  # x_y, 0 where y is none of these classes
    target: tuple[Array, Array]  # Σ t·(maximum - x), Σ t
    smooth: tuple[Array, Array]  # Σ w·(maximum - x), Σ w, over the classes that can happen


class Normalizer(NamedTuple):
    """What the gradient needs of the whole row, besides the logits themselves."""

    maximum: Array
    log_sum: Array
    entropy: Array
    label_possible: Array  # the label's own logit isn't -inf
    target_mass: Array
    smooth_mass: Array


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for 16-bit inputs, else the input's own."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def beside(numbers: Tree) -> Tree:
    """The numbers of the examples, so that they broadcast against their logits."""
    return jax.tree.map(lambda number: number[None] if number.ndim else number, numbers)


def is_index(target: Target) -> bool:
    return jnp.issubdtype(target.dtype, jnp.integer)


# What is summed over classes is written without comparisons and selects, and `one` is a 1 of each sum's own: XLA:CPU
# fuses arithmetic alone into a sum, and stores in the logits' size all else, and any scalar that two sums share.


def is_possible(x: Array, one: Array | float = 1.0) -> Array:
    """1 where a logit is finite, 0 where it is -inf; a constant to JAX."""
    x = lax.stop_gradient(x)
    floor = float(jnp.finfo(x.dtype).min) / 2 * one
    return jnp.minimum(jnp.maximum(x * (one / 4), floor) - floor, one)


def cap_logits(logits: Array, softcap: Array | None, one: Array | float = 1.0) -> Array:
    """Logits in the dtype of computation, soft-capped; a class at -inf stays impossible under the cap."""
    x = logits.astype(compute_dtype(logits.dtype))
    if softcap is None:
        return x
    cap = softcap.astype(x.dtype)
    capped = cap * jnp.tanh(jnp.maximum(x, float(jnp.finfo(x.dtype).min) / 2 * one) / cap)
    return capped + jnp.log(is_possible(x, one))


def gap_to(maximum: Array, x: Array, mass: Array, one: Array | float = 1.0) -> Array:
    """`mass · (maximum - x)`; for an impossible class 0 without mass, where that would be 0·inf, else a huge number."""
    return mass * (maximum - jnp.maximum(x, float(jnp.finfo(x.dtype).min) / 2 * one))


def honest(gap: Array) -> Array:
    """A sum of gaps; infinite where an impossible class had mass."""
    return jnp.where(gap > 1e30, jnp.inf, gap)


def on_cpu(cpu: Callable[..., Tree], default: Callable[..., Tree], x: Array, *args: Any) -> Tree:
    """`cpu(x, *args)` in what is compiled for a CPU, unless `x` is on a mesh; else `default(x, *args)`."""
    if not jax.typeof(x).sharding.mesh.empty:
        return default(x, *args)
    return lax.platform_dependent(x, *args, cpu=cpu, default=default)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def move(how: Callable[..., Array], x: Array, *where: Array) -> Array:
    """`how(x, *where)`, which moves entries of `x` about and computes nothing.

    16-bit floats go as integers: XLA:CPU moves them by way of a float32 copy of all of them.
    """
    if x.dtype.itemsize != 2:
        return how(x, *where)
    return lax.bitcast_convert_type(how(lax.bitcast_convert_type(x, jnp.uint16), *where), x.dtype)


@move.defjvp
def _move_jvp(how: Callable[..., Array], primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Any:
    x, *where = primals
    return move(how, x, *where), how(tangents[0], *where)


def pick(x: Array, index: Array) -> Array:
    """`x[index]`, 0 where `index` is outside of `x`."""

    def compare(x: Array, index: Array) -> Array:
        return jnp.where(is_class(index, x.shape[0]), x, 0).sum(0)

    # A gather is a serial read on TPU, and isn't split over a mesh; on a CPU the comparison is one more pass.
    return on_cpu(gather, compare, x, index)


def gather(x: Array, index: Array) -> Array:
    """`pick` by address."""

    def entry(x: Array, index: Array) -> Array:
        inside = (index >= 0) & (index < x.shape[0])
        near = jnp.clip(index, 0, x.shape[0] - 1)
        if x.ndim == 1:
            return jnp.where(inside, lax.dynamic_index_in_dim(x, near, keepdims=False), 0)
        return jnp.where(inside, jnp.take_along_axis(x, near[None], 0)[0], 0)

    return move(entry, x, index)


def columns(array: Array | None, logits: Array) -> list[Any]:
    """What each class of `logits` has of `array`, in the dtype of computation: its row, or the whole if it has none."""
    classes = range(logits.shape[0])
    if array is None or array.ndim < logits.ndim:
        return [array for _ in classes]
    rows = jnp.broadcast_to(array, (len(classes), *array.shape[1:]))
    return [move(lambda rows, c=c: rows[c], rows).astype(compute_dtype(rows.dtype)) for c in classes]


def sum_of(arrays: Iterable[Array]) -> Array:
    return reduce(jnp.add, arrays)


# Each with logits of its own, or XLA:CPU stores the 16-bit columns that they share.


def largest_column(x: Array) -> Array:
    return reduce(jnp.maximum, columns(own(x)[0], x))


def pick_column(x: Array, index: Array) -> Array:
    """`pick` by one comparison after the other."""
    x, index = own(x, index)
    return sum_of(jnp.where(index == c, column, 0) for c, column in enumerate(columns(x, x)))


def is_class(index: Array, num_classes: int) -> Array:
    """The one-hot form of `index`, as bool."""
    return lax.broadcasted_iota(jnp.int32, (num_classes, *index.shape), 0) == beside(index).astype(jnp.int32)


def target_mass(target: Target, weight: Array | None, dtype: jnp.dtype) -> Array:
    """The weight of each class in `nll`, for class probabilities."""
    mass = target.astype(dtype)
    return mass if weight is None else mass * weight.astype(dtype)


def smooth_mass(x: Array, weight: Array | None, one: Array | float = 1.0) -> Array:
    """The weight of each class in `smooth_nll`: an impossible class takes no part in it."""
    possible = is_possible(x, one)
    return possible if weight is None else possible * weight.astype(x.dtype)


def anchor(maximum: Array) -> Array:
    """What logits are taken relative to: their maximum, or 0 where every class is impossible."""
    return jnp.where(maximum == -jnp.inf, 0, maximum)


def partial_sums(
    logits: Array,
    target: Target | None,
    weight: Array | None,
    softcap: Array | None,
    *,
    smooth: bool,
    first_class: Array | int | None = None,
    by_columns: bool = False,
    max_and_exp: Callable[[Array], tuple[Array, Array]] | None = None,
) -> Sums:
    """The sums over the classes whose logits, target and weight these are.

    Without a target, its sums are 0. `first_class` is the index of the first of them, None where they are all there
    is: a part may be all -inf without harm, a whole row may not, and without the care for it XLA:CPU fuses the maximum
    with the sum. `by_columns` adds up one class after the other. `max_and_exp` makes the first two sums, if not XLA.
    """
    x = logits.astype(compute_dtype(logits.dtype))
    if max_and_exp is None:
        # Exact in 16 bits, and the cap keeps the order; behind the barrier, XLA:CPU keeps no float32 copy of the logits
        # for both passes.
        largest = largest_column if by_columns else partial(jnp.max, axis=0)
        maximum = cap_logits(lax.optimization_barrier(largest(lax.stop_gradient(logits))), softcap)
    else:
        maximum, exp = max_and_exp(logits)
    reference = beside(maximum if first_class is None else anchor(maximum))
    zero = jnp.zeros_like(maximum)

    def total(summand: Callable[..., Array], *arrays: Array | None) -> Array:
        """The sum of `summand(one, x, *arrays)` over the classes."""
        if by_columns:
            rows = zip(*(columns(array, logits) for array in (logits, *arrays)), strict=True)
            return sum_of(summand(1.0, cap_logits(row, softcap), *others) for row, *others in rows)
        own_logits, own_softcap, one, *own_arrays = own(logits, softcap, jnp.ones((), x.dtype), *arrays)
        one = lax.stop_gradient(one)
        return summand(one, cap_logits(own_logits, own_softcap, one), *own_arrays).sum(0)

    def mass_sums(mass: Callable[..., Array], *arrays: Array | None) -> tuple[Array, Array]:
        def gap(one: Array, x: Array, reference: Array, *arrays: Array | None) -> Array:
            return gap_to(reference, x, mass(one, x, *arrays), one)

        return total(gap, reference, *arrays), total(mass, *arrays)

    def exponential(_: Array, x: Array, reference: Array) -> Array:
        return jnp.exp(x - reference)

    def entropy(one: Array, x: Array, reference: Array) -> Array:
        # The exponential of -1000 is 0.
        return jnp.exp(x - reference) * jnp.maximum(x - reference, -1000 * one)

    label_logit, target_sums, smooth_sums = zero, (zero, zero), (zero, zero)
    if target is None:
        pass
    elif is_index(target):
        index = target if first_class is None else target - first_class
        # With a kernel, a comparison would be the second read that it saves.
        entry = pick_column if by_columns else pick if max_and_exp is None else gather
        label_logit = cap_logits(entry(logits, index), softcap)
    else:
        target_sums = mass_sums(lambda _, x, target, weight: target_mass(target, weight, x.dtype), target, weight)
    if smooth:
        smooth_sums = mass_sums(lambda one, x, weight: smooth_mass(x, weight, one), weight)
    if max_and_exp is None:
        # Without a cap, the backward pass may share it.
        shares = softcap is None and not by_columns
        exp = jnp.exp(x - reference).sum(0) if shares else total(exponential, reference)
    return Sums(
        maximum=maximum,
        exp=exp,
        exp_x=total(entropy, reference),
        label_logit=label_logit,
        target=target_sums,
        smooth=smooth_sums,
    )


def own(x: Array, *others: Array | None) -> tuple[Any, ...]:
    """The same arrays. On a CPU behind a barrier, so that what is made of them isn't shared with other sums."""

    def same(*arrays: Array | None) -> tuple[Any, ...]:
        return arrays

    return on_cpu(lambda *arrays: lax.optimization_barrier(arrays), same, x, *others)


def merge(parts: Sums) -> Sums:
    """The sums over all classes, from those over disjoint parts of them, stacked along axis 0."""
    # A barrier, or XLA makes one sum of the parts' sums, stores what it is the sum of, and takes the parts' from there.
    # One for each number, so that what nobody reads isn't computed.
    parts = jax.tree.map(lax.optimization_barrier, parts)
    maximum = parts.maximum.max(0)
    reference = anchor(maximum)
    scale = jnp.exp(parts.maximum - reference)
    exp = (scale * parts.exp).sum(0)
    rise = jnp.where(scale == 0, 0, parts.maximum - reference)

    def mass_sums(part: tuple[Array, Array]) -> tuple[Array, Array]:
        gap, mass = part
        return (gap + mass * (reference - anchor(parts.maximum))).sum(0), mass.sum(0)

    return Sums(
        maximum=maximum,
        exp=exp,
        exp_x=(scale * (parts.exp_x + rise * parts.exp)).sum(0),
        label_logit=parts.label_logit.sum(0),
        target=mass_sums(parts.target),
        smooth=mass_sums(parts.smooth),
    )


def read_stats(sums: Sums, target: Target) -> tuple[Stats, Normalizer]:
    """The numbers of the example, and what their gradient needs; a negative index is a bad label and gives NaN."""
    log_sum = jnp.where(sums.maximum == -jnp.inf, jnp.nan, jnp.log(sums.exp))
    if is_index(target):
        mass = jnp.where(target >= 0, jnp.ones_like(log_sum), jnp.nan)
        nll = mass * (log_sum - (sums.label_logit - sums.maximum))
    else:
        gap, mass = sums.target
        nll = honest(gap) + mass * log_sum
    stats = Stats(
        nll=nll,
        smooth_nll=sums.smooth[0] + sums.smooth[1] * log_sum,
        log_z=sums.maximum + log_sum,
        entropy=log_sum - sums.exp_x / sums.exp,
    )
    normalizer = Normalizer(
        maximum=sums.maximum,
        log_sum=log_sum,
        entropy=stats.entropy,
        label_possible=sums.label_logit > -jnp.inf,
        target_mass=mass,
        smooth_mass=sums.smooth[1],
    )
    return stats, normalizer


class Cotangents(NamedTuple):
    """Cotangents of `Stats`; None where one is zero."""

    nll: Array | None = None
    smooth_nll: Array | None = None
    log_z: Array | None = None
    entropy: Array | None = None


class Gradients(NamedTuple):
    """Cotangents of the inputs of `partial_sums`, in the dtype of computation; None for an input that has none."""

    logits: Array
    target: Array | None
    weight: Array | None
    softcap: Array | None


def partial_gradients(
    logits: Array,
    target: Target,
    weight: Array | None,
    softcap: Array | None,
    live: Array | None,
    normalizer: Normalizer,
    cotangents: Cotangents,
    *,
    first_class: Array | int = 0,
) -> Gradients:
    """Softmax minus target, for some of the classes; a cotangent that is None is zero, and all are if not `live`.

    d nll = p·Σt - t,  d smooth_nll = p·Σw - w,  d log_z = p,  d entropy = -p·(log p + entropy).
    """
    logits, maximum, softcap = apart(logits, normalizer.maximum, softcap)
    if is_index(target):
        hit = normalizer.label_possible if live is None else normalizer.label_possible & live
        index = jnp.where(hit, target - first_class, -1)
    maximum, live, normalizer, g = beside((maximum, live, normalizer, cotangents))
    per_exp = jnp.exp(-normalizer.log_sum)

    # -log p where it multiplies a weight, which an impossible class has none of.
    def surprise(x: Array) -> Array:
        return jnp.where(x == -jnp.inf, 0, normalizer.log_sum - (x - maximum))

    def slope(x: Array, weight: Array | None) -> Array:
        """What the gradients of these logits have that no target enters."""
        # As in `partial_sums`, so that XLA:CPU can take it over from there.
        exp = jnp.exp(x - maximum)
        factor = jnp.zeros((), x.dtype)
        if g.log_z is not None:
            factor += g.log_z
        if g.nll is not None:
            factor += g.nll * normalizer.target_mass
        if g.smooth_nll is not None:
            factor += g.smooth_nll * normalizer.smooth_mass
        dx = (factor * per_exp) * exp
        if g.entropy is not None:
            dx -= g.entropy * (per_exp * exp) * (normalizer.entropy - surprise(x))
        if g.smooth_nll is not None:
            dx -= g.smooth_nll * smooth_mass(x, weight)
        return dx

    # What is left out could be NaN, which the sum of the soft cap's gradients would keep.
    x, pull_softcap = jax.vjp(cap_logits, logits if softcap is None else keep(live, logits), softcap)
    dx = slope(x, weight)
    dtarget = None if is_index(target) else jnp.zeros_like(x)
    dweight = None if weight is None else jnp.zeros_like(x)
    if g.smooth_nll is not None and dweight is not None:
        dweight += g.smooth_nll * surprise(x)
    if g.nll is not None and not is_index(target):
        dx -= jnp.where(x == -jnp.inf, 0, g.nll * target_mass(target, weight, x.dtype))
        dtarget = g.nll * surprise(x) * (1 if weight is None else weight.astype(x.dtype))
        if dweight is not None:
            dweight += g.nll * surprise(x) * target.astype(x.dtype)
    dtarget, dweight = keep(live, (dtarget, dweight))
    if dweight is not None:
        dweight = dweight.sum(range(1, x.ndim), keepdims=True)
    if g.nll is None or not is_index(target):
        dx = keep_row(live, dx)
    elif softcap is None and logits.dtype.itemsize > 2:
        dx = subtract_label(
            dx, index, g.nll, live, lambda: slope(gather(x, index), None if weight is None else gather(weight, index))
        )
    else:
        dx = subtract_at(keep_row(live, dx), index, g.nll)
    if softcap is None:
        return Gradients(dx, dtarget, dweight, None)
    dx, dsoftcap = pull_softcap(dx)
    return Gradients(dx, dtarget, dweight, dsoftcap)


def apart(logits: Array, maximum: Array, softcap: Array | None) -> tuple[Array, Array, Array | None]:
    """The same, behind a barrier: XLA keeps no array of the logits' size from the forward pass for the backward pass.

    Except on a CPU where the gradient, of 32 bits or more, has the room for one: there exponentials cost more.
    """

    def kept(*arrays: Array | None) -> Any:
        return arrays

    def parted(*arrays: Array | None) -> Any:
        return lax.optimization_barrier(arrays)

    keeps = logits.dtype.itemsize > 2 and softcap is None
    return on_cpu(kept if keeps else parted, parted, logits, maximum, softcap)


# Up to this many classes, XLA:CPU vectorizes differently: over rows and classes in one (benchmarks/cross_entropy.py).
_SHORT_ROW = 64


def keep_row(live: Array | None, row: Array) -> Array:
    """`row` where the example is live, else zeros."""
    if live is None or row.shape[0] > _SHORT_ROW:
        return keep(live, row)
    # One bool for many elements keeps XLA:CPU from vectorizing; a comparison of the elements themselves doesn't.
    dead = jnp.where(live, jnp.zeros((), row.dtype), jnp.nan)
    return jnp.where(jnp.isnan(row + dead), jnp.where(live, jnp.nan, jnp.zeros((), row.dtype)), row)


def subtract_label(row: Array, index: Array, value: Array, live: Array | None, entry: Callable[[], Array]) -> Array:
    """`row` less `value` at `index`, where the row is `entry()`; zeros if not `live`."""

    def subtract(row: Array) -> Array:
        return subtract_at(keep_row(live, row), index, value)

    def replace(row: Array) -> Array:
        return keep(live, jnp.where(is_class(index, row.shape[0]), entry() - value, row))

    # Of rows as long as these, XLA:CPU makes the exponentials again, in a loop that is just short enough for LLVM to
    # interleave: to replace an entry takes an operation less than to subtract from it.
    return on_cpu(replace, subtract, row) if is_long(row) else subtract(row)


def subtract_at(x: Array, index: Array, value: Array) -> Array:
    """`x` less `value` at `index`; nothing where `index` is outside of `x`."""
    return x - value * is_class(index, x.shape[0]).astype(x.dtype)


# Up to this many classes, XLA:CPU does better by adding up columns than by reducing rows: it vectorizes over examples,
# if there is an even number of them, and fuses the sums with what is made of them (benchmarks/cross_entropy.py).
_FEW_CLASSES = 10


def suits_columns(num_classes: int, examples: int) -> bool:
    return num_classes <= _FEW_CLASSES and examples % 2 == 0


# The longest row that XLA:CPU reduces in one go; above it, its maximum and its sum of exponentials are several times
# slower than over slabs (benchmarks/cross_entropy.py).
_LONGEST_CPU_ROW = 32_768


def is_long(row: Array) -> bool:
    return row.ndim == 1 and row.shape[0] > _LONGEST_CPU_ROW


def even_slabs(num_classes: int) -> int:
    """How many equal slabs a long row is cut into; 1 if it can't be cut evenly.

    A multiple of 16 wherever there is one, so that the slabs of a row sharded over a power of two stay where they are.
    """
    counts = [n for n in range(1, 1 + num_classes // 1024) if num_classes % n == 0]
    counts = [n for n in counts if num_classes // n <= _LONGEST_CPU_ROW]
    return min(counts, key=lambda n: (n % 16 != 0, n), default=1)


# Whether rows are read once on a CUDA GPU, by a kernel. By the compiled instructions that is twice as fast for the loss
# alone (docs/speed.md); it stays off until it has been measured on a card, and since XLA can't split it over a mesh.
ONE_READ_ON_GPU = False
_SHORTEST_KERNEL_ROW = 512


def fits_kernel(logits: Array) -> bool:
    return logits.ndim == 1 and logits.shape[0] >= _SHORTEST_KERNEL_ROW and logits.dtype.itemsize <= 4


def row_sums(
    logits: Array,
    target: Target,
    weight: Array | None,
    softcap: Array | None,
    *,
    smooth: bool,
    by_columns: bool = False,
) -> Sums:
    """The sums over all classes, in the form that suits the platform."""
    whole = partial(partial_sums, smooth=smooth)
    arguments = (logits, target, weight, softcap)
    mesh = jax.typeof(logits).sharding.mesh
    forms = {}
    if is_long(logits) and mesh.empty:
        forms["cpu"] = partial(sums_in_slabs, smooth=smooth)
    if by_columns and mesh.empty:
        forms["cpu"] = partial(whole, by_columns=True)
    if ONE_READ_ON_GPU and softcap is None and fits_kernel(logits) and (mesh.empty or mesh.size == 1):
        # Imported where it is used, to keep the import of the package as cheap as it is.
        from jaxce._pallas import max_and_exp

        forms["cuda"] = partial(whole, max_and_exp=max_and_exp)
    return lax.platform_dependent(*arguments, **forms, default=whole) if forms else whole(*arguments)


def sums_in_slabs(logits: Array, target: Target, weight: Array | None, softcap: Array | None, *, smooth: bool) -> Sums:
    """The sums over all classes, from those of slabs: equal ones that are a view of the row, or else in a loop."""
    classes = logits.shape[0]
    index = is_index(target)
    rows = (logits, None if index else target, weight)

    def slab_sums(first_class: Array | int, slab: Any) -> Sums:
        logits, target, weight = slab
        return partial_sums(logits, target, weight, softcap, smooth=smooth, first_class=first_class)

    slabs = even_slabs(classes)
    if slabs > 1:
        first_classes = jnp.arange(slabs, dtype=jnp.int32) * (classes // slabs)
        views = jax.tree.map(partial(move, lambda row: row.reshape(slabs, -1)), rows)
        sums = merge(jax.tree.map(stored, jax.vmap(slab_sums)(first_classes, views)))
    else:

        def step(_: None, start: Array | int, size: int) -> tuple[None, Sums]:
            # A barrier, or what XLA can do to all of the row it does before the loop, and keeps the copy.
            here, parts = lax.optimization_barrier((jnp.asarray(start, jnp.int32), rows))
            take = partial(move, lambda row, start: lax.dynamic_slice_in_dim(row, start, size))
            return None, slab_sums(here, jax.tree.map(lambda row: take(row, here), parts))

        # The loop stores a slab of each row: of a power of two classes, and at most a thirty-second of them.
        width = 1 << (classes // 32).bit_length() - 1
        _, outs = scan_chunks(step, None, classes, width)
        sums = merge(jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs))
    return sums._replace(label_logit=cap_logits(pick(logits, target), softcap)) if index else sums


def stored(x: Array) -> Array:
    """`x`, by way of a select, which XLA:CPU's library for sums doesn't go on with."""
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def scan_chunks(
    step: Callable[[Any, Array | int, int], tuple[Any, Any]], carry: Any, length: int, size: int
) -> tuple[Any, list[Any]]:
    """`carry, out = step(carry, start, width)` over the whole chunks in a loop, then over the rest.

    Returns the last carry, and the outputs of the chunks, stacked, and of the rest.
    """
    size = min(size, length)
    whole = length // size if size else 0
    outs = []
    if whole > 1:
        carry, out = lax.scan(lambda carry, i: step(carry, i * size, size), carry, jnp.arange(whole, dtype=jnp.int32))
        outs.append(out)
    elif whole == 1:
        carry, out = step(carry, 0, size)
        outs.append(jax.tree.map(lambda leaf: leaf[None], out))
    rest = length - whole * size
    if rest or not whole:
        carry, out = step(carry, whole * size, rest)
        outs.append(jax.tree.map(lambda leaf: leaf[None], out))
    return carry, outs


def keep(live: Array | None, tree: Tree) -> Tree:
    """`tree` where the example is live, else zeros: selected, not multiplied, since NaN·0 is NaN."""
    if live is None:
        return tree
    return jax.tree.map(lambda leaf: jnp.where(live, leaf, 0), tree)


def vary_alike(tree: Tree) -> Tree:
    """The arrays, each varying over every axis of a `jax.shard_map` that any of them varies over.

    A gradient that is written by hand has to vary as its input does: that of weights that are the same everywhere is
    summed over the axes here, where JAX transposes this.
    """
    varying = frozenset[Any]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))

    def vary(leaf: Array) -> Array:
        missing = varying - jax.typeof(leaf).manual_axis_type.varying
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


class Form(NamedTuple):
    """How the numbers of an example are made; known when the function is traced."""

    smooth: bool  # with `smooth_nll`
    by_columns: bool  # on a CPU


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def softmax_stats(
    form: Form,
    logits: Array,
    target: Target,
    weight: Array | None,
    softcap: Array | None,
    live: Array | None,
) -> Stats:
    """The numbers of one example: (C,) logits, its target, class weights that fit them, and whether it counts at all.

    An example left out has zeros for numbers and for gradients, whatever its logits hold.
    """
    stats, _ = read_stats(row_sums(logits, target, weight, softcap, **form._asdict()), target)
    return keep(live, stats)


def primal_values(tree: Any) -> Any:
    """The arrays that a forward rule is given with `symbolic_zeros`."""
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))


def _softmax_stats_fwd(form: Form, *inputs: Any) -> tuple[Stats, tuple[Any, ...]]:
    logits, target, weight, softcap, live = primal_values(inputs)
    # Not where the gradient takes over the exponentials of rows; nor for examples behind the class axis, where each of
    # its entries would find the maximum anew.
    takes_over = logits.dtype.itemsize > 2 and softcap is None and is_index(target) and not form.smooth
    form = form._replace(by_columns=form.by_columns and logits.ndim == 1 and not takes_over)
    stats, normalizer = read_stats(row_sums(logits, target, weight, softcap, **form._asdict()), target)
    return keep(live, stats), (logits, target, weight, softcap, live, normalizer)


def _softmax_stats_bwd(form: Form, residuals: tuple[Any, ...], cotangents: Stats) -> tuple[Array | None, ...]:
    logits, target, weight, softcap, live, normalizer = residuals
    wanted = Cotangents(*(None if isinstance(g, SymbolicZero) else g for g in cotangents))
    gradients = partial_gradients(logits, target, weight, softcap, live, normalizer, wanted)
    inputs = (logits, target, weight, softcap)
    return *(None if g is None else g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=True)), None


softmax_stats.defvjp(_softmax_stats_fwd, _softmax_stats_bwd, symbolic_zeros=True)


@jax.custom_vjp
def negative_log_prob(log_probs: Array, target: Target, weight: Array | None, live: Array | None) -> Array:
    """`-log_probs[y]`, or `-Σ t·log_probs` for class probabilities, of one example; 0 where it is left out."""
    return _negative_log_prob_fwd(log_probs, target, weight, live)[0]


def _negative_log_prob_fwd(
    log_probs: Array, target: Target, weight: Array | None, live: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    lp = cap_logits(log_probs, None)
    if is_index(target):
        nll = jnp.where(target >= 0, -cap_logits(pick(log_probs, target), None), jnp.nan)
    else:
        nll = honest(gap_to(jnp.zeros((), lp.dtype), lp, target_mass(target, weight, lp.dtype)).sum(0))
    return keep(live, nll), (log_probs, target, weight, live)


def _negative_log_prob_bwd(residuals: tuple[Any, ...], g: Array) -> tuple[Array | None, ...]:
    log_probs, target, weight, live = residuals
    live, g = beside((live, g))
    lp = cap_logits(log_probs, None)
    dtarget, dweight = None, None
    if is_index(target):
        bad = beside(jnp.where(target >= 0, jnp.zeros((), lp.dtype), jnp.nan))
        dlp = subtract_at(jnp.zeros_like(lp), target, g) + bad
    else:
        nll = jnp.where(lp == -jnp.inf, 0, -lp)
        dlp = -g * target_mass(target, weight, lp.dtype)
        dtarget = keep(live, g * nll * (1 if weight is None else weight.astype(lp.dtype))).astype(target.dtype)
        if weight is not None:
            dweight = keep(live, g * nll * target.astype(lp.dtype))
            dweight = dweight.sum(range(1, lp.ndim), keepdims=True).astype(weight.dtype)
    return keep(live, dlp).astype(log_probs.dtype), dtarget, dweight, None


negative_log_prob.defvjp(_negative_log_prob_fwd, _negative_log_prob_bwd)


@jax.custom_vjp
def log_probs(logits: Array, where: Array | None) -> Array:
    """`log_softmax` of one row; -inf for the classes that `where` leaves out."""
    return _log_probs_fwd(logits, where)[0]


def _log_probs_fwd(logits: Array, where: Array | None) -> tuple[Array, tuple[Array, Array]]:
    x = logits if where is None else jnp.where(where, logits, -jnp.inf)
    no_label = jnp.zeros(x.shape[1:], jnp.int32)
    _, normalizer = read_stats(row_sums(x, no_label, None, None, smooth=False), no_label)
    out = (cap_logits(x, None) - beside(normalizer.maximum)) - beside(normalizer.log_sum)
    if where is not None:
        out = jnp.where(where, out, -jnp.inf)
    return out, (out, jnp.zeros((), logits.dtype))


def _log_probs_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    out, like = residuals
    g = jnp.where(out == -jnp.inf, 0, g)
    return (g - jnp.exp(out) * beside(g.sum(0))).astype(like.dtype), None


log_probs.defvjp(_log_probs_fwd, _log_probs_bwd)
