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

from jaxce._loops.accelerator import first_reference, read_once
from jaxce._loops.auto import classes_at_a_time
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
from jaxce._softmax import Cotangents, Normalizer, Stats, is_index, keep, merge, read_stats

# There, the sums over a slab are a part of its matmul; a GPU would have to ask its host whether to redo each slab.
ON_TPU = ("tpu",)


def chunk_size(config: Config, inputs: Inputs) -> int:
    """How many classes a slab has."""
    return config.chunk_size or classes_at_a_time(config.platform, inputs)


def forward(config: Config, inputs: Inputs, room: Array | None) -> tuple[Stats, Normalizer, Array, Array | None]:
    """The numbers of every token, what their gradients need, the class of its largest logit; and the room, filled."""

    config, inputs = as_it_lies(config, inputs) if room is None else (config, inputs)

    def see(reference: Array, start: Array | int, width: int, room: Array | None) -> tuple[Seen, Array | None]:
        if room is None:
            look_at = partial(look_at_slab, config, width)
            return read_once(ON_TPU, look_at, reference, inputs, jnp.asarray(start, jnp.int32)), None
        slab = take_slab(config, inputs, start, width)
        logits = Projection(config).logits(slab)
        return look(config, None, slab, logits, start), room_of(config, inputs).keep(room, logits, start)

    def step(carry: tuple[Seen, Array | None], start: Array | int, width: int) -> tuple[Any, None]:
        seen, room = carry
        more, room = see(seen.sums.maximum, start + size, width, room)
        return (merge_seen(seen, more), room), None

    # The first slab starts the sums, so that merging has no empty sums to know of.
    size = min(chunk_size(config, inputs), config.num_classes)
    carry = see(first_reference(config, inputs, size), 0, size, room)
    if config.num_classes > size:
        carry, _ = scan_chunks(step, carry, config.num_classes - size, size)
    (sums, predicted), room = carry
    stats, normalizer = jax.vmap(read_stats)(sums, inputs.targets)
    return keep(inputs.live, stats), normalizer, predicted, room


def as_it_lies(config: Config, inputs: Inputs) -> tuple[Config, Inputs]:
    """The kernel with that axis last which a TPU puts last: a `cond` would make a copy of it to have it otherwise."""
    rows, columns = inputs.kernel.shape
    if config.platform != "tpu" or columns % 128 == 0 or rows % 128 != 0:
        return config, inputs
    return config._replace(transpose_kernel=not config.transpose_kernel), inputs._replace(kernel=inputs.kernel.T)


def look_at_slab(config: Config, size: int, reference: Array | None, inputs: Inputs, start: Array) -> Seen:
    """What the classes from `start` show."""
    # Cut where it is multiplied, or a TPU would make a copy of it in case it is needed again.
    slab = take_slab(config, inputs, start, size)
    if reference is None:
        return look(config, None, slab, Projection(config).logits(slab), start)
    # With the classes first, which a TPU adds up as fast as it multiplies.
    logits = Projection(config).logits_of_classes(slab)
    targets = slab.targets if is_index(slab.targets) else slab.targets.T
    weight = None if slab.class_weight is None else slab.class_weight[:, None]
    sums = config.form.sums(logits, targets, weight, slab.softcap, reference, smooth=config.smooth, first_class=start)
    return Seen(sums, start + jnp.argmax(logits, 0).astype(jnp.int32))


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
    # A TPU makes these zeros as it multiplies; elsewhere that would be a copy of the hidden states for every slab.
    at_each_slab = config.platform == "tpu"
    parts = split_tokens(inputs if at_each_slab else without_left_out(inputs), normalizer, cotangents, kept)

    def step(carry: tuple[Summed, list[PerToken]], start: Array | int, size: int) -> tuple[Any, None]:
        sums, per_token = carry
        slabs = [
            take_slab(config, without_left_out(part.inputs) if at_each_slab else part.inputs, start, size)
            for part in parts
        ]
        logits = [Projection(config).logits(slab) for slab in slabs]
        if sums.kernel is not None and kept:
            logits[0] = room_of(config, inputs).logits(sums.kernel, start, size)
        shares = [
            gradient_shares(config, wanted, slab, x, part.normalizer, part.cotangents, start)
            for slab, x, part in zip(slabs, logits, parts, strict=True)
        ]
        sums = finish_slab(config, sums, reduce(add, [summed for summed, _ in shares]), start, scale)
        per_token = [
            PerToken(add(whole.hidden, part.hidden), put(whole.targets, part.targets, start, 1, scale))
            for whole, (_, part) in zip(per_token, shares, strict=True)
        ]
        return (sums, per_token), None

    # What every slab writes a part of needs no zeros to start from; padding of the kernel stays 0.
    padded = inputs.kernel.shape[Projection(config).class_axis] > config.num_classes
    sums = Summed(
        (zeros if padded else empty)(inputs.kernel, wanted.kernel) if room is None else room,
        zeros(inputs.bias, wanted.bias),
        zeros(inputs.class_weight, wanted.class_weight),
        zeros(inputs.softcap, wanted.softcap, dtype),
    )
    per_token = [
        PerToken(zeros(inputs.hidden, wanted.hidden, dtype), empty(inputs.targets, wanted.targets))
        for inputs, *_ in parts
    ]
    (sums, per_token), _ = scan_chunks(step, (sums, per_token), config.num_classes, chunk_size(config, inputs))
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *per_token)
    softcap, hidden = jax.tree.map(lambda total: scale * total, (sums.softcap, whole.hidden))
    return sums._replace(softcap=softcap), whole._replace(hidden=hidden)


def finish_slab(config: Config, sums: Summed, share: Summed, start: Array | int, scale: Array | float) -> Summed:
    """The slab's share of a gradient with an axis of classes is final: it is written where it belongs."""
    return Summed(
        kernel=put(sums.kernel, share.kernel, start, Projection(config).class_axis, scale),
        bias=put(sums.bias, share.bias, start, 0, scale),
        class_weight=put(sums.class_weight, share.class_weight, start, 0, scale),
        softcap=add(sums.softcap, share.softcap),
    )


def put(whole: Array | None, part: Array | None, start: Array | int, axis: int, scale: Array | float) -> Array | None:
    if whole is None or part is None:
        return None
    return lax.dynamic_update_slice_in_dim(whole, (scale * part).astype(whole.dtype), start, axis)
