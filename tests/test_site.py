"""The documentation, built and opened in a headless browser: nothing is missing or wider than the screen."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.site

DOCS = Path(__file__).parents[1] / "docs"
NEEDED = (
    "sphinx",
    "myst_parser",
    "furo",
    "sphinx_copybutton",
    "sphinx_design",
    "latex2mathml",
    "playwright",
)
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "google-chrome-stable")
PAGES = [path.stem for path in sorted(DOCS.glob("*.md"))]
# A telephone's, a tablet's and a desktop's, in pixels.
WIDTHS = (390, 820, 1440)

if any(importlib.util.find_spec(module) is None for module in NEEDED):
    pytest.skip("needs the extra jaxce[docs]", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        # Whoever installed jaxce[docs] wants the pages tested.
        pytest.fail(f"install a browser: one of {', '.join(BROWSERS)} must be on PATH")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found)
        yield opened
        opened.close()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page, site, browser):
    """To a page or picture that is there, and to a place in it; addresses elsewhere aren't looked up."""
    tab = browser.new_page()
    tab.goto((site / f"{page}.html").as_uri())
    links = {urlsplit(link) for link in tab.evaluate("[...document.links].map(link => link.href)")}
    assert links
    for link in links:
        assert link.scheme in ("file", "https")
        if link.scheme == "file":
            target = Path(unquote(link.path))
            assert target.is_file()
            assert not link.fragment or f'id="{unquote(link.fragment)}"' in target.read_text()
    tab.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_at_three_widths(page, dark, site, browser):
    complaints = []
    context = browser.new_context(color_scheme="dark" if dark else "light")
    tab = context.new_page()
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("requestfailed", lambda request: complaints.append(request.url))
    tab.goto((site / f"{page}.html").as_uri())
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert tab.evaluate(
            "[...document.querySelectorAll('math')].every(math => math.getBoundingClientRect().height > 0)"
        )
        lightness = tab.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0])")
        assert (lightness < 128) == dark
    assert not complaints
    context.close()
