"""The version of the distribution, stated here only."""

__version__ = "0.1.0"
