"""Python blocks of the documentation as tests, which cases run, and the switch that turns a platform's forms off."""

import importlib.util
import unittest
import zlib
from collections import defaultdict
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
    """`--as-on`: every test of values and gradients holds on every platform."""
    parser.addoption("--as-on", choices=("unknown", "gpu", "tpu"), help="run on the CPU what that platform would run")
    parser.addoption("--part", default="1", choices=("1", "2", "3", "all"), help="of the tests with many cases")


def pytest_configure(config: pytest.Config) -> None:
    """Pretends to be elsewhere before anything is traced."""
    config.addinivalue_line("markers", "form(name): a promise that this form of jaxce/_forms makes")
    config.addinivalue_line("markers", "every_case: all cases of this test run in every part")
    config.addinivalue_line("markers", "loop(name): a promise that this loop of jaxce/_projection/loops makes")
    if config.getoption("--as-on"):
        from jaxce import _platform

        _platform.pretended = config.getoption("--as-on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out other parts, and skips what only a form, or a loop of another platform, promises."""
    if config.getoption("--part") != "all":
        keep_part(config, items, int(config.getoption("--part")))
    skipped = ["form", "loop"] if config.getoption("--as-on") else []
    for item in items:
        for marker in (marker for name in skipped for marker in item.iter_markers(name)):
            item.add_marker(pytest.mark.skip(reason=f"a promise of {marker.args[0]}"))


def keep_part(config: pytest.Config, items: list[pytest.Item], part: int) -> None:
    """Keeps one of three parts of the cases, by the checksums of their names, and of each test at least one case."""
    cases = defaultdict(list)
    left_out = {item for item in items if item.path.suffix == ".md" and not is_block_of(item, part)}
    for item in items:
        if "[" in item.nodeid and not runs_whole(item, part):
            cases[item.nodeid.partition("[")[0]].append(item)
    for name, group in cases.items():
        chosen = [item for item in group if zlib.crc32(item.nodeid.encode()) % 3 == part % 3]
        chosen = chosen or [group[(zlib.crc32(name.encode()) + part) % len(group)]]
        left_out |= set(group) - set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def is_block_of(item: pytest.Item, part: int) -> bool:
    """The code of the pages is in the first part; that with PyTorch, and README's, in all."""
    return part == 1 or item.path.name == "README.md" or "import torch" in item.example.parsed


def runs_whole(item: pytest.Item, part: int) -> bool:
    """Whether all cases of its test run; those of the examples do in the first part."""
    return item.get_closest_marker("every_case") is not None or (part == 1 and item.path.name == "test_examples.py")


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
