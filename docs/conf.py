"""The documentation, made with `make docs`. Building it needs no network."""

import os
import re
from importlib.metadata import version as version_of

from sphinx.util import inspect

project = "lightning-unlearn"
author = "The lightning-unlearn contributors"
copyright = "2026, the lightning-unlearn contributors"
release = version = version_of("lightning-unlearn")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = True

autodoc_inherit_docstrings = False  # Lightning's hooks are Lightning's to document
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Other packages' names are links where their inventories may be fetched: DOCS_ONLINE=1 make docs.
if os.environ.get("DOCS_ONLINE"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
        "matplotlib": ("https://matplotlib.org/stable", None),
    }
# `Axes`, `Figure`: imported for type checkers alone.
OTHERS = ("collections", "lightning", "matplotlib", "nn", "np", "numpy", "os", "pathlib", "torch", "typing")
nitpick_ignore_regex = [
    ("py:.*", rf"({'|'.join(OTHERS)})\..*"),
    ("py:.*", r"Axes|Figure|MisconfigurationException"),
    ("py:.*", r"lightning_unlearn\..*\._\w+"),  # type variables
]


def _signature(app, what, name, obj, options, signature, returns):
    """The constructor's signature, also where Lightning's base class hides it; defaults that are made anew as dots.

    Of an enumeration by name: Sphinx leaves out a class whose signature is no Python.
    """
    if signature is not None and what == "class" and "*args" in signature:
        found = inspect.signature(obj.__init__, bound_method=True)
        signature = inspect.stringify_signature(found, unqualified_typehints=True, show_return_annotation=False)
    if signature is not None:
        signature = re.sub(r"<factory>|tensor\(\[\](, \w+=(\([^)]*\)|[\w.]+))*\)", "...", signature)
        signature = re.sub(r"<([\w.]+): '\w+'>", r"\1", signature)
    return signature, returns


def setup(app) -> None:  # noqa: D103
    app.connect("autodoc-process-signature", _signature)


html_theme = "furo"
html_title = "lightning-unlearn"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {
    "source_repository": "https://github.com/lightning-unlearn/lightning-unlearn/",
    "source_branch": "main",
    "source_directory": "docs/",
}
