"""Sphinx configuration of the manual."""

import importlib.metadata

from compute_worker.threads import use_threads

use_threads()

project = "compute_worker"
author = "The compute_worker authors"
copyright = author  # noqa: A001 - Sphinx's word
try:
    version = release = importlib.metadata.version("compute-worker")
except importlib.metadata.PackageNotFoundError:
    version = release = "unknown"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "oslo_config.sphinxext", "reno.sphinxext"]
html_theme = "alabaster"
html_theme_options = {"fixed_sidebar": True, "page_width": "1100px", "description": "virtual machines by message"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
nitpicky = False
