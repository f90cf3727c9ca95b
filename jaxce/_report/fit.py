"""What a training step of a last layer takes on a device, by the compiler alone: nothing is allocated, nothing runs."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxce
from jaxce._forms import FORM
from jaxce._math.labels import OfLabels
from jaxce._projection.chunks import Plan
from jaxce._projection.inputs import Head, Inputs, Wanted
from jaxce._projection.loops import auto, loop_for, over_tokens
from jaxce._report import hlo
from jaxce._report.devices import GIBI, UsageError, chip_of, memory_of

Loss = Callable[[Array, Array, Array], Array]


class Step(NamedTuple):
    """A loss with the gradients of hidden states and kernel, and the mesh that its arrays lie on."""

    tokens: int
    features: int
    classes: int
    dtype: str
    axes: dict[str, int]  # of the mesh: the first axes hold tokens, and the last one, if there are several, classes
    devices: Sequence[Any]

    @property
    def over_tokens(self) -> tuple[str, ...]:
        """The axes of the mesh that hold tokens, and the features of the kernel (FSDP)."""
        return tuple(self.axes)[:-1] or tuple(self.axes)

    @property
    def over_classes(self) -> str | None:
        """The axis of the mesh that holds classes."""
        return tuple(self.axes)[-1] if len(self.axes) > 1 else None

    @property
    def of_tokens(self) -> PartitionSpec:
        """How hidden states and labels lie."""
        return PartitionSpec(*_together(self.over_tokens))

    @property
    def of_kernel(self) -> PartitionSpec:
        """How the kernel lies."""
        return PartitionSpec(*_together(self.over_tokens), *([self.over_classes] if self.over_classes else []))

    @property
    def columns(self) -> int:
        """The kernel's: the classes, padded so that all devices of the class axis have the same number."""
        parts = self.axes[self.over_classes] if self.over_classes else 1
        return -(-self.classes // parts) * parts


def _together(axes: tuple[str, ...]) -> list[Any]:
    """An entry of a PartitionSpec for all of them, none for none."""
    return [axes if len(axes) > 1 else axes[0]] if axes else []


class Needs(NamedTuple):
    """What one contestant takes on each device."""

    name: str = ""
    call: str = ""  # how a user calls it
    loop: str = ""  # what "auto" comes to
    arguments: int = 0  # bytes of hidden states, kernel and labels
    gradients: int = 0  # bytes of what is returned
    temporaries: int = 0  # bytes beside both
    memory: int | None = None  # bytes that the device has
    flops: float = 0.0  # of the matmuls
    seconds: float | None = None  # a TPU compiler's expectation, without what the network takes
    refused: bool = False  # whether the compiler made no program, for want of memory

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.arguments + self.gradients + self.temporaries

    @property
    def fits(self) -> bool | None:
        """Whether the device has so much memory; None if nobody knows how much it has."""
        if self.refused:
            return False
        return None if self.memory is None else self.total <= self.memory


def contestants(step: Step) -> dict[str, tuple[Loss, str]]:
    """The losses to compare, each with how it is called."""

    def dense(hidden: Array, kernel: Array, labels: Array) -> Array:
        return jaxce.cross_entropy((hidden @ kernel)[:, : step.classes], labels)

    padded: dict[str, Any] = {} if step.columns == step.classes else {"num_classes": step.classes}
    chosen: list[dict[str, Any]] = [{}, {"strategy": "tokens"}, {"strategy": "classes"}]
    chosen += [{"kernel_gather": "slabs"}] if step.axes else []
    ours = {next(iter(options.values()), "auto"): _ours(step, padded | options) for options in chosen}
    logits = f"(hidden @ kernel)[:, :{step.classes}]" if padded else "hidden @ kernel"
    return {"dense": (dense, f"jaxce.cross_entropy({logits}, labels)"), **ours}


def _ours(step: Step, options: dict[str, Any]) -> tuple[Loss, str]:
    """`linear_cross_entropy` with these options, and how it is called; on a mesh, with how the arrays lie."""
    given = dict(options)
    written = [f"{name}={_written(value)}" for name, value in options.items() if name != "kernel_gather"]
    if step.axes:
        gather = {"kernel_gather": given.pop("kernel_gather")} if "kernel_gather" in given else {}
        lie = {"hidden": step.of_tokens, "kernel": step.of_kernel, **gather}
        given["sharding"] = jaxce.OnMesh(**lie)
        written.append(
            f"sharding=jaxce.OnMesh({', '.join(f'{name}={_written(value)}' for name, value in lie.items())})"
        )
    call = ", ".join(["hidden", "kernel", "labels", *written])
    return partial(jaxce.linear_cross_entropy, **given), f"jaxce.linear_cross_entropy({call})"


def _written(value: Any) -> str:
    """An option as one writes it, with P for a PartitionSpec."""
    if isinstance(value, PartitionSpec):
        return f"P{tuple(value)}".replace(",)", ")").replace("'", '"')
    return f'"{value}"' if isinstance(value, str) else repr(value)


def needs(step: Step) -> Iterator[Needs]:
    """Compiles each contestant for the step's devices; those that are the same program, once."""
    known: dict[str, Needs] = {}
    for name, (loss, call) in contestants(step).items():
        mesh, arguments, shardings = _laid_out(step)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=shardings).trace(*arguments)
            lowered = traced.lower()
            text = lowered.as_text()
            if text not in known:
                device, flops = step.devices[0], matmul_flops(traced.jaxpr.jaxpr) / mesh.size
                memory = memory_of(device)
                if memory and device.platform == "cpu":
                    memory //= mesh.size  # which they share
                known[text] = _compiled(lowered, Needs(flops=flops, memory=memory), device)
        yield known[text]._replace(name=name, call=call, loop=_loop(step) if name == "auto" else "")


def _compiled(lowered: Any, found: Needs, device: Any) -> Needs:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # A TPU's compiler says how many GiB it would take.
        needed = re.search(r"([\d.]+)G\) exceeds", str(error))
        return found._replace(refused=True, temporaries=int(float(needed.group(1)) * GIBI) if needed else 0)
    memory = compiled.memory_analysis()
    chip = chip_of(device)
    return found._replace(
        arguments=memory.argument_size_in_bytes,
        gradients=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        seconds=hlo.cycles(compiled.as_text()) / chip.hertz if chip and chip.hertz else None,
    )


def _laid_out(step: Step) -> tuple[Mesh, list[jax.ShapeDtypeStruct], Any]:
    """The mesh, the arguments on it, and how loss and gradients shall lie: as the arguments do."""
    axes = step.axes or {"device": 1}
    devices = np.array(step.devices[: math.prod(axes.values())]).reshape(tuple(axes.values()))
    mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    hidden, kernel, labels = (NamedSharding(mesh, spec) for spec in (step.of_tokens, step.of_kernel, step.of_tokens))
    arguments = [
        jax.ShapeDtypeStruct((step.tokens, step.features), step.dtype, sharding=hidden),
        jax.ShapeDtypeStruct((step.features, step.columns), step.dtype, sharding=kernel),
        jax.ShapeDtypeStruct((step.tokens,), jnp.int32, sharding=labels),
    ]
    return mesh, arguments, (NamedSharding(mesh, PartitionSpec()), (hidden, kernel))


def _loop(step: Step) -> str:
    """What "auto" picks for the tokens and classes of one device."""
    sharing_tokens = math.prod(step.axes[axis] for axis in step.over_tokens)
    sharing_classes = step.axes[step.over_classes] if step.over_classes else 1
    return picked(
        step.devices[0].platform,
        step.tokens // sharing_tokens,
        step.features,
        step.columns // sharing_classes,
        step.dtype,
    )


def picked(platform: str, tokens: int, features: int, classes: int, dtype: str) -> str:
    """What "auto" picks for a mean with the gradients of hidden states and kernel, in words."""
    hidden, kernel = jax.ShapeDtypeStruct((tokens, features), dtype), jax.ShapeDtypeStruct((features, classes), dtype)
    plan = Plan(
        OfLabels(FORM, classes), summed=True, strategy="auto", platform=platform, num_classes=classes, columns=classes
    )
    inputs, flags = _of_one_head(hidden, kernel), _of_one_head(True, True)
    if loop_for(plan, Wanted(flags), inputs) is over_tokens:
        return f"tokens, {min(tokens, auto.tokens_at_a_time(plan, inputs)):,} at a time"
    return f"classes, {min(classes, auto.classes_at_a_time(plan, inputs)):,} at a time"


def _of_one_head(hidden: Any, kernel: Any) -> Inputs:
    """These two and nothing else."""
    head = Head(hidden=hidden, kernel=kernel, bias=None, softcap=None, inverse_temperature=None, transpose_kernel=False)
    return Inputs(heads=(head,))


def matmul_flops(jaxpr: core.Jaxpr) -> float:
    """Of a program on all its devices together: two for each product; a conditional counts as its cheapest branch."""
    flops = 0.0
    for eqn in jaxpr.eqns:
        inner = [matmul_flops(one) for value in eqn.params.values() for one in _jaxprs(value)]
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                left, out = (_type(variable) for variable in (eqn.invars[0], eqn.outvars[0]))
                flops += 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
            case "scan":
                flops += eqn.params["length"] * sum(inner)
            case "cond":
                flops += min(inner)
            case "shard_map":
                flops += eqn.params["mesh"].size * sum(inner)
            case _:
                flops += sum(inner)
    return flops


def _type(variable: Any) -> Any:
    """Shape and dtype of a variable of a jaxpr."""
    return variable.aval


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    open_jaxpr = getattr(value, "jaxpr", value)
    if isinstance(open_jaxpr, core.Jaxpr):
        yield open_jaxpr
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)


def mesh_axes(text: str) -> dict[str, int]:
    """The axes of "data=4,model=2" and how many devices are along each."""
    axes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in axes:
            raise UsageError(f"--mesh {text}: write axes and how many devices are along each, as data=4,model=2")
        axes[name] = int(size)
    return axes


def step_of(tokens: int, features: int, classes: int, dtype: str, axes: dict[str, int], devices: list[Any]) -> Step:
    """Checks that the sizes suit the mesh."""
    step = Step(tokens, features, classes, dtype, axes, devices)
    if not axes:
        return step
    mesh = ",".join(f"{name}={size}" for name, size in axes.items())
    if math.prod(axes.values()) > len(devices):
        raise UsageError(
            f"--mesh {mesh} takes {math.prod(axes.values())} devices, and here are {len(devices)}: take fewer, or name "
            "a larger slice, for example --device tpu-v5e:2x4"
        )
    sharing = math.prod(axes[axis] for axis in step.over_tokens)
    for option, size in (("--tokens", tokens), ("--features", features)):
        if size % sharing:
            names = " and ".join(step.over_tokens)
            raise UsageError(f"{option} {size} can't be shared by the {sharing} devices along {names}: take a multiple")
    return step


def advice(found: Sequence[Needs]) -> list[str]:
    """Which of them to take, a sentence a line."""
    compiled = [one for one in found if not one.refused]
    fitting = [one for one in compiled if one.fits is not False]
    if not fitting:
        more = "Take fewer tokens in a step and accumulate gradients, or more devices (--mesh)."
        if not compiled:
            return [f"Nothing fits. {more}"]
        leanest = min(compiled, key=lambda one: one.total)
        short = readable(leanest.total - (leanest.memory or 0), "B")
        return [f'Nothing fits: the leanest, "{leanest.name}", is short of {short}. {more}']
    leanest = min(fitting, key=lambda one: one.total)
    times = [one.seconds for one in fitting if one.seconds is not None]
    if times:
        # Differences below a tenth mean nothing.
        fast = [one for one in fitting if one.seconds is not None and one.seconds <= 1.1 * min(times)]
        fastest = min(fast, key=lambda one: one.total)
        lines = [f"The least time, as the compiler expects, to a tenth: {fastest.call}"]
    else:
        lines = [f"What the package picks by itself: {one.call}" for one in fitting if one.name == "auto"]
    return [*lines, *(f"The least memory: {leanest.call}" for line in lines if not line.endswith(leanest.call))]


def readable(number: float, unit: str) -> str:
    """Three digits and a unit: 0.4, 12 and 1,500,000,000 bytes are "0.4 B", "12 B" and "1.5 GB"."""
    prefix, factor = next(
        ((prefix, factor) for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= factor),
        ("", 1.0),
    )
    return f"{number / factor:.3g} {prefix}{unit}"
