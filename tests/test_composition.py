"""A term of the loss that no option has: its gradient is there in every loop, dense, and on every layout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, cases, indices, normal, positive
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import InShardMap, OnMesh, _platform
from jaxce._arguments.options import loss_options
from jaxce._math import composition
from jaxce._math.composition import ExampleWeights, example_losses, is_read, reads_smoothing
from jaxce._math.example import Stats

N, D, C = 8, 8, 24
LABELS = indices((N,), C, 3).at[4].set(-100)
pytestmark = pytest.mark.usefixtures("x64")


def confidence(stats, weights, num_classes, options):
    """Of the entropy, and of log Z without a z-loss: numbers that no option reads where all are off."""
    return composition.times(weights.total, 0.5 * stats.entropy**2 + 0.1 * stats.log_z)


@pytest.fixture
def with_a_new_term(monkeypatch):
    monkeypatch.setattr(composition, "TERMS", [*composition.TERMS, confidence])
    jax.clear_caches()
    yield
    jax.clear_caches()


def problem():
    return {
        "hidden": normal((N, D), 0, np.float64),
        "kernel": normal((D, C), 1, np.float64) / 2,
        "bias": normal((C,), 2, np.float64),
        "sample_weight": positive((N,), 4, np.float64),
    }


def by_definition(hidden, kernel, bias, sample_weight):
    logits = hidden @ kernel + bias
    log_p, log_z = jax.nn.log_softmax(logits), jax.nn.logsumexp(logits, -1)
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    nll = -jnp.take_along_axis(log_p, jnp.maximum(LABELS, 0)[:, None], 1)[:, 0]
    weight = jnp.where(LABELS == -100, 0, sample_weight)
    return (weight * (nll + 0.5 * entropy**2 + 0.1 * log_z)).sum() / weight.sum()


def dense(hidden, kernel, bias, sample_weight, **how):
    return jaxce.cross_entropy(hidden @ kernel + bias, LABELS, sample_weight=sample_weight, **how)


def fused(**how):
    return partial(jaxce.linear_cross_entropy, labels=LABELS, chunk_size=5, **how)


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def on_mesh(loss, **specs):
    return partial(loss, sharding=OnMesh(mesh=mesh_of(), **specs))


def inside(hidden, kernel, bias, sample_weight):
    def local(hidden, kernel, bias, sample_weight, labels):
        own = InShardMap(batch_axes="data", class_axes="model")
        return jaxce.linear_cross_entropy(
            hidden, kernel, labels, bias=bias, sample_weight=sample_weight, chunk_size=5, sharding=own
        )

    specs = P("data"), P(None, "model"), P("model"), P("data"), P("data")
    loss = jax.shard_map(local, mesh=mesh_of(), in_specs=specs, out_specs=P())
    return loss(hidden, kernel, bias, sample_weight, LABELS)


def mean_of_none(**how):
    """The mean outside of the loss: by the loops that take any cotangents."""

    def loss(**arrays):
        weight = jnp.where(LABELS == -100, 0, arrays["sample_weight"])
        return fused(reduction="none", **how)(**arrays).sum() / weight.sum()

    return loss


LIE = {"hidden": P("data"), "kernel": P("data", "model")}
LOSSES = {
    "dense": dense,
    "dense on a mesh": on_mesh(dense, logits=P("data", "model")),
    "tokens": fused(strategy="tokens"),
    "classes": fused(strategy="classes"),
    "auto": fused(),
    "none, tokens": mean_of_none(strategy="tokens"),
    "none, classes": mean_of_none(strategy="classes"),
    "tokens on a mesh": on_mesh(fused(strategy="tokens"), **LIE),
    "classes on a mesh": on_mesh(fused(strategy="classes"), **LIE),
    "slab by slab": on_mesh(fused(), **LIE, kernel_gather="slabs"),
    "inside of a shard_map": inside,
}


QUICK = ["dense", "auto", "none, tokens", "classes on a mesh"]


@cases("name", QUICK, LOSSES)
def test_a_new_term_has_its_gradient_everywhere(name, with_a_new_term):
    arrays = problem()
    got, want = (
        jax.jit(jax.value_and_grad(lambda arrays, loss=loss: loss(**arrays)))(arrays)
        for loss in (LOSSES[name], by_definition)
    )
    assert_trees_close(got, want, 1e-11)


@pytest.mark.thorough
@cases("platform", ["gpu", "tpu"], ["cpu", "unknown"])
def test_a_new_term_on_every_platform(platform, with_a_new_term, monkeypatch):
    monkeypatch.setattr(_platform, "pretended", platform)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    arrays = problem()
    for loss in (dense, fused()):
        got = jax.jit(jax.value_and_grad(lambda arrays, loss=loss: loss(**arrays)))(arrays)
        assert_trees_close(got, jax.jit(jax.value_and_grad(lambda arrays: by_definition(**arrays)))(arrays), 1e-11)


def options(**given):
    return loss_options(LABELS, **given)[1].factors()


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({}, {"nll"}),
        ({"label_smoothing": 0.1}, {"nll", "smooth_nll"}),
        ({"z_loss": 0.1}, {"nll", "log_z"}),
        ({"label_smoothing": 0.1, "z_loss": 0.1, "weight": np.ones(C)}, {"nll", "smooth_nll", "log_z"}),
    ],
)
def test_which_numbers_a_loss_reads(given, numbers):
    one = jnp.ones(())
    losses = lambda stats, weights, options: example_losses(stats, weights, C, options)  # noqa: E731
    read = is_read(losses, Stats(one, one, one, one), ExampleWeights(one, one), options(**given))
    assert {name for name in ("nll", "smooth_nll", "log_z", "entropy") if getattr(read, name)} == numbers
    assert reads_smoothing(C, options(**given)) == ("smooth_nll" in numbers)
