"""What a platform does differently from `_softmax.py`, for speed or memory, behind one door: `chosen()`.

A form takes the arguments of `partial_sums` or of `partial_gradients`, after what it falls back on, and returns the
same up to rounding. A program exported for several platforms carries each one's own. To delete a form, delete its file
and its line here. `docs/speed.md` says what each is for; `benchmarks/forms.py` measures them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import jax
from jax import Array, lax

from jaxce._forms import cpu_few_classes, cpu_long_rows, cpu_one_pass, cpu_recomputed, cpu_short_rows, gpu_soft_cap
from jaxce._softmax import TEXTBOOK, Form, Gradients, Sums

# The first that fits is taken; each goes on to the next where it doesn't fit.
CPU_SUMS: Sequence[Callable[..., Sums]] = [cpu_few_classes.sums, cpu_long_rows.sums, cpu_one_pass.sums]
CPU_GRADIENTS: Sequence[Callable[..., Gradients]] = [cpu_short_rows.gradients, cpu_recomputed.gradients]
GPU_SUMS: Sequence[Callable[..., Sums]] = [gpu_soft_cap.sums]

# For tests: without forms, all is as in `_softmax.py`.
enabled = True


def chosen() -> Form:
    """The functions for sums and gradients, with what each platform does differently in them."""
    return Form(sums, gradients) if enabled else TEXTBOOK


def sums(logits: Array, *inputs: Any, smooth: bool, first_class: Array | int = 0) -> Sums:
    """`partial_sums` in the form that suits the platform."""
    options = {"smooth": smooth, "first_class": first_class}
    platforms = {"cpu": CPU_SUMS, "cuda": GPU_SUMS, "rocm": GPU_SUMS}
    return by_platform(TEXTBOOK.sums, platforms, logits, *inputs, **options)


def gradients(logits: Array, *inputs: Any, first_class: Array | int = 0) -> Gradients:
    """`partial_gradients` in the form that suits the platform."""
    return by_platform(TEXTBOOK.gradients, {"cpu": CPU_GRADIENTS}, logits, *inputs, first_class=first_class)


def read_again(logits: Array) -> Array:
    """The logits, for a pass of its own over them: on a CPU, XLA would store what two passes have in common."""

    def apart(_: Callable[..., Array], logits: Array) -> Array:
        return lax.optimization_barrier(logits)

    return by_platform(lambda logits: logits, {"cpu": [apart]}, logits) if enabled else logits


def by_platform(
    textbook: Callable[..., Any],
    platforms: Mapping[str, Sequence[Callable[..., Any]]],
    logits: Array,
    *inputs: Any,
    **options: Any,
) -> Any:
    """The platform's first form, which goes on to the second, and so on to the textbook."""
    if not jax.typeof(logits).sharding.mesh.empty:
        # Where types say how the logits lie on a mesh, the forms' views of them would have to say it too.
        return textbook(logits, *inputs, **options)
    chains = {
        platform: reduce(lambda rest, form: partial(form, rest), reversed(forms), textbook)
        for platform, forms in platforms.items()
    }
    functions = {platform: partial(function, **options) for platform, function in chains.items()}
    return lax.platform_dependent(logits, *inputs, **functions, default=partial(textbook, **options))
