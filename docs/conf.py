"""Sphinx's settings; `nox -s docs` builds."""

import tdhook

project = "tdhook"
author = "The tdhook authors"
copyright = "2026, The tdhook authors"
version = release = tdhook.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tdhook {release}"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings are read in editors first: `x` there is code, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# The texts that torch.autograd.Function and nn.Module would hand down refer to torch's own documentation.
autodoc_inherit_docstrings = False

doctest_global_setup = "import torch; _ = torch.manual_seed(0)"
