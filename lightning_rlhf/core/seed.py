"""The seed of a run."""

from __future__ import annotations

import os


def seed_of_run(seed: int | None) -> int:
    """Return the given seed, or that of Lightning's `seed_everything` if it is None."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
