"""Python blocks of the documentation as tests, and the switch that turns the forms of a platform off."""

from typing import Any

import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--no-forms`: every test of values and gradients holds for the textbook too."""
    parser.addoption("--no-forms", action="store_true", help="compute as in jaxce/_softmax.py on every platform")


def pytest_configure(config: pytest.Config) -> None:
    """Turns the forms off before anything is traced."""
    config.addinivalue_line("markers", "form(name): a promise that this form of jaxce/_forms makes")
    if config.getoption("--no-forms"):
        from jaxce import _forms

        _forms.enabled = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without forms, skips what only a form promises."""
    for item in items if config.getoption("--no-forms") else []:
        for marker in item.iter_markers("form"):
            item.add_marker(pytest.mark.skip(reason=f"--no-forms: a promise of {marker.args[0]}"))


def as_users_have_it(namespace: dict[str, Any]) -> None:
    """Undoes what tests/conftest.py makes strict: Flax and Optax need JAX's own rules of promotion."""
    namespace["__promotion"] = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")


def as_it_was(namespace: dict[str, Any]) -> None:
    """Puts back what `as_users_have_it` changed."""
    jax.config.update("jax_numpy_dtype_promotion", namespace["__promotion"])


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["*.md"],
    setup=as_users_have_it,
    teardown=as_it_was,
).pytest()
