"""Validation, test and prediction of a module that has a policy and a reward."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule

from lightning_rlhf.evaluation.evaluation import Evaluation
from lightning_rlhf.rollout.responder import Responder
from lightning_rlhf.types import Outcome, PromptBatch, TextBatch


class EvaluatedModule(LightningModule):
    """Hooks of the evaluation of today's weights.

    Attributes:
        evaluation: what is measured.
        responder: policy, reference and reward.
        outcome: the responses scored last, for callbacks; None after held-out texts.
    """

    evaluation: Evaluation
    responder: Responder
    outcome: Outcome | None

    def on_validation_epoch_start(self) -> None:
        """Reset the means of the evaluation and have the engine take today's weights."""
        self.evaluation.begin(self.responder)

    def validation_step(self, batch: PromptBatch | TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generate and score responses to held-out prompts, or measure the held-out pretraining loss."""
        self.outcome = None
        self.outcome = self.evaluation.step(self.responder, batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the validation means as `eval/…`, those of a named set as `eval@NAME/…`."""
        self._log_evaluation("eval")

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step
    on_predict_epoch_start = on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        """Log the test means as `test/…`."""
        self._log_evaluation("test")

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return a JSON-ready record per prompt: its response with score, KL and length."""
        return self.evaluation.predict(self.responder, batch, batch_idx)

    def _log_evaluation(self, stage: str) -> None:
        trains = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        for held_out, means in self.evaluation.conclude(self.responder, remember=trains).items():
            prefix = f"{stage}@{held_out}" if held_out else stage
            self.log_dict({f"{prefix}/{name}": value for name, value in means.items()}, sync_dist=True)
