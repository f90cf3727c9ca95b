"""What is computed of an example, as loops and devices see it: sums over some classes, and what is read off them.

A quantity is one of three: the numbers of labels (`OfLabels`), the divergence of two distributions (`OfTwo`), or the
log-probabilities of chosen classes (`OfChosen`). All have the same methods, the contract of `Quantity`, so that each of
them runs in every loop and on every layout. `numbers` is the quantity of a whole row, with its gradient.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jaxce._math.example import STACKED, Merging

# An array, or what stands for one: its gradient, its axis for `jax.vmap`, what its axes hold; None if there is none.
Leaf: TypeAlias = Any

# A named tuple of `maximum`, the largest logit; `reference`, what the sums are relative to, which is the maximum or
# another number that isn't far below it; and `total`, the sums. Of two distributions there are two of each.
Sums: TypeAlias = Any


class Example(NamedTuple):
    """What the numbers of an example are made of, of some of the classes, on axis 0.

    There are logits, a soft cap and a temperature for each distribution: one, or the student's and the teacher's.
    """

    logits: tuple[Leaf, ...]  # before the soft cap
    softcap: tuple[Leaf, ...]
    inverse_temperature: tuple[Leaf, ...]
    target: Leaf = None  # the index of the label's class, or the classes' probabilities
    chosen: Leaf = None  # (k,) indices of classes
    class_weight: Leaf = None
    counts_in: Leaf = None  # False for an example that is left out: zeros for numbers and gradients


class Quantity(Protocol):
    """What is computed of an example. Hashable: a loop knows it when it is traced."""

    def takes_reference(self, example: Example) -> bool:
        """Whether the sums may be relative to another number than the maximum."""

    def sums(self, example: Example, reference: Any = None, *, first_class: Array | int = 0) -> Any:
        """Over the classes whose logits, target and weights these are; `first_class` is the index of the first."""

    def merge(self, parts: Any, over: Merging = STACKED) -> Any:
        """The sums over all classes, from those over disjoint parts of them."""

    def read(self, sums: Any, example: Example) -> tuple[Any, Any]:
        """The numbers of the example, zeros where it is left out; and what their gradients need of the whole row."""

    def gradients(self, example: Example, whole_row: Any, cotangents: Any, *, first_class: Array | int = 0) -> Example:
        """Of some of the classes, in the dtype of computation; None for what isn't there or has no gradient."""

    def losses(self, numbers: Any, weights: Any, options: Any) -> Array:
        """The losses of examples that have these numbers."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def numbers(quantity: Quantity, example: Example) -> Any:
    """The numbers of one example, of all of its classes."""
    return quantity.read(quantity.sums(example), example)[0]


def _numbers_fwd(quantity: Quantity, example: Any) -> tuple[Any, Any]:
    example = primal_values(example)
    found, whole_row = quantity.read(quantity.sums(example), example)
    return found, (example, whole_row)


def _numbers_bwd(quantity: Quantity, residuals: Any, g: Any) -> tuple[Example]:
    example, whole_row = residuals
    return (rounded(quantity.gradients(example, whole_row, cotangents_of(g)), example),)


numbers.defvjp(_numbers_fwd, _numbers_bwd, symbolic_zeros=True)


def rounded(gradients: Any, inputs: Any) -> Any:
    """Each gradient in its input's dtype; None where there is none."""
    return jax.tree.map(
        lambda x, gradient: None if x is None or gradient is None else gradient.astype(x.dtype),
        inputs,
        gradients,
        is_leaf=lambda leaf: leaf is None,
    )


def primal_values(tree: Any) -> Any:
    """The arrays that a forward rule is given with `symbolic_zeros`."""
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))


def cotangents_of(g: Any) -> Any:
    """The cotangents that a backward rule is given with `symbolic_zeros`; None is zero."""

    def is_zero(leaf: Any) -> bool:
        return isinstance(leaf, SymbolicZero)

    return jax.tree.map(lambda leaf: None if is_zero(leaf) else leaf, g, is_leaf=is_zero)
