"""Text of the progress bar during a rollout, with the time left in the run."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor
from torch.optim import Optimizer

from lightning_rlhf.core.checks import check_not_negative
from lightning_rlhf.engines.progress import Progress, Watch


class RolloutProgress(Callback):
    """Text of the progress bar during a step: responses drawn and tokens/s, then the number of the update.

    A step of reinforcement learning takes minutes, during which Lightning's bar stands still. The score, the KL and the
    time left to the end of the run are on the bar, the logger's version is not. Responses are of process 0. It supports
    `TQDMProgressBar` and `RichProgressBar`, and does nothing under another bar, without one, and in the stages without
    rollouts.

    Args:
        every: seconds between two changes of the bar, at least; raise it where the output goes to a file.

    Raises:
        ValueError: `every` is negative.
    """

    def __init__(self, every: float = 0.5) -> None:
        check_not_negative(every=every)
        self.every = every
        self._start = 0.0
        self._before = 0.0
        self._updates = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and note the share that an earlier run did, which took no time of this one."""
        if isinstance(trainer.progress_bar_callback, TQDMProgressBar | RichProgressBar):
            _hide_version(trainer.progress_bar_callback)
        if _shown(trainer, pl_module):
            self._start, self._before = perf_counter(), _share(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Follow the rollout's progress."""
        self._updates = 0
        if _shown(trainer, pl_module):
            pl_module.collector.engine.watch = Watch(partial(self._tell, trainer, pl_module), every=self.every)

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        """Show the number of the update."""
        if _shown(trainer, pl_module) and pl_module.outcome is not None:
            total = pl_module.updates.steps(len(pl_module.outcome.rollout))
            update = f"update {self._updates + 1}/{total}"
            _describe(trainer, ", ".join(filter(None, [update, self._left(trainer, pl_module)])))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count the updates of the rollout."""
        self._updates += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show the time left in the run."""
        if _shown(trainer, pl_module):
            pl_module.collector.engine.watch = None  # validation has a bar of its own
            _describe(trainer, self._left(trainer, pl_module))

    def _tell(self, trainer: Trainer, module: Any, progress: Progress) -> None:
        speed = progress.tokens / max(progress.seconds, 1e-9)
        status: str = module.collector.sampler.status(progress.done, progress.total)
        responses = f"{status}, {speed:.0f} tokens/s"
        _describe(trainer, ", ".join(filter(None, [responses, self._left(trainer, module)])))

    def _left(self, trainer: Trainer, module: LightningModule) -> str:
        """Time left at the mean pace so far; empty before the first step and if the run has no end."""
        share = _share(trainer, module)
        if share <= self._before:
            return ""
        seconds = (perf_counter() - self._start) * (1 - share) / (share - self._before)
        return f"{timedelta(seconds=round(seconds))} left"


def _share(trainer: Trainer, module: Any) -> float:
    """Share of the run that is done, by the nearer limit."""
    rollouts = trainer.num_training_batches * (trainer.max_epochs or -1)
    shares = [module.iteration / rollouts if rollouts > 0 else 0.0]
    shares.append(trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0)
    return min(max(shares), 1.0)


def _shown(trainer: Trainer, module: LightningModule) -> bool:
    bar = trainer.progress_bar_callback
    known = isinstance(bar, TQDMProgressBar | RichProgressBar) and bar.is_enabled
    return known and getattr(module, "collector", None) is not None


def _hide_version(bar: Any) -> None:
    """Hide the logger's version on the bar, which takes the room of a metric."""
    metrics = bar.get_metrics
    bar.get_metrics = lambda *each: {name: value for name, value in metrics(*each).items() if name != "v_num"}


def _describe(trainer: Trainer, text: str) -> None:
    """Show a text behind the epoch."""
    words = ", ".join(filter(None, [f"Epoch {trainer.current_epoch}", text]))
    bar: Any = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar):
        bar.train_progress_bar.set_description(words)
    elif bar.progress is not None and bar.train_progress_bar_id is not None:
        bar.progress.update(bar.train_progress_bar_id, description=words)
        bar.refresh()
