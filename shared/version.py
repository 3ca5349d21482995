"""Baton's version, as installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("baton")
except PackageNotFoundError:  # a source tree that was never installed
    VERSION = "0"
