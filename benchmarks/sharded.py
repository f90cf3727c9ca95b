"""What the compilers for TPUs and H200s make of the losses on a mesh, on a machine that has neither.

    pip install "jax[tpu]" jax-cuda13-plugin jax-cuda13-pjrt
    python benchmarks/sharded.py --out sharded.json

Nothing runs. A language model's last layer in bfloat16, loss and both gradients: 4,096 features, two sequences of
4,096 tokens for each device along `data`; the kernel's features are sharded over `data` and its classes over `model`.
For each mesh: temporary memory of a device, on a TPU the time that its compiler expects without what the network takes,
and the bytes that each device sends, counted in the compiled program as `hlo.py` says. Prints a Markdown table, with
the formula of the bytes beside the count.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import compiled  # before JAX, whose environment it sets
import hlo
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxce
from jaxce._report.devices import CHIPS, named

FEATURES, LENGTH, SEQUENCES = 4_096, 4_096, 2
CLASSES = (128_256, 262_144)
OF_TOKENS, OF_KERNEL = PartitionSpec("data"), PartitionSpec("data", "model")
# Chips, and how many along `data` and `model`.
MESHES = (
    ("TPU v5e", "tpu-v5e:2x4", 4, 2),
    ("TPU v5e", "tpu-v5e:8x8", 16, 4),
    ("TPU v5e", "tpu-v5e:16x16", 32, 8),
    ("TPU v5p", "tpu-v5p:8x8x16", 128, 8),
    ("H200", "h200:8", 4, 2),
)


def dense(hidden: Array, kernel: Array, labels: Array) -> Array:
    """The logits of all tokens, laid out by XLA's partitioner."""
    return jaxce.cross_entropy(hidden @ kernel, labels)


def remat_scan(hidden: Array, kernel: Array, labels: Array) -> Array:
    """The dense loss of 1,024 positions of each sequence at a time, made again for the gradient."""
    size = 1_024

    def step(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        of_chunk = jax.checkpoint(lambda hidden, labels: jaxce.cross_entropy(hidden @ kernel, labels, reduction="sum"))
        return total + of_chunk(*chunk), None

    def chunks(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)

    return lax.scan(step, jnp.zeros(()), (chunks(hidden), chunks(labels)))[0] / labels.size


def sharded(
    of_tokens: PartitionSpec = OF_TOKENS, of_kernel: PartitionSpec = OF_KERNEL, kernel_gather: Any = "whole", **how: Any
) -> Callable[..., Array]:
    lie = jaxce.OnMesh(hidden=of_tokens, kernel=of_kernel, kernel_gather=kernel_gather)
    return partial(jaxce.linear_cross_entropy, sharding=lie, **how)


CONTESTANTS: dict[str, Callable[..., Array]] = {
    "dense, partitioned": dense,
    "remat scan, partitioned": remat_scan,
    "`linear_cross_entropy`, partitioned": jaxce.linear_cross_entropy,
    "`sharding`": sharded(),
    '`sharding`, `kernel_gather="slabs"`': sharded(kernel_gather="slabs"),
}


class Case(NamedTuple):
    device: str
    chips: str
    data: int
    model: int
    classes: int
    of_tokens: PartitionSpec = OF_TOKENS
    of_kernel: PartitionSpec = OF_KERNEL


# On 4 × 2 devices, eight sequences.
LAYOUTS = {
    "data parallel": (PartitionSpec(("data", "model")), PartitionSpec()),
    "FSDP": (PartitionSpec(("data", "model")), PartitionSpec(("data", "model"))),
    "FSDP by classes": (PartitionSpec(("data", "model")), PartitionSpec(None, ("data", "model"))),
    "tensor parallel": (PartitionSpec(), PartitionSpec(None, ("data", "model"))),
    "data and tensor parallel": (PartitionSpec("data"), PartitionSpec(None, "model")),
    "FSDP and tensor parallel": (PartitionSpec("data"), PartitionSpec("data", "model")),
    "FSDP, sequence and tensor parallel": (PartitionSpec("data", "model"), PartitionSpec("data", "model")),
}


def mesh_of(case: Case) -> Mesh:
    devices = named(case.chips)[: case.data * case.model]
    return Mesh(np.array(devices).reshape(case.data, case.model), ("data", "model"))


def compile_on(case: Case, loss: Callable[..., Array]) -> Any:
    """The loss with both gradients, which lie as the hidden states and the kernel do."""
    mesh = mesh_of(case)
    sequences = SEQUENCES * case.data

    def shaped(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    arguments = (
        shaped((sequences, LENGTH, FEATURES), jnp.bfloat16, case.of_tokens),
        shaped((FEATURES, case.classes), jnp.bfloat16, case.of_kernel),
        shaped((sequences, LENGTH), jnp.int32, case.of_tokens),
    )
    out = None, tuple(argument.sharding for argument in arguments[:2])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=out).lower(*arguments).compile()


def sent_by_formula(case: Case, *, gathers: int = 1) -> float:
    """Bytes that a device sends, if it gathers what it lacks of the kernel so often; bfloat16, ring by ring."""
    mesh, tokens = {"data": case.data, "model": case.model}, SEQUENCES * case.data * LENGTH
    hidden, (features, classes) = (
        axes_in(case.of_tokens),
        (axes_in(PartitionSpec(e)) for e in (*case.of_kernel, None, None)[:2]),
    )
    both = hidden & classes
    few_tokens = tokens / size(mesh, hidden - both) <= case.classes / size(mesh, classes - both)
    gathered_tokens, gathered_classes = (both, set()) if few_tokens else (set(), both)
    of_tokens, of_classes = size(mesh, hidden - gathered_tokens), size(mesh, classes - gathered_classes)
    # The hidden states that a device works on and, of each token, a maximum and three sums in float32.
    states, numbers = 2 * FEATURES * tokens / of_tokens, 4 * 4 * tokens / of_tokens
    kernel, lacks = 2 * FEATURES * case.classes / of_classes, features | gathered_classes
    sent = (gathers + 1) * share(mesh, lacks) * kernel
    # What is the same on several devices is summed on all of them.
    sent += 2 * share(mesh, (hidden - gathered_tokens) - lacks) * kernel / size(mesh, lacks)
    sent += 2 * share(mesh, classes - gathered_classes) * numbers
    sent += 2 * share(mesh, gathered_tokens) * states
    return sent + 2 * share(mesh, (classes - gathered_classes) - gathered_tokens) * states / size(mesh, gathered_tokens)


def axes_in(spec: PartitionSpec) -> set[str]:
    return {axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}


def size(mesh: dict[str, int], axes: set[str]) -> int:
    return math.prod(mesh[axis] for axis in axes)


def share(mesh: dict[str, int], axes: set[str]) -> float:
    """Of an array, what a device sends in a ring along these axes to gather or to scatter it."""
    return 1 - 1 / size(mesh, axes)


def measure(case: Case, loss: Callable[..., Array]) -> dict[str, Any]:
    try:
        program = compile_on(case, loss)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False}
    text = program.as_text()
    sent = hlo.collectives(text)
    chip = CHIPS[compiled.DEVICES[case.device]]
    return {
        "fits": True,
        "temporaries_mb": program.memory_analysis().temp_size_in_bytes / 1e6,
        "ms": 1e3 * hlo.cycles(text) / chip.hertz if chip.hertz else None,
        "sent_mb": sum(one.bytes for one in sent) / 1e6,
        "sent_by_kind_mb": {
            kind: sum(one.bytes for one in sent if one.kind == kind) / 1e6 for kind in {one.kind for one in sent}
        },
    }


def of_meshes(chips: list[int] | None) -> list[dict[str, Any]]:
    rows = []
    compiled.head("devices", "data × model", "C", "loss and gradients", "temporaries, MB", "ms", "sent, MB", "formula")
    for device, chips_there, data, model in MESHES:
        for classes in CLASSES if not chips or data * model in chips else ():
            case = Case(device, chips_there, data, model, classes)
            for label, loss in CONTESTANTS.items():
                gathers = {"`sharding`": 1, '`sharding`, `kernel_gather="slabs"`': 2}.get(label)
                formula = None if gathers is None else sent_by_formula(case, gathers=gathers) / 1e6
                row = {"contestant": label, **measure(case, loss), "formula_mb": formula}
                rows.append(
                    {**case._asdict(), "of_tokens": str(case.of_tokens), "of_kernel": str(case.of_kernel), **row}
                )
                compiled.show(f"{data * model} {device}", f"{data} × {model}", f"{classes:,}", label, *cells(row))
    return rows


def of_layouts() -> list[dict[str, Any]]:
    """What the loss sends, layout by layout."""
    rows = []
    head = "temporaries, MB", "ms", "sent, MB", "formula"
    compiled.head("4 × 2 TPU v5e, C = 128,256", "hidden", "kernel", *head)
    for label, (of_tokens, of_kernel) in LAYOUTS.items():
        case = Case("TPU v5e", "tpu-v5e:2x4", 4, 2, 128_256, of_tokens, of_kernel)
        found = measure(case, sharded(of_tokens, of_kernel))
        row = {**found, "formula_mb": sent_by_formula(case) / 1e6}
        rows.append({"layout": label, "of_tokens": str(of_tokens), "of_kernel": str(of_kernel), **row})
        compiled.show(label, f"`{of_tokens}`", f"`{of_kernel}`", *cells(row))
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    formula = "" if row["formula_mb"] is None else f"{row['formula_mb']:,.0f}"
    if not row["fits"]:
        return ["doesn't fit", "", "", formula]
    ms = "" if row["ms"] is None else f"{row['ms']:.0f}"
    return [f"{row['temporaries_mb']:,.0f}", ms, f"{row['sent_mb']:,.0f}", formula]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--chips", type=int, nargs="+", help="only meshes of so many devices (default: all)")
    args = parser.parse_args()
    print('"partitioned": on automatic axes. There, pass the specs as sharding=jaxce.OnMesh(...).')
    results = {"versions": compiled.versions(), "meshes": of_meshes(args.chips), "layouts": []}
    if not args.chips or 8 in args.chips:
        results["layouts"] = of_layouts()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
