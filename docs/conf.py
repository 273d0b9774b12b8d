"""The site's settings: Markdown through MyST, the reference from docstrings, all of it offline (`make docs`)."""

from MyGPT import __version__

project, author, release = "MyGPT", "the MyGPT authors", __version__
project_copyright = "the MyGPT authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
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
# Our docstrings write code in single backticks.
default_role = "code"
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "no-value": True}
autodoc_inherit_docstrings = False  # torch's own say nothing of ours
