"""Stage 2: a reward model from rankings of K responses, 0 on labeler demonstrations."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core import CosineSchedule, PreferenceLoss, RankingLoss, Schedule, preferred_pairs
from lightning_rlhf.core.arguments import check_arguments
from lightning_rlhf.models import ModelSource, ScalarModel, score_at_end
from lightning_rlhf.models.limits import check_length, check_rows
from lightning_rlhf.models.meta import unread
from lightning_rlhf.models.source import without_dropout
from lightning_rlhf.modules.ranking_evaluation import RankingEvaluation, seen
from lightning_rlhf.modules.reward_metrics import Mean, begin
from lightning_rlhf.modules.supervised import SupervisedModule
from lightning_rlhf.types import ComparisonBatch, TextBatch

logger = logging.getLogger(__name__)


class RewardModule(SupervisedModule):
    """Reward model r_θ(x, y) from K-wise rankings (Ouyang et al. 2022, eq. 1), 0 on demonstrations on average.

    r_θ(x, y) = raw score + b, with b = −(mean raw score of the demonstrations). The loss does not see a constant added
    to r_θ, so b is set after every validation that served demonstrations, and when training ends where the data module
    has any, with or without a validation: over all processes, and in float32 whatever the training precision (under
    FSDP2 and DeepSpeed ZeRO-3 in the training precision). The loss is given raw scores, because one that does see a
    constant (`Centered`) would chase the bias.

    An evaluation logs accuracy, margin and loss, the accuracy by confidence (`Calibration`), by length difference
    (`LengthAccuracy`) and by who wrote the responses (`SystemAccuracy`), and the correlation of score and length
    (`LengthCorrelation`), all of them over all processes.

    Args:
        model: a sequence-classification folder, or a language model whose head is replaced by a scalar one; or a
            transformers sequence-classification module already built.
        tokenizer: of a built module; otherwise the one beside the weights. A folder or hub name, or the object.
        loss: of the scores of one prompt's responses.
        lr: learning rate of AdamW without weight decay; None is the paper's 9e-6, or that of `optimizer`.
        optimizer: a function of the parameters, instead of `lr`.
        schedule: of the learning rate, per optimizer step; the paper decays to 10 %.
    """

    kind = "RewardModule"
    model: ScalarModel

    def __init__(
        self,
        model: ModelSource | str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        loss: PreferenceLoss = RankingLoss(),
        lr: float | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = CosineSchedule(),
    ) -> None:
        check_arguments(RewardModule, locals())
        super().__init__(model, tokenizer, lr, optimizer, schedule, default_lr=9e-6, loss=loss)
        self.loss = loss
        self.evaluation = RankingEvaluation()
        self.demonstrations = Mean()

    def setup(self, stage: str) -> None:
        """Add the callback that scores the demonstrations when training ends."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and not any(isinstance(callback, DemonstrationBias) for callback in callbacks):
            callbacks.insert(0, DemonstrationBias())

    def _build(self, source: ModelSource | nn.Module) -> ScalarModel:
        network = unread(source).scorer(new_head=True) if isinstance(source, ModelSource) else without_dropout(source)
        check_rows(network, self.tokenizer, name="reward")
        return ScalarModel(network, self.tokenizer)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return r_θ at the last token of each row with its bias, (B,).

        Args:
            tokens: prompt, response and end token, (B, L), int64.
            mask: real tokens, (B, L), bool.

        Raises:
            ValueError: the texts are longer than the network can read.
        """
        return self.raw(tokens, mask) + self.model.bias

    def raw(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return r_θ at the last token without the bias; arguments and errors as of `forward`."""
        check_length(self.model.network, tokens.shape[1], limits="the data's `max_tokens`")
        with self.model.without_bias():
            return score_at_end(self.model(tokens, mask), mask)

    def rank(self, batch: ComparisonBatch) -> Tensor:
        """Score K responses to each prompt with the bias, (B, K); 0 for an absent response."""
        return torch.where(batch.rank >= 0, self._raw_rank(batch) + self.model.bias, 0.0)

    def _raw_rank(self, batch: ComparisonBatch) -> Tensor:
        present = batch.rank >= 0
        scores = self.raw(batch.tokens[present], batch.mask[present])
        return torch.zeros(present.shape, dtype=scores.dtype, device=scores.device).masked_scatter(present, scores)

    def training_step(self, batch: ComparisonBatch, batch_idx: int) -> Tensor:
        """Return the batch's share of the step's mean over prompts that have a pair."""
        counts = preferred_pairs(batch.rank).any(2).any(1)
        losses = self.loss(self._raw_rank(batch), batch.rank, batch.strength)
        total = torch.where(counts, losses, 0.0).sum()
        return self.step_loss(total, counts.sum(), rows=len(batch.rank))

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics of the evaluation."""
        begin(self.demonstrations)
        self.evaluation.begin()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: ComparisonBatch | TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add comparisons to the metrics and demonstrations to the mean of the bias."""
        if isinstance(batch, TextBatch):
            with self.model.in_float32():
                scores = self.raw(batch.tokens, batch.mask)  # fillers too: a pass may need all processes
            real = batch.target.any(1)
            if real.any():
                self.demonstrations.update(scores[real])
            return
        scores = self._raw_rank(batch)
        counts = preferred_pairs(batch.rank).any(2).any(1)
        if counts.any():
            losses = self.loss(scores, batch.rank, batch.strength)
            self.evaluation.update(scores, losses, batch, counts)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics and set the bias."""
        self._conclude("eval")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._conclude("test")

    def _conclude(self, stage: str) -> None:
        for name, value in self.evaluation.compute(self).items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "accuracy", sync_dist=True)
        if seen(self, self.demonstrations):
            raw = float(self.demonstrations.compute())
            self.log(f"{stage}/demonstrations", raw + self.model.bias, sync_dist=True)
            if stage == "eval" and not self.trainer.sanity_checking:
                self.model.bias = -raw
            self.log(f"{stage}/demonstration_bias", self.model.bias, sync_dist=True)

    @torch.no_grad()
    def score_demonstrations(self) -> None:
        """Set the bias from the data module's demonstrations over all processes; keeps it if there are none."""
        trainer: Any = self.trainer
        if getattr(trainer.datamodule, "demonstrations", None) is None:
            return
        training = self.training
        self.eval()
        begin(self.demonstrations)
        for number, batch in enumerate(trainer.datamodule.demonstration_dataloader()):
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            trainer.strategy.validation_step(batch, number)
        self.train(training)
        raw = float(self.demonstrations.compute())
        if trainer.is_global_zero:
            logger.info("demonstrations scored %.4g on average; with the new bias 0", raw + self.model.bias)
        self.model.bias = -raw

    @torch.no_grad()
    def normalize(self, demonstrations: Iterable[TextBatch]) -> float:
        """Set the bias without a trainer, so that the demonstrations score 0 on average.

        Args:
            demonstrations: batches of prompt, response and end token.

        Returns:
            the bias, reward units.

        Raises:
            ValueError: there is no demonstration.
        """
        self.configure_model()
        total, count = 0.0, 0
        for batch in demonstrations:
            tokens, mask, target = (field.to(self.device) for field in batch)
            real = target.any(1)
            if not real.any():
                continue
            with self.model.in_float32():
                total += float(self.raw(tokens[real], mask[real]).double().sum())
            count += int(real.sum())
        if count == 0:
            raise ValueError("`demonstrations` is empty: the bias needs at least one demonstration")
        self.model.bias = -total / count
        return self.model.bias

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the run's settings and the source of the model, so that `LearnedReward` can load the file alone."""
        source = self._source[0]
        super().on_save_checkpoint(checkpoint)
        if isinstance(source, ModelSource) and source.peft is None:
            checkpoint["rlhf"]["model"] = asdict(source)


class DemonstrationBias(Callback):
    """Callback that scores the demonstrations when training ends, before others save the reward model.

    `RewardModule` adds it to the trainer's callbacks, as the first.
    """

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Set the demonstration bias over all processes."""
        pl_module.score_demonstrations()
