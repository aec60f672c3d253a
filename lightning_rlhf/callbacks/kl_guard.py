"""A budget for how far the policy may go from the reference, and for how long its responses may get."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.kl_action import GuardAction, StopTraining


class KLGuard(Callback):
    """Acts after a rollout whose mean KL to the reference or mean length is over its budget, over all processes.

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
        """Go on from a checkpoint's state, once the module has its own."""
        self.action.restore(self._state, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A rollout begins."""
        self.action.begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare what it logged."""
        for name, budget in self.budgets.items():
            found = float(trainer.callback_metrics[name])
            if budget is not None and not found <= budget:  # NaN is over every budget
                why = f"rollout {pl_module.iteration - 1}: {name} is {found:.4g}, over its budget of {budget:.4g}"
                return self.action.act(trainer, pl_module, why)
        return self.action.keep()

    def state_dict(self) -> dict[str, Any]:
        """The action's."""
        return self.action.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts."""
        self._state = dict(state_dict)
