"""What several test files share: data, comparisons, and gradients in every input at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

HALF_DTYPES = [jnp.float16, jnp.bfloat16]
FLOAT_DTYPES = [*HALF_DTYPES, jnp.float32]


def normal(shape, seed=0, dtype=np.float32):
    """Logits of order 1: larger ones saturate the softmax and hide errors."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def positive(shape, seed=0, dtype=np.float32):
    """Weights, none of them 0 or 1."""
    return jnp.asarray(np.random.default_rng(seed).uniform(0.2, 2.0, size=shape), dtype)


def indices(shape, num_classes, seed=0):
    """Labels that contain the first and the last class, where there is room for them."""
    labels = np.random.default_rng(seed).integers(0, num_classes, size=shape)
    labels.flat[:2] = [0, num_classes - 1][: labels.size]
    return jnp.asarray(labels)


def distributions(shape, axis=-1, seed=0, dtype=np.float32):
    return jax.nn.softmax(normal(shape, seed + 100, dtype), axis)


def assert_close(got, want, rtol=1e-12):
    """Equal up to `rtol` of the largest entry; refuses to compare with nothing but zeros."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(want).max() > 0, "an all-zero gradient would pass this comparison"
    np.testing.assert_allclose(got.astype(want.dtype), want, rtol=rtol, atol=rtol * np.abs(want).max())


def assert_trees_close(got, want, rtol=1e-12):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: assert_close(a, b, rtol), got, want)


def value_and_grads(loss, floats, **options):
    """The loss, and the gradient of a random weighting of it in each of the named float inputs."""

    @jax.jit
    def weighted(floats):
        value, pull = jax.vjp(lambda floats: loss(**floats, **options), floats)
        return value, pull(positive(value.shape, 7, value.dtype))[0]

    return weighted(floats)


def cases(names, quick, thorough=(), **how):
    """Parametrizes: with the `quick` cases always, and with those of `thorough` that aren't among them on demand."""
    more = [case for case in thorough if case not in quick]
    several = not isinstance(names, str)
    marked = [pytest.param(*(case if several else (case,)), marks=pytest.mark.thorough) for case in more]
    return pytest.mark.parametrize(names, [*quick, *marked], **how)


def for_figures(lowered):
    """Compiled with LLVM's optimizations, as users have it: for what a test says of memory."""
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 3})
