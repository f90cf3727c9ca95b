"""Every script in examples/ runs in its short mode, without a warning, and writes its picture."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import cases

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


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


@pytest.mark.thorough
@pytest.mark.any_jax
@cases("name", ["train_digits"], EXAMPLES)
def test_smoke(name, tmp_path):
    # On a mesh the language model trains on one device, too, and fails unless the losses are the same.
    run(FOLDER / f"{name}.py", tmp_path, *(["--mesh", "data=4,model=2"] if name == "train_lm" else []))
