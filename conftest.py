"""Python blocks of the documentation as tests, which tests run where, and the switch "as on another platform".

The markers in `pyproject.toml` say which tests run where; `pytest --markers` prints them.
"""

import importlib.util
import os
import unittest
from typing import Any

import jax
import pytest
from sybil import Example, Sybil
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.markdown import CodeBlockParser

# Sphinx reads these, not pytest.
collect_ignore_glob = ["docs/*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two switches; `-m` has the others."""
    parser.addoption("--as-on", choices=("unknown", "gpu", "tpu"), help="run on the CPU what that platform would run")
    parser.addoption("--thorough", action="store_true", help="run the cases that are marked thorough as well")


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is traced and JAX starts its backend."""
    flags = ["--xla_force_host_platform_device_count=8"]
    if config.option.markexpr != "compilers":
        # LLVM's optimizations change no value, and take a third of the time.
        flags.append("--xla_backend_optimization_level=0")
    # Of two that contradict each other, XLA takes the later one.
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
    if config.getoption("--as-on"):
        from jaxce import _platform

        _platform.pretended = config.getoption("--as-on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is thorough, and skips what only a form, or a loop of another platform, promises."""
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    skipped = ["form", "loop"] if config.getoption("--as-on") else []
    for item in items:
        for marker in (marker for name in skipped for marker in item.iter_markers(name)):
            item.add_marker(pytest.mark.skip(reason=f"a promise of {marker.args[0]}"))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks the blocks of the pages, where no marker can stand; but not those for PyTorch, which is rarely there."""
    if item.path.suffix == ".md" and item.path.name != "README.md" and "import torch" not in item.example.parsed:
        item.add_marker("thorough")
        item.add_marker("any_jax")


def as_users_have_it(namespace: dict[str, Any]) -> None:
    """Undoes what tests/conftest.py makes strict: Flax and Optax need JAX's own rules of promotion."""
    namespace["__promotion"] = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")


def as_it_was(namespace: dict[str, Any]) -> None:
    """Puts back what `as_users_have_it` changed."""
    jax.config.update("jax_numpy_dtype_promotion", namespace["__promotion"])


class PythonBlocks(CodeBlockParser):
    """Each block of a page is a test of its own: workers share them out. With prompts, what it prints is compared."""

    language = "python"

    def evaluate(self, example: Example) -> str | None:
        """Runs a block; raises, or returns what differs."""
        if "import torch" in example.parsed and importlib.util.find_spec("torch") is None:
            raise unittest.SkipTest("PyTorch is absent")
        if example.parsed.startswith(">>>"):
            return self.evaluate_session(example)
        PythonEvaluator()(example)
        return None

    def evaluate_session(self, example: Example) -> str | None:
        """Prompt after prompt, up to the first that prints something else than the page says."""
        check = DocTestEvaluator()
        for prompt in DocTestStringParser(check)(example.parsed, example.path):
            example.parsed = prompt.parsed
            if failure := check(example):
                return failure
        return None


pytest_collect_file = Sybil(
    parsers=[PythonBlocks()],
    patterns=["*.md"],
    setup=as_users_have_it,
    teardown=as_it_was,
).pytest()
