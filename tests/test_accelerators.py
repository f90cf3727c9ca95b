"""What the compilers for a TPU v5e and an H200 make of the losses, on a machine that has neither."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import cases

import jaxce

for module in ("libtpu", "jax_plugins", "optax"):
    if importlib.util.find_spec(module) is None:
        pytest.skip("needs the compilers of jax[tpu] and jax-cuda13-plugin", allow_module_level=True)
if os.environ.get("JAX_PLATFORMS") != "cpu":
    pytest.skip("needs JAX_PLATFORMS=cpu, or JAX looks for a GPU of its own", allow_module_level=True)
if "optimization_level=0" in os.environ["XLA_FLAGS"]:
    pytest.skip("needs -m compilers, for figures with the optimizations", allow_module_level=True)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
compiled = pytest.importorskip("compiled", reason="needs benchmarks/ beside tests/")
hlo = pytest.importorskip("hlo")
sharded = pytest.importorskip("sharded")

pytestmark = pytest.mark.compilers


def with_gradients(loss, device, *arguments):
    """The compiled loss with its gradients in the arguments of bfloat16."""
    wanted = tuple(i for i, (_, dtype) in enumerate(arguments) if dtype == jnp.bfloat16)
    return compiled.compile_for(device, jax.value_and_grad(loss, wanted), arguments)


@cases(
    ("device", "options"),
    [("TPU v5e", {"label_smoothing": 0.1, "z_loss": 0.1}), ("H200", {"logit_softcap": 30.0})],
    product(("TPU v5e", "H200"), ({}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"logit_softcap": 30.0})),
)
def test_nothing_of_the_logits_size_is_stored(device, options):
    n, c = 8192, 128_256
    program = with_gradients(partial(jaxce.cross_entropy, **options), device, ((n, c), jnp.bfloat16), ((n,), jnp.int32))
    assert program.temporaries <= 0.05 * 2 * n * c


# Three matmuls at the chip's peak are 1; temporaries in GB. The host is a CPU: "auto" goes by the arrays' mesh.
@cases(
    ("shape", "multiple", "temporaries"),
    [
        ((8_192, 4_096, 128_256), 1.45, 0.3),
        # A kernel that a TPU lays out by columns.
        ((12_000, 3_072, 100_277), 1.55, 0.2),
    ],
    [
        ((32_768, 2_560, 128_256), 1.55, 0.6),
        ((16_384, 8_192, 128_256), 1.45, 0.65),
        ((16_384, 2_048, 32_768), 1.6, 0.3),
        # More tokens than the gradient of a slab's logits has room for on the chip.
        ((65_536, 4_096, 128_256), 1.5, 1.2),
    ],
)
def test_loss_and_gradients_on_a_tpu(shape, multiple, temporaries):
    program = with_gradients(jaxce.linear_cross_entropy, "TPU v5e", *compiled.of_shape(shape))
    found = compiled.on_tpu("TPU v5e", program, shape, matmuls=3)
    assert found["multiple"] <= multiple
    assert found["temporaries_gb"] <= temporaries


@pytest.mark.thorough
def test_options_on_a_tpu_store_no_more_and_take_little_longer():
    shape, options = (8_192, 4_096, 128_256), {"label_smoothing": 0.1, "z_loss": 1e-4, "logit_softcap": 30.0}
    loss = compiled.fused(num_classes=128_000, **options)
    found = compiled.on_tpu("TPU v5e", with_gradients(loss, "TPU v5e", *compiled.of_shape(shape)), shape, matmuls=3)
    assert found["multiple"] <= 1.55
    assert found["temporaries_gb"] <= 0.15
    evaluated = compiled.compile_for("TPU v5e", loss, compiled.of_shape(shape))
    assert compiled.on_tpu("TPU v5e", evaluated, shape, matmuls=1)["multiple"] <= 1.25
    assert evaluated.temporaries <= 2e6


@cases("shape", list(compiled.ON_V5E)[:1], compiled.ON_V5E)
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


def test_log_probabilities_and_entropies_on_a_tpu():
    shape = 8_192, 4_096, 128_256
    arguments = [*compiled.of_shape(shape), ((shape[0],), jnp.float32)]
    weighted = compiled.NUMBERS["all three, at a temperature"]
    program = compiled.compile_for("TPU v5e", jax.value_and_grad(weighted, (0, 1)), arguments)
    found = compiled.on_tpu("TPU v5e", program, shape, matmuls=4)
    assert found["multiple"] <= 1.2
    assert found["temporaries_gb"] <= 0.15


# On a mesh: loss and both gradients, 4,096 features, two sequences of 4,096 tokens for each device along `data`.
EIGHT = sharded.Case("TPU v5e", "tpu-v5e:2x4", 4, 2, 128_256)
POD = sharded.Case("TPU v5e", "tpu-v5e:16x16", 32, 8, 128_256)
ON_H200S = sharded.Case("H200", "h200:8", 4, 2, 128_256)


def kernel_bytes(case):
    return 2 * sharded.FEATURES * case.classes // case.model


def check_what_is_sent(case, program):
    """Never logits; of the kernel a part in the loop, and the whole once outside of it; nothing in a branch."""
    sent = hlo.collectives(program.as_text())
    assert not any("conditional" in one.inside for one in sent)
    assert sum(one.bytes for one in sent if one.kind == "all-gather" and not one.inside) <= 1.02 * kernel_bytes(case)
    # The gradient of a slab of the kernel; or, over tokens, some numbers of each.
    assert max(one.shape.bytes for one in sent if one.inside) <= 2 * sharded.FEATURES * 1_400
    return sum(one.bytes for one in sent)


@pytest.mark.parametrize(("case", "megabytes", "ms"), [(EIGHT, 700, 105), (POD, 300, 26)], ids=["8 chips", "256 chips"])
def test_a_sharded_loss_on_tpus(case, megabytes, ms):
    program = sharded.compile_on(case, sharded.sharded())
    assert program.memory_analysis().temp_size_in_bytes <= megabytes * 1e6
    assert hlo.cycles(program.as_text()) / 1.5e9 <= ms / 1e3
    bytes_sent = check_what_is_sent(case, program)
    assert bytes_sent == pytest.approx(sharded.sent_by_formula(case, gathers=1), rel=0.02)
    dense = sharded.compile_on(case, sharded.dense)
    assert bytes_sent <= sum(one.bytes for one in hlo.collectives(dense.as_text()))


def test_a_kernel_gathered_slab_by_slab_on_tpus():
    program = sharded.compile_on(EIGHT, sharded.sharded(kernel_gather="slabs"))
    assert program.memory_analysis().temp_size_in_bytes <= 160e6
    assert hlo.cycles(program.as_text()) / 1.5e9 <= 0.105
    check_what_is_sent(EIGHT, program)


def test_numbers_of_tokens_cross_the_class_axis_in_the_loop_over_tokens():
    program = sharded.compile_on(EIGHT, sharded.sharded(strategy="tokens"))
    in_loop = [one for one in hlo.collectives(program.as_text()) if one.inside]
    assert in_loop
    assert {one.kind for one in in_loop} == {"all-reduce"}
    assert max(one.shape.entries for one in in_loop) <= 2_048


def test_a_sharded_loss_on_gpus():
    program = sharded.compile_on(ON_H200S, sharded.sharded(strategy="classes"))
    assert program.memory_analysis().temp_size_in_bytes <= 900e6
    check_what_is_sent(ON_H200S, program)


@pytest.mark.thorough
@pytest.mark.parametrize(("case", "ms"), [(EIGHT, 105), (POD, 45)], ids=["8 chips", "256 chips"])
def test_the_plain_function_on_automatic_axes_of_tpus(case, ms):
    """Each device has its own tokens to do, and no logits are gathered."""
    program = sharded.compile_on(case, jaxce.linear_cross_entropy)
    assert hlo.cycles(program.as_text()) / 1.5e9 <= ms / 1e3
    gathered = [one for one in hlo.collectives(program.as_text()) if one.kind in ("all-gather", "all-to-all")]
    assert max(one.shape.bytes for one in gathered) <= 2 * kernel_bytes(case)


def test_the_report_of_a_slice():
    """As users call it: the compiler is here and the chips aren't."""
    sizes = ["--tokens", "65536", "--features", "256", "--classes", "8192"]
    options = ["--device", "tpu-v5e:2x4", "--mesh", "data=4,model=2", "--json"]
    done = subprocess.run([sys.executable, "-m", "jaxce", *sizes, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["step"]["devices"] == [{"kind": "TPU v5 lite", "platform": "tpu", "count": 8, "memory": 2**34}]
    needs = {one["name"]: one for one in found["losses"]}
    # No faster than the chip's peak allows, and not a hundred times slower.
    assert all(1 < one["seconds"] * 197e12 / one["flops"] < 100 for one in needs.values())
    assert needs["auto"]["temporaries"] == needs["classes"]["temporaries"] < needs["dense"]["temporaries"]
