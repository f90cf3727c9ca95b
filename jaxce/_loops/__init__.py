"""The numbers of every token from a projection, and the sum of their losses, by a loop over tokens or over classes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxce._compose import ExampleWeights, Options
from jaxce._loops import over_classes, over_tokens
from jaxce._loops.across_devices import gather_features, scatter_features
from jaxce._loops.auto import loop as choose_loop
from jaxce._loops.cpu_room import empty_room
from jaxce._loops.shared import (
    Config,
    Inputs,
    PerToken,
    Summed,
    compose,
    compose_gradients,
    matmul_dtype,
    wanted_gradients,
)
from jaxce._loops.shared import Loop as Loop
from jaxce._softmax import Normalizer, Stats, cotangents_of, primal_values

__all__ = ["Config", "Inputs", "Loop", "choose_loop", "linear_stats", "matmul_dtype", "summed_loss"]


def with_kernel(config: Config, inputs: Inputs) -> Inputs:
    """The inputs with what the loops need of the kernel at a time."""
    return inputs if config.gathers_slabs else gather_features(config, inputs)


def as_cotangents(config: Config, inputs: Inputs, sums: Summed, per_token: PerToken) -> Inputs:
    """Each gradient in its input's dtype; the only place where a sum over chunks of tokens is rounded."""
    of_classes = (sums.kernel, sums.bias, per_token.targets, sums.class_weight, sums.softcap)
    gradients = (per_token.hidden, *of_classes, None, per_token.scale, None)
    rounded: Any = (
        None if g is None or x is None else g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=True)
    )
    found = Inputs(*rounded)
    if sums.kernel is None or config.loop == "classes":
        return found
    return found._replace(kernel=scatter_features(config, found.kernel))


def evaluate(config: Config, inputs: Inputs) -> tuple[Stats, Array]:
    """The numbers of every token and the class of its largest logit, where no gradient is wanted."""
    loop = over_classes if config.loop == "classes" else over_tokens
    return loop.evaluate(config, with_kernel(config, inputs))


def forward(config: Config, inputs: Inputs, room: Array | None) -> tuple[Stats, Normalizer, Array, Array | None]:
    """The numbers of every token, what their gradients need, the class of its largest logit; and the room, filled."""
    if config.loop == "classes":
        return over_classes.forward(config, inputs, room)
    return *over_tokens.forward(config, inputs), None


# The numbers of every token, for any reduction and any cotangents: the gradient makes the logits again.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_stats(config: Config, inputs: Inputs) -> tuple[Stats, Array]:
    """The numbers of every token, and the class of its largest logit."""
    return evaluate(config, inputs)


def _linear_stats_fwd(config: Config, inputs: Any) -> tuple[Any, Any]:
    wanted, inputs = wanted_gradients(inputs), with_kernel(config, primal_values(inputs))
    stats, normalizer, predicted, room = forward(config, inputs, empty_room(config, wanted, inputs))
    return (stats, predicted), (inputs, normalizer, wanted, room)


def _linear_stats_bwd(config: Config, residuals: Any, g: tuple[Stats, Any]) -> tuple[Inputs]:
    inputs, normalizer, wanted, room = residuals
    cotangents = cotangents_of(g[0])
    if config.loop == "classes":
        gradients = over_classes.backward(config, wanted, inputs, normalizer, cotangents, room)
    else:
        gradients = over_tokens.backward(config, wanted, inputs, normalizer, cotangents)
    return (as_cotangents(config, inputs, *gradients),)


linear_stats.defvjp(_linear_stats_fwd, _linear_stats_bwd, symbolic_zeros=True)


# The sum of the losses. Its cotangent only scales the gradients, so that the loop over tokens can make them in the
# forward pass.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_loss(
    config: Config, inputs: Inputs, weights: ExampleWeights, options: Options
) -> tuple[Array, tuple[Stats, Array]]:
    """The sum of the tokens' losses; and what `linear_stats` returns, without gradient."""
    stats, predicted = evaluate(config, inputs)
    return compose(config, stats, weights, options), (stats, predicted)


def _summed_loss_fwd(config: Config, inputs: Any, weights: Any, options: Any) -> tuple[Any, Any]:
    wanted = wanted_gradients(inputs)
    inputs, weights, options = primal_values((inputs, weights, options))
    inputs = with_kernel(config, inputs)
    # With the kernel or the hidden states frozen, two matmuls do over tokens, and three over classes.
    if config.loop == "tokens" or (config.either_loop and not (wanted.kernel and wanted.hidden)):
        config = config._replace(loop="tokens")
        out, gradients = over_tokens.loss_and_gradients(config, wanted, inputs, weights, options)
        return out, (inputs, gradients, None)
    stats, normalizer, predicted, room = forward(config, inputs, empty_room(config, wanted, inputs))
    out = compose(config, stats, weights, options), (stats, predicted)
    return out, (inputs, None, (wanted, normalizer, room, stats, weights, options))


def _summed_loss_bwd(config: Config, residuals: Any, cotangents: Any) -> tuple[Any, Any, Any]:
    inputs, gradients, unfinished = residuals
    g, _ = cotangents
    if isinstance(g, SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    if gradients is not None:
        sums, per_token, weights, options = jax.tree.map(lambda leaf: g * leaf, gradients)
        return as_cotangents(config._replace(loop="tokens"), inputs, sums, per_token), weights, options
    wanted, normalizer, room, stats, weights, options = unfinished
    _, of_stats, of_weights, of_options = compose_gradients(config, stats, weights, options)
    sums, per_token = over_classes.backward(config, wanted, inputs, normalizer, of_stats, room, g)
    weights, options = jax.tree.map(lambda leaf: g * leaf, (of_weights, of_options))
    return as_cotangents(config, inputs, sums, per_token), weights, options


summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd, symbolic_zeros=True)
