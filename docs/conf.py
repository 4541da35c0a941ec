"""Builds the documentation: ``make docs``."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import attnres_rewrite  # noqa: E402 - it is found by the path set above

project = "attnres-rewrite"
author = copyright = "the authors of attnres-rewrite"
version = release = attnres_rewrite.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "public_names"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
# Links to `page.md#a-heading` are checked, headings of this depth included.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# A reference to a name of this package must lead somewhere. Others' are not looked up: a build needs no network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|fx|os|pathlib|collections|typing|optional|transformers|pytorch_lightning|lightning)\b.*"),
    # Types of annotations that are not public.
    ("py:class", r"attnres_rewrite\.\w+\..*"),
]

html_theme = "furo"
html_title = f"attnres-rewrite {version}"
html_copy_source = False
html_show_sphinx = False
