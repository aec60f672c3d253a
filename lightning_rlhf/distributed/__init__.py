"""Interface to Lightning's strategy for multi-process training."""
