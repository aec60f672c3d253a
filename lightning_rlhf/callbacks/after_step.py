"""Hook after every optimizer step of torch's optimizers and of DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def after_step(optimizer: Any, act: Callable[[], None]) -> Callable[[], None]:
    """Call `act` after each step that moved weights; the returned function removes the hook.

    Args:
        optimizer: torch's, or DeepSpeed's, which has no hooks and reports by `overflow` that it left a step out.
        act: reads the new weights.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer.register_step_post_hook(lambda *_: act()).remove
    step = optimizer.step

    def stepped(*args: Any, **options: Any) -> Any:
        done = step(*args, **options)
        if not optimizer.overflow:
            act()
        return done

    optimizer.step = stepped
    return lambda: delattr(optimizer, "step")
