"""Trains a small convolutional network on handwritten digits with `jaxce.cross_entropy`, Flax NNX and Optax.

    pip install -e ".[examples]"                      # from the root of the repository
    python examples/train_digits.py                   # under a minute on two cores; writes out/train_digits.png
    python examples/train_digits.py --smoke           # a few seconds, for CI; fails unless the loss falls
    python examples/train_digits.py --help

The data are the 1797 images of 8 x 8 pixels that scikit-learn carries, so nothing is downloaded. Four fifths are for
training, the rest is held out. Every number that is printed or drawn comes from `LossStats`, which `cross_entropy`
returns next to the loss.

Shapes: B images in a batch, H x W pixels (8 x 8), C classes (10 digits).
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxce

BATCH_SIZE = 64
NUM_CLASSES = 10
LEFT_OUT = -100  # cross_entropy's default ignore_index: the row has no loss, no gradient and no weight


class ConvNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 64, 128, rngs=rngs)
        self.logits = nnx.Linear(128, NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv1(images))  # (B, 8, 8, 1) -> (B, 8, 8, 32)
        x = nnx.relu(self.conv2(x))  # (B, 8, 8, 64)
        x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))  # (B, 4, 4, 64)
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))  # (B, 1024) -> (B, 128)
        return self.logits(x)  # (B, C)


@nnx.jit
def train_step(model: ConvNet, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jaxce.LossStats:
    def loss_fn(model: ConvNet) -> tuple[jax.Array, jaxce.LossStats]:
        logits = model(images)  # (B, H, W, 1) -> (B, C)
        # With ten classes, 0.05 asks for a probability of 0.955 and so keeps nll near -log(0.955) = 0.046 nats.
        return jaxce.cross_entropy(logits, labels, label_smoothing=0.05, return_stats=True)

    (_, stats), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return stats


@nnx.jit
def eval_step(model: ConvNet, images: jax.Array, labels: jax.Array) -> jaxce.LossStats:
    _, stats = jaxce.cross_entropy(model(images), labels, return_stats=True)
    return stats


class Digits(NamedTuple):
    images: np.ndarray  # (N, H, W, 1), float32 from 0 (paper) to 1 (ink)
    labels: np.ndarray  # (N,), int32


def load_data(seed: int) -> tuple[Digits, Digits]:
    """Training and held-out digits; each class has the same share of both."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)  # (1797, 8, 8, 1)
    labels = digits.target.astype(np.int32)  # (1797,)
    train, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def shift(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves each image by up to one pixel in each direction: a digit stays the same digit."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))  # (N, H + 2, W + 2, 1)
    down, right = rng.integers(0, 3, size=(2, count, 1))  # (N, 1) each
    rows, columns = down + np.arange(height), right + np.arange(width)  # (N, H), (N, W)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]  # (N, H, W, 1)


def batches(digits: Digits) -> Iterator[Digits]:
    """Batches of one size, so that each step is compiled once: empty images that are left out fill up the last."""
    missing = -len(digits.labels) % BATCH_SIZE
    images = np.pad(digits.images, ((0, missing), (0, 0), (0, 0), (0, 0)))
    labels = np.pad(digits.labels, (0, missing), constant_values=LEFT_OUT)
    for start in range(0, len(labels), BATCH_SIZE):
        yield Digits(images[start : start + BATCH_SIZE], labels[start : start + BATCH_SIZE])  # (B, H, W, 1), (B,)


class Score(NamedTuple):
    loss: float  # mean negative log-likelihood in nats, without label smoothing
    accuracy: float  # share of images classified right, from 0 to 1


def score(stats: jaxce.LossStats, labels: np.ndarray) -> Score:
    """Loss and accuracy over all images; the mean of the batches' means would weigh a short batch too much."""
    count = stats.weight_sum.sum()  # weight 1 for each image, 0 for each that is left out
    correct = stats.predicted[: len(labels)] == labels  # (N,)
    return Score(float(stats.nll.sum() / count), float(correct.sum() / count))


def concatenate(stats: list[jaxce.LossStats]) -> jaxce.LossStats:
    """The stats of several batches as one: arrays of N images and the padding, and a weight_sum for each batch."""
    return jaxce.LossStats(*(np.hstack(field) for field in zip(*stats, strict=True)))


def evaluate(model: ConvNet, digits: Digits) -> jaxce.LossStats:
    return concatenate([eval_step(model, *batch) for batch in batches(digits)])


def fit(train: Digits, held_out: Digits, epochs: int, seed: int) -> tuple[list[Score], list[Score], jaxce.LossStats]:
    """Scores of each epoch on the training and the held-out images, and the last stats of the held-out images.

    Training scores are taken on shifted images while the weights change, so they may be the worse ones. The first
    held-out score is from before training, when the loss is about log(10) = 2.3 nats.
    """
    steps = epochs * -(-len(train.labels) // BATCH_SIZE)
    model = ConvNet(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adamw(optax.cosine_decay_schedule(2e-3, steps)), wrt=nnx.Param)
    rng = np.random.default_rng(seed)

    stats = evaluate(model, held_out)
    train_scores, held_out_scores = [], [score(stats, held_out.labels)]
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for epoch in range(1, epochs + 1):
            order = rng.permutation(len(train.labels))
            shuffled = Digits(shift(train.images[order], rng), train.labels[order])
            epoch_stats = []
            for batch in batches(shuffled):
                epoch_stats.append(train_step(model, optimizer, *batch))
                bar.update()
            train_scores.append(score(concatenate(epoch_stats), shuffled.labels))
            stats = evaluate(model, held_out)
            held_out_scores.append(score(stats, held_out.labels))
            bar.write(epoch_line(epoch, epochs, train_scores[-1], held_out_scores[-1]))
    return train_scores, held_out_scores, stats


def epoch_line(epoch: int, epochs: int, train: Score, held_out: Score) -> str:
    return (
        f"epoch {epoch:{len(str(epochs))}}/{epochs}"
        f"   train loss {train.loss:.4f} nats, accuracy {train.accuracy:6.2%}"
        f"   held-out loss {held_out.loss:.4f} nats, accuracy {held_out.accuracy:6.2%}"
    )


def draw_curves(loss_axes: Axes, accuracy_axes: Axes, train: list[Score], held_out: list[Score]) -> None:
    for name, scores, first, colour in [("training (shifted)", train, 1, "C0"), ("held-out", held_out, 0, "C1")]:
        epochs = range(first, first + len(scores))
        style = {"color": colour, "marker": ".", "markersize": 5}
        loss, accuracy = scores[-1]
        loss_axes.plot(epochs, [s.loss for s in scores], label=f"{name}, last {loss:.3f}", **style)
        accuracy_axes.plot(epochs, [100 * s.accuracy for s in scores], label=f"{name}, last {accuracy:.1%}", **style)
    loss_axes.set(title="Loss", xlabel="epoch", ylabel="mean negative log-likelihood (nats)", yscale="log")
    loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss_axes.yaxis.set_major_formatter("{x:g}")
    loss_axes.yaxis.set_minor_locator(NullLocator())
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylabel="images classified right (%)", ylim=(0, 103))
    for axes, corner in [(loss_axes, "upper right"), (accuracy_axes, "lower right")]:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc=corner)


def draw_confusion(axes: Axes, labels: np.ndarray, predicted: np.ndarray) -> None:
    """Counts of images; the diagonal is grey, so that the colours are free for the few mistakes off it."""
    counts = confusion_matrix(labels, predicted, labels=range(NUM_CLASSES))  # (C, C), a row for each label
    diagonal = np.eye(NUM_CLASSES, dtype=bool)
    mistakes = np.where(diagonal, 0, counts)
    darkest = max(3, mistakes.max())
    axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=darkest)
    axes.imshow(np.where(diagonal, 0.2, np.nan), cmap="Greys", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        colour = "w" if mistakes[row, column] > darkest / 2 else "k"
        weight = "normal" if row == column else "bold"
        axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, weight=weight)
    axes.set(title="Confusion (held-out images)", xlabel="predicted digit", ylabel="label")
    axes.set(xticks=range(NUM_CLASSES), yticks=range(NUM_CLASSES))


def draw_worst(row: Iterable[Axes], digits: Digits, stats: jaxce.LossStats) -> None:
    """The images with the largest loss; those that are classified wrong in red, the others in black."""
    worst = np.argsort(-stats.nll[: len(digits.labels)], stable=True)
    for axes, i in zip(row, worst, strict=False):
        label, predicted = digits.labels[i], stats.predicted[i]
        colour = "k" if predicted == label else "C3"
        axes.imshow(digits.images[i, ..., 0], cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"label {label}, predicted {predicted}\nloss {stats.nll[i]:.2f} nats", size=10, color=colour)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(colour)


def draw_picture(out: Path, train: list[Score], held_out: list[Score], digits: Digits, stats: jaxce.LossStats) -> None:
    """Training curves, confusion matrix, and the held-out images that the network got most wrong."""
    count = len(digits.labels)
    predicted = stats.predicted[:count]
    wrong = int((predicted != digits.labels).sum())

    figure = Figure(figsize=(14, 7.5), dpi=120, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(5, 2.5))
    loss_axes, accuracy_axes, confusion_axes = top.subplots(1, 3)
    draw_curves(loss_axes, accuracy_axes, train, held_out)
    draw_confusion(confusion_axes, digits.labels, predicted)
    bottom.suptitle(f"Held-out images with the largest loss (red: classified wrong, {wrong} of {count})")
    draw_worst(bottom.subplots(1, 8), digits, stats)
    for part in (top, bottom):
        part.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # inches
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)  # Agg draws it, and a figure made without pyplot never asks for a display


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a small convolutional network on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images")
    parser.add_argument("--out", type=Path, default=Path("out/train_digits.png"), help="where to save the picture")
    parser.add_argument("--seed", type=int, default=0, help="for the split, the weights, the order and the shifts")
    parser.add_argument(
        "--smoke", action="store_true", help="512 training images, at most 6 epochs; fails unless the loss falls"
    )
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1; got {args.epochs}")

    train, held_out = load_data(args.seed)
    epochs = args.epochs
    if args.smoke:
        train = Digits(train.images[:512], train.labels[:512])
        epochs = min(epochs, 6)
    train_scores, held_out_scores, stats = fit(train, held_out, epochs, args.seed)
    draw_picture(args.out, train_scores, held_out_scores, held_out, stats)
    before, after = held_out_scores[0], held_out_scores[-1]
    print(f"held-out accuracy {after.accuracy:.2%}; picture in {args.out}")
    if args.smoke and not after.loss < before.loss:
        raise SystemExit(f"the held-out loss didn't fall: {before.loss:.4f} nats before, {after.loss:.4f} after")


if __name__ == "__main__":
    main()
