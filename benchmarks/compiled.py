"""What the compilers for TPUs and an H200 make of the losses, on a machine that has neither.

    pip install "jax[tpu]" jax-cuda13-plugin jax-cuda13-pjrt optax matplotlib
    python benchmarks/compiled.py --out compiled.json --plot frontier.png

Nothing runs: the figures are the compilers' own. All is in bfloat16. For `linear_cross_entropy` on a TPU: the time that
its compiler expects, as a multiple of that of the matmuls at the chip's peak, and temporary memory; `hlo.py` says how
far to trust it. On an H200: temporary memory, and what a step launches, reads, writes and multiplies. For
`cross_entropy`: temporary memory as a share of the logits, and how often arrays of their size are written and read.
Prints Markdown tables. tokamax takes part where it is installed.
"""

import argparse
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxce
from jaxce import _forms
from jaxce._report.devices import CHIPS, named, without_a_device

without_a_device()

Shape = tuple[int, int, int]  # (N, D, C)
Loss = Callable[..., Any]


DEVICES = {"TPU v5e": "tpu-v5e", "TPU v5p": "tpu-v5p", "TPU v6e": "tpu-v6e", "H200": "h200"}

ON_V5E: tuple[Shape, ...] = (
    (8_192, 4_096, 128_256),
    (32_768, 2_560, 128_256),
    (16_384, 8_192, 128_256),
    (16_384, 2_048, 32_768),
    (12_000, 3_072, 100_277),
)
ON_LARGER: Shape = (65_536, 6_144, 128_256)
ON_TPU = (*(("TPU v5e", shape) for shape in ON_V5E), ("TPU v5p", ON_LARGER), ("TPU v6e", ON_LARGER))
ON_H200: tuple[Shape, ...] = ((8_192, 4_096, 128_256), (32_768, 2_560, 128_256), (16_384, 2_048, 32_768))
WITH_OPTIONS: Shape = (8_192, 4_096, 128_256)
SHAPES = tuple(dict.fromkeys(shape for _, shape in ON_TPU))
# Logits, and their class axis.
LOGITS = (((8_192, 128_256), 1), ((65_536, 1_000), 1), ((65_536, 10), 1), ((64, 21, 256, 256), 1))


def dense_optax(hidden: Array, kernel: Array, labels: Array) -> Array:
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def dense(hidden: Array, kernel: Array, labels: Array) -> Array:
    return jaxce.cross_entropy(hidden @ kernel, labels)


def remat_scan(loss: Loss) -> Loss:
    """What trainers write: the dense loss of 2,048 tokens at a time, whose logits are made again for the gradient."""

    def scanned(hidden: Array, kernel: Array, labels: Array) -> Array:
        n, d = hidden.shape
        size = 2_048 if n % 2_048 == 0 else 2_000

        def step(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
            of_chunk = jax.checkpoint(lambda hidden, labels: size * loss(hidden, kernel, labels))
            return total + of_chunk(*chunk), None

        chunks = hidden.reshape(n // size, size, d), labels.reshape(n // size, size)
        return lax.scan(step, jnp.zeros(()), chunks)[0] / n

    return scanned


def tokamax_loss(hidden: Array, kernel: Array, labels: Array) -> Array:
    import tokamax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # or tokamax reads the command line of this script

    # The compiler expects a Pallas kernel, its default on a TPU, to cost nothing.
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, labels, kernel, reduction="mean", implementation="chunked_xla"
    )


def fused(strategy: str = "auto", **options: Any) -> Loss:
    def loss(hidden: Array, kernel: Array, labels: Array) -> Any:
        return jaxce.linear_cross_entropy(hidden, kernel, labels, strategy=strategy, **options)

    return loss


OURS = {f"`{strategy}`": fused(strategy) for strategy in ("tokens", "classes", "auto")}


def contestants() -> dict[str, Loss]:
    found = {
        "dense, optax": dense_optax,
        "dense": dense,
        "remat scan, optax": remat_scan(dense_optax),
        "remat scan": remat_scan(dense),
    }
    if importlib.util.find_spec("tokamax") is not None:
        found["tokamax, chunked"] = tokamax_loss
    return found | OURS


class Compiled(NamedTuple):
    text: str
    temporaries: int  # bytes
    jaxpr: Jaxpr


# What was compiled, by device and program, since several contestants may come to the same.
_programs: dict[tuple[str, str], tuple[str, int] | None] = {}


def compile_for(
    name: str, function: Callable[..., Any], arguments: Sequence[tuple[tuple[int, ...], Any]]
) -> Compiled | None:
    """`function` for arguments of these shapes and dtypes; None if it doesn't fit into the device's memory."""
    mesh = Mesh(np.array(named(DEVICES[name])[:1]), ("x",))
    placed = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, PartitionSpec())) for s, t in arguments]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function).trace(*placed)
        lowered = traced.lower()
        key = name, lowered.as_text()
        if key not in _programs:
            try:
                program = lowered.compile()
                _programs[key] = program.as_text(), program.memory_analysis().temp_size_in_bytes
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                _programs[key] = None
    found = _programs[key]
    return found and Compiled(*found, traced.jaxpr.jaxpr)


def of_shape(shape: Shape) -> list[tuple[tuple[int, ...], Any]]:
    """Hidden states, kernel and labels."""
    n, d, c = shape
    return [((n, d), jnp.bfloat16), ((d, c), jnp.bfloat16), ((n,), jnp.int32)]


def inner_jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from inner_jaxprs(item)


def chunk_sizes(jaxpr: Jaxpr, shape: Shape) -> Iterator[int]:
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


def show(*cells: Any) -> None:
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def head(*columns: str) -> None:
    print()
    show(*columns)
    print("|", "---|" * len(columns), sep="", flush=True)


def on_tpu(name: str, program: Compiled | None, shape: Shape, matmuls: int) -> dict[str, Any]:
    """Expected time, in ms and as a multiple of that of so many matmuls at the chip's peak, and temporaries in GB."""
    if program is None:
        return {"fits": False}
    chip = CHIPS[DEVICES[name]]
    seconds = hlo.cycles(program.text) / chip.hertz
    multiple = seconds / (matmuls * 2.0 * math.prod(shape) / chip.flops)
    return {"fits": True, "ms": 1e3 * seconds, "multiple": multiple, "temporaries_gb": program.temporaries / 1e9}


def cells(row: dict[str, Any], *, ms: bool = True, mega: bool = False) -> list[str]:
    """The multiple, the ms and the temporaries, in GB or MB."""
    if not row["fits"]:
        return ["doesn't fit", *([""] if ms else []), ""]
    temporaries = f"{1e3 * row['temporaries_gb']:.1f}" if mega else f"{row['temporaries_gb']:.2f}"
    return [f"{row['multiple']:.2f}", *([f"{row['ms']:.0f}"] if ms else []), temporaries]


def gradients_on_tpu(shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    rows = []
    head("compiled for", "(N, D, C)", "loss and gradients", "/ 3 matmuls", "ms", "temporaries, GB")
    for name, shape in ON_TPU:
        for label, loss in contestants().items() if shape in shapes else ():
            program = compile_for(name, jax.value_and_grad(loss, (0, 1)), of_shape(shape))
            row = on_tpu(name, program, shape, matmuls=3)
            rows.append({"device": name, "shape": shape, "contestant": label, **row})
            show(name, shape, label, *cells(row))
    return rows


def losses_on_tpu(shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    rows = []
    head("compiled for", "(N, D, C)", "loss alone", "/ 1 matmul", "ms", "temporaries, MB")
    for name, shape in ON_TPU:
        for label, loss in (("dense", dense), ("`auto`", OURS["`auto`"])) if shape in shapes else ():
            program = compile_for(name, loss, of_shape(shape))
            row = on_tpu(name, program, shape, matmuls=1)
            rows.append({"device": name, "shape": shape, "contestant": label, **row})
            show(name, shape, label, *cells(row, mega=True))
    return rows


class Case(NamedTuple):
    """A loss with an option, its arguments, and those whose gradients are wanted."""

    loss: Loss
    arguments: list[tuple[tuple[int, ...], Any]]
    wanted: tuple[int, ...] = (0, 1)
    stats: bool = False


def with_options(shape: Shape) -> dict[str, Case]:
    n, d, c = shape
    hidden, kernel, labels = of_shape(shape)
    plain = [hidden, kernel, labels]

    def with_array(hidden: Array, kernel: Array, labels: Array, array: Array, *, option: str) -> Array:
        return jaxce.linear_cross_entropy(hidden, kernel, labels, **{option: array})

    def per_token(hidden: Array, kernel: Array, labels: Array, weights: Array) -> Array:
        return (weights * jaxce.linear_cross_entropy(hidden, kernel, labels, reduction="none")).sum()

    return {
        "plain": Case(fused(), plain),
        "`label_smoothing`": Case(fused(label_smoothing=0.1), plain),
        "`weight`": Case(partial(with_array, option="weight"), [*plain, ((c,), jnp.float32)]),
        "`z_loss`": Case(fused(z_loss=1e-4), plain),
        "`logit_softcap`": Case(fused(logit_softcap=30.0), plain),
        "`bias`, its gradient too": Case(partial(with_array, option="bias"), [*plain, ((c,), jnp.bfloat16)], (0, 1, 3)),
        "class probabilities": Case(fused(), [hidden, kernel, ((n, c), jnp.bfloat16)]),
        "`transpose_kernel`": Case(fused(transpose_kernel=True), [hidden, ((c, d), jnp.bfloat16), labels]),
        "`num_classes`, of 256 more": Case(fused(num_classes=c - 256), plain),
        "`return_stats`": Case(fused(return_stats=True), plain, stats=True),
        '`reduction="none"`, weighted': Case(per_token, [*plain, ((n,), jnp.float32)]),
    }


def numbers_of_tokens(*names: str, **options: Any) -> Loss:
    """A weighting of numbers of `linear_token_log_probs`, for each token its own."""

    def weighted(hidden: Array, kernel: Array, labels: Array, weights: Array) -> Array:
        stats = jaxce.linear_token_log_probs(hidden, kernel, labels, **options)
        return sum((weights * getattr(stats, name)).sum() for name in names)

    return weighted


NUMBERS = {
    "`log_prob`": numbers_of_tokens("log_prob"),
    "`log_prob`, `entropy`": numbers_of_tokens("log_prob", "entropy"),
    "all three, at a temperature": numbers_of_tokens("log_prob", "log_z", "entropy", temperature=0.7),
}


def log_probs_on_tpu(shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """Four matmuls are what the numbers and their gradients need: the logits twice, and two for the gradients."""
    name, rows = "TPU v5e", []
    columns = "value and gradients / 4 matmuls", "temporaries, GB", "value / 1 matmul", "temporaries, MB"
    head(name, "`linear_token_log_probs`", *columns)
    for shape in ON_V5E:
        for label, function in NUMBERS.items() if shape in shapes else ():
            arguments = [*of_shape(shape), ((shape[0],), jnp.float32)]
            gradient = jax.value_and_grad(function, (0, 1))
            trained = on_tpu(name, compile_for(name, gradient, arguments), shape, matmuls=4)
            evaluated = on_tpu(name, compile_for(name, function, arguments), shape, matmuls=1)
            rows.append({"shape": shape, "numbers": label, "value and gradients": trained, "value": evaluated})
            show(shape, label, *cells(trained, ms=False), *cells(evaluated, ms=False, mega=True))
    return rows


def options_on_tpu(shape: Shape) -> list[dict[str, Any]]:
    """What each option adds, with "auto"."""
    name, rows = "TPU v5e", []
    head(f"{name}, {shape}", "gradients / 3 matmuls", "temporaries, GB", "loss alone / 1 matmul", "temporaries, MB")
    for label, case in with_options(shape).items():
        gradient = jax.value_and_grad(case.loss, case.wanted, has_aux=case.stats)
        trained = on_tpu(name, compile_for(name, gradient, case.arguments), shape, matmuls=3)
        evaluated = on_tpu(name, compile_for(name, case.loss, case.arguments), shape, matmuls=1)
        rows.append({"option": label, "loss and gradients": trained, "loss": evaluated})
        show(label, *cells(trained, ms=False), *cells(evaluated, ms=False, mega=True))
    return rows


def gradients_on_h200(shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """Of each loop's body; a dense loss, which has no loop, is one body."""
    rows = []
    head(
        "H200, (N, D, C)",
        "loss and gradients",
        "temporaries, GB",
        "kernels",
        "loops' turns",
        "bytes a logit written / read",
        "logits written / read",
        "matmuls, (M×K×N)",
    )
    chosen = {label: loss for label, loss in contestants().items() if label not in ("dense, optax", "tokamax, chunked")}
    for shape in ON_H200:
        for label, loss in chosen.items() if shape in shapes else ():
            program = compile_for("H200", jax.value_and_grad(loss, (0, 1)), of_shape(shape))
            if program is None:
                rows.append({"shape": shape, "contestant": label, "fits": False})
                show(shape, label, "doesn't fit", "", "", "", "", "")
                continue
            row = on_h200(program, shape)
            rows.append({"shape": shape, "contestant": label, "fits": True, **row})
            show(shape, label, *h200_cells(row))
    return rows


def on_h200(program: Compiled, shape: Shape) -> dict[str, Any]:
    entries = max(chunk_sizes(program.jaxpr, shape))
    loops = hlo.loop_traffic(program.text, entries)
    found = hlo.matmuls(program.text)
    if not loops:
        parsed = hlo.parse(program.text)
        loops, found = [hlo.traffic(program.text, entries)], [list(hlo.matmuls_in(parsed, parsed.entry))]
    return {
        "temporaries_gb": program.temporaries / 1e9,
        "kernels": hlo.kernels(program.text),
        "chunk_logits": entries,
        "loops": [
            {**loop._asdict(), "matmuls": [str(matmul) for matmul in inside]}
            for loop, inside in zip(loops, found, strict=True)
        ],
    }


def h200_cells(row: dict[str, Any]) -> tuple[Any, ...]:
    entries, loops = row["chunk_logits"], row["loops"]
    return (
        f"{row['temporaries_gb']:.2f}",
        row["kernels"],
        "; ".join(str(loop["times"]) for loop in loops),
        "; ".join(f"{loop['written'] / entries:.1f} / {loop['read'] / entries:.1f}" for loop in loops),
        "; ".join(f"{loop['logits_written']} / {loop['logits_read']}" for loop in loops),
        "; ".join(", ".join(loop["matmuls"]) for loop in loops),
    )


def optax_loss(axis: int) -> Loss:
    def loss(logits: Array, labels: Array) -> Array:
        x = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(x, labels, axis=axis).mean()

    return loss


def of_logits() -> list[dict[str, Any]]:
    """`cross_entropy`; and with a soft cap on the H200, with and without the form for it."""
    rows = []
    head("compiled for", "logits", "", "", "temporaries", "logits written / read")
    for name in ("H200", "TPU v5e"):
        for shape, axis in LOGITS:
            for gradient in (False, True):
                ours = partial(jaxce.cross_entropy, axis=axis)
                rows.append(logits_row(name, "jaxce", ours, shape, axis, gradient))
                rows.append(logits_row(name, "optax", optax_loss(axis), shape, axis, gradient))
    shape, axis = LOGITS[0]
    capped = partial(jaxce.cross_entropy, logit_softcap=30.0)
    forms = _forms.GPU_SUMS
    without = [form for form in forms if form is not _forms.gpu_soft_cap]
    for label, chosen in (("soft cap", forms), ("soft cap, without gpu_soft_cap", without)):
        jax.clear_caches()
        _forms.GPU_SUMS = chosen
        rows.append(logits_row("H200", f"jaxce, {label}", capped, shape, axis, gradient=True))
    _forms.GPU_SUMS = forms
    return rows


def logits_row(name: str, label: str, loss: Loss, shape: tuple[int, ...], axis: int, gradient: bool) -> dict[str, Any]:
    arguments = ((shape, jnp.bfloat16), (shape[:axis] + shape[axis + 1 :], jnp.int32))
    program = compile_for(name, jax.value_and_grad(loss) if gradient else loss, arguments)
    size = math.prod(shape)
    passes = hlo.traffic(program.text, size)
    share = program.temporaries / (2 * size)
    what = "loss and gradient" if gradient else "loss"
    show(name, shape, what, label, f"{share:.1%}", f"{passes.logits_written} / {passes.logits_read}")
    return {
        "device": name,
        "logits": shape,
        "of": what,
        "contestant": label,
        "temporaries_share": share,
        "logits_written": passes.logits_written,
        "logits_read": passes.logits_read,
    }


# What is drawn, and how.
DRAWN = {
    "dense": ("dense", "C7", "s"),
    "remat scan, optax": ("scan over 2,048 tokens, checkpointed, optax", "C1", "D"),
    "remat scan": ("the same with 16-bit logits and jaxce", "C3", "D"),
    "`tokens`": ('jaxce, "tokens"', "C2", "^"),
    "`classes`": ('jaxce, "classes" and "auto"', "C0", "o"),
}


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Expected time against temporaries on a v5e, a panel for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [row for row in rows if row["device"] == "TPU v5e" and row["contestant"] in DRAWN]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    height = -(-(len(shapes) + 1) // 3)
    figure, axes = plt.subplots(height, 3, figsize=(12, 3.6 * height), layout="constrained", squeeze=False)
    for ax, shape in zip(axes.flat, shapes, strict=False):
        here = [row for row in rows if row["shape"] == shape]
        for row in here:
            if row["fits"]:
                _, color, marker = DRAWN[row["contestant"]]
                ax.plot(row["temporaries_gb"], row["ms"], marker, color=color, markersize=10)
        missing = [DRAWN[row["contestant"]][0] for row in here if not row["fits"]]
        n, d, c = shape
        ax.set_title(f"N = {n:,}, D = {d:,}, C = {c:,}", fontsize=10)
        if missing:
            ax.text(0.97, 0.03, f"{', '.join(missing)}: doesn't fit", transform=ax.transAxes, ha="right", fontsize=9)
        ax.set_xscale("log")
        ax.set(xlim=(0.02, 20), ylim=(0, 1.2 * max(row["ms"] for row in here if row["fits"])))
        ax.set(xlabel="temporaries (GB)", ylabel="loss and gradients (ms)")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    legend = axes.flat[len(shapes)]
    for label, color, marker in DRAWN.values():
        legend.plot([], [], marker, color=color, markersize=10, label=label)
    legend.legend(loc="center", frameon=False, title="as a TPU v5e's compiler expects,\nnothing measured")
    for ax in axes.flat[len(shapes) :]:
        ax.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def versions() -> dict[str, str]:
    found = {}
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "optax", "tokamax"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def shape_of(text: str) -> Shape:
    shape = tuple(int(size) for size in text.split(","))
    if shape not in SHAPES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {' '.join(','.join(map(str, s)) for s in SHAPES)}")
    return shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw the times and temporaries on a TPU v5e to this picture")
    parser.add_argument(
        "--shapes", type=shape_of, nargs="+", default=SHAPES, metavar="N,D,C", help="only these (default: all)"
    )
    args = parser.parse_args()
    results = {"versions": versions(), "linear_tpu": gradients_on_tpu(args.shapes)}
    if args.plot:
        draw(args.plot, results["linear_tpu"])
    results["linear_tpu_loss_alone"] = losses_on_tpu(args.shapes)
    results["linear_tpu_options"] = options_on_tpu(WITH_OPTIONS) if WITH_OPTIONS in args.shapes else []
    results["log_probs_tpu"] = log_probs_on_tpu(args.shapes)
    results["linear_h200"] = gradients_on_h200(args.shapes)
    results["cross_entropy"] = of_logits()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
