"""Sums over logits that a GPU or TPU reads once: relative to a number that is known before the logits are.

XLA then makes the maximum, the exponentials, their sum and the label's logit in one pass. On a TPU that pass is a part
of the matmul, so that the loop over classes stores no logits in its forward pass. With the maximum itself as the
reference there are two passes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxce import _forms
from jaxce._loops.across_devices import gather_features
from jaxce._loops.shared import Config, Inputs, Projection, Seen, class_index, take_slab
from jaxce._mesh import vary_alike
from jaxce._softmax import Sums, cap_logits, finite, scaled_sums

# Where a logit is so far above the reference, the sums are made again. Up to there the exponentials of any number of
# classes, and what the entropy sums, stay in the range of float32.
FAR = 64.0
# The largest logit of so many classes is the first reference.
FIRST_CLASSES = 128

# For tests: on a CPU too.
everywhere = False


def first_reference(config: Config, inputs: Inputs, classes: int) -> Array:
    """For each token the largest logit of the first few of so many classes; -inf where none of them can happen."""
    few = take_slab(config, inputs, 0, min(FIRST_CLASSES, classes))
    if config.gathers_slabs:
        few = gather_features(config, few)
    largest = cap_logits(Projection(config).logits(few).max(1), inputs.softcap)
    return lax.stop_gradient(largest if inputs.scale is None else largest * inputs.scale)


def read_once(platforms: Sequence[str], look: Callable[..., Seen], reference: Array, *arrays: Any) -> Seen:
    """`look(m, *arrays)`, where m is near `reference` on these platforms, and None, for the maximum, on others."""
    if everywhere:
        return near(look, reference, *arrays)
    if not _forms.enabled:
        return look(None, *arrays)
    return lax.platform_dependent(
        reference,
        *arrays,
        **dict.fromkeys(platforms, partial(near, look)),
        default=lambda _, *arrays: look(None, *arrays),
    )


def near(look: Callable[..., Seen], reference: Array, *arrays: Any) -> Seen:
    """What `look` shows relative to `reference`; or to the maxima it found, if one of them is far above it."""
    # `vmap` of a `cond` takes arrays of one kind only.
    reference, arrays = vary_alike((reference, arrays))
    seen = look(finite(reference), *arrays)
    maximum = seen.sums.maximum
    # Infinitely far where `reference` is of impossible classes alone. NaN isn't far: it stays NaN either way.
    far = (maximum - reference > FAR).any()
    m = jnp.where(far, finite(maximum), finite(reference))
    total = lax.cond(far, lambda: look(m, *arrays).sums.total, lambda: seen.sums.total)
    return seen._replace(sums=Sums(maximum, m, total))


def look_classes_first(config: Config, reference: Array, slab: Inputs, start: Array) -> Seen:
    """`look` at the logits of a slab and of indices, with the classes first: a TPU adds those up as it multiplies."""
    logits = Projection(config).logits_of_classes(slab)
    weight = None if slab.class_weight is None else slab.class_weight[:, None]
    arrays = (logits, slab.targets, weight, slab.softcap, slab.scale, reference)
    sums = scaled_sums(config.form, *arrays, smooth=config.smooth, first_class=class_index(config, start))
    return Seen(sums, start + jnp.argmax(logits, 0).astype(jnp.int32))


def as_it_lies(config: Config, inputs: Inputs) -> tuple[Config, Inputs]:
    """The kernel with that axis last which a TPU puts last: a `cond` would make a copy of it to have it otherwise."""
    rows, columns = inputs.kernel.shape
    gathered = config.feature_axes and not config.gathers_slabs
    if config.platform != "tpu" or columns % 128 == 0 or rows % 128 != 0 or gathered:
        return config, inputs
    return config._replace(transpose_kernel=not config.transpose_kernel), inputs._replace(kernel=inputs.kernel.T)
