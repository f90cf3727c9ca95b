"""The kernel that reads a row once on a GPU: interpreted, and where it is taken."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT_DTYPES, assert_close, distributions, indices, normal

import jaxce
from jaxce import _softmax_stats
from jaxce._pallas import max_and_exp

interpreted = partial(max_and_exp, interpret=True)


# Less than a lane's share, a whole block, one more and one less, and several of them.
@pytest.mark.parametrize("classes", [1, 511, 512, 4095, 4096, 4097, 10_001])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sums_of_a_row(classes, dtype):
    rows = normal((2, 3, classes), dtype=dtype).at[1].add(jnp.asarray(300, dtype))
    maximum, exp = jax.vmap(jax.vmap(interpreted))(rows)
    assert maximum.tolist() == rows.astype(jnp.float32).max(-1).tolist()
    assert_close(exp, jnp.exp(rows.astype(jnp.float32) - maximum[..., None]).sum(-1), 1e-5)


@pytest.mark.parametrize("classes", [600, 5000])
def test_rising_maxima_and_impossible_classes(classes):
    rising = jnp.linspace(-2000.0, 1000.0, classes)
    holes = jnp.where(jnp.arange(classes) % 7 == 0, rising, -jnp.inf)
    late = jnp.full(classes, -jnp.inf).at[-1].set(5.0)
    for row in (rising, rising[::-1], holes, late):
        maximum, exp = interpreted(row)
        assert maximum == row.max()
        assert_close(exp, jnp.exp(row - row.max()).sum(), 1e-5)
    assert interpreted(jnp.full(classes, -jnp.inf)) == (-jnp.inf, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 4999])
def test_a_bad_logit_makes_the_sum_nan(bad, place):
    assert jnp.isnan(interpreted(normal(5000).at[place].set(bad))[1])


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("target", [indices((), 700), distributions((700,))], ids=["index", "probabilities"])
def test_the_other_sums_fit_the_kernels(target, smooth):
    logits = normal(700)
    ours, theirs = (
        _softmax_stats.partial_sums(logits, target, None, None, smooth=smooth, max_and_exp=kernel)
        for kernel in (interpreted, None)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.fixture
def one_read(monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(_softmax_stats, "ONE_READ_ON_GPU", True)
    yield
    jax.clear_caches()


def loss_and_gradient(**options):
    return jax.value_and_grad(lambda x, y: jaxce.cross_entropy(x, y, **options))


def arrays(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:-1], jnp.int32)


def kernels(*shape, dtype=jnp.bfloat16, **options):
    return str(jax.make_jaxpr(loss_and_gradient(**options))(*arrays(*shape, dtype=dtype))).count("name=max_and_exp")


def test_the_kernel_is_off_by_default():
    jax.clear_caches()
    assert kernels(8, 40_000) == 0


def test_the_kernel_is_for_long_rows_on_cuda_alone(one_read):
    assert kernels(8, 40_000) == 1
    assert kernels(8, 1_000) == 1
    assert kernels(8, 100) == 0
    assert kernels(8, 40_000, logit_softcap=5.0) == 0
    for platform in ("cpu", "tpu", "rocm"):
        module = jax.export.export(jax.jit(loss_and_gradient()), platforms=[platform])(*arrays(8, 40_000)).mlir_module()
        assert "triton" not in module
    logits, labels = normal((2, 700)), indices(2, 700)
    assert_close(jaxce.cross_entropy(logits, labels), jaxce.reference.cross_entropy(logits, labels), 1e-6)
