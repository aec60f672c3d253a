"""Budgets for the KL from the policy to the reference and for the length of responses."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.batch_end import following, log_row
from lightning_rlhf.callbacks.kl_action import GuardAction, StopTraining


class KLGuard(Callback):
    """Acts if the mean KL to the reference or mean length of a rollout of all processes exceeds its budget.

    Args:
        kl: most nats per response (`objective/kl`); None is no budget.
        length: most tokens per response (`objective/response_length`); None is no budget.
        action: `StopTraining()`, `RaiseKL()` or `RollBack()`.

    Raises:
        ValueError: there is no budget, or it is not positive.
    """

    def __init__(self, kl: float | None = None, length: float | None = None, action: GuardAction | None = None) -> None:
        self.budgets = {"objective/kl": kl, "objective/response_length": length}
        given = [budget for budget in self.budgets.values() if budget is not None]
        if not given or min(given) <= 0:
            raise ValueError(f"KLGuard needs a budget above 0, `kl` or `length`: got kl={kl}, length={length}")
        self.action = action or StopTraining()
        self._state: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the action's state after the module has restored its own."""
        self.action.restore(self._state, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prepare the action for a rollout."""
        self.action.begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the logged numbers of the rollout with their budgets."""
        for name, budget in self.budgets.items():
            measured = float(trainer.callback_metrics[name])
            if budget is not None and not measured <= budget:  # NaN is over every budget
                why = f"rollout {pl_module.iteration - 1}: {name} is {measured:.4g}, over its budget of {budget:.4g}"
                return self._act(trainer, pl_module, why)
        return self.action.keep()

    def _act(self, trainer: Trainer, pl_module: Any, why: str) -> None:
        """Act, and give the loggers the rollout's numbers if that ends the run; otherwise Lightning does later."""
        try:
            self.action.act(trainer, pl_module, why)
        except RuntimeError:
            log_row(trainer, following(trainer))
            raise

    def state_dict(self) -> dict[str, Any]:
        """State of the action."""
        return self.action.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the action's state until training starts."""
        self._state = dict(state_dict)
