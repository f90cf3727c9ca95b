"""Runs the Python blocks of the Markdown documentation as tests; doctests run through `--doctest-modules`."""

from typing import Any

import jax
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


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
