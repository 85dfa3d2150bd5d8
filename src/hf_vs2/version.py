"""The version, which artefacts record."""

__version__ = "0.2.0.dev0"
