"""Trains a small language model with `jaxce.linear_cross_entropy`, Flax NNX and Optax, without storing its logits.

    pip install -e ".[examples]"                      # from the root of the repository
    python examples/train_lm.py                       # about two minutes on two cores; writes out/train_lm.png
    python examples/train_lm.py --dense               # trains with the plain loss, which stores the logits
    python examples/train_lm.py --mesh data=4,model=2 # on eight virtual devices, with sharding=; about ten minutes
    python examples/train_lm.py --smoke               # a few seconds, for CI; fails unless the loss falls
    python examples/train_lm.py --help

The text is the reference of the Python language, which every Python carries in `pydoc_data.topics`, so nothing is
downloaded; it differs a little between versions of Python. The first steps are trained a second time with the other
loss, on the same batches: the picture shows that the two draw the same curve, and the memory that the compiled step of
each takes. With `--mesh` it is the same loss on one device. The blocks are rematerialized, so that the logits are what
is left to save.

Shapes: B sequences in a batch, T tokens in a sequence, D features, H heads of K features, V tokens in the vocabulary.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers, imported below, warns when a process forks otherwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm

import jaxce

VOCABULARY = 8192
BATCH_SIZE, LENGTH = 8, 128  # B, T
FEATURES, LAYERS, HEADS = 128, 3, 4  # D, number of blocks, H
COMPARED_STEPS = 60  # how many of the first steps are trained with the other loss too
BATCH_SPEC, EMBEDDING_SPEC = P("data"), P("model")  # on a mesh: of (B, T, D), and of (V, D)
LEFT_OUT = -100  # linear_cross_entropy's default ignore_index: the token has no loss, no gradient and no weight


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: turns each pair of features by an angle proportional to the position (arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] / 10_000 ** (jnp.arange(half) / half)  # (T, K/2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # (T, 1, K/2)
    a, b = jnp.split(x, 2, axis=-1)  # (B, T, H, K/2) each
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)  # (B, T, H, K)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.qkv = nnx.Linear(FEATURES, 3 * FEATURES, use_bias=False, rngs=rngs)
        self.attended = nnx.Linear(FEATURES, FEATURES, use_bias=False, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.up = nnx.Linear(FEATURES, 4 * FEATURES, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * FEATURES, FEATURES, use_bias=False, rngs=rngs)

    @nnx.remat  # the backward pass computes the block again instead of storing what is inside
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3 * HEADS, -1)  # (B, T, 3 H, K)
        q, k, v = jnp.split(heads, 3, axis=2)  # (B, T, H, K) each
        attended = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)  # (B, T, H, K)
        x = x + self.attended(attended.reshape(x.shape))  # (B, T, D)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))  # (B, T, D)


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, FEATURES, embedding_init=nnx.initializers.normal(0.05), rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)  # (B, T) -> (B, T, D)
        for block in self.blocks:
            x = block(x)  # (B, T, D)
        return self.norm(x)  # (B, T, D)


def fused_loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[jax.Array, jaxce.LossStats]:
    # The embedding is the output kernel too, and is (V, D) where an output layer's kernel is (D, V).
    return jaxce.linear_cross_entropy(hidden, kernel, labels, transpose_kernel=True, return_stats=True)


def dense_loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[jax.Array, jaxce.LossStats]:
    logits = hidden @ kernel.T  # (B, T, V): the array that the fused loss never stores
    return jaxce.cross_entropy(logits, labels, return_stats=True)


def sharded_loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[jax.Array, jaxce.LossStats]:
    # The mesh is that of jax.set_mesh. Each device has some of the sequences, and of the vocabulary; see `spread`.
    lie = jaxce.OnMesh(hidden=BATCH_SPEC, kernel=EMBEDDING_SPEC)
    return jaxce.linear_cross_entropy(hidden, kernel, labels, transpose_kernel=True, return_stats=True, sharding=lie)


LOSSES = {"fused": fused_loss, "dense": dense_loss, "sharded": sharded_loss}
COLOURS = {"fused": "C0", "dense": "C1", "sharded": "C2"}


def train_step(
    loss: Callable, model: Decoder, optimizer: nnx.Optimizer, tokens: jax.Array, labels: jax.Array
) -> jaxce.LossStats:
    def loss_fn(model: Decoder) -> tuple[jax.Array, jaxce.LossStats]:
        hidden = model(tokens)  # (B, T) -> (B, T, D)
        return loss(hidden, model.embed.embedding[...], labels)

    (_, stats), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return stats


@nnx.jit
def eval_step(model: Decoder, tokens: jax.Array, labels: jax.Array) -> jaxce.LossStats:
    _, stats = fused_loss(model(tokens), model.embed.embedding[...], labels)
    return stats


class Batch(NamedTuple):
    tokens: np.ndarray  # (B, T), int32
    labels: np.ndarray  # (B, T), int32: the next token, or LEFT_OUT


def load_documents(seed: int) -> tuple[ByteLevelBPETokenizer, list[np.ndarray], list[np.ndarray]]:
    """The tokenizer, and the tokens of the training and of the held-out topics.

    Some topics repeat parts of others: a paragraph is kept only where it comes first, lest training sees the held-out.
    """
    seen: set[str] = set()
    texts = []
    for name in sorted(topics):
        paragraphs = [p for p in topics[name].split("\n\n") if not (p in seen or seen.add(p))]
        texts.append("\n\n".join(paragraphs))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, min_frequency=1, show_progress=False)
    documents = [np.array(encoded.ids, np.int32) for encoded in tokenizer.encode_batch(texts) if encoded.ids]
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out, train = np.split(order, [len(documents) // 8])
    return tokenizer, [documents[i] for i in train], [documents[i] for i in held_out]


def pack(documents: list[np.ndarray]) -> Batch:
    """Documents end to end, cut into sequences, whole batches of them; boundaries and padding are left out."""
    tokens = np.concatenate(documents)
    # The last token of a document isn't asked for the first of the next, which has nothing to do with it.
    labels = np.concatenate([np.append(document[1:], LEFT_OUT) for document in documents])
    padding = (0, -len(tokens) % (BATCH_SIZE * LENGTH))
    tokens, labels = np.pad(tokens, padding), np.pad(labels, padding, constant_values=LEFT_OUT)
    return Batch(tokens.reshape(-1, LENGTH), labels.reshape(-1, LENGTH).astype(np.int32))  # (N, T) each


def batches(packed: Batch, mesh: Mesh | None = None) -> Iterator[Batch]:
    for start in range(0, len(packed.tokens), BATCH_SIZE):
        batch = Batch(*(array[start : start + BATCH_SIZE] for array in packed))  # (B, T) each
        yield batch if mesh is None else jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))


def training_batches(documents: list[np.ndarray], seed: int, mesh: Mesh | None) -> Iterator[Batch]:
    """Batches without end; each pass over the documents packs them in a new order."""
    rng = np.random.default_rng(seed)
    while True:
        packed = pack([documents[i] for i in rng.permutation(len(documents))])
        order = rng.permutation(len(packed.tokens))
        yield from batches(Batch(packed.tokens[order], packed.labels[order]), mesh)


def mean_nll(stats: list[jaxce.LossStats]) -> float:
    """Mean negative log-likelihood in nats over the tokens of all batches; its exponential is the perplexity."""
    # weight_sum counts the tokens that are not left out.
    return float(sum(s.nll.sum() for s in stats) / sum(s.weight_sum for s in stats))


def evaluate(model: Decoder, documents: list[np.ndarray]) -> float:
    return mean_nll([eval_step(model, *batch) for batch in batches(pack(documents))])


class Run(NamedTuple):
    model: Decoder
    losses: list[float]  # mean negative log-likelihood of each step's batch, in nats
    temp_bytes: int  # what the compiled step allocates beside the weights and the optimizer's state


def spread(model: Decoder, mesh: Mesh) -> None:
    """Lays the embedding, which is the output kernel too, over the mesh, and all other weights on each device."""
    nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, P())))
    model.embed.embedding[...] = jax.device_put(model.embed.embedding[...], NamedSharding(mesh, EMBEDDING_SPEC))


def fit(name: str, documents: list[np.ndarray], steps: int, seed: int, stop: int, mesh: Mesh | None = None) -> Run:
    """Trains for the first `stop` of `steps` steps with the loss of this name; on a mesh, if there is one."""
    model = Decoder(nnx.Rngs(seed))
    if mesh is not None:
        spread(model, mesh)
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, warmup_steps=math.ceil(steps / 10), decay_steps=steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, b2=0.99, weight_decay=0.1), wrt=nnx.Param)
    stream = training_batches(documents, seed, mesh)
    batch = next(stream)
    step = nnx.jit(partial(train_step, LOSSES[name])).lower(model, optimizer, *batch).compile()

    losses = []
    tokens = BATCH_SIZE * LENGTH
    with tqdm(total=stop * tokens, desc=name, unit="token", unit_scale=True, dynamic_ncols=True) as bar:
        for _ in range(stop):
            loss = mean_nll([step(model, optimizer, *batch)])
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", perplexity=f"{math.exp(loss):.0f}", refresh=False)
            bar.update(tokens)
            batch = next(stream)
    return Run(model, losses, step.memory_analysis().temp_size_in_bytes)


@nnx.jit
def next_token(model: Decoder, window: jax.Array, last: jax.Array, key: jax.Array, temperature: float) -> jax.Array:
    """A token to follow the one at `last`; what stands behind that is padding, which causal attention can't see."""
    hidden = model(window[None])[0, last]  # (T,) -> (D,)
    logits = model.embed.embedding[...] @ hidden  # (V,)
    return jax.random.categorical(key, logits / temperature)


def generate(model: Decoder, tokenizer: ByteLevelBPETokenizer, prompt: str, seed: int, temperature: float = 0.7) -> str:
    """The prompt and what the model adds to it, up to the T tokens of a window: one shape, so compiled once."""
    tokens = tokenizer.encode(prompt).ids
    for key in jax.random.split(jax.random.key(seed), LENGTH - len(tokens)):
        window = np.pad(np.array(tokens, np.int32), (0, LENGTH - len(tokens)))  # (T,)
        tokens.append(int(next_token(model, window, len(tokens) - 1, key, temperature)))
    return tokenizer.decode(tokens)


def draw_curves(axes: Axes, difference_axes: Axes, runs: dict[str, Run], held_out: float) -> None:
    """The longer run as a broad pale line, the other as a thin dark one on top of it; below, the gap."""
    longer, other = sorted(runs, key=lambda name: -len(runs[name].losses))
    a, b = np.array(runs[longer].losses), np.array(runs[other].losses)
    steps = np.arange(1, len(a) + 1)
    axes.plot(steps, a, color=COLOURS[longer], linewidth=3.5, alpha=0.45, label=f"{longer}, {len(a)} steps")
    axes.plot(steps[: len(b)], b, color=COLOURS[other], linewidth=1.2, label=f"{other}, first {len(b)} steps")
    axes.axhline(held_out, color="k", linestyle=":", label=f"held-out at the end: {held_out:.2f}")
    axes.set(title="Loss of the same batches", ylabel="mean negative log-likelihood (nats)")
    axes.tick_params(labelbottom=False)
    axes.legend(loc="upper right")
    gap = np.abs(a[: len(b)] - b)
    difference_axes.plot(steps[: len(b)], gap, "k.-", linewidth=0.8, markersize=4)
    difference_axes.ticklabel_format(axis="y", scilimits=(0, 0))
    difference_axes.set(xlabel="step", ylabel=f"|{longer} - {other}|", xlim=axes.get_xlim())
    difference_axes.set_ylim(-1e-7, max(1e-6, 1.1 * gap.max()))  # a float32 loss of 8 is known to 1e-6
    for each in (axes, difference_axes):
        each.grid(alpha=0.3)


def draw_memory(axes: Axes, runs: dict[str, Run]) -> None:
    names = [name for name in LOSSES if name in runs]
    logits = BATCH_SIZE * LENGTH * VOCABULARY * 4 / 1e6
    megabytes = [runs[name].temp_bytes / 1e6 for name in names]
    bars = axes.bar(names, megabytes, color=[COLOURS[name] for name in names], width=0.45)
    axes.bar_label(bars, fmt="%.1f MB", padding=3)
    axes.axhline(logits, color="k", linestyle="--", linewidth=1)
    axes.text(0.5, logits, f"logits alone\n{logits:.1f} MB", va="center", ha="center", size=9, backgroundcolor="w")
    axes.set(title="Temporary memory of the step", ylabel="MB (10⁶ bytes)", ylim=(0, 1.15 * max(megabytes)))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def draw_picture(out: Path, runs: dict[str, Run], held_out: float) -> None:
    """The loss of both runs with the difference below, and the memory of both steps beside it."""
    figure = Figure(figsize=(12, 5.5), dpi=120, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    draw_curves(*left.subplots(2, 1, height_ratios=(3, 1)), runs, held_out)
    draw_memory(right.subplots(), runs)
    for part in (left, right):
        part.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # inches
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)  # Agg draws it, and a figure made without pyplot never asks for a display


def mesh_shape(text: str) -> dict[str, int]:
    """The sizes of the axes in text such as data=4,model=2."""
    try:
        shape = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        shape = {}
    if set(shape) != {"data", "model"} or min(shape.values()) < 1:
        raise argparse.ArgumentTypeError(f"must name the sizes of both axes, as in data=4,model=2; got {text}")
    if BATCH_SIZE % shape["data"] or VOCABULARY % shape["model"]:
        raise argparse.ArgumentTypeError(f"data must divide {BATCH_SIZE}, and model {VOCABULARY}; got {text}")
    return shape


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small language model on the reference of the Python language.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=360, help=f"batches of {BATCH_SIZE * LENGTH} tokens to train on")
    parser.add_argument("--out", type=Path, default=Path("out/train_lm.png"), help="where to save the picture")
    parser.add_argument("--seed", type=int, default=0, help="for the split, the weights, the order and the sample")
    parser.add_argument("--dense", action="store_true", help="train with the plain loss, which stores the logits")
    parser.add_argument("--mesh", type=mesh_shape, help="train on so many virtual devices, as in data=4,model=2")
    parser.add_argument("--smoke", action="store_true", help="at most 6 steps; fails unless the loss falls")
    args = parser.parse_args()
    if args.mesh and args.dense:
        parser.error("--mesh is for the fused loss: leave --dense out")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2; got {args.steps}")
    return args


def main() -> None:
    args = parse_args()
    if args.mesh:
        jax.config.update("jax_num_cpu_devices", math.prod(args.mesh.values()))
    steps = min(args.steps, 6) if args.smoke else args.steps
    tokenizer, train, held_out = load_documents(args.seed)
    compared = min(steps, COMPARED_STEPS)
    if args.mesh:
        trained, other = "sharded", "fused"
        mesh = jax.make_mesh(tuple(args.mesh.values()), tuple(args.mesh), axis_types=(AxisType.Auto,) * 2)
        with jax.set_mesh(mesh):
            first = fit(trained, train, steps, args.seed, steps, mesh)
        # Evaluated and sampled from on one device.
        nnx.update(first.model, jax.device_put(nnx.state(first.model), jax.devices()[0]))
    else:
        trained, other = ("dense", "fused") if args.dense else ("fused", "dense")
        first = fit(trained, train, steps, args.seed, steps)
    runs = {trained: first, other: fit(other, train, steps, args.seed, compared)}
    model, losses, _ = runs[trained]
    loss = evaluate(model, held_out)
    draw_picture(args.out, runs, loss)

    gap = max(abs(a - b) for a, b in zip(losses, runs[other].losses, strict=False))
    print(f"largest difference of {trained} and {other} loss in {len(runs[other].losses)} steps: {gap:.1e} nats")
    for name in runs:
        print(f"temporary memory of the compiled step, {name}: {runs[name].temp_bytes / 1e6:.1f} MB")
    print(f"held-out loss {loss:.4f} nats, perplexity {math.exp(loss):.1f}; picture in {args.out}")
    print("sample:", generate(model, tokenizer, "The value of the expression", args.seed), sep="\n")
    if args.mesh and not gap < 1e-3:
        raise SystemExit(f"the loss on the mesh isn't that on one device: {gap:.1e} nats apart")
    if args.smoke and not losses[-1] < losses[0]:
        raise SystemExit(f"the loss didn't fall: {losses[0]:.4f} nats in the first step, {losses[-1]:.4f} in the last")


if __name__ == "__main__":
    main()
