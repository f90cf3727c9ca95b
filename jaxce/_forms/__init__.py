"""What a platform does differently from `_math/example.py`, for speed or memory, behind one door: `FORM`.

A form takes the arguments of `partial_sums` or of `partial_gradients`, after what it falls back on, and returns the
same up to rounding. A program exported for several platforms carries each one's own. To delete a form, delete its file
and its line here. `docs/compilers.md` says what each is for; `benchmarks/forms.py` measures them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType

from jaxce._forms import (
    cpu_few_classes,
    cpu_long_rows,
    cpu_one_pass,
    cpu_recomputed,
    cpu_short_rows,
    gpu_one_read,
    gpu_soft_cap,
)
from jaxce._math.example import TEXTBOOK, Form, Gradients, Sums
from jaxce._platform import by_platform

# Modules, each with `fits` and the function itself. The first that fits is taken, and may go on to the next for parts.
CPU_SUMS: Sequence[Any] = [cpu_few_classes, cpu_long_rows, cpu_one_pass]
GPU_SUMS: Sequence[Any] = [gpu_one_read, gpu_soft_cap]
CPU_GRADIENTS: Sequence[Any] = [cpu_short_rows, cpu_recomputed]


def sums(*inputs: Any, smooth: bool, first_class: Array | int = 0) -> Sums:
    """`partial_sums` in the form that suits the platform."""
    platforms = {"cpu": CPU_SUMS, "cuda": GPU_SUMS, "rocm": GPU_SUMS}
    return first_form("sums", platforms, TEXTBOOK.sums, *inputs, smooth=smooth, first_class=first_class)


def gradients(*inputs: Any, first_class: Array | int = 0) -> Gradients:
    """`partial_gradients` in the form that suits the platform."""
    return first_form("gradients", {"cpu": CPU_GRADIENTS}, TEXTBOOK.gradients, *inputs, first_class=first_class)


def read_again(logits: Array) -> Array:
    """The logits, for a pass of its own over them: on a CPU, XLA would store what two passes have in common."""
    return by_platform(logits, cpu=lax.optimization_barrier, default=lambda logits: logits)


def first_form(
    name: str, platforms: Mapping[str, Sequence[Any]], textbook: Callable[..., Any], *inputs: Any, **options: Any
) -> Any:
    """The function `name` of the platform's first form that fits these inputs; the textbook's if none does."""
    # Where types say how the logits lie on a mesh, a form's views of them would have to say it too.
    typed = any(kind != AxisType.Auto for kind in jax.typeof(inputs[0]).sharding.mesh.axis_types)
    functions = {
        platform: partial(run, name, forms, textbook, **options)
        for platform, forms in platforms.items()
        if any(form.fits(*inputs) for form in forms) and not typed
    }
    if not functions:
        return textbook(*inputs, **options)
    return by_platform(*inputs, **functions, default=partial(textbook, **options))


def run(name: str, forms: Sequence[Any], textbook: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """The first form that fits, which may go on to the next ones."""
    for place, form in enumerate(forms):
        if form.fits(*inputs):
            return getattr(form, name)(partial(run, name, forms[place + 1 :], textbook), *inputs, **options)
    return textbook(*inputs, **options)


# The functions for sums and gradients, with what each platform does differently in them.
FORM = Form(sums, gradients)
