"""Every public loss and its gradients on this machine's device, against float64 on the host.

Each function is compared with the plain computation that a user would write without this package, made in float64 on
the CPU from the same numbers. The plain computation on the device, in the dtype of the inputs, is measured beside it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, PartitionSpec

import jaxce

TOKENS, FEATURES, CLASSES, LONG_ROW = 48, 64, 1024, 50_257
# How many units in the last place a result may be wrong by, measured at the largest entry of its array, for the bytes
# of its dtype. A 16-bit gradient is rounded once, after matmuls of rounded operands. Longer ones show the roundings of
# the sums, and what a device's exponentials and logarithms lack.
BOUND = {2: 4.0, 4: 64.0, 8: 64.0}

Arrays = tuple[Any, ...]
Function = Callable[..., Any]


class Check(NamedTuple):
    """A function and the plain computation of the same, of arrays that are differentiated and of others."""

    name: str
    ours: Function
    plain: Function
    arrays: Arrays
    fixed: Arrays = ()


class Result(NamedTuple):
    """Errors in units in the last place; NaN where a result isn't finite."""

    name: str
    dtype: str
    value: float
    plain_value: float
    gradient: float
    plain_gradient: float
    right: bool


def log_prob(log_p: Array, labels: Any) -> Array:
    """Of the labels."""
    return jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]


def entropy(log_p: Array) -> Array:
    """Of each row."""
    return -(jnp.exp(log_p) * log_p).sum(-1)


def token_stats(logits: Array, labels: Any) -> jaxce.TokenStats:
    """What `token_log_probs` returns."""
    log_p = jax.nn.log_softmax(logits)
    return jaxce.TokenStats(log_prob(log_p, labels), jax.nn.logsumexp(logits, -1), entropy(log_p))


def soft_mean_loss(logits: Array, probabilities: Array) -> Array:
    """The same of class probabilities."""
    return -(probabilities * jax.nn.log_softmax(logits)).sum(-1).mean()


def mean_loss(logits: Array, labels: Any) -> Array:
    """The cross-entropy that everybody writes."""
    return -log_prob(jax.nn.log_softmax(logits), labels).mean()


def checks(devices: Sequence[Any]) -> list[Check]:
    """One for each public function, and for each of its ways to compute; the same data on every machine."""
    # All devices, or as many as share the classes evenly.
    mesh = Mesh(np.array(devices[: math.gcd(len(devices), CLASSES)]), ("classes",), axis_types=(AxisType.Auto,))
    rng, of_classes = np.random.default_rng(0), PartitionSpec(None, "classes")
    groups = (
        (_of_logits(rng), jaxce.OnMesh(mesh=mesh, logits=of_classes)),
        (_of_projections(rng), jaxce.OnMesh(mesh=mesh, hidden=PartitionSpec(), kernel=of_classes)),
    )
    return [check for group, sharding in groups for check in _and_on_a_mesh(group, sharding)]


def _and_on_a_mesh(group: Iterator[Check], sharding: jaxce.OnMesh) -> Iterator[Check]:
    """The checks, and then each public function again with classes shared out; ways to compute are indented."""
    alone = list(group)
    yield from alone
    for check in alone:
        if not check.name.startswith(" "):
            yield check._replace(name=f"{check.name} on a mesh", ours=partial(check.ours, sharding=sharding))


def _of_logits(rng: np.random.Generator) -> Iterator[Check]:
    # Of order 3: larger ones saturate the softmax, smaller ones hide it.
    logits, long_rows = 3 * rng.normal(size=(TOKENS, CLASSES)), 3 * rng.normal(size=(4, LONG_ROW))
    log_probs, probabilities = -rng.gamma(7.0, size=(TOKENS, CLASSES)), rng.dirichlet(np.ones(CLASSES), TOKENS)
    weight, sample_weight = rng.uniform(0.5, 2.0, CLASSES), rng.uniform(0.5, 2.0, TOKENS)
    labels = rng.integers(0, CLASSES, TOKENS)

    def with_options(loss: Function, logits: Array, weight: Array, sample_weight: Array, labels: Array) -> Any:
        scalars = {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_softcap": 30.0, "temperature": 0.7}
        of_examples = {"sample_weight": sample_weight, "where": labels % 5 > 0}
        return loss(logits, labels, weight=weight, **scalars, **of_examples)

    ours, theirs = (partial(with_options, loss) for loss in (jaxce.cross_entropy, jaxce.reference.cross_entropy))
    yield Check("log_softmax", jaxce.log_softmax, jax.nn.log_softmax, (logits,))
    yield Check(
        "nll_loss", jaxce.nll_loss, lambda log_p, labels: -log_prob(log_p, labels).mean(), (log_probs,), (labels,)
    )
    yield Check("cross_entropy", jaxce.cross_entropy, mean_loss, (logits,), (labels,))
    yield Check("  of probabilities", jaxce.cross_entropy, soft_mean_loss, (logits, probabilities))
    yield Check("  with every option", ours, theirs, (logits, weight, sample_weight), (labels,))
    yield Check(f"  of {LONG_ROW:,} classes", jaxce.cross_entropy, mean_loss, (long_rows,), (labels[:4],))
    yield Check("token_log_probs", jaxce.token_log_probs, token_stats, (logits,), (labels,))


def _of_projections(rng: np.random.Generator) -> Iterator[Check]:
    hidden, teacher_hidden = rng.normal(size=(2, TOKENS, FEATURES))
    kernel, teacher_kernel = 3 / math.sqrt(FEATURES) * rng.normal(size=(2, FEATURES, CLASSES))
    arrays, labels = (hidden, kernel), rng.integers(0, CLASSES, TOKENS)
    # Else a GPU or TPU would multiply float32 in fewer bits, here as there.
    exact: dict[str, Any] = {"precision": "highest"}

    def logits(hidden: Array, kernel: Array) -> Array:
        return jnp.matmul(hidden, kernel, precision="highest")

    def loss(hidden: Array, kernel: Array, labels: Array) -> Array:
        return mean_loss(logits(hidden, kernel), labels)

    def stats(hidden: Array, kernel: Array, labels: Array) -> jaxce.TokenStats:
        return token_stats(logits(hidden, kernel), labels)

    def divergence(hidden: Array, kernel: Array, *teacher: Array) -> Array:
        log_q, log_p = (jax.nn.log_softmax(logits(*model)) for model in ((hidden, kernel), teacher))
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()

    ours: Function = partial(jaxce.linear_cross_entropy, **exact)
    yield Check("linear_cross_entropy", ours, loss, arrays, (labels,))
    yield Check('  by "tokens"', partial(ours, strategy="tokens"), loss, arrays, (labels,))
    yield Check('  by "classes"', partial(ours, strategy="classes"), loss, arrays, (labels,))
    yield Check("linear_token_log_probs", partial(jaxce.linear_token_log_probs, **exact), stats, arrays, (labels,))
    ours = partial(jaxce.linear_distillation_loss, **exact)
    yield Check("linear_distillation_loss", ours, divergence, arrays, (teacher_hidden, teacher_kernel))


def dtypes(device: Any) -> list[str]:
    """Those that a device has."""
    return ["float32", "bfloat16", "float16", *([] if device.platform == "tpu" else ["float64"])]


def measure(check: Check, dtypes: Sequence[str], device: Any) -> Iterator[Result]:
    """The errors of a function and of the plain computation, in each dtype."""
    host = jax.local_devices(backend="cpu")[0]
    ours, plain, truth = (jax.jit(partial(with_gradients, f)) for f in (check.ours, check.plain, check.plain))
    for dtype in dtypes:
        arguments = tuple(tuple(rounded(array, dtype) for array in given) for given in (check.arrays, check.fixed))
        with jax.enable_x64(True), jax.default_device(host):
            true = truth(*jax.tree.map(lambda array: rounded(array, "float64"), arguments))
        with jax.enable_x64(dtype == "float64"), jax.default_device(device):
            got, plainly = ours(*arguments), plain(*arguments)
        value, gradient = (errors(*each) for each in zip(got, got, true, strict=True))
        plain_value, plain_gradient = (errors(*each) for each in zip(plainly, got, true, strict=True))
        yield Result(
            check.name,
            dtype,
            largest(value),
            largest(plain_value),
            largest(gradient),
            largest(plain_gradient),
            right=all(ulps <= bound for ulps, bound in (*value, *gradient)),
        )


def rounded(array: Any, dtype: str) -> Any:
    """In that dtype, but class indices as they are."""
    return array.astype(jnp.int32 if array.dtype.kind == "i" else jnp.dtype(dtype))


def with_gradients(f: Function, arrays: Arrays, fixed: Arrays) -> tuple[Any, Any]:
    """What a function returns, and the gradients of a weighting of all of it."""
    value, pull = jax.vjp(lambda *arrays: f(*arrays, *fixed), *arrays)

    def weights(out: Array) -> Array:
        # That every dtype has exactly.
        return (1 + jnp.arange(out.size) % 4).reshape(out.shape).astype(out.dtype) / 4

    return value, pull(jax.tree.map(weights, value))


def errors(got: Any, like: Any, true: Any) -> list[tuple[float, float]]:
    """Of each array the largest error, in units in the last place of the dtype of `like`, and how large it may be."""
    found = []
    for array, ours, truth in zip(*map(jax.tree.leaves, (got, like, true)), strict=True):
        exact = np.asarray(truth)
        unit = float(jnp.finfo(ours.dtype).eps) * 2.0 ** math.floor(math.log2(np.abs(exact).max()))
        wrong = np.abs(np.asarray(array).astype(np.float64) - exact).max() / unit
        found.append((float(wrong), BOUND[ours.dtype.itemsize]))
    return found


def largest(found: Sequence[tuple[float, float]]) -> float:
    """NaN if one is."""
    return float(np.max([ulps for ulps, _ in found]))
