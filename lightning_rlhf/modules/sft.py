"""Stage 1: supervised fine-tuning on labeler demonstrations."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core import CosineSchedule, Schedule, next_token_loss
from lightning_rlhf.core.arguments import check_arguments
from lightning_rlhf.models import ModelSource, PolicyModel
from lightning_rlhf.models.limits import check_length
from lightning_rlhf.modules.networks import build_policy
from lightning_rlhf.modules.reward_metrics import Mean, begin
from lightning_rlhf.modules.supervised import SupervisedModule
from lightning_rlhf.types import TextBatch


class SFTModule(SupervisedModule):
    """Next-token prediction on demonstrations (Ouyang et al. 2022, §3.5 and C.1).

    The loss is the mean over the tokens that count of the whole step, all processes and all batches whose gradients the
    trainer accumulates together; which tokens count is the data's choice (the response only, unless `loss_on_prompt`).

    Args:
        model: the language model: a folder or name, a source, or a module already built.
        tokenizer: of a built module; otherwise the one beside the weights. A folder or hub name, or the object.
        lr: learning rate of AdamW without weight decay; None is the paper's for 1.3B to 6B, 9.65e-6, or that of
            `optimizer`.
        optimizer: a function of the parameters, instead of `lr`.
        schedule: of the learning rate, per optimizer step; the paper decays to 10 % without warm-up.
    """

    kind = "SFTModule"

    def __init__(
        self,
        model: ModelSource | str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        lr: float | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = CosineSchedule(),
    ) -> None:
        check_arguments(SFTModule, locals())
        super().__init__(model, tokenizer, lr, optimizer, schedule, default_lr=9.65e-6)
        self.eval_loss = Mean()

    def _build(self, source: ModelSource | nn.Module) -> PolicyModel:
        return build_policy(source, self.tokenizer)

    def forward(self, batch: TextBatch) -> Tensor:
        """Return log-probs of tokens 1 .. L−1, (B, L − 1), in nats; 0 if a token does not count.

        Raises:
            ValueError: the texts are longer than the network can read.
        """
        check_length(self.model.network, batch.tokens.shape[1], limits="the data's `max_tokens`")
        return self.model(batch.tokens, batch.mask, width=batch.tokens.shape[1] - 1, wanted=batch.target[:, 1:])

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Return the batch's share of the step's mean, in nats per token that counts."""
        total = next_token_loss(self(batch), batch.target, count=1)
        return self.step_loss(total, batch.target.sum(), rows=len(batch.tokens))

    def on_validation_epoch_start(self) -> None:
        """Reset the mean loss of the evaluation."""
        begin(self.eval_loss)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Add a batch to `eval/loss`, in nats per token."""
        self._evaluate(batch, "eval/loss")

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Add a batch to `test/loss`, in nats per token."""
        self._evaluate(batch, "test/loss")

    def _evaluate(self, batch: TextBatch, name: str) -> None:
        self.eval_loss.update(-self(batch)[batch.target[:, 1:]])
        self.log(name, self.eval_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch.tokens))
