"""Stage 1: supervised fine-tuning on labeler demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core import CosineSchedule, Schedule, next_token_loss
from lightning_rlhf.core.arguments import check_arguments
from lightning_rlhf.core.settings import Difference
from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.distributed.sharding import built_whole, shard_networks
from lightning_rlhf.models import ModelSource, PolicyModel
from lightning_rlhf.models.context_length import check_length
from lightning_rlhf.models.source import DType
from lightning_rlhf.modules.hparams import keep_hyperparameters
from lightning_rlhf.modules.metrics import Mean, begin
from lightning_rlhf.modules.networks import as_source, build_policy, find_tokenizer
from lightning_rlhf.modules.optim import chosen_optimizer, optimizer_of, scheduled, training_steps
from lightning_rlhf.modules.optimizer_checks import begin_training, picklable, refuse_finder
from lightning_rlhf.modules.resume import check_resumable, settings, version
from lightning_rlhf.modules.revival import CheckedRevival
from lightning_rlhf.modules.step_mean import StepMean
from lightning_rlhf.types import TextBatch


class SFTModule(CheckedRevival, LightningModule):
    """Next-token prediction on demonstrations (Ouyang et al. 2022, §3.5 and C.1).

    The loss is the mean over the tokens that count of the whole step, all processes and all batches whose gradients the
    trainer accumulates together; which tokens count is the
    data's choice (the response only, unless `loss_on_prompt`).

    Args:
        model: the language model: a folder or name, a source, or a module already built.
        tokenizer: of a built module; otherwise the one beside the weights. A folder or hub name, or the object.
        lr: learning rate of AdamW without weight decay; None is the paper's for 1.3B to 6B, 9.65e-6, or that of
            `optimizer`.
        optimizer: a function of the parameters, instead of `lr`.
        schedule: of the learning rate, per optimizer step; the paper decays to 10 % without warm-up.
    """

    def __init__(
        self,
        model: str | ModelSource | nn.Module,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        lr: float | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = CosineSchedule(),
    ) -> None:
        check_arguments(SFTModule, locals())
        super().__init__()
        model = as_source(model)
        optimizer = chosen_optimizer(optimizer, lr, default=9.65e-6)
        keep_hyperparameters(self, tokenizer=tokenizer, lr=lr)
        self.tokenizer = find_tokenizer(model, tokenizer)
        self.model: PolicyModel | None = None
        self.optimizer, self.schedule = picklable(optimizer), schedule
        self.eval_loss = Mean()
        self._step = StepMean()
        self._changed: list[Difference] = []
        self._source = (model,)  # in a tuple, so that a built module is not registered twice
        self._settings = settings(optimizer, model=model, schedule=schedule)

    @built_whole
    def configure_model(self) -> None:
        """Build the network once and shard it if the strategy asks for it."""
        if self.model is None:
            refuse_finder(self)
            self.model = build_policy(self._source[0], self.tokenizer)
            shard_networks(self, [self.model])

    def forward(self, batch: TextBatch) -> Tensor:
        """Return log-probs of tokens 1 .. L−1, (B, L − 1), in nats; 0 if a token does not count.

        Raises:
            ValueError: the texts are longer than the network can read.
        """
        check_length(self.model.network, batch.tokens.shape[1], limits="the data's `max_tokens`")
        return self.model(batch.tokens, batch.mask, width=batch.tokens.shape[1] - 1, wanted=batch.target[:, 1:])

    def on_train_start(self) -> None:
        """Apply a learning rate that differs from the resumed checkpoint's."""
        begin_training(self, self._changed)

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Return the batch's share of the step's mean, in nats per token that counts."""
        total = next_token_loss(self(batch), batch.target, count=1)
        loss = self._step.loss(self, total, Ranks(self).sum(batch.target.sum()))
        self.log("train/loss", self._step.mean.to(loss), prog_bar=True, batch_size=len(batch.tokens))
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the count of all accumulated batches."""
        self._step.finish(optimizer)

    def on_validation_epoch_start(self) -> None:
        """Reset the mean loss of the evaluation."""
        begin(self.eval_loss)

    def on_test_epoch_start(self) -> None:
        """Reset the mean loss of the evaluation."""
        begin(self.eval_loss)

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Add a batch to `eval/loss`, in nats per token."""
        self._evaluate(batch, "eval/loss")

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Add a batch to `test/loss`, in nats per token."""
        self._evaluate(batch, "test/loss")

    def _evaluate(self, batch: TextBatch, name: str) -> None:
        self.eval_loss.update(-self(batch)[batch.target[:, 1:]])
        self.log(name, self.eval_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch.tokens))

    def configure_optimizers(self) -> dict:
        """Build the optimizer and its schedule."""
        return scheduled(optimizer_of(self.optimizer, self.model), self.schedule, lambda: training_steps(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the settings of the run."""
        checkpoint["rlhf"] = {"module": "SFTModule", "settings": self._settings, "version": version()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise if the checkpoint belongs to a run with other settings."""
        self._changed = check_resumable(self, checkpoint, self._settings)

    def save_pretrained(self, folder: str | Path, *, merge_adapter: bool = False, dtype: DType | None = None) -> None:
        """Write a Hugging Face folder: the `policy` of the RL stage and the backbone of the reward model.

        Args:
            folder: written whole or not at all.
            merge_adapter: fold a LoRA adapter into the weights.
            dtype: of the weights in the folder; None is that in which they were trained.
        """
        self.configure_model()
        self.model.save_pretrained(folder, merge_adapter=merge_adapter, dtype=dtype)
