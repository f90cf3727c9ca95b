"""What the compilers for a TPU v5e and an H200 make of the losses, on a machine that has neither.

    pip install "jax[tpu]" jax-cuda13-plugin jax-cuda13-pjrt optax rich
    python benchmarks/compiled.py

All in bfloat16. For `linear_cross_entropy` with both gradients: temporary memory, matmuls as flops over 2NDC, the
dtypes of their operands, and how often an array of a chunk's logits is written and read in the generated code. For
`cross_entropy`: temporary memory as a share of the logits, and how often arrays of their size are written and read.
Prints two Markdown tables.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# There is no card to try kernels out on.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxce
from jaxce import _forms

SHAPES = ((8_192, 4_096, 128_256), (32_768, 2_560, 128_256))
# Logits, and their class axis.
LOGITS = (((8_192, 128_256), 1), ((65_536, 1_000), 1), ((65_536, 10), 1), ((64, 21, 256, 256), 1))

# The card's published limits, in the form that XLA reads.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def dense(hidden: Array, kernel: Array, labels: Array) -> Array:
    return jaxce.cross_entropy(hidden @ kernel, labels)


def fused(strategy: str) -> Callable[..., Array]:
    def loss(hidden: Array, kernel: Array, labels: Array) -> Array:
        return jaxce.linear_cross_entropy(hidden, kernel, labels, strategy=strategy)

    return loss


def device(name: str) -> Any:
    if name == "H200":
        options = {"platform": "cuda", "topology_name": "", "target_config": H200, "topology": "1x1x1"}
    else:
        options = {"platform": "tpu", "topology_name": "v5e:2x2"}
    return topologies.get_topology_desc(**options).devices[0]


def inner_jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from inner_jaxprs(item)


def matmuls(jaxpr: Jaxpr) -> Iterator[tuple[float, str]]:
    """Flops and operand dtypes of every matmul, those of loops as often as they run."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted])
            yield 2.0 * eqn.outvars[0].aval.size * depth, " × ".join(v.aval.dtype.name for v in eqn.invars)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in inner_jaxprs(value):
                yield from ((times * flops, dtypes) for flops, dtypes in matmuls(inner))


def instructions(computation: str) -> Iterator[tuple[str, list[int], str, str, str]]:
    """Name, sizes of the outputs, operation, operands and the whole line of each instruction."""
    for line in computation.splitlines():
        match = re.match(r"\s*(?:ROOT )?(%\S+) = (.*?) (\w[\w-]*)\((.*?)\)", line)
        if match:
            name, shape, operation, operands = match.groups()
            sizes = [
                int(np.prod([int(d) for d in dims.split(",") if d])) for dims in re.findall(r"\[([\d,]*)\]", shape)
            ]
            yield name, sizes, operation, operands, line


def reduces(computation: str, entries: int) -> bool:
    """Whether an array of so many entries is reduced; a gather from it takes an entry a row."""
    large = {name for name, sizes, *_ in instructions(computation) if entries in sizes}
    return any(
        operation == "reduce" and large & set(re.findall(r"%[\w.-]+", operands))
        for _, _, operation, operands, _ in instructions(computation)
    )


def passes(hlo: str, entries: int) -> tuple[int, int]:
    """How often arrays of so many entries are written and read, outside of fusions; loops count once."""
    views = ("parameter", "get-tuple-element", "bitcast")
    written = read = 0
    computations = re.split(r"\n(?=%|ENTRY)", hlo)
    gathers = {text.split()[0] for text in computations if " gather(" in text and not reduces(text, entries)}
    for computation in computations:
        if re.match(r"%(\S*fused|\S*_computation|wrapped)", computation):
            continue
        large = {}
        for name, sizes, operation, operands, line in instructions(computation):
            if operation in ("tuple", "while", "constant"):
                continue
            called = re.search(r"calls=(%[\w.-]+)", line)
            if operation not in views:
                if not (called and called.group(1) in gathers):
                    read += sum(operand in large for operand in re.findall(r"%[\w.-]+", operands))
                written += sizes.count(entries)
            if entries in sizes:
                large[name] = True
    return written, read


def row(name: str, label: str, loss: Callable[..., Array], shape: tuple[int, int, int]) -> str:
    n, d, c = shape
    mesh = Mesh(np.array([device(name)]), ("x",))
    placed = NamedSharding(mesh, PartitionSpec())
    arguments = [
        jax.ShapeDtypeStruct(s, t, sharding=placed)
        for s, t in (((n, d), jnp.bfloat16), ((d, c), jnp.bfloat16), ((n,), jnp.int32))
    ]
    gradient = jax.value_and_grad(loss, (0, 1))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(gradient).lower(*arguments).compile()
    jaxpr = jax.make_jaxpr(gradient)(*arguments).jaxpr
    found = list(matmuls(jaxpr))
    flops = sum(f for f, _ in found) / (2 * n * d * c)
    written, read = passes(compiled.as_text(), max(chunk_sizes(jaxpr, shape)))
    temp = compiled.memory_analysis().temp_size_in_bytes / 1e9
    operands = ", ".join(sorted({dtypes for _, dtypes in found}))
    return f"| {name} | {shape} | {label} | {temp:.2f} | {flops:.1f} | {operands} | {written} / {read} |"


def optax_loss(axis: int) -> Callable[..., Array]:
    def loss(logits: Array, labels: Array) -> Array:
        x = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(x, labels, axis=axis).mean()

    return loss


def logits_row(
    name: str, label: str, loss: Callable[..., Array], shape: tuple[int, ...], axis: int, gradient: bool
) -> str:
    mesh = Mesh(np.array([device(name)]), ("x",))
    placed = NamedSharding(mesh, PartitionSpec())
    logits = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed)
    labels = jax.ShapeDtypeStruct(shape[:axis] + shape[axis + 1 :], jnp.int32, sharding=placed)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(jax.value_and_grad(loss) if gradient else loss).lower(logits, labels).compile()
    written, read = passes(compiled.as_text(), logits.size)
    temp = compiled.memory_analysis().temp_size_in_bytes / (2 * logits.size)
    what = "loss and gradient" if gradient else "loss"
    return f"| {name} | {shape} | {what} | {label} | {temp:.1%} | {written} / {read} |"


def chunk_sizes(jaxpr: Jaxpr, shape: tuple[int, int, int]) -> Iterator[int]:
    """Entries of the logits that one step of a loop makes: the output of the matmul over all D features."""
    n, d, c = shape
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            out = eqn.outvars[0].aval
            if eqn.invars[0].aval.shape[contracted[0]] == d and (out.shape[0] == n or out.shape[1] == c):
                yield out.size
        for value in eqn.params.values():
            for inner in inner_jaxprs(value):
                yield from chunk_sizes(inner, shape)


def main() -> None:
    print("| compiled for | (N, D, C) | | temporaries, GB | matmuls | operands | logits written / read |")
    print("|---|---|---|---|---|---|---|")
    for name in ("H200", "TPU v5e"):
        for shape in SHAPES:
            for label, loss in (("dense", dense), ("`tokens`", fused("tokens")), ("`classes`", fused("classes"))):
                try:
                    print(row(name, label, loss, shape), flush=True)
                except jax.errors.JaxRuntimeError as error:
                    print(f"| {name} | `{shape}` | {label} | doesn't fit: {str(error).splitlines()[0][:80]} | | | |")
    print("\n| compiled for | logits | | | temporaries | logits written / read |")
    print("|---|---|---|---|---|---|")
    for name in ("H200", "TPU v5e"):
        for shape, axis in LOGITS:
            for gradient in (False, True):
                ours = partial(jaxce.cross_entropy, axis=axis)
                print(logits_row(name, "jaxce", ours, shape, axis, gradient), flush=True)
                print(logits_row(name, "optax", optax_loss(axis), shape, axis, gradient), flush=True)
    shape, axis = LOGITS[0]
    capped = partial(jaxce.cross_entropy, logit_softcap=30.0)
    for label, forms in (("soft cap", _forms.GPU_SUMS), ("soft cap, without gpu_soft_cap", [])):
        jax.clear_caches()
        _forms.GPU_SUMS = forms
        print(logits_row("H200", f"jaxce, {label}", capped, shape, axis, gradient=True), flush=True)


if __name__ == "__main__":
    main()
