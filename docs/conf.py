"""Settings of the documentation site, which `make docs` builds offline: Markdown through MyST, the reference from docstrings."""

from pathlib import Path
from typing import Any

from MyGPT import __version__

# The sections of the sidebar. They are listed here because a toctree in index.md looks like program text on a code host.
CONTENTS = {
    "Guide": [
        "learn",
        "guide/exercises",
        "guide/tokenizers",
        "guide/data",
        "guide/model",
        "guide/training",
        "guide/comparing",
        "guide/scale",
        "guide/weights",
        "guide/generation",
        "guide/serving",
        "ecosystem",
        "guide/finetuning",
        "evaluation",
        "guide/inside",
        "guide/command_line",
    ],
    "Coming from": ["coming_from_the_book", "coming_from_nanogpt", "coming_from_transformers"],
    "Reference": [f"reference/{page.stem}" for page in sorted(Path(__file__).parent.glob("reference/*.md"))],
    "How it is made": ["performance", "reliability", "design"],
    "Measurements": [f"performance/{page.stem}" for page in sorted(Path(__file__).parent.glob("performance/*.md"))],
}

project, author, release = "MyGPT", "the MyGPT authors", __version__
project_copyright = "the MyGPT authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = "MyGPT"
html_static_path, html_css_files = ["_static"], ["wide.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}

myst_heading_anchors = 3
# Docstrings mark code with single backticks.
default_role = "code"
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"no-value": True}
# Without this, every model page would repeat the documentation of nn.Module.
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
# Describe each attribute once, at the attribute.
napoleon_use_ivar = True


def add_contents(app: Any, docname: str, source: list[str]) -> None:
    """Append the hidden tables of contents to the front page."""
    if docname == "index":
        for caption, pages in CONTENTS.items():
            listed = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def keep_colons(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put a line that shows nothing before an attribute's docstring, in whose first line napoleon reads "text: " as a type."""
    if what in ("attribute", "property", "data"):
        lines.insert(0, "\\ ")


def setup(app: Any) -> None:
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon's 500
