"""Every script in examples/ runs in its short mode, without a warning, and writes its picture."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_examples_are_found():
    assert EXAMPLES


def run(script, tmp_path, *options):
    """A process of its own: the example runs as a user runs it, without the strict settings of conftest.py."""
    for module in ("flax", "optax", "sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(module, reason="needs the extra jaxce[examples]")
    picture = tmp_path / "new_folder" / "picture.png"
    command = [sys.executable, script, "--smoke", "--out", picture, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


RUNS = {script.stem: (script,) for script in EXAMPLES}
# It fails unless the losses are those on one device.
RUNS["train_lm on a mesh"] = (Path(__file__).parents[1] / "examples" / "train_lm.py", "--mesh", "data=4,model=2")


@pytest.mark.parametrize("run_of", RUNS)
def test_smoke(run_of, tmp_path):
    script, *options = RUNS[run_of]
    run(script, tmp_path, *options)
