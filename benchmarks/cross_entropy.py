"""`jaxce.cross_entropy` against optax on the shapes of a classifier and of language models.

    python benchmarks/cross_entropy.py --out results.json

Each line is a ratio of times measured in turn in one run, and the compiler's temporary memory as a share of the
logits. The last line is the geometric mean of the ratios.
"""

import argparse
import math
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import optax
from jax import Array
from tqdm import tqdm

import jaxce

SHAPES = ((65_536, 10), (4_096, 1_000), (1_024, 32_000), (512, 128_256))
DTYPES = ("float32", "bfloat16")


def optax_loss(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time per case (default: %(default)s)")
    args = parser.parse_args()
    cases = []
    for (n, c), dtype, with_gradient in tqdm([(s, d, g) for s in SHAPES for d in DTYPES for g in (False, True)]):
        logits = jax.random.normal(jax.random.key(0), (n, c)).astype(dtype)
        labels = jax.random.randint(jax.random.key(1), (n,), 0, c)
        losses = {"jaxce": jaxce.cross_entropy, "optax": optax_loss}
        timed = {
            name: harness.compiled(jax.value_and_grad(loss) if with_gradient else loss, logits, labels)
            for name, loss in losses.items()
        }
        harness.measure(timed, args.seconds)
        cases.append(
            {
                "shape": [n, c],
                "dtype": dtype,
                "gradient": with_gradient,
                "ms": {name: 1e3 * min(t.seconds) for name, t in timed.items()},
                "ratio": harness.ratio(timed["jaxce"], timed["optax"]),
                "temp_share": {name: (t.temp_bytes or 0) / logits.nbytes for name, t in timed.items()},
            }
        )
    mean = math.exp(sum(math.log(case["ratio"]) for case in cases) / len(cases))
    harness.show(
        "jaxce.cross_entropy against optax",
        ("logits", "dtype", "", "jaxce ms", "optax ms", "ratio", "jaxce temp", "optax temp"),
        [
            (
                str(tuple(case["shape"])),
                case["dtype"],
                "loss + gradient" if case["gradient"] else "loss",
                f"{case['ms']['jaxce']:.2f}",
                f"{case['ms']['optax']:.2f}",
                f"{case['ratio']:.2f}",
                f"{case['temp_share']['jaxce']:.1%}",
                f"{case['temp_share']['optax']:.1%}",
            )
            for case in cases
        ],
    )
    print(f"geometric mean of the ratios: {mean:.3f}; largest: {max(case['ratio'] for case in cases):.2f}")
    if args.out:
        harness.save(args.out, {"cases": cases, "geometric_mean": mean})


if __name__ == "__main__":
    main()
