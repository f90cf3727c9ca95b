"""The platform that "auto" goes by, as far as it is known where the loss is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxce._loops import auto
from jaxce._loops.shared import Inputs
from jaxce._platform import platform_of


@pytest.fixture
def default_is_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_where_arrays_and_meshes_are(default_is_a_tpu, axis_type):
    anywhere = (np.ones(3), jnp.ones(3), None)
    assert platform_of(anywhere) == "tpu"
    assert platform_of((*anywhere, jax.device_put(np.ones(3), jax.devices()[0]))) == "cpu"
    with jax.default_device(jax.devices()[0]):
        assert platform_of(anywhere) == "cpu"
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        assert platform_of(anywhere) == "cpu"
    found = []
    spread = jax.device_put(np.ones(4), NamedSharding(mesh, PartitionSpec("data")))
    # A tracer says it too, that of a gradient and of what was computed as well.
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(lambda x: found.append(platform_of(2 * x)) or x.sum()))(spread)
    jax.jit(lambda x: found.append(platform_of(x)) or x)(np.ones(3))
    assert found == ["cpu", "tpu"]


def inputs_of(n, d, c, dtype=jnp.bfloat16):
    shapes = jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct((d, c), dtype)
    return Inputs(*shapes, None, jax.ShapeDtypeStruct((n,), jnp.int32), None, None, None)


@pytest.mark.parametrize(
    ("platform", "shape", "reduction", "loop"),
    [
        ("tpu", (32_768, 2_560, 128_256), "mean", "classes"),
        ("gpu", (32_768, 2_560, 128_256), "mean", "tokens"),
        ("gpu", (8_192, 4_096, 128_256), "mean", "classes"),
        ("gpu", (32_768, 2_560, 128_256), "none", "classes"),
        ("cpu", (32_768, 2_560, 128_256), "mean", "classes"),
        ("cpu", (32_768, 256, 1_024), "sum", "tokens"),
    ],
)
def test_auto(platform, shape, reduction, loop):
    assert auto.loop(platform, inputs_of(*shape), reduction) == loop


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("tokens", [1, 100, 8_192, 1_000_000])
def test_accelerators_work_on_a_thousand_at_a_time(tokens, platform):
    inputs = inputs_of(tokens, 512, 100_000)
    assert auto.classes_at_a_time(platform, inputs) >= 1024
    assert auto.tokens_at_a_time(platform, inputs, 100_000) >= 1024


def test_on_automatic_axes_a_chunk_has_tokens_of_all_devices():
    inputs = inputs_of(8_192, 512, 100_000)
    assert auto.loop("tpu", inputs, "mean", groups=8) == "tokens"
    assert auto.tokens_at_a_time("tpu", inputs, 100_000, groups=8) == 2_048
