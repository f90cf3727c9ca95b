"""PyTorch's losses in float64: values, and gradients in logits and probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, distributions, indices, normal, positive

import jaxce

torch = pytest.importorskip("torch", reason="PyTorch isn't installed: parity with it is skipped")
# One thread each for the workers of pytest-xdist.
torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures("x64")

F64 = np.float64
SHAPES_AND_REDUCTIONS = [
    ((5,), "none"),
    ((4, 5), "sum"),
    ((4, 5), "mean"),
    ((3, 5, 2, 2), "mean"),
    ((3, 5, 2, 2), "none"),
]


def class_axis(shape):
    return 0 if len(shape) == 1 else 1


def to_torch(array, **options):
    return None if array is None else torch.tensor(np.asarray(array), **options)


def torch_value_and_grads(loss, *inputs):
    """PyTorch's loss and its gradients in the inputs, cotangents as those of `jax_value_and_grads`."""
    value = loss(*inputs)
    grads = torch.autograd.grad(value, inputs, torch.tensor(np.array(positive(tuple(value.shape), 7, F64))))
    return value.detach().numpy(), [g.numpy() for g in grads]


def jax_value_and_grads(loss, *inputs):
    @jax.jit
    def weighted(*inputs):
        value, pull = jax.vjp(loss, *inputs)
        return value, pull(positive(value.shape, 7, value.dtype))

    return weighted(*inputs)


def assert_parity(ours, theirs):
    assert_close(ours[0], theirs[0])
    for got, want in zip(ours[1], theirs[1], strict=True):
        assert_close(got, want)


@pytest.mark.parametrize(("smoothing", "ignore_index"), [(0.0, -100), (0.2, 3)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shape", "reduction"), SHAPES_AND_REDUCTIONS)
def test_cross_entropy_of_indices(shape, reduction, weighted, ignore_index, smoothing):
    axis = class_axis(shape)
    logits, labels = normal(shape, 0, F64), indices(shape[:axis] + shape[axis + 1 :], 5)
    weight = positive(5, 1, F64) if weighted else None
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": reduction}
    theirs = torch_value_and_grads(
        lambda x: torch.nn.functional.cross_entropy(x, to_torch(labels), weight=to_torch(weight), **options),
        to_torch(logits, requires_grad=True),
    )
    ours = jax_value_and_grads(lambda x: jaxce.cross_entropy(x, labels, axis=axis, weight=weight, **options), logits)
    assert_parity(ours, theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shape", "reduction"), SHAPES_AND_REDUCTIONS)
def test_cross_entropy_of_probabilities(shape, reduction, weighted, smoothing):
    axis = class_axis(shape)
    logits, labels = normal(shape, 0, F64), distributions(shape, axis, dtype=F64)
    weight = positive(5, 1, F64) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    theirs = torch_value_and_grads(
        lambda x, p: torch.nn.functional.cross_entropy(x, p, weight=to_torch(weight), **options),
        to_torch(logits, requires_grad=True),
        to_torch(labels, requires_grad=True),
    )
    ours = jax_value_and_grads(
        lambda x, p: jaxce.cross_entropy(x, p, axis=axis, weight=weight, **options), logits, labels
    )
    assert_parity(ours, theirs)


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shape", "reduction"), SHAPES_AND_REDUCTIONS)
def test_nll_loss(shape, reduction, weighted, ignore_index):
    axis = class_axis(shape)
    scores, labels = normal(shape, 0, F64), indices(shape[:axis] + shape[axis + 1 :], 5)
    weight = positive(5, 1, F64) if weighted else None
    options = {"ignore_index": ignore_index, "reduction": reduction}
    theirs = torch_value_and_grads(
        lambda x: torch.nn.functional.nll_loss(x, to_torch(labels), weight=to_torch(weight), **options),
        to_torch(scores, requires_grad=True),
    )
    ours = jax_value_and_grads(lambda x: jaxce.nll_loss(x, labels, axis=axis, weight=weight, **options), scores)
    assert_parity(ours, theirs)


@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((4, 5), 0), ((4, 5), -1), ((3, 5, 2, 2), 1)])
def test_log_softmax(shape, axis):
    logits = normal(shape, 0, F64)
    theirs = torch_value_and_grads(lambda x: torch.log_softmax(x, axis), to_torch(logits, requires_grad=True))
    assert_parity(jax_value_and_grads(lambda x: jaxce.log_softmax(x, axis), logits), theirs)


def test_float32_loss_and_gradient():
    logits, labels = normal((4, 5)), jnp.array([0, 4, 3, 1])
    x = to_torch(logits, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(x, to_torch(labels), label_smoothing=0.1)
    value, gradient = jax.value_and_grad(jaxce.cross_entropy)(logits, labels, label_smoothing=0.1)
    assert_close(value, loss.detach().numpy(), 1e-6)
    assert_close(gradient, torch.autograd.grad(loss, (x,))[0].numpy(), 1e-5)


def test_the_mean_of_nothing_differs_from_torch_on_purpose():
    logits = normal((2, 5), 0, F64)
    assert torch.isnan(torch.nn.functional.cross_entropy(to_torch(logits), torch.full((2,), -100)))
    assert jaxce.cross_entropy(logits, jnp.full(2, -100)) == 0
