"""The numbers of an example with a label, `Stats`, as a quantity of the loops."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxce._math.composition import ExampleWeights, example_losses
from jaxce._math.example import (
    STACKED,
    Form,
    Merging,
    Normalizer,
    Stats,
    Sums,
    final_logits,
    final_logits_and_pull,
    is_index,
    keep,
    merge,
    read_stats,
)
from jaxce._math.quantity import Example


@dataclasses.dataclass(frozen=True)
class OfLabels:
    """`Stats` of an example; its logits are of one distribution."""

    form: Form
    num_classes: int
    smooth: bool = False  # with `smooth_nll`
    predict: bool = False  # with the class of the largest logit

    def takes_reference(self, example: Example) -> bool:
        """Class probabilities go without: the sums might have to be made again, for which XLA:TPU copies them."""
        return is_index(example.target)

    def sums(self, example: Example, reference: Any = None, *, first_class: Array | int = 0) -> Sums:
        """By the form of the platform, which takes the soft cap itself; a temperature goes before."""
        (logits,), (softcap,), (inverse_temperature,) = example.logits, example.softcap, example.inverse_temperature
        x = logits
        if inverse_temperature is not None:
            x, softcap = final_logits(logits, softcap, inverse_temperature), None
        of_label = example.target, example.class_weight
        sums = self.form.sums(x, *of_label, softcap, reference, smooth=self.smooth, first_class=first_class)
        if self.predict:
            sums = sums._replace(predicted=first_class + jnp.argmax(logits, 0).astype(jnp.int32))
        return sums

    def merge(self, parts: Any, over: Merging = STACKED) -> Sums:
        """As `merge`."""
        return merge(parts, over)

    def read(self, sums: Sums, example: Example) -> tuple[Stats, Normalizer]:
        """As `read_stats`."""
        stats, normalizer = read_stats(sums, example.target)
        return keep(example.counts_in, stats._replace(predicted=None))._replace(predicted=stats.predicted), normalizer

    def gradients(
        self, example: Example, whole_row: Normalizer, cotangents: Stats, *, first_class: Array | int = 0
    ) -> Example:
        """By the form of the platform, as `sums`."""
        (logits,), (softcap,), (inverse_temperature,) = example.logits, example.softcap, example.inverse_temperature
        target, weight, counts_in = example.target, example.class_weight, example.counts_in
        numbers = counts_in, whole_row, cotangents._replace(predicted=None)
        if inverse_temperature is None:
            found = self.form.gradients(logits, target, weight, softcap, *numbers, first_class=first_class)
            of_logits, of_cap, of_temperature = found.logits, found.softcap, None
        else:
            x, pull = final_logits_and_pull(logits, softcap, inverse_temperature, counts_in)
            found = self.form.gradients(x, target, weight, None, *numbers, first_class=first_class)
            of_logits, of_cap, of_temperature = pull(found.logits)
            of_logits = of_logits.astype(x.dtype)
        return Example((of_logits,), (of_cap,), (of_temperature,), found.target, class_weight=found.weight)

    def losses(self, numbers: Stats, weights: ExampleWeights, options: Any) -> Array:
        """As `example_losses`."""
        return example_losses(numbers, weights, self.num_classes, options)
