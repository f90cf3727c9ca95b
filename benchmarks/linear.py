"""`jaxce.linear_cross_entropy` against dense losses and other fused ones: time, memory and error.

    python benchmarks/linear.py --out linear.json --plot linear.png

Loss with both gradients; float32 on a CPU, bfloat16 and larger shapes on a GPU. Times are measured in turn in one run
and given as ratios to three plain matmuls of the same shape; memory is the compiler's figure for temporaries, and for
PyTorch on a GPU its allocator's; the error is that of the kernel's gradient against float64. Contestants that aren't
installed, or can't run on the device, are left out; those that fail are named with what they said.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# PyTorch needs its share of a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import harness
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from matplotlib.ticker import NullFormatter, NullLocator
from tqdm import tqdm

import jaxce

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Shape = tuple[int, int, int]  # (N, D, C)


class Suite(NamedTuple):
    dtype: str
    targets: tuple[Shape, ...]
    over_classes: tuple[Shape, ...]
    over_tokens: tuple[Shape, ...]


CPU = Suite(
    "float32",
    targets=((2048, 256, 32_000), (1024, 512, 128_256)),
    over_classes=tuple((1024, 256, c) for c in (4_096, 16_384, 65_536)),
    over_tokens=tuple((n, 256, 16_384) for n in (256, 1024, 4_096)),
)
GPU = Suite(
    "bfloat16",
    targets=((32_768, 2_560, 128_256), (8_192, 4_096, 128_256)),
    over_classes=tuple((8_192, 2_048, c) for c in (8_192, 32_768, 131_072, 262_144)),
    over_tokens=tuple((n, 2_048, 131_072) for n in (1_024, 8_192, 32_768)),
)
ERROR_SHAPE = (1024, 64, 4_096)


def dense_optax(hidden: Array, kernel: Array, labels: Array) -> Array:
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def fused(strategy: str) -> Callable[..., Array]:
    def loss(hidden: Array, kernel: Array, labels: Array) -> Array:
        return jaxce.linear_cross_entropy(hidden, kernel, labels, strategy=strategy)

    return loss


def tokamax_loss(hidden: Array, kernel: Array, labels: Array) -> Array:
    import tokamax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # or tokamax reads the command line of this script

    return tokamax.linear_softmax_cross_entropy_loss(hidden, labels, kernel, reduction="mean")


def three_matmuls(hidden: Array, kernel: Array, dlogits: Array) -> tuple[Array, Array, Array]:
    return hidden @ kernel, dlogits @ kernel.T, hidden.T @ dlogits


class Problem(NamedTuple):
    """Logits of order 1, the same for every contestant."""

    hidden: np.ndarray
    kernel: np.ndarray
    labels: np.ndarray
    dtype: str

    @staticmethod
    def of(shape: Shape, dtype: str) -> "Problem":
        n, d, c = shape
        random = np.random.default_rng(0)
        hidden = random.normal(size=(n, d)).astype(np.float32)
        kernel = (random.normal(size=(d, c)) / np.sqrt(d)).astype(np.float32)
        return Problem(hidden, kernel, random.integers(0, c, n).astype(np.int32), dtype)

    def as_jax(self) -> tuple[Array, Array, Array]:
        return (
            jnp.asarray(self.hidden, self.dtype),
            jnp.asarray(self.kernel, self.dtype),
            jnp.asarray(self.labels),
        )


# What makes a contestant ready to run. Its `run()` gives the loss, and the gradients of the hidden states and kernel.
Contestant = Callable[[Problem], harness.Timed]


def with_jax(loss: Callable[..., Array]) -> Contestant:
    return lambda problem: harness.compiled(jax.value_and_grad(loss, (0, 1)), *problem.as_jax())


def floor(problem: Problem) -> harness.Timed:
    hidden, kernel, labels = problem.as_jax()
    dlogits = jnp.full((labels.size, kernel.shape[1]), 1e-3, hidden.dtype)
    return harness.compiled(three_matmuls, hidden, kernel, dlogits)


def with_torch(loss: Callable[..., Any]) -> Contestant:
    """A loss of torch tensors: hidden (N, D), weight (C, D) and labels (N,)."""

    def prepare(problem: Problem) -> harness.Timed:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, problem.dtype)
        hidden = torch.tensor(problem.hidden).to(device, dtype).requires_grad_()
        weight = torch.tensor(problem.kernel).T.contiguous().to(device, dtype).requires_grad_()
        labels = torch.tensor(problem.labels, dtype=torch.int64, device=device)

        def run() -> tuple[Any, tuple[Any, Any]]:
            hidden.grad = weight.grad = None
            value = loss(hidden, weight, labels)
            value.backward()
            if device == "cuda":
                torch.cuda.synchronize()
            return value.detach(), (hidden.grad, weight.grad.T)

        if device == "cpu":
            return harness.Timed(run, rest=harness.THREADS_REST)
        run()
        torch.cuda.reset_peak_memory_stats()
        kept = torch.cuda.memory_allocated()  # the inputs and their gradients
        run()
        return harness.Timed(run, torch.cuda.max_memory_allocated() - kept)

    return prepare


def torch_dense(hidden: Any, weight: Any, labels: Any) -> Any:
    return importlib.import_module("torch").nn.functional.linear_cross_entropy(hidden, weight, labels)


def torch_chunked(hidden: Any, weight: Any, labels: Any) -> Any:
    nn = importlib.import_module("torch").nn
    return nn.functional.linear_cross_entropy(hidden, weight, labels, options=nn.LinearCrossEntropyOptions())


def liger(hidden: Any, weight: Any, labels: Any) -> Any:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return functional.liger_fused_linear_cross_entropy(hidden, weight, labels)


def cut_cross_entropy(hidden: Any, weight: Any, labels: Any) -> Any:
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy(hidden, weight, labels, impl="cce")


def contestants() -> dict[str, Contestant]:
    """All that are installed and run on this device."""

    def installed(package: str) -> bool:
        return importlib.util.find_spec(package) is not None

    found = {f"jaxce {strategy}": with_jax(fused(strategy)) for strategy in ("auto", "tokens", "classes")}
    found["optax dense"] = with_jax(dense_optax)
    if installed("tokamax"):
        found["tokamax"] = with_jax(tokamax_loss)
    if not installed("torch"):
        return found
    on_cuda = importlib.import_module("torch").cuda.is_available()
    if on_cuda == (jax.default_backend() == "gpu"):
        found |= {"torch dense": with_torch(torch_dense), "torch chunked": with_torch(torch_chunked)}
    if on_cuda and installed("liger_kernel"):
        found["liger"] = with_torch(liger)
    if on_cuda and installed("cut_cross_entropy"):
        found["cut-cross-entropy"] = with_torch(cut_cross_entropy)
    return found


def ready(problem: Problem, chosen: dict[str, Contestant]) -> tuple[dict[str, harness.Timed], dict[str, str]]:
    """Those that run on this problem; and what the others said, out of memory for example."""
    timed, failed = {}, {}
    for name, prepare in chosen.items():
        try:
            timed[name] = prepare(problem)
            timed[name].run()
        except Exception as error:
            timed.pop(name, None)
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return timed, failed


def measure(shape: Shape, dtype: str, seconds: float) -> dict[str, Any]:
    problem = Problem.of(shape, dtype)
    timed, failed = ready(problem, contestants())
    timed = {"3 matmuls": floor(problem), **timed}
    harness.measure(timed, seconds, rounds=5)
    return {
        "shape": shape,
        "dtype": dtype,
        "ms": {name: 1e3 * min(t.seconds) for name, t in timed.items()},
        "ratio": {name: harness.ratio(t, timed["3 matmuls"]) for name, t in timed.items()},
        "temp_mb": {name: t.temp_bytes / 1e6 for name, t in timed.items() if t.temp_bytes is not None},
        "failed": failed,
    }


def kernel_gradient(result: Any) -> np.ndarray:
    _, (_, gradient) = result
    if not isinstance(gradient, Array):
        gradient = gradient.float().cpu().numpy()
    return np.asarray(gradient, np.float64)


def errors() -> list[dict[str, Any]]:
    """Relative error of the kernel's gradient against float64."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        problem = Problem.of(ERROR_SHAPE, dtype)
        hidden, kernel, labels = problem.as_jax()
        with jax.enable_x64(True):
            hidden, kernel = hidden.astype(jnp.float64), kernel.astype(jnp.float64)
            exact = np.asarray(jax.grad(lambda w, h=hidden, y=labels: jaxce.reference.cross_entropy(h @ w, y))(kernel))
        timed, _ = ready(problem, contestants())
        for name, contestant in timed.items():
            error = np.linalg.norm(kernel_gradient(contestant.run()) - exact) / np.linalg.norm(exact)
            rows.append({"name": name, "dtype": dtype, "error": float(error)})
    return rows


def draw(path: Path, suite: Suite, cases: list[dict[str, Any]]) -> None:
    """Time and temporary memory against C and against N."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    (n, d, _), (_, _, c) = suite.over_classes[0], suite.over_tokens[0]
    lines = (
        (suite.over_classes, 2, f"classes C (N = {n}, D = {d}, {suite.dtype})"),
        (suite.over_tokens, 0, f"tokens N (D = {d}, C = {c}, {suite.dtype})"),
    )
    for column, (shapes, index, label) in enumerate(lines):
        chosen = sorted((c for c in cases if tuple(c["shape"]) in shapes), key=lambda c: c["shape"][index])
        sizes = [case["shape"][index] for case in chosen]
        for row, (figures, unit) in enumerate((("ms", "loss and gradients (ms)"), ("temp_mb", "temporaries (MB)"))):
            ax = axes[row, column]
            for name in chosen[0][figures]:
                if name == "3 matmuls" and figures == "temp_mb":
                    continue
                points = [
                    (x, case[figures][name]) for x, case in zip(sizes, chosen, strict=True) if name in case[figures]
                ]
                # "auto" lies upon the loop that it picks.
                style = {"3 matmuls": "k--", "jaxce auto": "kx"}.get(name, "o-")
                ax.loglog(*zip(*points, strict=True), style, label=name, zorder=3 - (style == "o-"))
            ax.set(xlabel=label, ylabel=unit)
            ax.set_xticks(sizes, [str(size) for size in sizes], minor=False)
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.grid(alpha=0.3, which="both")
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw time and memory to this picture")
    parser.add_argument("--seconds", type=float, default=5.0, help="least time per shape (default: %(default)s)")
    args = parser.parse_args()
    suite = GPU if jax.default_backend() == "gpu" else CPU
    shapes = dict.fromkeys((*suite.targets, *suite.over_classes, *suite.over_tokens))
    cases = [measure(shape, suite.dtype, args.seconds) for shape in tqdm(shapes)]
    names = list(dict.fromkeys(name for case in cases for name in case["ms"]))
    harness.show(
        f"{suite.dtype}: time as a ratio to three matmuls / temporaries in MB",
        ("(N, D, C)", *names),
        [(str(case["shape"]), *(figures(case, name) for name in names)) for case in cases],
    )
    for case in cases:
        for name, reason in case["failed"].items():
            print(f"{case['shape']}, {name}: {reason}")
    error_rows = errors()
    harness.show(
        f"relative error of the kernel's gradient at {ERROR_SHAPE}, against float64",
        ("contestant", "dtype", "error"),
        [(r["name"], r["dtype"], f"{r['error']:.1e}") for r in error_rows],
    )
    if args.out:
        harness.save(args.out, {"cases": cases, "errors": error_rows})
    if args.plot:
        draw(args.plot, suite, cases)


def figures(case: dict[str, Any], name: str) -> str:
    if name not in case["ratio"]:
        return "-"
    temp = f" / {case['temp_mb'][name]:.0f}" if name in case["temp_mb"] else ""
    return f"{case['ratio'][name]:.2f}{temp}"


if __name__ == "__main__":
    main()
