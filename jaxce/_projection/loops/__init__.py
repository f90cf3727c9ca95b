"""The door of the loops: the numbers of every token from a projection, and the sum of their losses.

A loop is a module with these functions, and what it hands from one to the next is its own business:

    fits(plan, wanted, inputs) -> bool
    evaluate(plan, inputs) -> numbers
    forward(plan, wanted, inputs) -> numbers, residuals
    backward(plan, residuals, cotangents, factor) -> gradients of the inputs, times a factor

and, if it makes the gradients of a sum of losses in the forward pass, these too:

    loss_and_gradients(plan, wanted, inputs, weights, options) -> (loss, numbers), residuals
    gradients_times(plan, residuals, factor) -> gradients of the inputs, the weights and the options

To add a loop for one platform, write its file and add it to that platform's list.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxce._math.quantity import cotangents_of, primal_values, rounded
from jaxce._projection.chunks import Numbers, Plan, composed, composed_gradients
from jaxce._projection.inputs import Inputs, Wanted, wanted_gradients
from jaxce._projection.loops import cpu_kept_logits, over_classes, over_tokens

# Of each platform; the first loop that fits is taken.
LOOPS: dict[str, Sequence[Any]] = {"cpu": [over_tokens, cpu_kept_logits, over_classes]}
ELSEWHERE: Sequence[Any] = [over_tokens, over_classes]


def loop_for(plan: Plan, wanted: Wanted, inputs: Inputs) -> Any:
    """The module of the loop to take."""
    return next(loop for loop in LOOPS.get(plan.platform, ELSEWHERE) if loop.fits(plan, wanted, inputs))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Taken:
    """The loop that the forward pass took; no data to JAX, so that it can stand among residuals."""

    loop: Any


# The numbers of every token, for any reduction and any cotangents: the gradient makes the logits again.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def numbers_of_tokens(plan: Plan, inputs: Inputs) -> Numbers:
    """The numbers of every token, as the plan's quantity has them."""
    return loop_for(plan, wanted_gradients(inputs), inputs).evaluate(plan, inputs)


def _numbers_fwd(plan: Plan, inputs: Any) -> tuple[Numbers, Any]:
    wanted, inputs = wanted_gradients(inputs), primal_values(inputs)
    loop = loop_for(plan, wanted, inputs)
    numbers, residuals = loop.forward(plan, wanted, inputs)
    return numbers, (Taken(loop), inputs, residuals)


def _numbers_bwd(plan: Plan, residuals: Any, g: Numbers) -> tuple[Inputs]:
    taken, inputs, residuals = residuals
    return (rounded(taken.loop.backward(plan, residuals, cotangents_of(g), 1.0), inputs),)


numbers_of_tokens.defvjp(_numbers_fwd, _numbers_bwd, symbolic_zeros=True)


# The sum of the losses. Its cotangent only scales the gradients, so that a loop can make them in the forward pass.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_loss(plan: Plan, inputs: Inputs, weights: Any, options: Any) -> tuple[Array, Numbers]:
    """The sum of the tokens' losses; and their numbers, without gradient."""
    numbers = loop_for(plan, wanted_gradients(inputs), inputs).evaluate(plan, inputs)
    return composed(plan, numbers, weights, options), numbers


def _summed_loss_fwd(plan: Plan, inputs: Any, weights: Any, options: Any) -> tuple[Any, Any]:
    wanted = wanted_gradients(inputs)
    inputs, weights, options = primal_values((inputs, weights, options))
    loop = loop_for(plan, wanted, inputs)
    if hasattr(loop, "loss_and_gradients"):
        out, residuals = loop.loss_and_gradients(plan, wanted, inputs, weights, options)
        return out, (Taken(loop), inputs, residuals)
    numbers, residuals = loop.forward(plan, wanted, inputs)
    out = composed(plan, numbers, weights, options), numbers
    return out, (Taken(loop), inputs, (residuals, (numbers, weights, options)))


def _summed_loss_bwd(plan: Plan, residuals: Any, cotangents: Any) -> tuple[Any, Any, Any]:
    taken, inputs, residuals = residuals
    factor, _ = cotangents
    if isinstance(factor, SymbolicZero):
        factor = jnp.zeros(factor.shape, factor.dtype)
    if hasattr(taken.loop, "loss_and_gradients"):
        of_inputs, of_weights, of_options = taken.loop.gradients_times(plan, residuals, factor)
    else:
        residuals, of_loss = residuals
        of_numbers, of_weights, of_options = composed_gradients(plan, *of_loss)
        of_inputs = taken.loop.backward(plan, residuals, of_numbers, factor)
        of_weights, of_options = jax.tree.map(lambda gradient: factor * gradient, (of_weights, of_options))
    return rounded(of_inputs, inputs), of_weights, of_options


summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd, symbolic_zeros=True)
