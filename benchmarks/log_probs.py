"""`jaxce.linear_token_log_probs` on this machine: time beside four plain matmuls of the same shape, in one run.

    python benchmarks/log_probs.py --out log_probs.json

Log-probability and entropy of each token with a gradient for each, in float32: the logits twice and two matmuls for the
gradients are what they need. Beside it the dense computation, `jax.nn.log_softmax` of stored logits; memory is the
compiler's figure for temporaries.
"""

import argparse
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxce

SHAPES = ((2048, 256, 32_000), (1024, 512, 128_256))  # (N, D, C)


def four_matmuls(hidden: Array, kernel: Array, dlogits: Array) -> tuple[Array, ...]:
    again = hidden * 1.5  # or XLA would multiply once
    return hidden @ kernel, again @ kernel, dlogits @ kernel.T, hidden.T @ dlogits


def ours(hidden: Array, kernel: Array, labels: Array, weights: Array) -> Array:
    stats = jaxce.linear_token_log_probs(hidden, kernel, labels)
    return (weights * (stats.log_prob + stats.entropy)).sum()


def dense(hidden: Array, kernel: Array, labels: Array, weights: Array) -> Array:
    log_p = jax.nn.log_softmax(hidden @ kernel)
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return (weights * (jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0] + entropy)).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    results = []
    for n, d, c in SHAPES:
        random = np.random.default_rng(0)
        hidden = jnp.asarray(random.normal(size=(n, d)), jnp.float32)
        kernel = jnp.asarray(random.normal(size=(d, c)) / np.sqrt(d), jnp.float32)
        labels, weights = jnp.asarray(random.integers(0, c, n)), jnp.asarray(random.uniform(size=n), jnp.float32)
        contestants = {"four matmuls": harness.compiled(four_matmuls, hidden, kernel, jnp.full((n, c), 1e-3))}
        for label, function in (("jaxce", ours), ("dense", dense)):
            contestants[label] = harness.compiled(jax.value_and_grad(function, (0, 1)), hidden, kernel, labels, weights)
        harness.measure(contestants)
        for label in ("jaxce", "dense"):
            times = harness.ratio(contestants[label], contestants["four matmuls"])
            megabytes = contestants[label].temp_bytes / 1e6
            results.append({"shape": (n, d, c), "contestant": label, "times": times, "temporaries_mb": megabytes})
    rows = [[str(r["shape"]), r["contestant"], f"{r['times']:.2f}", f"{r['temporaries_mb']:.0f}"] for r in results]
    harness.show("value and gradients / four matmuls", ["(N, D, C)", "", "time", "temporaries, MB"], rows)
    if args.out:
        harness.save(args.out, {"log_probs": results})


if __name__ == "__main__":
    main()
