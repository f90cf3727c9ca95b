"""`python -m jaxce`: what it says, how it ends, and that a wrong loss is called wrong."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxce

pytest.importorskip("click", reason="needs the extra jaxce[report]")
pytest.importorskip("rich", reason="needs the extra jaxce[report]")

from rich.console import Console

from jaxce._report import checks, command, devices, fit, show

SIZES = ["--tokens", "256", "--features", "64", "--classes", "8000"]


def report(capsys, *arguments):
    """The exit status, and what was printed."""
    status = command.run(arguments)
    return status, *capsys.readouterr()


def as_json(capsys, *arguments):
    status, out, err = report(capsys, *arguments, "--json")
    assert err == ""
    return status, json.loads(out)


@pytest.mark.thorough
def test_the_losses_are_right_here(capsys):
    status, found = as_json(capsys, "--dtype", "bfloat16")
    assert status == 0
    assert found["right"] is True
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"][0]["count"] == 8
    assert all(check["right"] for check in found["checks"])
    # The plain computation rounds its losses to 16 bits.
    errors = {check["name"]: check for check in found["checks"]}
    assert errors["cross_entropy"]["value"] < 4 < 1000 < errors["cross_entropy"]["plain_value"]
    picks = {(pick["tokens"], pick["classes"]): pick["auto"] for pick in found["auto"]}
    assert picks[8192, 128256] == "classes, 1,024 at a time"
    assert picks[256, 1000].startswith("tokens")


def test_every_public_loss_is_checked():
    names = {check.name for check in checks.checks(jax.devices())}
    public = {name for name in jaxce.__all__ if callable(getattr(jaxce, name)) and name[0].islower()}
    assert len(public) == 7
    assert public <= names
    assert {f"{name} on a mesh" for name in public} <= names


def cross_entropy_check(ours):
    rng = np.random.default_rng(0)
    return checks.Check(
        "cross_entropy", ours, checks.mean_loss, (3 * rng.normal(size=(8, 16)),), (rng.integers(0, 16, 8),)
    )


def flipped(logits, labels):
    """The right loss with the gradient's sign wrong."""
    loss = jaxce.cross_entropy(logits, labels)
    return 2 * lax.stop_gradient(loss) - loss


BUGS = {
    "a loss off by a thousandth": lambda logits, labels: 1.001 * jaxce.cross_entropy(logits, labels),
    "a gradient of zeros": lambda logits, labels: lax.stop_gradient(jaxce.cross_entropy(logits, labels)),
    "a gradient with the wrong sign": flipped,
    "a NaN": lambda logits, labels: jnp.nan * jaxce.cross_entropy(logits, labels),
    "a sum for a mean": lambda logits, labels: jaxce.cross_entropy(logits, labels, reduction="sum"),
    "a loss in the dtype of the logits": lambda logits, labels: jnp.float32(checks.mean_loss(logits, labels)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_loss_is_called_wrong(bug, capsys, monkeypatch):
    monkeypatch.setattr(checks, "checks", lambda devices: [cross_entropy_check(BUGS[bug])])
    status, out, _ = report(capsys, "--dtype", "bfloat16")
    assert status == 1
    assert "WRONG" in out
    assert "Wrong: cross_entropy (bfloat16)." in out
    status, found = as_json(capsys, "--dtype", "bfloat16")
    assert status == 1
    assert found["right"] is False


def test_a_right_loss_is_called_right(capsys, monkeypatch):
    """In all dtypes, as people see it."""
    monkeypatch.setattr(checks, "checks", lambda devices: [cross_entropy_check(jaxce.cross_entropy)])
    status, out, err = report(capsys)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if "gradient" in line and "plain" in line][-4:] == [
        "float32", "bfloat16", "float16", "float64",
    ]  # fmt: skip
    assert out.count(" right\n") == 4
    assert "All 4 checks are right." in out
    # No colors and no progress bar in a pipe.
    assert "\x1b" not in out + err


def test_errors_are_in_units_in_the_last_place():
    """The spacing of float32 from 2 up to 4 is 2⁻²²."""
    (found,) = checks.errors(np.float32([3.0, 2**-21]), np.zeros(2, np.float32), np.float64([3.0, 0.0]))
    assert found == (2.0, checks.BOUND[4])


@pytest.mark.thorough
def test_what_a_step_takes(capsys):
    status, found = as_json(capsys, *SIZES, "--dtype", "float32")
    assert status == 0
    needs = {one["name"]: one for one in found["losses"]}
    assert list(needs) == ["dense", "auto", "tokens", "classes"]
    n, d, c = 256, 64, 8000
    assert all(one["fits"] for one in needs.values())
    for one in needs.values():
        assert one["arguments"] == 4 * (n * d + d * c + n)
        assert 0 <= one["gradients"] - 4 * (n * d + d * c) < 100
        assert one["total"] == one["arguments"] + one["gradients"] + one["temporaries"]
    assert needs["dense"]["temporaries"] >= 4 * n * c > needs["classes"]["temporaries"]
    assert needs["dense"]["flops"] == 6 * n * d * c
    assert needs["tokens"]["flops"] == pytest.approx(6 * n * d * c, rel=0.02)
    assert needs["classes"]["flops"] == pytest.approx(8 * n * d * c, rel=0.02)
    assert needs["auto"]["loop"].startswith("tokens")
    assert needs["classes"]["call"] == 'jaxce.linear_cross_entropy(hidden, kernel, labels, strategy="classes")'
    assert needs["dense"]["seconds"] is None


def test_what_a_step_takes_for_people(capsys):
    status, out, err = report(capsys, *SIZES)
    assert status == 0
    assert "256 tokens, 64 features and 8,000 classes in bfloat16, on one device." in " ".join(out.split())
    assert '"auto" is a loop over tokens' in out
    assert "The least memory: jaxce.linear_cross_entropy(hidden, kernel, labels" in out
    assert "\x1b" not in out + err
    assert all(len(line) <= 79 for line in out.splitlines() if line.startswith(("dense", "auto", "tokens", "classes")))


def test_on_a_mesh(capsys):
    """What each of eight devices takes, with classes that don't divide."""
    arguments = ["--tokens", "256", "--features", "64", "--classes", "8001", "--dtype", "float32"]
    status, found = as_json(capsys, *arguments, "--mesh", "data=4,model=2")
    assert status == 0
    needs = {one["name"]: one for one in found["losses"]}
    assert list(needs) == ["dense", "auto", "tokens", "classes", "slabs"]
    assert needs["slabs"]["arguments"] == 4 * (64 * 64 + 64 // 4 * 8002 // 2 + 64)
    assert needs["slabs"]["call"] == (
        "jaxce.linear_cross_entropy(hidden, kernel, labels, num_classes=8001, "
        'sharding=jaxce.OnMesh(hidden=P("data"), kernel=P("data", "model"), kernel_gather="slabs"))'
    )
    assert needs["dense"]["call"] == "jaxce.cross_entropy((hidden @ kernel)[:, :8001], labels)"
    assert found["step"]["columns"] == 8002
    # The devices share what the machine has.
    assert needs["dense"]["memory"] == found["step"]["devices"][0]["memory"] // 8
    assert needs["classes"]["flops"] == pytest.approx(8 * 256 * 64 * 8002 / 8, rel=0.02)


def test_nothing_fits(capsys, monkeypatch):
    monkeypatch.setattr(fit, "memory_of", lambda device: 100_000)
    status, out, _ = report(capsys, *SIZES)
    assert status == 1
    assert "Nothing fits: the leanest, " in out
    assert "Take fewer tokens in a step" in out


def test_a_compiler_that_runs_out_of_memory():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: memory required for HLO temporaries (20.09G) exceeds available HBM (15.75G)"
            )

    found = fit._compiled(Lowered(), fit.Needs(name="dense", memory=2**34), jax.devices()[0])
    assert found.fits is False
    assert found.temporaries == int(20.09 * 2**30)
    assert fit.advice([found]) == [
        "Nothing fits. Take fewer tokens in a step and accumulate gradients, or more devices (--mesh)."
    ]


def test_the_least_time_is_that_of_what_fits():
    """The fastest doesn't fit, and the leanest is slow."""
    needs = [
        fit.Needs("dense", "dense()", temporaries=200, memory=100, seconds=1.0),
        fit.Needs("auto", "auto()", temporaries=90, memory=100, seconds=2.0),
        fit.Needs("classes", "classes()", temporaries=10, memory=100, seconds=3.0),
    ]
    fastest = "The least time, as the compiler expects, to a tenth: "
    assert fit.advice(needs) == [f"{fastest}auto()", "The least memory: classes()"]
    # A difference of a twentieth is none.
    needs[2] = needs[2]._replace(seconds=2.1)
    assert fit.advice(needs) == [f"{fastest}classes()"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0 B"), (12.0, "12 B"), (1500.0, "1.5 kB"), (137_200_000_000, "137 GB"), (5e15, "5e+03 TB")],
)
def test_sizes_for_people(number, text):
    assert fit.readable(number, "B") == text


WRONG_ARGUMENTS = {
    (
        "--tokens",
        "-3",
        "--features",
        "8",
        "--classes",
        "8",
    ): "Invalid value for '--tokens': -3 is not in the range x>=1.",
    ("--tokens", "x"): "Invalid value for '--tokens': 'x' is not a valid integer range.",
    ("--tokens", "8"): "--features and --classes missing: a step has --tokens, --features and --classes",
    ("--mesh", "data=2"): "--mesh goes with --tokens, --features and --classes",
    ("--device", "h200"): "--device goes with --tokens, --features and --classes",
    (
        "--dtype",
        "int8",
    ): "Invalid value for '--dtype': 'int8' is not one of 'float32', 'bfloat16', 'float16', 'float64'.",
    ("--size", "8"): "No such option '--size'.",
    ("cpu",): "Got unexpected extra argument (cpu)",
    (*SIZES, "--mesh", "data"): "--mesh data: write axes and how many devices are along each, as data=4,model=2",
    (*SIZES, "--mesh", "a=2,a=2"): "--mesh a=2,a=2: write axes and how many devices are along each, as data=4,model=2",
    (*SIZES, "--mesh", "a=0"): "--mesh a=0: write axes and how many devices are along each, as data=4,model=2",
    (*SIZES, "--mesh", "data=4,model=4"): (
        "--mesh data=4,model=4 takes 16 devices, and here are 8: take fewer, or name a larger slice, for example "
        "--device tpu-v5e:2x4"
    ),
    (*SIZES, "--mesh", "data=3"): "--tokens 256 can't be shared by the 3 devices along data: take a multiple",
    (*SIZES, "--device", "tpu-v1"): (
        "--device tpu-v1: known are tpu-v5e, tpu-v5p, tpu-v6e, h200, as tpu-v5e:2x4 (2 × 4 chips) or h200:8"
    ),
    (*SIZES, "--device", "h200:many"): "--device h200:many: how many H200s? For example h200:8",
    (*SIZES, "--device", "h200:0"): "--device h200:0: how many H200s? For example h200:8",
    (*SIZES, "--device", "tpu-v5e:many"): "--device tpu-v5e:many: write the slice as tpu-v5e:2x2",
}


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS, ids=" ".join)
def test_arguments_that_make_no_sense(arguments, capsys, monkeypatch):
    monkeypatch.setattr(devices, "without_a_device", lambda: None)
    status, out, err = report(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err == f"python -m jaxce: {WRONG_ARGUMENTS[arguments]}\n"


def test_a_compiler_that_is_not_installed(capsys, monkeypatch):
    def refuse(**options):
        raise RuntimeError("no such platform\nand much more")

    monkeypatch.setattr(devices, "without_a_device", lambda: None)
    monkeypatch.setattr(devices.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(devices, "_installed", lambda package: False)
    status, _, err = report(capsys, *SIZES, "--device", "tpu-v5e:2x4")
    assert status == 2
    assert err.endswith(f'its compiler isn\'t installed here: pip install "jax[tpu]=={jax.__version__}"\n')
    monkeypatch.setattr(devices, "_installed", lambda package: True)
    _, _, err = report(capsys, *SIZES, "--device", "h200")
    assert err == "python -m jaxce: --device h200: its compiler says: no such platform\n"


def test_help_has_examples(capsys):
    status, out, _ = report(capsys, "--help")
    assert status == 0
    assert "python -m jaxce --tokens 8192 --features 4096 --classes 128256" in out
    assert "Exit status" in out


def test_a_terminal_gets_colors():
    console = Console(force_terminal=True, color_system="standard", width=100)
    with console.capture() as shown:
        result = checks.Result("cross_entropy", "float32", 0.5, 1.0, float("nan"), 1.0, False)
        show.Checked(jax.devices(), [result]).print(console)
    assert "\x1b[1;31mWRONG" in shown.get()
    assert "NaN" in shown.get()


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_its_libraries_it_says_what_to_install(missing):
    program = f"import sys, runpy; sys.modules['{missing}'] = None; runpy.run_module('jaxce', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f'python -m jaxce: {missing} is missing: pip install "jaxce[report]"\n'
