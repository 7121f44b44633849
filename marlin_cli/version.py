"""The version of marlin."""

__version__ = "0.1.0"
