"""Times compiled functions side by side in one run, with the compiler's memory figures."""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

# Seconds after which the threads of PyTorch's pool have stopped waiting busily for more work, at others' cost.
THREADS_REST = 0.01
# Runs below so many seconds are run twice, and timed the second time.
SHORT = 0.02


class Timed:
    """A function that is ready to run: `run()` blocks until its result is there. `rest` seconds pass after it."""

    def __init__(self, run: Callable[[], Any], temp_bytes: int | None = None, rest: float = 0.0) -> None:
        self.run = run
        self.temp_bytes = temp_bytes
        self.rest = rest
        self.seconds: list[float] = []


def compiled(function: Callable[..., Any], *args: Any) -> Timed:
    """`function` compiled by JAX for these arguments."""
    executable = jax.jit(function).lower(*args).compile()
    memory = executable.memory_analysis()
    return Timed(
        lambda: jax.block_until_ready(executable(*args)), None if memory is None else memory.temp_size_in_bytes
    )


def measure(contestants: dict[str, Timed], seconds: float = 1.0, rounds: int = 5) -> None:
    """Runs the contestants in turn, so that a change in the machine's speed meets all of them alike."""
    for contestant in contestants.values():
        contestant.run()
    start = time.perf_counter()
    done = 0
    shuffled = random.Random(0)
    while done < rounds or (time.perf_counter() - start < seconds and done < 200):
        # In an order of its own each round, since who ran before leaves a mark on memory and caches.
        order = list(contestants.values())
        shuffled.shuffle(order)
        for contestant in order:
            if contestant.seconds and contestant.seconds[-1] < SHORT:
                contestant.run()
            before = time.perf_counter()
            contestant.run()
            contestant.seconds.append(time.perf_counter() - before)
            time.sleep(contestant.rest)
        done += 1


def ratio(a: Timed, b: Timed) -> float:
    """Time of `a` over time of `b`: the median over the rounds."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def machine() -> dict[str, str]:
    """What the figures were measured on and with."""
    versions = {}
    for package in ("jax", "jaxlib", "optax", "torch", "tokamax", "liger-kernel", "cut-cross-entropy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else _processor()
    return {"device": kind, "platform": device.platform, "python": platform.python_version(), **versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if (info.exists())
        else []
    )
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
