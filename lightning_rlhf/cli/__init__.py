"""The command line."""

from lightning_rlhf.cli.console import console, main

__all__ = ["console", "main"]
