"""`jaxce.linear_cross_entropy` against dense losses and other fused ones: time, memory and error.

    python benchmarks/linear.py --out linear.json --plot linear.png

Loss with both gradients. Times are measured in turn in one run and given as ratios to three plain matmuls of the same
shape; memory is the compiler's figure for temporaries; the error is that of the kernel's gradient against float64, and
of bfloat16 inputs beside float32 ones. Contestants that aren't installed are left out, by name.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

# (N, D, C): the two targets, then a line in C and a line in N.
TARGETS = ((2048, 256, 32_000), (1024, 512, 128_256))
OVER_CLASSES = tuple((1024, 256, c) for c in (4_096, 16_384, 65_536))
OVER_TOKENS = tuple((n, 256, 16_384) for n in (256, 1024, 4_096))
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

    return tokamax.linear_softmax_cross_entropy_loss(hidden, labels, kernel, reduction="mean")


def jax_losses() -> dict[str, Callable[..., Array]]:
    losses = {f"jaxce {strategy}": fused(strategy) for strategy in ("auto", "tokens", "classes")}
    losses["optax dense"] = dense_optax
    if importlib.util.find_spec("tokamax"):
        losses["tokamax"] = tokamax_loss
    return losses


def torch_contestants(hidden: np.ndarray, kernel: np.ndarray, labels: np.ndarray) -> dict[str, harness.Timed]:
    if not importlib.util.find_spec("torch"):
        return {}
    import torch
    from torch.nn.functional import linear_cross_entropy

    h = torch.tensor(hidden, requires_grad=True)
    w = torch.tensor(np.ascontiguousarray(kernel.T), requires_grad=True)
    y = torch.tensor(labels, dtype=torch.int64)

    def run(options: Any) -> None:
        h.grad = w.grad = None
        linear_cross_entropy(h, w, y, options=options).backward()

    return {
        "torch dense": harness.Timed(lambda: run(None)),
        "torch chunked": harness.Timed(lambda: run(torch.nn.LinearCrossEntropyOptions())),
    }


def inputs(n: int, d: int, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of order 1."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(n, d)).astype(np.float32)
    kernel = (random.normal(size=(d, c)) / np.sqrt(d)).astype(np.float32)
    return hidden, kernel, random.integers(0, c, n).astype(np.int32)


def three_matmuls(hidden: Array, kernel: Array, dlogits: Array) -> tuple[Array, Array, Array]:
    return hidden @ kernel, dlogits @ kernel.T, hidden.T @ dlogits


def measure(shape: tuple[int, int, int], seconds: float) -> dict[str, Any]:
    hidden, kernel, labels = inputs(*shape)
    arrays = [jnp.asarray(a) for a in (hidden, kernel, labels)]
    dlogits = jnp.full((shape[0], shape[2]), 1e-3)
    timed = {"3 matmuls": harness.compiled(three_matmuls, *arrays[:2], dlogits)}
    for name, loss in jax_losses().items():
        timed[name] = harness.compiled(jax.value_and_grad(loss, (0, 1)), *arrays)
    timed |= torch_contestants(hidden, kernel, labels)
    harness.measure(timed, seconds, rounds=3)
    return {
        "shape": shape,
        "ms": {name: 1e3 * min(t.seconds) for name, t in timed.items()},
        "ratio": {name: harness.ratio(t, timed["3 matmuls"]) for name, t in timed.items()},
        "temp_mb": {name: t.temp_bytes / 1e6 for name, t in timed.items() if t.temp_bytes is not None},
    }


def errors() -> list[dict[str, Any]]:
    """Relative error of the kernel's gradient against float64."""
    hidden, kernel, labels = inputs(*ERROR_SHAPE)
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        h, w = jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype)
        with jax.enable_x64(True):
            exact = jax.grad(lambda w, h=h: jaxce.reference.cross_entropy(h.astype(jnp.float64) @ w, labels))(
                w.astype(jnp.float64)
            )
            exact = np.asarray(exact)
        for name, loss in jax_losses().items():
            gradient = np.asarray(jax.grad(loss, 1)(h, w, jnp.asarray(labels)), np.float64)
            error = np.linalg.norm(gradient - exact) / np.linalg.norm(exact)
            rows.append({"name": name, "dtype": jnp.dtype(dtype).name, "error": float(error)})
    return rows


def draw(path: Path, cases: list[dict[str, Any]]) -> None:
    """Time and temporary memory against C and against N."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    lines = ((OVER_CLASSES, 2, "classes C (N = 1024, D = 256)"), (OVER_TOKENS, 0, "tokens N (D = 256, C = 16384)"))
    for column, (shapes, index, label) in enumerate(lines):
        chosen = sorted((c for c in cases if tuple(c["shape"]) in shapes), key=lambda c: c["shape"][index])
        sizes = [case["shape"][index] for case in chosen]
        for row, (figures, unit) in enumerate((("ms", "loss and gradients (ms)"), ("temp_mb", "temporaries (MB)"))):
            ax = axes[row, column]
            for name in chosen[0][figures]:
                if name == "3 matmuls" and figures == "temp_mb":
                    continue
                # "auto" lies upon the loop that it picks.
                style = {"3 matmuls": "k--", "jaxce auto": "kx"}.get(name, "o-")
                ax.loglog(
                    sizes, [case[figures][name] for case in chosen], style, label=name, zorder=3 - (style == "o-")
                )
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
    shapes = dict.fromkeys((*TARGETS, *OVER_CLASSES, *OVER_TOKENS))
    cases = [measure(shape, args.seconds) for shape in tqdm(shapes)]
    names = list(cases[0]["ms"])
    harness.show(
        "time as a ratio to three matmuls / temporaries in MB",
        ("(N, D, C)", *names),
        [
            (
                str(case["shape"]),
                *(
                    f"{case['ratio'][n]:.2f}" + (f" / {case['temp_mb'][n]:.0f}" if n in case["temp_mb"] else "")
                    for n in names
                ),
            )
            for case in cases
        ],
    )
    error_rows = errors()
    harness.show(
        f"relative error of the kernel's gradient at {ERROR_SHAPE}, against float64",
        ("contestant", "dtype", "error"),
        [(r["name"], r["dtype"], f"{r['error']:.1e}") for r in error_rows],
    )
    if args.out:
        harness.save(args.out, {"cases": cases, "errors": error_rows})
    if args.plot:
        draw(args.plot, cases)


if __name__ == "__main__":
    main()
