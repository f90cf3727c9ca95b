"""`jaxce.cross_entropy` against optax, PyTorch and the floor, over shapes, dtypes and options.

    python benchmarks/cross_entropy.py --out results.json --plot results.png

Times are measured in turn in one run and given as ratios of `jaxce` to each of the others; memory is the compiler's
figure for temporaries as a share of the logits. The floor is a plain copy of the logits and a plain maximum of each
row. PyTorch runs on the same device, where it is installed. At the end: the geometric mean over the target shapes, and
what a call outside of `jax.jit` costs.
"""

import argparse
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

import jaxce

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TARGETS = ((65_536, 10), (4_096, 1_000), (1_024, 32_000), (512, 128_256))
CLASSES = (2, 10, 100, 1_000, 4_096, 32_000, 50_257, 128_256, 262_144)
FEW_ROWS = ((2, 2), (32, 10), (2, 262_144))
OPTIONS_SHAPE = (4_096, 1_000)
IMAGES = (8, 21, 128, 128)  # classes on axis 1
OPTIONS = ("label smoothing", "class weights", "ignored labels", "probabilities")


class Case(NamedTuple):
    group: str  # "targets", "classes", "few rows", "options" or "axis 1"
    shape: tuple[int, ...]
    dtype: str
    gradient: bool
    option: str = "plain"

    @property
    def axis(self) -> int:
        return 1 if self.group == "axis 1" else -1


def all_cases() -> Iterator[Case]:
    gpu = jax.default_backend() == "gpu"
    dtypes = ("float32", "bfloat16", "float16") if gpu else ("float32", "bfloat16")
    entries = 2**28 if gpu else 2**23
    groups = [("targets", shape, "plain") for shape in TARGETS]
    groups += [("classes", (min(entries // c, 2**22), c), "plain") for c in CLASSES]
    groups += [("few rows", shape, "plain") for shape in FEW_ROWS]
    groups += [("options", OPTIONS_SHAPE, option) for option in OPTIONS]
    groups += [("axis 1", IMAGES, "plain")]
    for (group, shape, option), dtype, gradient in itertools.product(groups, dtypes, (False, True)):
        yield Case(group, shape, dtype, gradient, option)


class Problem(NamedTuple):
    logits: np.ndarray
    labels: np.ndarray  # class indices, or probabilities
    weight: np.ndarray  # (C,)

    @staticmethod
    def of(case: Case) -> "Problem":
        random = np.random.default_rng(0)
        classes = case.shape[case.axis]
        logits = random.standard_normal(size=case.shape, dtype=np.float32)
        labels = random.integers(0, classes, tuple(np.delete(case.shape, case.axis))).astype(np.int32)
        if case.option == "ignored labels":
            labels = np.where(random.random(labels.shape) < 0.3, -100, labels).astype(np.int32)
        if case.option == "probabilities":
            labels = np.asarray(jax.nn.softmax(random.standard_normal(size=case.shape, dtype=np.float32), case.axis))
        return Problem(logits, labels, random.uniform(0.5, 1.5, classes).astype(np.float32))


def options_of(case: Case, weight: Any) -> dict[str, Any]:
    """The same words in `jaxce` and in PyTorch."""
    return {"label smoothing": {"label_smoothing": 0.1}, "class weights": {"weight": weight}}.get(case.option, {})


def jaxce_loss(case: Case, weight: Array) -> Callable[..., Array]:
    return partial(jaxce.cross_entropy, axis=case.axis, **options_of(case, weight))


def optax_loss(case: Case, weight: Array) -> Callable[..., Array]:
    """As its users write it, in float32."""

    def loss(logits: Array, labels: Array) -> Array:
        x = logits.astype(jnp.float32)
        if case.option == "probabilities":
            return optax.softmax_cross_entropy(x, labels).mean()
        if case.option == "label smoothing":
            one_hot = jax.nn.one_hot(labels, x.shape[-1])
            return optax.softmax_cross_entropy(x, optax.smooth_labels(one_hot, 0.1)).mean()
        kept = labels != -100
        safe = jnp.where(kept, labels, 0) if case.option == "ignored labels" else labels
        losses = optax.softmax_cross_entropy_with_integer_labels(x, safe, axis=case.axis)
        if case.option == "ignored labels":
            return (losses * kept).sum() / kept.sum()
        if case.option == "class weights":
            return (losses * weight[labels]).sum() / weight[labels].sum()
        return losses.mean()

    return loss


def optax_one_hot_loss(case: Case) -> Callable[..., Array]:
    def loss(logits: Array, labels: Array) -> Array:
        one_hot = jax.nn.one_hot(labels, logits.shape[case.axis], axis=case.axis)
        return optax.softmax_cross_entropy(logits.astype(jnp.float32), one_hot, axis=case.axis).mean()

    return loss


def torch_run(case: Case, problem: Problem) -> Callable[[], Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.tensor(problem.logits).to(device, getattr(torch, case.dtype)).requires_grad_(case.gradient)
    labels = torch.tensor(problem.labels, device=device)
    labels = labels.to(logits.dtype if labels.is_floating_point() else torch.int64)
    weight = torch.tensor(problem.weight).to(device, logits.dtype)
    loss = partial(torch.nn.functional.cross_entropy, **options_of(case, weight))

    def run() -> None:
        logits.grad = None
        with torch.set_grad_enabled(case.gradient):
            value = loss(logits, labels)
        if case.gradient:
            value.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def contestants(case: Case) -> tuple[dict[str, harness.Timed], int]:
    """What is ready to run, and the bytes of the logits."""
    problem = Problem.of(case)
    logits, labels, weight = jnp.asarray(problem.logits, case.dtype), *map(jnp.asarray, problem[1:])
    losses = {"jaxce": jaxce_loss(case, weight), "optax": optax_loss(case, weight)}
    if case.group in ("targets", "axis 1"):
        losses["optax one-hot"] = optax_one_hot_loss(case)
    functions = {name: jax.value_and_grad(loss) if case.gradient else loss for name, loss in losses.items()}
    timed = {name: harness.compiled(function, logits, labels) for name, function in functions.items()}
    timed["copy"] = harness.compiled(jnp.copy, logits)
    timed["maximum"] = harness.compiled(lambda x: x.max(case.axis), logits)
    if importlib.util.find_spec("torch"):
        timed["torch"] = harness.Timed(torch_run(case, problem), rest=harness.THREADS_REST)
    return timed, logits.nbytes


def measure(case: Case, seconds: float) -> dict[str, Any]:
    timed, nbytes = contestants(case)
    harness.measure(timed, seconds)
    return {
        **case._asdict(),
        "ms": {name: 1e3 * min(t.seconds) for name, t in timed.items()},
        "ratio": {name: harness.ratio(timed["jaxce"], t) for name, t in timed.items() if name != "jaxce"},
        "temp_share": {name: t.temp_bytes / nbytes for name, t in timed.items() if t.temp_bytes is not None},
    }


def calls_outside_jit() -> list[dict[str, Any]]:
    """Microseconds of a call on a small batch, and the ratio to the same call of optax."""
    logits, labels = np.random.default_rng(0).normal(size=(32, 10)).astype(np.float32), np.arange(32) % 10
    case = Case("calls", (32, 10), "float32", gradient=False)
    losses = {"jaxce": jaxce_loss(case, jnp.ones(10)), "optax": optax_loss(case, jnp.ones(10))}
    rows = []
    for inputs, convert in (("JAX arrays", jnp.asarray), ("NumPy arrays", np.asarray)):
        arrays = convert(logits), convert(labels)
        for what, wrap in (("loss", lambda loss: loss), ("loss + gradient", jax.value_and_grad)):
            functions = {name: wrap(loss) for name, loss in losses.items()}
            timed = {
                name: harness.Timed(lambda f=function, a=arrays: jax.block_until_ready(f(*a)))
                for name, function in functions.items()
            }
            harness.measure(timed, seconds=1.0, rounds=200)
            micros = {name: 1e6 * min(t.seconds) for name, t in timed.items()}
            rows.append({"inputs": inputs, "what": what, "us": micros, "ratio": harness.ratio(*timed.values())})
    return rows


def draw(path: Path, cases: list[dict[str, Any]]) -> None:
    """Time per million logits against the number of classes."""
    lines = [case for case in cases if case["group"] == "classes"]
    dtypes = list(dict.fromkeys(case["dtype"] for case in lines))
    figure, axes = plt.subplots(len(dtypes), 2, figsize=(12, 4 * len(dtypes)), sharex=True, layout="constrained")
    for row, dtype in zip(axes, dtypes, strict=True):
        for ax, gradient in zip(row, (False, True), strict=True):
            chosen = [case for case in lines if case["dtype"] == dtype and case["gradient"] == gradient]
            for name in chosen[0]["ms"]:
                style = {"jaxce": "ko-", "copy": "k--", "maximum": "k:"}.get(name, "o-")
                per_million = [1e6 * case["ms"][name] / math.prod(case["shape"]) for case in chosen]
                ax.loglog([case["shape"][-1] for case in chosen], per_million, style, label=name, markersize=4)
            ax.set(title=f"{dtype}, loss{' and gradient' if gradient else ''}", ylabel="ms per million logits")
            ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("classes C")
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw time against classes to this picture")
    parser.add_argument("--groups", nargs="*", help="measure these groups of cases alone")
    parser.add_argument("--seconds", type=float, default=1.5, help="least time per case (default: %(default)s)")
    args = parser.parse_args()
    chosen = [case for case in all_cases() if not args.groups or case.group in args.groups]
    cases = [measure(case, args.seconds) for case in tqdm(chosen)]
    others = list(dict.fromkeys(name for case in cases for name in case["ratio"]))
    harness.show(
        "time of jaxce.cross_entropy, as a ratio to that of the others; temporaries as a share of the logits",
        ("", "logits", "dtype", "option", "", "ms", *(f"/ {name}" for name in others), "temp", "optax temp"),
        [
            (
                case["group"],
                str(tuple(case["shape"])),
                case["dtype"],
                case["option"],
                "loss + gradient" if case["gradient"] else "loss",
                f"{case['ms']['jaxce']:.3f}",
                *(f"{case['ratio'][name]:.2f}" if name in case["ratio"] else "-" for name in others),
                f"{case['temp_share']['jaxce']:.1%}",
                f"{case['temp_share']['optax']:.1%}",
            )
            for case in cases
        ],
    )
    results: dict[str, Any] = {"cases": cases}
    targets = [case["ratio"]["optax"] for case in cases if case["group"] == "targets"]
    if targets:
        results["geometric_mean"] = math.exp(sum(map(math.log, targets)) / len(targets))
        print(f"targets against optax: geometric mean {results['geometric_mean']:.3f}, largest {max(targets):.2f}")
    results["calls"] = calls_outside_jit()
    for row in results["calls"]:
        times = ", ".join(f"{name} {us:.0f} µs" for name, us in row["us"].items())
        print(f"a call outside of jit on (32, 10), {row['inputs']}, {row['what']}: {times}")
    if args.out:
        harness.save(args.out, results)
    if args.plot:
        draw(args.plot, cases)


if __name__ == "__main__":
    main()
