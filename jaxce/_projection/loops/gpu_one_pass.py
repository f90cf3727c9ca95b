"""The sums over the logits of a chunk of tokens in one pass: on a GPU that saves the loop over tokens a pass over them.

On a TPU they are made in two: it would make a copy of the logits in case they are needed again.
"""

from jax import Array

from jaxce._math.quantity import Sums
from jaxce._projection.chunks import Plan, example_of, first_reference, sums_of
from jaxce._projection.inputs import Inputs
from jaxce._projection.loops.one_pass import in_one_pass

PLATFORMS = ("cuda", "rocm")


def sums_of_chunk(plan: Plan, inputs: Inputs, logits: tuple[Array, ...]) -> Sums:
    """The sums of some tokens over all classes."""
    if not plan.quantity.takes_reference(example_of(inputs, logits)):
        return sums_of(plan, inputs, logits, 0)
    return in_one_pass(
        PLATFORMS,
        lambda reference, inputs, logits: sums_of(plan, inputs, logits, 0, reference),
        first_reference(plan, inputs, plan.columns),
        inputs,
        logits,
    )
