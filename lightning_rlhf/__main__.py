"""`python -m lightning_rlhf` is the console script."""

from lightning_rlhf.cli import console

console()
