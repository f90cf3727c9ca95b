"""What the compilers for a TPU v5e and an H200 make of the losses, on a machine that has neither."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxce

for module in ("libtpu", "jax_plugins", "optax"):
    if importlib.util.find_spec(module) is None:
        pytest.skip("needs the compilers of jax[tpu] and jax-cuda13-plugin", allow_module_level=True)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
compiled = pytest.importorskip("compiled", reason="needs benchmarks/ beside tests/")

pytestmark = pytest.mark.parametrize("device", ["TPU v5e", "H200"])


def temporaries(function, device, *arrays):
    """Bytes, by the compiler, of the loss with its gradients in the float arrays."""
    mesh = Mesh(np.array([compiled.device(device)]), ("x",))
    placed = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, PartitionSpec())) for s, t in arrays]
    wrt = tuple(i for i, (_, dtype) in enumerate(arrays) if dtype == jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(jax.value_and_grad(function, wrt)).lower(*placed).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"logit_softcap": 30.0}])
def test_nothing_of_the_logits_size_is_stored(device, options):
    n, c = 8192, 128_256
    loss = partial(jaxce.cross_entropy, **options)
    assert temporaries(loss, device, ((n, c), jnp.bfloat16), ((n,), jnp.int32)) <= 0.05 * 2 * n * c


def test_the_loop_over_classes_takes_little_memory(device):
    n, d, c = 8192, 4096, 128_256
    loss = partial(jaxce.linear_cross_entropy, strategy="classes")
    # The hidden states' gradient in float32 is 134 MB of them.
    assert temporaries(loss, device, ((n, d), jnp.bfloat16), ((d, c), jnp.bfloat16), ((n,), jnp.int32)) <= 0.3e9
