"""The platform that "auto" goes by, as far as it is known where the loss is traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxce._platform import platform_of
from jaxce._projection.chunks import Plan
from jaxce._projection.inputs import Head, Inputs, Wanted
from jaxce._projection.loops import auto, cpu_kept_logits, loop_for, over_classes, over_tokens


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
    shapes = {"hidden": jax.ShapeDtypeStruct((n, d), dtype), "kernel": jax.ShapeDtypeStruct((d, c), dtype)}
    head = Head(**shapes, bias=None, softcap=None, inverse_temperature=None, transpose_kernel=False)
    return Inputs((head,), jax.ShapeDtypeStruct((n,), jnp.int32))


def plan_of(platform, inputs, *, summed=True, **how):
    columns = inputs.heads[0].columns
    how = {"strategy": "auto", "num_classes": columns, "columns": columns, **how}
    return Plan(quantity=None, summed=summed, platform=platform, **how)


def wanted(inputs, *names):
    """The gradients of these arrays of the head."""
    (head,) = inputs.heads
    flags = dict.fromkeys(("hidden", "kernel", "bias", "softcap", "inverse_temperature"), False)
    return Wanted(
        Inputs((dataclasses.replace(head, **flags | dict.fromkeys(names, True)),), False, False, False, False)
    )


BOTH = ("hidden", "kernel")


@pytest.mark.parametrize(
    ("platform", "shape", "summed", "gradients", "loop"),
    [
        ("tpu", (32_768, 2_560, 128_256), True, BOTH, over_classes),
        ("tpu", (32_768, 2_560, 128_256), True, ("hidden",), over_classes),
        ("gpu", (32_768, 2_560, 128_256), True, BOTH, over_tokens),
        ("gpu", (8_192, 4_096, 128_256), True, BOTH, over_classes),
        ("gpu", (8_192, 4_096, 128_256), True, ("kernel",), over_tokens),
        ("gpu", (8_192, 4_096, 128_256), True, ("hidden",), over_tokens),
        ("gpu", (8_192, 4_096, 128_256), True, (), over_classes),
        ("gpu", (32_768, 2_560, 128_256), False, BOTH, over_classes),
        ("cpu", (32_768, 2_560, 128_256), True, BOTH, over_classes),
        ("cpu", (32_768, 256, 1_024), True, BOTH, over_tokens),
        ("cpu", (32_768, 256, 1_024), False, BOTH, over_classes),
        ("a new one", (8_192, 4_096, 128_256), True, BOTH, over_classes),
    ],
)
def test_auto(platform, shape, summed, gradients, loop):
    inputs = inputs_of(*shape)
    assert loop_for(plan_of(platform, inputs, summed=summed), wanted(inputs, *gradients), inputs) is loop


def test_a_cpu_keeps_logits_that_have_room(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    inputs = inputs_of(2_048, 256, 32_000, jnp.float32)

    def loop(gradients=BOTH, platform="cpu", inputs=inputs, **how):
        return loop_for(plan_of(platform, inputs, **how), wanted(inputs, *gradients), inputs)

    assert loop() is loop(summed=False) is cpu_kept_logits
    others = [loop(()), loop(platform="tpu"), loop(strategy="classes"), loop(inputs=inputs_of(2_048, 256, 32_000))]
    assert set(others) == {over_classes}
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert loop() is over_classes


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("tokens", [1, 100, 8_192, 1_000_000])
def test_accelerators_work_on_a_thousand_at_a_time(tokens, platform):
    inputs = inputs_of(tokens, 512, 100_000)
    plan = plan_of(platform, inputs)
    assert auto.classes_at_a_time(plan, inputs) >= 1024
    assert auto.tokens_at_a_time(plan, inputs) >= 1024


def test_on_automatic_axes_a_chunk_has_tokens_of_all_devices():
    inputs = inputs_of(8_192, 512, 100_000)
    plan = plan_of("tpu", inputs, token_groups=8)
    assert loop_for(plan, wanted(inputs, *BOTH), inputs) is over_tokens
    assert auto.tokens_at_a_time(plan, inputs) == 2_048
