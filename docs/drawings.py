"""Draws how jaxce is made, and what lies where on a mesh: `python docs/drawings.py` writes the pictures here.

Black on a white panel, so that they can be read in a light and in a dark page; the same bytes each time.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

INK, PALE, DEEP, GONE = "#1f2933", "#cfe2f3", "#1f77b4", "#eeeeee"
WARM = "#f6c58f"  # results

plt.rcParams.update({"svg.hashsalt": "jaxce", "svg.fonttype": "path", "font.size": 13, "text.color": INK})


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose unit is a tenth of its width, with a white panel of round corners."""
    figure = plt.figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10), ylim=(0, 10 * height / width))
    axes.axis("off")
    margin, rounding = 0.05, 0.25
    axes.add_patch(
        FancyBboxPatch(
            (margin + rounding, margin + rounding),
            10 - 2 * (margin + rounding),
            10 * height / width - 2 * (margin + rounding),
            boxstyle=f"round,pad={rounding}",
            facecolor="white",
            edgecolor="#cccccc",
        )
    )
    return figure, axes


def save(figure: Figure, name: str) -> None:
    """Writes the picture beside this file, without the date."""
    figure.savefig(Path(__file__).parent / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def box(
    axes: Axes, x: float, y: float, width: float, height: float, color: str = "white", label: str = "", **style: Any
) -> None:
    """A rectangle with a label in its middle."""
    style = {"edgecolor": INK, "linewidth": 1, **style}
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, **style))
    ink = "white" if color == DEEP else INK
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", color=ink)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one point to another."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.2})


def merge() -> None:
    """How the parts of a row merge: twelve logits in three parts, with their maxima and sums."""
    parts = ((1.0, 3.0, 0.0, 2.0), (5.0, 4.0, 1.0, 0.0), (2.0, -1.0, 2.0, 1.0))
    figure, axes = panel(6.4, 6.2)
    axes.text(5, 9.1, "the logits of one token, in three parts", ha="center", size=13)
    tops = (0.6, 3.6, 6.6)
    found = []
    for left, part in zip(tops, parts, strict=True):
        for place, logit in enumerate(part):
            color = DEEP if logit == max(part) else PALE
            box(axes, left + 0.7 * place, 8.0, 0.7, 0.7, color, f"{logit:g}".replace("-", "\N{MINUS SIGN}"))
        m = max(part)
        total = sum(math.exp(x - m) for x in part)
        found.append((m, total))
        arrow(axes, (left + 1.4, 7.9), (left + 1.4, 7.25))
        box(axes, left + 0.1, 5.9, 2.6, 1.3, "white", f"maximum {m:g}\nsum {total:.3f}")
    maximum = max(m for m, _ in found)
    for left, (m, total) in zip(tops, found, strict=True):
        arrow(axes, (left + 1.4, 5.8), (left + 1.4, 4.55))
        rise = maximum - m
        axes.text(left + 1.55, 5.17, f"$\\times\\; e^{{-{rise:g}}}$" if rise else "$\\times$ 1", ha="left", va="center")
        box(axes, left + 0.1, 3.85, 2.6, 0.65, WARM, f"{total * math.exp(-rise):.3f}")
    for left in tops:
        arrow(axes, (left + 1.4, 3.75), (5 + 0.45 * (left + 1.4 - 5), 2.75))
    whole = sum(total * math.exp(m - maximum) for m, total in found)
    box(axes, 1.9, 1.4, 6.2, 1.25, DEEP, f"maximum {maximum:g}, sum {whole:.3f}")
    log_z = maximum + math.log(whole)
    axes.text(5, 0.8, f"log Z = {maximum:g} + log {whole:.3f} = {log_z:.3f}", ha="center", va="center", size=13)
    save(figure, "merge")


class Matrix(NamedTuple):
    """A factor or a product: its sides, and which of its rows or columns are worked on at a time."""

    name: str
    sides: str
    height: float
    width: float
    part: str  # "rows", "columns", "all" of it
    color: str = DEEP  # of that part
    stored: bool = True
    note: str = ""


def draw_matrix(axes: Axes, x: float, middle: float, matrix: Matrix) -> None:
    """A matrix whose left edge is at x, with the part that is worked on."""
    low = middle - matrix.height / 2
    style = {} if matrix.stored else {"linestyle": (0, (4, 3)), "edgecolor": "#8a94a0"}
    box(axes, x, low, matrix.width, matrix.height, "white", **style)
    if matrix.part == "rows":
        box(axes, x, low + 0.58 * matrix.height, matrix.width, 0.24 * matrix.height, matrix.color, matrix.note)
    elif matrix.part == "columns":
        box(axes, x + 0.18 * matrix.width, low, 0.24 * matrix.width, matrix.height, matrix.color, matrix.note)
    else:
        box(axes, x, low, matrix.width, matrix.height, matrix.color, matrix.note)
    axes.text(x + matrix.width / 2, low + matrix.height + 0.1, matrix.name, ha="center", va="bottom")
    axes.text(x + matrix.width / 2, low - 0.1, matrix.sides, ha="center", va="top", size=10)


def product(axes: Axes, middle: float, *matrices: Matrix) -> None:
    """a × b = c, in the middle of the panel."""
    gap = 0.7
    x = 5 - (sum(matrix.width for matrix in matrices) + 2 * gap) / 2
    for sign, matrix in zip("×= ", matrices, strict=True):
        draw_matrix(axes, x, middle, matrix)
        x += matrix.width + gap
        axes.text(x - gap / 2, middle, sign, ha="center", va="center", size=16)


N, D, C = 1.7, 0.9, 2.6  # as lengths


def heading(axes: Axes, y: float, text: str) -> None:
    """A line over some of the products."""
    axes.text(0.5, y, text, va="center", weight="bold")


def legend(axes: Axes, y: float, *entries: tuple[str, str]) -> None:
    """What the colors mean, a line each."""
    for color, text in entries:
        style = {"linestyle": (0, (4, 3)), "edgecolor": "#8a94a0"} if color == "white" else {}
        box(axes, 0.6, y - 0.16, 0.5, 0.32, color, **style)
        axes.text(1.3, y, text, va="center", size=11)
        y -= 0.48


def over_tokens() -> None:
    """The loop over tokens: all three matmuls of a chunk in the forward pass."""
    figure, axes = panel(6.4, 8.4)
    heading(axes, 12.45, "Forward pass, for each chunk of tokens")
    product(
        axes,
        10.65,
        Matrix("hidden", "N × D", N, D, "rows"),
        Matrix("kernel", "D × C", D, C, "all", PALE),
        Matrix("logits", "N × C", N, C, "rows", stored=False, note="this chunk"),
    )
    product(
        axes,
        7.55,
        Matrix("gradient of logits", "N × C", N, C, "rows", stored=False),
        Matrix("kernel$^T$", "C × D", C, D, "all", PALE),
        Matrix("gradient\nof hidden", "N × D", N, D, "rows", WARM),
    )
    product(
        axes,
        4.3,
        Matrix("hidden$^T$", "D × N", D, N, "columns"),
        Matrix("gradient of logits", "N × C", N, C, "rows", stored=False),
        Matrix("gradient of kernel", "D × C", D, C, "all", WARM, note="added to"),
    )
    heading(axes, 2.7, "Backward pass: both gradients times a number")
    legend(
        axes,
        2,
        (DEEP, "the chunk that is worked on"),
        (PALE, "read whole for each chunk"),
        (WARM, "kept until the backward pass; the gradient of kernel in float32"),
        ("white", "dashed: never stored whole"),
    )
    save(figure, "over_tokens")


def over_classes() -> None:
    """The loop over classes: the logits of a slab in the forward pass, and again in the backward pass."""
    figure, axes = panel(6.4, 9.8)
    heading(axes, 14.1, "Forward pass, for each slab of classes")
    hidden = Matrix("hidden", "N × D", N, D, "all", PALE)
    kernel = Matrix("kernel", "D × C", D, C, "columns")
    product(axes, 12.3, hidden, kernel, Matrix("logits", "N × C", N, C, "columns", stored=False))
    axes.text(5, 10.75, "kept of each token: a maximum and a few sums", ha="center", va="center", size=11)
    heading(axes, 10, "Backward pass, for each slab: the same logits again, and")
    product(
        axes,
        7.8,
        Matrix("gradient of logits", "N × C", N, C, "columns", stored=False),
        Matrix("kernel$^T$", "C × D", C, D, "rows"),
        Matrix("gradient\nof hidden", "N × D", N, D, "all", WARM, note="added\nto"),
    )
    product(
        axes,
        4.5,
        Matrix("hidden$^T$", "D × N", D, N, "all", PALE),
        Matrix("gradient of logits", "N × C", N, C, "columns", stored=False),
        Matrix("gradient of kernel", "D × C", D, C, "columns", WARM),
    )
    axes.text(5, 2.9, "this slab of the kernel's gradient is finished", ha="center", va="center", size=11)
    legend(
        axes,
        2,
        (DEEP, "the slab that is worked on"),
        (PALE, "read whole for each slab"),
        (WARM, "results; the gradient of hidden in float32"),
        ("white", "dashed: never stored whole"),
    )
    save(figure, "over_classes")


def mesh() -> None:
    """Two devices of a class axis: each has half of the classes, and they merge what they saw of a token."""
    figure, axes = panel(6.4, 5.2)
    for left, device, classes in ((0.6, "device 0", "classes 0 … C/2 - 1"), (5.2, "device 1", "classes C/2 … C - 1")):
        box(axes, left, 2.5, 4.2, 5.0, "#f7f9fb")
        axes.text(left + 2.1, 7.15, device, ha="center", va="center", weight="bold")
        axes.text(left + 2.1, 6.7, classes, ha="center", va="center", size=10.5)
        box(axes, left + 0.4, 5.45, 3.4, 0.85, PALE, "its slabs of logits")
        arrow(axes, (left + 2.1, 5.4), (left + 2.1, 4.5))
        axes.text(left + 2.25, 4.97, "merge", va="center", size=10.5)
        box(axes, left + 0.2, 3.0, 3.8, 1.4, WARM, "of each token:\na maximum, a few sums")
        arrow(axes, (left + 2.1, 2.9), (5 + 0.4 * (left + 2.1 - 5), 1.95))
    box(axes, 2.3, 0.75, 5.4, 1.15, DEEP, "the same merge, across devices:\nthe maximum, then the sums")
    save(figure, "across_devices")


def who_holds_what() -> None:
    """What one device of 4 × 2 works on: its tokens, its classes, and their logits."""
    data, model = 4, 2
    figure, axes = panel(6.4, 9.8)
    rows = (
        (11.0, "hidden: tokens × features", 1, 3.1, "each device of a row has the same tokens"),
        (
            6.1,
            "kernel: features × classes",
            model,
            3.1,
            "pale: gathered once along data, and its gradient\nscattered along data",
        ),
        (
            1.5,
            "logits: tokens × classes, never stored",
            model,
            3.1,
            "along model: a few sums of each token,\nand the gradient of hidden",
        ),
    )
    for low, title, columns, width, note in rows:
        left, height = 5 - columns * width / 2, 0.72
        axes.text(5, low + data * height + 0.3, title, ha="center", va="center", weight="bold")
        for row in range(data):
            for column in range(columns):
                own = row == 1 and column == 0
                gathered = title.startswith("kernel") and column == 0
                stored = {"linestyle": (0, (4, 3))} if title.startswith("logits") else {}
                where = f"data {row}" + (f", model {column}" if columns > 1 else "")
                color = DEEP if own else PALE if gathered else "white"
                box(axes, left + column * width, low + (data - 1 - row) * height, width, height, color, where, **stored)
        axes.text(5, low - 0.2, note, ha="center", va="top", size=11)
    axes.text(5, 14.85, "What the device at data 1, model 0 works on (blue)", ha="center", va="center")
    save(figure, "sharded")


if __name__ == "__main__":
    merge()
    over_tokens()
    over_classes()
    mesh()
    who_holds_what()
