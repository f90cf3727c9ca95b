"""The command line of `python -m jaxce`."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import click
import jax
from rich.console import Console
from rich.progress import track

from jaxce._report import checks, devices, fit, show

DTYPES = ("float32", "bfloat16", "float16", "float64")
Item = TypeVar("Item")

HELP = """Reports whether jaxce's losses are right on this machine, and what of a training step fits into its memory.

Without options, every public loss and its gradients run on the device that JAX picks, and are compared with float64
on the CPU.

With --tokens, --features and --classes, nothing runs and nothing is allocated: the compiler says how much memory the
last layer of a model takes in a training step, with each strategy of linear_cross_entropy and with the logits stored.

\b
Examples:
  python -m jaxce
  python -m jaxce --dtype bfloat16 --json
  python -m jaxce --tokens 8192 --features 4096 --classes 128256
  python -m jaxce --tokens 32768 --features 4096 --classes 128256 \\
      --mesh data=4,model=2 --device tpu-v5e:2x4

\b
Exit status:
  0  everything is right, or something fits
  1  a check failed, or nothing fits
  2  the arguments make no sense here
"""

SIZE = click.IntRange(min=1)


@click.command(help=HELP, context_settings={"max_content_width": 100})
@click.option("--tokens", metavar="N", type=SIZE, help="Tokens of a step, on all devices together.")
@click.option("--features", metavar="D", type=SIZE, help="Features of a hidden state.")
@click.option("--classes", metavar="C", type=SIZE, help="Classes: the size of the vocabulary.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the arrays. Default: bfloat16 with sizes; without them, every dtype is checked.",
)
@click.option(
    "--mesh",
    "mesh",
    metavar="AXES",
    help="Devices along each axis, as data=4,model=2. The last of several axes holds classes, the others hold tokens "
    "and the kernel's features (FSDP).",
)
@click.option(
    "--device",
    metavar="NAME",
    help=f"Compile for devices that needn't be here: {', '.join(devices.CHIPS)}; as tpu-v5e:2x4 for 2 × 4 chips, "
    "h200:8 for eight.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    tokens: int | None,
    features: int | None,
    classes: int | None,
    dtype: str | None,
    mesh: str | None,
    device: str | None,
    as_json: bool,
) -> int:
    sizes = {"--tokens": tokens, "--features": features, "--classes": classes}
    missing = [name for name, size in sizes.items() if size is None]
    if missing == list(sizes):
        for name, value in (("--mesh", mesh), ("--device", device)):
            if value is not None:
                raise devices.UsageError(f"{name} goes with --tokens, --features and --classes")
        report: show.Checked | show.Fitted = check_losses(dtype)
    elif missing:
        raise devices.UsageError(f"{' and '.join(missing)} missing: a step has --tokens, --features and --classes")
    else:
        report = fit_step(tokens or 0, features or 0, classes or 0, dtype or "bfloat16", mesh, device)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        report.print(Console(soft_wrap=False, width=None if sys.stdout.isatty() else 100))
    return 0 if report.good else 1


def check_losses(dtype: str | None) -> show.Checked:
    """Runs every check on the device that JAX picks."""
    found = local_devices()
    known = checks.dtypes(found[0])
    if dtype is not None and dtype not in known:
        raise devices.UsageError(f"--dtype {dtype}: {found[0].device_kind} has {', '.join(known)}")
    all_checks = checks.checks(found)
    dtypes = known if dtype is None else [dtype]
    results = (result for check in all_checks for result in checks.measure(check, dtypes, found[0]))
    return show.Checked(found, list(progress(results, len(all_checks) * len(dtypes), "checking")))


def fit_step(tokens: int, features: int, classes: int, dtype: str, mesh: str | None, device: str | None) -> show.Fitted:
    """Compiles the step of a last layer in every way."""
    axes = {} if mesh is None else fit.mesh_axes(mesh)
    if device is None:
        found = local_devices()
    else:
        devices.without_a_device()
        found = devices.named(device)
    if dtype not in checks.dtypes(found[0]):
        raise devices.UsageError(f"--dtype {dtype}: {found[0].device_kind} has {', '.join(checks.dtypes(found[0]))}")
    step = fit.step_of(tokens, features, classes, dtype, axes, found)
    with jax.enable_x64(dtype == "float64"):
        return show.Fitted(step, list(progress(fit.needs(step), len(fit.contestants(step)), "compiling")))


def local_devices() -> list[Any]:
    """Those of this process, of the platform that JAX picks."""
    try:
        jax.local_devices(backend="cpu")
        return jax.local_devices()
    except RuntimeError as error:
        raise devices.UsageError(f"JAX can't use its devices: {str(error).splitlines()[0]}") from error


def progress(items: Iterable[Item], total: int, doing: str) -> Iterator[Item]:
    """A bar on the terminal while the items are made, and nothing in a pipe."""
    console = Console(stderr=True)
    return iter(track(items, doing, total, console=console, transient=True, disable=not console.is_terminal))


def run(arguments: Sequence[str]) -> int:
    """The exit status: what is wrong with the arguments is one line on the standard error."""
    try:
        return int(command.main(list(arguments), prog_name="python -m jaxce", standalone_mode=False) or 0)
    except (click.ClickException, devices.UsageError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"python -m jaxce: {' '.join(message.split())}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
