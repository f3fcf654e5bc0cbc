"""Sphinx builds these pages: `sphinx-build -W --keep-going -b html docs docs/_build`."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import api_pages  # noqa: E402 (after the path)

import jaxsoftmax  # noqa: E402

project = "jaxsoftmax"
version = release = jaxsoftmax.__version__
copyright = "The jaxsoftmax authors"
extensions = ["myst_parser", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_use_index = False
toc_object_entries_show_parents = "hide"
html_title = f"jaxsoftmax {version}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
suppress_warnings = ["misc.highlighting_failure"]  # Unicode of formulas in examples

api_pages.write(DOCS / "api")
