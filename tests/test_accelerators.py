"""What the compilers for a TPU v5e and an H200 make of the losses, on a machine that has neither."""

import importlib.util
import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxce

for module in ("libtpu", "jax_plugins", "optax"):
    if importlib.util.find_spec(module) is None:
        pytest.skip("needs the compilers of jax[tpu] and jax-cuda13-plugin", allow_module_level=True)
if os.environ.get("JAX_PLATFORMS") != "cpu":
    pytest.skip("needs JAX_PLATFORMS=cpu, or JAX looks for a GPU of its own", allow_module_level=True)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
compiled = pytest.importorskip("compiled", reason="needs benchmarks/ beside tests/")
hlo = pytest.importorskip("hlo")

every_device = pytest.mark.parametrize("device", ["TPU v5e", "H200"])


def with_gradients(loss, device, *arguments):
    """The compiled loss with its gradients in the arguments of bfloat16."""
    wanted = tuple(i for i, (_, dtype) in enumerate(arguments) if dtype == jnp.bfloat16)
    return compiled.compile_for(device, jax.value_and_grad(loss, wanted), arguments)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"logit_softcap": 30.0}])
@every_device
def test_nothing_of_the_logits_size_is_stored(device, options):
    n, c = 8192, 128_256
    program = with_gradients(partial(jaxce.cross_entropy, **options), device, ((n, c), jnp.bfloat16), ((n,), jnp.int32))
    assert program.temporaries <= 0.05 * 2 * n * c


# Three matmuls at the chip's peak are 1; temporaries in GB. The host is a CPU: "auto" goes by the arrays' mesh.
@pytest.mark.parametrize(
    ("shape", "multiple", "temporaries"),
    [
        ((8_192, 4_096, 128_256), 1.45, 0.3),
        ((32_768, 2_560, 128_256), 1.55, 0.6),
        ((16_384, 8_192, 128_256), 1.45, 0.65),
        ((16_384, 2_048, 32_768), 1.6, 0.3),
        # More tokens than the gradient of a slab's logits has room for on the chip.
        ((65_536, 4_096, 128_256), 1.5, 1.2),
        # A kernel that a TPU lays out by columns.
        ((12_000, 3_072, 100_277), 1.55, 0.2),
    ],
)
def test_loss_and_gradients_on_a_tpu(shape, multiple, temporaries):
    program = with_gradients(jaxce.linear_cross_entropy, "TPU v5e", *compiled.of_shape(shape))
    found = compiled.on_tpu("TPU v5e", program, shape, matmuls=3)
    assert found["multiple"] <= multiple
    assert found["temporaries_gb"] <= temporaries


def test_options_on_a_tpu_store_no_more_and_take_little_longer():
    shape, options = (8_192, 4_096, 128_256), {"label_smoothing": 0.1, "z_loss": 1e-4, "logit_softcap": 30.0}
    loss = compiled.fused(num_classes=128_000, **options)
    found = compiled.on_tpu("TPU v5e", with_gradients(loss, "TPU v5e", *compiled.of_shape(shape)), shape, matmuls=3)
    assert found["multiple"] <= 1.55
    assert found["temporaries_gb"] <= 0.15
    evaluated = compiled.compile_for("TPU v5e", loss, compiled.of_shape(shape))
    assert compiled.on_tpu("TPU v5e", evaluated, shape, matmuls=1)["multiple"] <= 1.25
    assert evaluated.temporaries <= 2e6


@pytest.mark.parametrize("shape", compiled.ON_V5E)
def test_evaluation_on_a_tpu_stores_no_logits(shape):
    program = compiled.compile_for("TPU v5e", jaxce.linear_cross_entropy, compiled.of_shape(shape))
    assert compiled.on_tpu("TPU v5e", program, shape, matmuls=1)["multiple"] <= 1.25
    # Some numbers for each token.
    assert program.temporaries <= 2e6
    # Each slab asks whether it has to be done again.
    assert " conditional(" in program.text


@pytest.mark.parametrize(("strategy", "temporaries"), [("classes", 0.3), ("tokens", 2.8)], ids=["classes", "tokens"])
def test_loops_on_a_gpu(strategy, temporaries):
    shape = 8_192, 4_096, 128_256
    program = with_gradients(compiled.fused(strategy), "H200", *compiled.of_shape(shape))
    found = compiled.on_h200(program, shape)
    assert found["temporaries_gb"] <= temporaries
    assert found["kernels"] <= 3_000
    for loop in found["loops"]:
        assert loop["logits_written"] <= 2
        assert loop["logits_read"] <= 4
        assert loop["matmuls"]
        assert all("bf16→" in matmul for matmul in loop["matmuls"])
    # The gradients are added up in float32, in the matmuls that make them.
    assert sum("→f32" in matmul for loop in found["loops"] for matmul in loop["matmuls"]) >= 3
