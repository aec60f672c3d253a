"""Preference stage: a policy from preferences directly, without a reward model or sampling."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core import DPO, ConstantSchedule, DirectPreferenceLoss, Schedule, response_labels
from lightning_rlhf.core.arguments import check_arguments
from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.distributed.strategies import most_passes
from lightning_rlhf.models import ModelSource, PolicyModel
from lightning_rlhf.models.kept_logprobs import KeptLogprobs, alone, key_of
from lightning_rlhf.models.limits import check_length
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.modules.networks import as_source, build_policy, build_reference
from lightning_rlhf.modules.preference_batch import as_comparisons, mismatched, responses_of
from lightning_rlhf.modules.ranking_evaluation import RankingEvaluation, seen
from lightning_rlhf.modules.reward_metrics import Mean, begin
from lightning_rlhf.modules.supervised import SupervisedModule
from lightning_rlhf.types import ComparisonBatch, LabeledBatch, TextBatch

SIDES = {"chosen": 1, "rejected": -1}
"""Labels of the responses in the means of either side."""


class PreferenceModule(SupervisedModule):
    """Policy from preferences: DPO, IPO or KTO by its `loss` (Rafailov et al. 2023).

    π_θ is trained on h = log π_θ(y|x) − log π_ref(y|x) of responses in the data. β·h is its implicit reward, by which
    an evaluation measures what it does of a reward model: accuracy, margin, calibration, and accuracy by length and by
    system (`RankingEvaluation`). It takes the rankings of `ComparisonDataModule` by their pairs; with `KTO` by their
    best and worst responses, or the labels of `LabeledDataModule`. The reference's log-probs are computed with every
    batch, or once by `cache_reference`.

    Args:
        policy: the language model to train, usually that of stage 1: a folder or name, a source, or a module already
            built.
        loss: of the log-ratios.
        reference: π_ref; None is the policy at the start (the adapter off, under PEFT).
        tokenizer: of a built module; otherwise the one beside the weights. A folder or hub name, or the object.
        lr: learning rate of AdamW without weight decay; None is the paper's 1e-6, or that of `optimizer`.
        optimizer: a function of the parameters, instead of `lr`; the paper's is RMSprop.
        schedule: of the learning rate, per optimizer step; the paper warms up over 150 steps and stays there.
        cache_reference: compute log π_ref of each text once and keep it in `reference-logprobs` of the run's folder
            for later epochs and resumed runs. Texts are then read one by one, because padding changes last bits, and
            the first epoch takes longer. KTO's mismatched pairs are new in every epoch and not kept.
    """

    kind = "PreferenceModule"
    model: PolicyModel
    reference: Reference

    def __init__(
        self,
        policy: ModelSource | str | nn.Module,
        loss: DirectPreferenceLoss = DPO(),
        reference: ModelSource | str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        lr: float | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = ConstantSchedule(warmup=150, warmup_start=0.0),
        cache_reference: bool = False,
    ) -> None:
        check_arguments(PreferenceModule, locals())
        source = as_source(reference)
        deciding: dict[str, Any] = {"loss": loss, "reference": source}
        if isinstance(policy, nn.Module) and reference is None:
            deciding["policy"] = policy  # of which the reference is a copy
        super().__init__(policy, tokenizer, lr, optimizer, schedule, default_lr=1e-6, **deciding)
        self.loss = loss
        self._reference_source = source
        self.cache_reference, self._kept = cache_reference, KeptLogprobs()
        self.evaluation = RankingEvaluation()
        self.means = nn.ModuleDict({f"{side}_{what}": Mean() for side in SIDES for what in ("logprob", "reward")})

    def _build(self, source: ModelSource | nn.Module) -> PolicyModel:
        return build_policy(source, self.tokenizer)

    def _build_frozen(self) -> list[nn.Module]:
        self.reference = build_reference(self.model, self._reference_source, None)
        return [] if self.reference.frozen is None else [self.reference.frozen]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the settings of the run and a reference that has moved; write what `cache_reference` keeps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rlhf"]["reference"] = self.reference.state() if self.model else {}
        self._write_kept()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore a reference that has moved; raise if the checkpoint belongs to a run with other settings."""
        super().on_load_checkpoint(checkpoint)
        if checkpoint["rlhf"].get("reference"):
            if self.cache_reference:
                raise ValueError(
                    "the checkpoint's reference has moved, and `cache_reference` keeps what one reference said: set it "
                    "to false"
                )
            self.configure_model()
            self.reference.restore(checkpoint["rlhf"]["reference"])

    def forward(self, texts: TextBatch) -> Tensor:
        """Return log π_θ of each text's targets, (N,), nats.

        Raises:
            ValueError: the texts are longer than the network can read.
        """
        check_length(self.model.network, texts.tokens.shape[1], limits="the data's `max_tokens`")
        return self.model.text_logprobs(texts).sum(1)

    @torch.no_grad()
    def reference_logprobs(self, texts: TextBatch) -> Tensor:
        """Return log π_ref of each text's targets in nats, (N,) without gradient."""
        with self.reference.model() as network:
            if network is not self.model:  # Lightning moves and casts only registered modules
                weight = next(self.model.parameters())
                copied = self._reference_source is None
                network.to(device=weight.device, dtype=weight.dtype if copied else None)
            return network.text_logprobs(texts).sum(1)

    def _reference_of_each(self, texts: TextBatch) -> Tensor:
        """Return log π_ref of each text's targets, (N,): computed together, or else alone and once."""
        if not self.cache_reference:
            return self.reference_logprobs(texts)
        rows = [alone(texts, row) for row in range(len(texts.tokens))]
        keys = [key_of(row) for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._kept}
        for _ in range(len(missing), most_passes(self, len(missing))):  # for others, which need all processes
            self.reference_logprobs(rows[0])
        for key, row in missing.items():
            self._kept.add(key, float(self.reference_logprobs(row)))
        return torch.tensor([self._kept[key] for key in keys], dtype=torch.float64, device=texts.tokens.device)

    @property
    def _kept_folder(self) -> Path:
        """Folder of log-probs of this reference in this precision."""
        names = ("reference",) if self._settings["reference"] is not None else ("model", "policy")
        values = {name: self._settings.get(name) for name in names}
        values |= {
            "precision": str(self.trainer.precision),
            "device": self.trainer.strategy.root_device.type,
            "torch": torch.__version__,
        }
        digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return Ranks(self).folder / "reference-logprobs" / digest

    def _write_kept(self) -> None:
        if self.cache_reference and self._trainer is not None and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._kept.write(self._kept_folder)

    def setup(self, stage: str) -> None:
        """Read the reference's log-probs of an earlier run."""
        if self.cache_reference:
            self._kept = KeptLogprobs()  # what another trainer computed may be of another precision
            self._kept.read(self._kept_folder)

    def on_train_epoch_end(self) -> None:
        """Exchange the reference's log-probs of this epoch with the other processes."""
        if self.cache_reference:
            self._write_kept()
            self.trainer.strategy.barrier()
            self._kept.read(self._kept_folder)

    def teardown(self, stage: str) -> None:
        """Write the reference's log-probs that are new."""
        self._write_kept()

    def log_ratios(self, batch: ComparisonBatch) -> tuple[Tensor, Tensor]:
        """Return h and log π_θ of each response, (B, K) each in nats; 0 where a response is absent."""
        there, texts = batch.mask.any(2), responses_of(batch)
        logprobs = self(texts)
        ratios = logprobs - self._reference_of_each(texts).to(logprobs)
        zeros = logprobs.new_zeros(there.shape)
        return zeros.masked_scatter(there, ratios), zeros.masked_scatter(there, logprobs.detach())

    def rewards(self, batch: ComparisonBatch | LabeledBatch) -> Tensor:
        """Return the implicit rewards β·h of each response, (B, K); 0 where one is absent.

        Labels are of one response each, K = 1.
        """
        return self.loss.beta * self.log_ratios(as_comparisons(batch))[0]

    @torch.no_grad()
    def estimated_kl(self, batch: ComparisonBatch) -> Tensor | None:
        """Estimate max(0, KL(π_θ‖π_ref)) from mismatched pairs of the whole batch; returns None if the loss needs none.

        Args:
            batch: B prompts of this process.

        Returns:
            scalar, nats; 0 if fewer than two prompts of the batch of all processes count.
        """
        if not self.loss.needs_kl:
            return None
        ranks = Ranks(self)
        rank = torch.where(self.loss.counts(batch.rank).unsqueeze(1), batch.rank, -1)
        texts, counts = mismatched(batch._replace(rank=rank), ranks)
        ratios = torch.where(counts, self(texts) - self.reference_logprobs(texts), 0.0)
        total, count = ranks.sum(torch.stack([ratios.sum(), counts.sum().to(ratios)]))
        return (total / count.clamp(min=1)).clamp(min=0)

    def training_step(self, batch: ComparisonBatch | LabeledBatch, batch_idx: int) -> Tensor:
        """Return the batch's share of the step's mean over prompts that count."""
        batch = as_comparisons(batch)
        counts = self.loss.counts(batch.rank)
        ratios, logprobs = self.log_ratios(batch)
        kl = self.estimated_kl(batch)
        losses = self.loss(ratios, batch.rank, kl)
        self._log_sides(batch, ratios.detach(), logprobs)
        if kl is not None:
            self.log("train/kl", kl)
        return self.step_loss(torch.where(counts, losses, 0.0).sum(), counts.sum(), rows=len(batch.rank))

    def _log_sides(self, batch: ComparisonBatch, ratios: Tensor, logprobs: Tensor) -> None:
        """Log the means of log π_θ and of the implicit reward of a batch's best and worst responses."""
        labels = response_labels(batch.rank)
        columns = torch.stack([torch.ones_like(ratios), logprobs, self.loss.beta * ratios])
        sums = torch.stack([torch.where(labels == sign, columns, 0.0).sum((1, 2)) for sign in SIDES.values()])
        for side, (count, logprob, reward) in zip(SIDES, Ranks(self).sum(sums), strict=True):
            if count:
                self.log_dict({f"train/{side}_logprob": logprob / count, f"train/{side}_reward": reward / count})

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics of the evaluation."""
        begin(*self.means.values())  # type: ignore[arg-type]
        self.evaluation.begin()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(
        self, batch: ComparisonBatch | LabeledBatch | TextBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add rankings or labels to the metrics; demonstrations are left alone."""
        if isinstance(batch, TextBatch):
            return
        batch = as_comparisons(batch)
        counts = self.loss.counts(batch.rank)
        ratios, logprobs = self.log_ratios(batch)
        losses = self.loss(ratios, batch.rank, self.estimated_kl(batch))
        self.evaluation.update(self.loss.beta * ratios, losses, batch, counts)
        labels = response_labels(batch.rank)
        for side, sign in SIDES.items():
            if (labels == sign).any():
                self.means[f"{side}_logprob"].update(logprobs[labels == sign])  # type: ignore[operator]
                self.means[f"{side}_reward"].update(self.loss.beta * ratios[labels == sign])  # type: ignore[operator]

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._conclude("eval")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._conclude("test")

    def _conclude(self, stage: str) -> None:
        values = self.evaluation.compute(self)
        values |= {name: mean.compute() for name, mean in self.means.items() if seen(self, mean)}  # type: ignore
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("accuracy", "loss"), sync_dist=True)
