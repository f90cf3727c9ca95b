"""What a report says: as tables for people, or as JSON."""

import math
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from jaxce._report.checks import Result
from jaxce._report.devices import GIBI, memory_of
from jaxce._report.fit import Needs, Step, advice, picked, readable

PACKAGES = ("jaxce", "jax", "jaxlib", "chex")
# Last layers: tokens, features and classes.
LAYERS = (
    (8_192, 4_096, 128_256),
    (65_536, 4_096, 128_256),
    (16_384, 2_048, 32_768),
    (2_048, 768, 50_257),
    (256, 512, 1_000),
)


def versions() -> dict[str, str]:
    """Of the packages and of Python."""
    return {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}


def device_names(devices: Sequence[Any]) -> list[dict[str, Any]]:
    """The kinds of devices, how many of each, and what one has of memory."""
    kinds: dict[str, dict[str, Any]] = {}
    for device in devices:
        kind = kinds.setdefault(
            device.device_kind,
            {"kind": device.device_kind, "platform": device.platform, "count": 0, "memory": memory_of(device)},
        )
        kind["count"] += 1
    return list(kinds.values())


def print_head(console: Console, devices: Sequence[Any]) -> None:
    """Versions and devices."""
    console.print("  ".join(f"{name} {version}" for name, version in versions().items()), highlight=False)
    for kind in device_names(devices):
        memory = "memory unknown" if kind["memory"] is None else f"{kind['memory'] / GIBI:.0f} GiB of memory"
        of_each = " each" if kind["count"] > 1 and kind["platform"] != "cpu" else ""
        console.print(f"{kind['count']} × {kind['kind']}, {memory}{of_each}", highlight=False)


def table(*columns: str) -> Table:
    """The first column is text, the others are numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    return made


class Checked(NamedTuple):
    """The losses on a device."""

    devices: Sequence[Any]
    results: list[Result]

    @property
    def good(self) -> bool:
        return all(result.right for result in self.results)

    def picks(self) -> list[dict[str, Any]]:
        """What "auto" picks here."""
        names = "tokens", "features", "classes"
        return [
            dict(zip(names, layer, strict=True)) | {"auto": picked(self.devices[0].platform, *layer, "bfloat16")}
            for layer in LAYERS
        ]

    def as_json(self) -> dict[str, Any]:
        results = [
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in row.items()
            }
            for row in (result._asdict() | {"name": result.name.strip()} for result in self.results)
        ]
        return {
            "versions": versions(),
            "devices": device_names(self.devices),
            "right": self.good,
            "checks": results,
            "auto": self.picks(),
        }

    def print(self, console: Console) -> None:
        print_head(console, self.devices)
        console.print(
            "\nErrors against float64 on the CPU, in units in the last place of the result's dtype at its largest "
            "entry, beside those of the plain computation in the inputs' dtype.",
            highlight=False,
        )
        for dtype in dict.fromkeys(result.dtype for result in self.results):
            console.print()
            rows = table(dtype, "value", "plain", "gradient", "plain", "")
            for result in self.results:
                if result.dtype == dtype:
                    verdict = "[green]right[/]" if result.right else "[bold red]WRONG[/]"
                    numbers = result.value, result.plain_value, result.gradient, result.plain_gradient
                    rows.add_row(result.name, *(ulps(number) for number in numbers), verdict)
            console.print(rows)
        console.print('\nWhat "auto" picks here for bfloat16, one device:', highlight=False)
        rows = table("tokens", "features", "classes", "loop over")
        for pick in self.picks():
            rows.add_row(*(f"{pick[name]:,}" for name in ("tokens", "features", "classes")), pick["auto"])
        console.print(rows)
        wrong = [f"{result.name.strip()} ({result.dtype})" for result in self.results if not result.right]
        if wrong:
            console.print(
                f"\n[bold red]Wrong:[/] {', '.join(wrong)}. Please report it, with this page.", highlight=False
            )
        else:
            console.print(f"\n[green]All {len(self.results)} checks are right.[/]", highlight=False)


def ulps(number: float) -> str:
    """Of a few digits."""
    if not math.isfinite(number):
        return "NaN"
    return f"{number:.1f}" if number < 100 else f"{number:,.0f}"


class Fitted(NamedTuple):
    """What a step takes."""

    step: Step
    found: list[Needs]

    @property
    def good(self) -> bool:
        return any(one.fits is not False for one in self.found)

    def as_json(self) -> dict[str, Any]:
        step = self.step._asdict() | {"columns": self.step.columns, "devices": device_names(self.step.devices)}
        found = [one._asdict() | {"total": one.total, "fits": one.fits} for one in self.found]
        return {"versions": versions(), "step": step, "losses": found, "advice": advice(self.found)}

    def print(self, console: Console) -> None:
        step = self.step
        print_head(console, step.devices)
        where = " × ".join(f"{name}={size}" for name, size in step.axes.items()) or "one device"
        console.print(
            f"\nLoss and both gradients of {step.tokens:,} tokens, {step.features:,} features and {step.classes:,} "
            f"classes in {step.dtype}, on {where}. Compiled; nothing was run. For each device:\n",
            highlight=False,
        )
        timed = any(one.seconds is not None for one in self.found)
        columns = ["", "in and out", "temporaries", "in all", "flops", *(["expected"] if timed else []), "fits?"]
        rows = table(*columns)
        for one in self.found:
            verdict = {True: "[green]yes[/]", False: "[bold red]no[/]", None: "?"}[one.fits]
            sizes = one.arguments + one.gradients, one.temporaries, one.total
            cells = ["", readable(one.temporaries, "B"), ""] if one.refused else [readable(size, "B") for size in sizes]
            time = [] if not timed else ["" if one.seconds is None else f"{1e3 * one.seconds:.3g} ms"]
            rows.add_row(one.name, *cells, readable(one.flops, ""), *time, verdict)
        console.print(rows)
        notes = [f'"{one.name}" is a loop over {one.loop}.' for one in self.found if one.loop]
        if step.axes:
            notes.append('"slabs" is kernel_gather="slabs": a slab of the kernel at a time is gathered.')
        notes.append(
            '"dense" stores the logits; "tokens" and "classes" are strategies of linear_cross_entropy.\n'
            "In and out: hidden states, kernel, labels and both gradients. The rest of the model isn't counted."
        )
        if step.columns != step.classes:
            notes.append(f"The kernel is padded from {step.classes:,} to {step.columns:,} classes.")
        if timed:
            notes.append("Expected: by the TPU's compiler, without what the network takes. No measurement.")
        if step.devices[0].platform == "cpu":
            notes.append("A CPU's memory is that of the whole machine, shared by the devices of a mesh.")
        for line in ("", *notes, "", *advice(self.found)):
            console.print(line, highlight=False, soft_wrap=True)
