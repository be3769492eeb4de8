"""Settings of Sphinx. The examples of the pages are run by tests/docs."""

from importlib.metadata import version as installed_version

project = "sa_tablecache"
author = "The sa_tablecache authors"
project_copyright = "2026, The sa_tablecache authors"
version = release = installed_version("sa-tablecache")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = "sa_tablecache"
