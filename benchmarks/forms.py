"""What each form of a platform is worth: the losses with it and without it, in one run.

A form stays while it makes a case at least 1.25 times as fast or saves a copy of the logits.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxce
from jaxce import _forms
from jaxce._forms import cpu_few_classes, cpu_long_rows, cpu_one_pass, cpu_recomputed, cpu_short_rows


class Case(NamedTuple):
    form: str
    shape: tuple[int, int]
    dtype: str
    gradient: bool
    option: str = "plain"


FORMS = {
    "cpu_few_classes": cpu_few_classes,
    "cpu_long_rows": cpu_long_rows,
    "cpu_one_pass": cpu_one_pass,
    "cpu_short_rows": cpu_short_rows,
    "cpu_recomputed": cpu_recomputed,
    "read_again": _forms.read_again,
}
SHAPES = {
    "cpu_few_classes": [(65536, 2), (65536, 10), (131072, 16)],
    "cpu_long_rows": [(512, 128256), (1300, 50257)],
    "cpu_one_pass": [(4096, 1000), (1024, 32000)],
    "cpu_short_rows": [(65536, 5), (65536, 10)],
    "cpu_recomputed": [(4096, 1000), (1024, 32000)],
    "read_again": [(4096, 1000)],
}


def all_cases() -> Iterator[Case]:
    for form, shapes in SHAPES.items():
        options = {"cpu_one_pass": ["plain", "label smoothing", "probabilities"], "read_again": ["stats"]}
        gradients = [True] if form in ("cpu_short_rows", "cpu_recomputed") else [False, True]
        for shape in shapes:
            for option in options.get(form, ["plain"]):
                for dtype in ("float32", "bfloat16"):
                    yield from (Case(form, shape, dtype, gradient, option) for gradient in gradients)


@contextlib.contextmanager
def without(form: str) -> Iterator[None]:
    """The package as if that form had been deleted."""
    before = _forms.CPU_SUMS, _forms.CPU_GRADIENTS, _forms.read_again
    jax.clear_caches()
    _forms.CPU_SUMS, _forms.CPU_GRADIENTS = ([f for f in forms if f is not FORMS[form]] for forms in before[:2])
    if form == "read_again":
        _forms.read_again = lambda logits: logits
    try:
        yield
    finally:
        _forms.CPU_SUMS, _forms.CPU_GRADIENTS, _forms.read_again = before
        jax.clear_caches()


def loss(option: str) -> Any:
    def of(logits: jax.Array, labels: jax.Array) -> jax.Array:
        if option != "stats":
            return jaxce.cross_entropy(logits, labels, label_smoothing=0.1 if option == "label smoothing" else 0.0)
        value, stats = jaxce.cross_entropy(logits, labels, return_stats=True)
        return value + jax.lax.stop_gradient(0.0 * (stats.predicted == labels).sum())

    return of


def measure(case: Case, seconds: float) -> dict[str, Any]:
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.standard_normal(size=case.shape, dtype=np.float32), case.dtype)
    labels = jnp.asarray(random.integers(0, case.shape[1], case.shape[0]), jnp.int32)
    if case.option == "probabilities":
        labels = jax.nn.softmax(jnp.asarray(random.standard_normal(size=case.shape, dtype=np.float32)))
    function = jax.value_and_grad(loss(case.option)) if case.gradient else loss(case.option)
    timed = {"with": harness.compiled(function, logits, labels)}
    with without(case.form):
        timed["without"] = harness.compiled(function, logits, labels)
    harness.measure(timed, seconds)
    return {
        **case._asdict(),
        "ms": {name: 1e3 * min(t.seconds) for name, t in timed.items()},
        "without / with": harness.ratio(timed["without"], timed["with"]),
        "temp_share": {name: (t.temp_bytes or 0) / logits.nbytes for name, t in timed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--forms", nargs="*", choices=sorted(FORMS), help="measure these forms alone")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time per case (default: %(default)s)")
    args = parser.parse_args()
    cases = [measure(case, args.seconds) for case in tqdm([c for c in all_cases() if c.form in (args.forms or FORMS)])]
    harness.show(
        "time and temporaries without a form, beside those with it",
        ("form", "logits", "dtype", "", "", "ms", "without / with", "temp with", "temp without"),
        [
            (
                case["form"],
                str(tuple(case["shape"])),
                case["dtype"],
                case["option"],
                "loss + gradient" if case["gradient"] else "loss",
                f"{case['ms']['with']:.3f}",
                f"{case['without / with']:.2f}",
                f"{case['temp_share']['with']:.1%}",
                f"{case['temp_share']['without']:.1%}",
            )
            for case in cases
        ],
    )
    if args.out:
        harness.save(args.out, {"cases": cases})


if __name__ == "__main__":
    main()
