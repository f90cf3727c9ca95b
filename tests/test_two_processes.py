"""A loss on a mesh of two processes of four devices each, which send each other numbers over loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from helpers import cases

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, process, strategy = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=process)
assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)

import jaxce

rng = np.random.default_rng(0)
hidden = rng.normal(size=(8, 6, 16)).astype(np.float32)
kernel = rng.normal(size=(16, 24)).astype(np.float32) / 4
labels = rng.integers(0, 23, (8, 6)).astype(np.int32)
labels[1, 2] = -100
options = {"num_classes": 23, "label_smoothing": 0.1, "z_loss": 0.01}
want = jax.jit(jax.value_and_grad(lambda h, k: jaxce.linear_cross_entropy(h, k, labels, **options), (0, 1)))
want = jax.tree.map(np.asarray, want(hidden, kernel))

# The classes lie across the processes, and so do the tokens.
for axes in (("model", "data"), ("data", "model")):
    shape = {"data": 4, "model": 2}
    mesh = jax.make_mesh(tuple(shape[axis] for axis in axes), axes, axis_types=(AxisType.Auto,) * 2)
    lie = jaxce.OnMesh(mesh=mesh, hidden=P("data"), kernel=P("data", "model"))

    def place(array, spec):
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

    def loss(hidden, kernel, labels):
        return jaxce.linear_cross_entropy(
            hidden, kernel, labels, sharding=lie, strategy=strategy, chunk_size=5, **options
        )

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    got = step(place(hidden, P("data")), place(kernel, P("data", "model")), place(labels, P("data")))
    for ours, whole in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(whole).max() > 0
        for shard in ours.addressable_shards:
            np.testing.assert_allclose(shard.data, whole[shard.index], rtol=1e-5, atol=1e-6)
print("as on one process")
"""


@cases("strategy", [], ["classes", "tokens"])
def test_classes_and_tokens_of_two_processes(strategy):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(process), strategy],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all("as on one process" in output for output in outputs)
