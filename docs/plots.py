"""Draws the plots of the pages from the committed figures of benchmarks/results: `python docs/plots.py`.

`frontier.svg` is for the first page, large enough for a telephone. The others are those that the benchmarks draw too,
with `--plot`.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import compiled
import cross_entropy
import linear
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent

plt.rcParams.update({"svg.hashsalt": "jaxce", "svg.fonttype": "path"})

# What is written beside each point, and where: to the right of it, or below.
LABELS = {
    "dense, optax": ("logits stored, optax", "C7", "s", "above"),
    "dense": ("logits stored, jaxce", "C7", "s", "below"),
    "remat scan, optax": ("checkpointed scan, optax", "C1", "D", "above"),
    "remat scan": ("checkpointed scan, jaxce", "C3", "D", "below"),
    "`auto`": ("linear_cross_entropy", "C0", "o", "below"),
}


def results(name: str) -> dict[str, Any]:
    """The committed figures."""
    return json.loads((DOCS.parent / "benchmarks" / "results" / f"{name}.json").read_text())


def frontier(rows: list[dict[str, Any]]) -> None:
    """Expected time against memory, for the last layer of a model with 4,096 features and 128,256 classes."""
    figure, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    for row in rows:
        if row["device"] == "TPU v5e" and row["shape"] == (8_192, 4_096, 128_256) and row["contestant"] in LABELS:
            label, color, marker, side = LABELS[row["contestant"]]
            ax.plot(row["temporaries_gb"], row["ms"], marker, color=color, markersize=13)
            shift, anchor = {"below": ((0, -13), "top"), "above": ((0, 13), "bottom")}[side]
            where = {"textcoords": "offset points", "ha": "center", "va": anchor, "fontsize": 12, "color": color}
            ax.annotate(label, (row["temporaries_gb"], row["ms"]), shift, **where)
    ax.set_xscale("log")
    ax.set(xlim=(0.05, 12), ylim=(0, 290), xticks=(0.1, 1, 10), xticklabels=("0.1 GB", "1 GB", "10 GB"))
    ax.tick_params(labelsize=12)
    ax.set_xlabel("memory beside the gradients", fontsize=13)
    ax.set_ylabel("loss and gradients, ms", fontsize=13)
    ax.set_title("8,192 tokens, 4,096 features, 128,256 classes\nas the compiler of a TPU v5e expects", fontsize=13)
    ax.grid(alpha=0.3)
    figure.savefig(DOCS / "frontier.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


if __name__ == "__main__":
    on_accelerators = [row | {"shape": tuple(row["shape"])} for row in results("compiled")["linear_tpu"]]
    frontier(on_accelerators)
    compiled.draw(DOCS / "linear-tpu.png", on_accelerators)
    linear.draw(DOCS / "linear-cpu.png", linear.CPU, results("linear-cpu")["cases"])
    cross_entropy.draw(DOCS / "cross_entropy-cpu.png", results("cross_entropy-cpu")["cases"])
