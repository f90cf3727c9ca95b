"""How Sphinx builds the documentation: `sphinx-build -W docs site`."""

import re
from importlib import metadata
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx

project = "jaxce"
author = "The jaxce developers"
version = release = metadata.version("jaxce")
copyright = f"2026, {author}. Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["*.py"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Docstrings give types and shapes in words.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# A name in single backticks is code in docstrings, as it is in Markdown.
default_role = "literal"

html_theme = "furo"
html_title = f"jaxce {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"


def mathml(node: nodes.Node, display: str) -> str:
    """The formula as the browser's own mathematics: no script, no font to load."""
    return latex2mathml.converter.convert(re.sub(r"\s+", " ", node.astext()), display=display)


def inline(self: Any, node: nodes.Element) -> None:
    """A formula in a line."""
    self.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def block(self: Any, node: nodes.Element) -> None:
    """A formula by itself, which scrolls where a screen is too narrow."""
    self.body.append(f'<div class="math">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Registers the formulas."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
