"""Teaches the language model of `train_lm.py` to write as a reward likes it, with group-relative policy optimization.

    pip install -e ".[examples]"     # from the root of the repository
    python examples/grpo.py          # three minutes on two cores; writes out/grpo.png
    python examples/grpo.py --smoke  # seconds, for CI
    python examples/grpo.py --help

The model is first trained on the reference of the Python language, as in `train_lm.py` but briefly. Then, step by step:
it continues some prompts, each a group of times; the reward of a text is the share of its characters that are a certain
letter; and a text's advantage is its reward less the mean of its group, over the group's standard deviation. The loss
is that of GRPO (Shao et al., 2024, arXiv:2402.03300): the clipped ratio of PPO, a bonus for entropy, and the divergence
from the model that it started from. `jaxce.linear_token_log_probs` gives the log-probability and the entropy of each
token, and their gradients, without the logits of all tokens: B texts of T tokens over V tokens of the vocabulary.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_lm
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxce

GROUPS, GROUP_SIZE = 6, 8  # prompts in a step, and how often each is continued
PROMPT, LENGTH = 8, 32  # tokens of a prompt, and of a text with its prompt: T
CLIP = 0.2  # how far the ratio of new to old probabilities counts
UPDATES = 2  # gradient steps on the texts of a step
LEFT_OUT = -100


def token_stats(model: train_lm.Decoder, texts: jax.Array) -> jaxce.TokenStats:
    """Of each token but the first, given those before it; 0 in the prompt."""
    hidden = model(texts[:, :-1])  # (B, T - 1, D)
    labels = jnp.where(jnp.arange(1, LENGTH) < PROMPT, LEFT_OUT, texts[:, 1:])  # (B, T - 1)
    return jaxce.linear_token_log_probs(hidden, model.embed.embedding[...], labels, transpose_kernel=True)


@nnx.jit
def write_token(model: train_lm.Decoder, texts: jax.Array, place: jax.Array, key: jax.Array) -> jax.Array:
    """The texts with a token at `place`; what stands behind it is padding, which causal attention can't see."""
    hidden = jnp.take(model(texts), place - 1, axis=1)  # (B, D), of the last token so far
    logits = hidden @ model.embed.embedding[...].T  # (B, V)
    return texts.at[:, place].set(jax.random.categorical(jax.random.fold_in(key, place), logits))


def continue_prompts(model: train_lm.Decoder, prompts: np.ndarray, key: jax.Array) -> jax.Array:
    """(B, T) texts that begin with the (B, PROMPT) prompts."""
    texts = jnp.pad(prompts, [(0, 0), (0, LENGTH - PROMPT)])
    for place in range(PROMPT, LENGTH):
        texts = write_token(model, texts, place, key)
    return texts


class Experience(NamedTuple):
    texts: jax.Array  # (B, T)
    advantages: jax.Array  # (B,)
    log_prob: jax.Array  # (B, T - 1), of the model that wrote them
    start_log_prob: jax.Array  # (B, T - 1), of the model that it started from


class Report(NamedTuple):
    """Means over the tokens, in nats."""

    entropy: jax.Array
    kl: jax.Array


def grpo_loss(
    model: train_lm.Decoder, seen: Experience, kl_weight: float, entropy_weight: float
) -> tuple[jax.Array, Report]:
    stats = token_stats(model, seen.texts)
    written = jnp.arange(1, LENGTH) >= PROMPT  # (T - 1,)
    count = written.sum() * seen.texts.shape[0]
    ratio = jnp.exp(stats.log_prob - seen.log_prob)
    advantages = seen.advantages[:, None]
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
    # Never negative, and its mean over texts of the model is the divergence (arXiv:2402.03300, equation 4).
    difference = seen.start_log_prob - stats.log_prob
    kl = jnp.exp(difference) - difference - 1

    def mean(per_token: jax.Array) -> jax.Array:
        return jnp.where(written, per_token, 0).sum() / count

    report = Report(mean(stats.entropy), mean(kl))
    return kl_weight * report.kl - entropy_weight * report.entropy - mean(gain), report


@partial(nnx.jit, static_argnames=("kl_weight", "entropy_weight"))
def update(
    model: train_lm.Decoder, optimizer: nnx.Optimizer, seen: Experience, kl_weight: float, entropy_weight: float
) -> Report:
    loss_fn = partial(grpo_loss, seen=seen, kl_weight=kl_weight, entropy_weight=entropy_weight)
    (_, report), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return report


def rewards_of(texts: jax.Array, tokenizer: train_lm.ByteLevelBPETokenizer, letter: str) -> np.ndarray:
    """(B,) the share of the characters after the prompt that are that letter."""
    written = [tokenizer.decode(text) for text in np.asarray(texts[:, PROMPT:]).tolist()]
    return np.array([text.count(letter) / max(len(text), 1) for text in written], np.float32)


def advantages_of(rewards: np.ndarray) -> np.ndarray:
    """(B,) each reward relative to those of its group."""
    groups = rewards.reshape(GROUPS, GROUP_SIZE)
    relative = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)
    return relative.ravel()


class History(NamedTuple):
    reward: list[float]
    entropy: list[float]
    kl: list[float]


def learn(
    model: train_lm.Decoder,
    documents: list[np.ndarray],
    tokenizer: train_lm.ByteLevelBPETokenizer,
    args: argparse.Namespace,
    steps: int,
) -> History:
    """Changes the model."""
    start = nnx.clone(model)
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(args.rate)), wrt=nnx.Param)
    log_probs_of = nnx.jit(lambda model, texts: token_stats(model, texts).log_prob)
    rng, history = np.random.default_rng(args.seed), History([], [], [])
    tokens = np.concatenate(documents)
    with tqdm(range(steps), desc="GRPO", unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            places = rng.integers(0, len(tokens) - PROMPT, GROUPS)
            prompts = np.repeat(np.stack([tokens[place : place + PROMPT] for place in places]), GROUP_SIZE, 0)
            texts = continue_prompts(model, prompts, jax.random.key(args.seed * 10_000 + step))
            rewards = rewards_of(texts, tokenizer, args.letter)
            seen = Experience(texts, advantages_of(rewards), log_probs_of(model, texts), log_probs_of(start, texts))
            reports = [update(model, optimizer, seen, args.kl, args.entropy) for _ in range(UPDATES)]
            history.reward.append(float(rewards.mean()))
            history.entropy.append(float(reports[0].entropy))
            history.kl.append(float(reports[0].kl))
            bar.set_postfix(reward=f"{history.reward[-1]:.3f}", KL=f"{history.kl[-1]:.3f}", refresh=False)
    return history


def draw(out: Path, history: History, letter: str) -> None:
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    names = (f"reward: share of {letter!r}", "entropy of a token (nats)", "KL to the start of a token (nats)")
    for ax, name, values, colour in zip(figure.subplots(1, 3), names, history, ("C0", "C2", "C3"), strict=True):
        ax.plot(np.arange(1, len(values) + 1), values, color=colour, alpha=0.35)
        width = max(1, len(values) // 10)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        ax.plot(np.arange(width, len(values) + 1), smooth, color=colour, label=f"mean of {width} steps")
        ax.set(title=name, xlabel="step", ylim=(0, None))
        ax.legend(loc="best")
        ax.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Teach a small language model to like a letter.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pretraining", type=int, default=200, help="steps of training on text first")
    parser.add_argument("--steps", type=int, default=150, help=f"steps of {GROUPS * GROUP_SIZE} texts")
    parser.add_argument("--letter", default="e", help="the letter that is rewarded")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--kl", type=float, default=0.15, help="weight of the divergence from the start")
    parser.add_argument("--entropy", type=float, default=0.01, help="weight of the entropy")
    parser.add_argument("--out", type=Path, default=Path("out/grpo.png"), help="where to save the picture")
    parser.add_argument("--seed", type=int, default=0, help="for the split, the weights, the prompts and the texts")
    parser.add_argument("--smoke", action="store_true", help="a few steps; fails unless all numbers are finite")
    args = parser.parse_args()
    if len(args.letter) != 1:
        parser.error(f"--letter must be one character; got {args.letter!r}")
    if args.steps < 2 or args.pretraining < 2:
        parser.error("--steps and --pretraining must be at least 2")
    return args


def main() -> None:
    args = parse_args()
    pretraining, steps = (4, 3) if args.smoke else (args.pretraining, args.steps)
    tokenizer, train, held_out = train_lm.load_documents(args.seed)
    model = train_lm.fit("fused", train, pretraining, args.seed, pretraining).model
    prompts = np.stack([document[:PROMPT] for document in held_out if len(document) >= PROMPT][:2])

    def samples() -> list[str]:
        texts = continue_prompts(model, prompts, jax.random.key(args.seed))
        return [tokenizer.decode(text) for text in np.asarray(texts).tolist()]

    before = samples()
    history = learn(model, train, tokenizer, args, steps)
    draw(args.out, history, args.letter)
    tenth = max(1, steps // 10)
    first, last = np.mean(history.reward[:tenth]), np.mean(history.reward[-tenth:])
    print(f"reward, mean of {tenth} steps: {first:.3f} at first, {last:.3f} at last; picture in {args.out}")
    for text, later in zip(before, samples(), strict=True):
        print("before:", repr(text), "after: ", repr(later), sep="\n  ")
    if not np.isfinite([history.reward, history.entropy, history.kl]).all():
        raise SystemExit("a reward, an entropy or a divergence isn't finite")


if __name__ == "__main__":
    main()
