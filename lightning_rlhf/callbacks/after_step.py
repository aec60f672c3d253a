"""What follows every optimizer step, also of an optimizer that is none of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def after_step(optimizer: Any, act: Callable[[], None]) -> Callable[[], None]:
    """Have `act` called after each step that moved weights; what is returned ends that.

    Args:
        optimizer: torch's, or DeepSpeed's, which has no hooks and says by `overflow` that it left a step out.
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
