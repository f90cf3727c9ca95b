"""The loop over classes: all tokens against a slab of them at a time.

The backward pass makes each slab's logits again and finishes that slab of the kernel's gradient: four matmuls in all,
and no array larger than N×slab, N×D or the gradients themselves.
"""

from functools import partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._loops.accelerator import as_it_lies, first_reference, look_classes_first, read_once
from jaxce._loops.across_devices import gather_features, merge_devices, own_features, scatter_features
from jaxce._loops.auto import classes_at_a_time, classes_evaluated_at_a_time, tokens_beside_a_slab
from jaxce._loops.cpu_room import room_of
from jaxce._loops.shared import (
    Config,
    Inputs,
    PerToken,
    Projection,
    Seen,
    Summed,
    Wanted,
    add,
    empty,
    gradient_shares,
    look,
    scan_chunks,
    take_chunk,
    take_slab,
    take_tokens,
    without_left_out,
    zeros,
)
from jaxce._mesh import vary_alike
from jaxce._softmax import Cotangents, Normalizer, Stats, is_index, keep, merge, read_stats

# There, the sums over a slab are a part of its matmul; a GPU would have to ask its host whether to redo each slab.
ON_TPU = ("tpu",)


def chunk_size(config: Config, inputs: Inputs) -> int:
    """How many classes a slab has."""
    return config.chunk_size or classes_at_a_time(config.platform, inputs)


def evaluate(config: Config, inputs: Inputs) -> tuple[Stats, Array]:
    """The numbers of every token and the class of its largest logit, where no gradient is wanted."""
    size = config.chunk_size or classes_evaluated_at_a_time(config.platform, inputs)
    stats, _, predicted, _ = forward(config._replace(chunk_size=size), inputs, None)
    return stats, predicted


def forward(config: Config, inputs: Inputs, room: Array | None) -> tuple[Stats, Normalizer, Array, Array | None]:
    """The numbers of every token, what their gradients need, the class of its largest logit; and the room, filled."""
    config, inputs = as_it_lies(config, inputs)

    def see(reference: Array, start: Array | int, width: int, room: Array | None) -> tuple[Seen, Array | None]:
        if room is not None:
            slab = take_slab(config, inputs, start, width)
            logits = Projection(config).logits(slab)
            return look(config, None, slab, logits, start), room_of(config, inputs).keep(room, logits, start)
        start = jnp.asarray(start, jnp.int32)
        if config.gathers_slabs:
            # Before the question whether to do it again, which other devices may answer otherwise.
            look_at, there = partial(look_at_slab, config), cut_slab(config, inputs, start, width)
        else:
            look_at, there = partial(look_at_classes, config, width), inputs
        if is_index(inputs.targets):
            return read_once(ON_TPU, look_at, reference, there, start), None
        # Of class probabilities a TPU would make a copy in case a slab is needed again.
        return look_at(None, there, start), None

    def step(carry: tuple[Seen, Array | None], start: Array | int, width: int) -> tuple[Any, None]:
        seen, room = carry
        more, room = see(seen.sums.maximum, start + size, width, room)
        return (merge_seen(seen, more), room), None

    # The first slab starts the sums, so that merging has no empty sums to know of.
    size = min(chunk_size(config, inputs), config.columns)
    carry = see(first_reference(config, inputs, size), 0, size, room)
    if config.columns > size:
        carry, _ = scan_chunks(step, carry, config.columns - size, size)
    seen, room = carry
    sums, predicted = merge_devices(config, seen)
    stats, normalizer = jax.vmap(read_stats)(sums, inputs.targets)
    return keep(inputs.live, stats), normalizer, predicted, room


def look_at_classes(config: Config, size: int, reference: Array | None, inputs: Inputs, start: Array) -> Seen:
    """What that many classes from `start` show."""
    # Cut where it is multiplied, or a TPU would make a copy of it in case it is needed again.
    return look_at_slab(config, reference, take_slab(config, inputs, start, size), start)


def look_at_slab(config: Config, reference: Array | None, slab: Inputs, start: Array) -> Seen:
    """What the classes of a slab show."""
    if reference is None:
        return look(config, None, slab, Projection(config).logits(slab), start)
    return look_classes_first(config, reference, slab, start)


def merge_seen(a: Seen, b: Seen) -> Seen:
    # The first of equal logits, and NaN above all, as in argmax.
    ahead = (b.sums.maximum > a.sums.maximum) | (jnp.isnan(b.sums.maximum) & ~jnp.isnan(a.sums.maximum))
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), a.sums, b.sums)
    return Seen(merge(stacked), jnp.where(ahead, b.predicted, a.predicted))


class Part(NamedTuple):
    """Some of the tokens, with their numbers; those whose logits were kept are a part of their own."""

    inputs: Inputs
    normalizer: Normalizer
    cotangents: Cotangents


def split_tokens(inputs: Inputs, normalizer: Normalizer, cotangents: Cotangents, first: int) -> list[Part]:
    """The first tokens and the others, if there are both."""
    tokens = inputs.hidden.shape[0]
    spans = list(pairwise([0, first, tokens] if 0 < first < tokens else [0, tokens]))
    return [
        Part(take_chunk(inputs, start, end - start), *take_tokens((normalizer, cotangents), start, end - start))
        for start, end in spans
    ]


def backward(
    config: Config,
    wanted: Wanted,
    inputs: Inputs,
    normalizer: Normalizer,
    cotangents: Cotangents,
    room: Array | None,
    scale: Array | float = 1.0,
) -> tuple[Summed, PerToken]:
    """The gradients for any cotangents of the numbers of `forward`, times `scale`.

    That is after the matmuls: one over the number of tokens would take the small logit gradients out of float16's range
    before them.
    """
    dtype = normalizer.exp.dtype
    kept = 0 if room is None else room_of(config, inputs).tokens
    clean = inputs if config.platform == "tpu" else without_left_out(inputs)
    parts = split_tokens(clean, normalizer, cotangents, kept)

    def step(carry: tuple[Summed, list[PerToken]], start: Array | int, size: int) -> tuple[Any, None]:
        sums, per_token = carry
        slabs = [part._replace(inputs=cut_slab(config, part.inputs, start, size)) for part in parts]
        logits: list[Array | None] = [None] * len(parts)
        if sums.kernel is not None and kept:
            logits[0] = room_of(config, inputs).logits(sums.kernel, start, size)
        found = [
            slab_gradients(config, wanted, *of_part, start, scale)
            for of_part in zip(slabs, logits, per_token, strict=True)
        ]
        sums = finish_slab(config, sums, reduce(add, [summed for summed, _ in found]), start, scale)
        return (sums, [per_token for _, per_token in found]), None

    sums = Summed(
        to_be_written(config, inputs.kernel, wanted.kernel) if room is None else room,
        zeros(inputs.bias, wanted.bias),
        zeros(inputs.class_weight, wanted.class_weight),
        zeros(inputs.softcap, wanted.softcap, dtype),
    )
    per_token = [
        PerToken(
            zeros(inputs.hidden, wanted.hidden, dtype),
            empty(inputs.targets, wanted.targets),
            zeros(inputs.scale, wanted.scale, dtype),
        )
        for inputs, *_ in parts
    ]
    (sums, per_token), _ = scan_chunks(step, (sums, per_token), config.columns, chunk_size(config, inputs))
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *per_token)
    softcap, hidden, of_scale = jax.tree.map(lambda total: scale * total, (sums.softcap, whole.hidden, whole.scale))
    return sums._replace(softcap=softcap), whole._replace(hidden=hidden, scale=of_scale)


def cut_slab(config: Config, inputs: Inputs, start: Array | int, size: int) -> Inputs:
    """The inputs as they concern the classes from `start`, with all features of their kernel."""
    slab = take_slab(config, inputs, start, size)
    return gather_features(config, slab) if config.gathers_slabs else slab


def to_be_written(config: Config, kernel: Array, want: bool) -> Array | None:
    """An array for the gradient of the kernel: every slab writes its part of it; 0 where the kernel is padding."""
    kernel = own_features(config, kernel)
    axis = Projection(config).class_axis
    padding = lax.slice_in_dim(kernel, config.columns, None, axis=axis)
    place = (config.columns, 0) if axis == 0 else (0, config.columns)
    return put(empty(kernel, want), jnp.zeros_like(padding), place) if padding.size else empty(kernel, want)


def slab_gradients(
    config: Config,
    wanted: Wanted,
    slab: Part,
    logits: Array | None,
    whole: PerToken,
    start: Array | int,
    scale: Array | float,
) -> tuple[Summed, PerToken]:
    """What a slab of classes from `start` adds to each gradient; `logits` are made here if they weren't kept.

    A block of tokens at a time, so that a TPU has the gradient of their logits on the chip for both matmuls.
    """

    def of_block(whole: PerToken, first: Array | int, tokens: int) -> tuple[Summed, PerToken]:
        inputs = take_chunk(slab.inputs, first, tokens)
        if config.platform == "tpu":
            # These zeros are a part of the matmul there; elsewhere they would be a copy for each slab.
            inputs = without_left_out(inputs)
        x = Projection(config).logits(inputs) if logits is None else logits
        normalizer, cotangents = take_tokens((slab.normalizer, slab.cotangents), first, tokens)
        share, per_token = gradient_shares(config, wanted, inputs, x, normalizer, cotangents, start)
        summed = add(take_tokens((whole.hidden, whole.scale), first, tokens), (per_token.hidden, per_token.scale))
        return share, PerToken(
            put(whole.hidden, summed[0], (first, 0)),
            put(whole.targets, per_token.targets, (first, start), scale),
            put(whole.scale, summed[1], (first,)),
        )

    def step(carry: tuple[Summed, PerToken], first: Array | int, tokens: int) -> tuple[Any, None]:
        share, whole = carry
        more, whole = of_block(whole, first, tokens)
        return (add(share, more), whole), None

    tokens = slab.inputs.hidden.shape[0]
    block = tokens_beside_a_slab(config.platform, tokens)
    if block >= tokens:
        return of_block(whole, 0, tokens)
    like, _ = jax.eval_shape(partial(of_block, first=0, tokens=block), whole)
    nothing = jax.tree.map(lambda share: jnp.zeros(share.shape, share.dtype), like)
    nothing, _ = vary_alike((nothing, slab.inputs.hidden))
    return scan_chunks(step, (nothing, whole), tokens, block)[0]


def finish_slab(config: Config, sums: Summed, share: Summed, start: Array | int, scale: Array | float) -> Summed:
    """The slab's share of a gradient with an axis of classes is final: it is written where it belongs."""
    place = (start, 0) if config.transpose_kernel else (0, start)
    kernel = share.kernel
    if kernel is not None and sums.kernel is not None:
        kernel = scatter_features(config, (scale * kernel).astype(sums.kernel.dtype))
    return Summed(
        kernel=put(sums.kernel, kernel, place),
        bias=put(sums.bias, share.bias, (start,), scale),
        class_weight=put(sums.class_weight, share.class_weight, (start,), scale),
        softcap=add(sums.softcap, share.softcap),
    )


def put(
    whole: Array | None, part: Array | None, place: tuple[Array | int, ...], scale: Array | float = 1.0
) -> Array | None:
    """`whole` with `scale·part` at that place."""
    if whole is None or part is None:
        return None
    indices = [jnp.asarray(index, jnp.int32) for index in place]
    return lax.dynamic_update_slice(whole, (scale * part).astype(whole.dtype), indices)
