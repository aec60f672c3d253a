"""Loss of a part of one optimizer step (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core import Algorithm, k3, next_token_loss
from lightning_rlhf.core.checks import check_not_negative
from lightning_rlhf.core.vocabulary import VocabularySums, vocabulary_sums
from lightning_rlhf.evaluation.mean_metrics import MeanMetrics
from lightning_rlhf.models import PolicyModel, ScalarModel
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.types import Experience, PPOBatch, TextBatch

Loss = tuple[Tensor, MeanMetrics]
"""A scalar loss with its graph, and the numbers to log of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Numerators of the losses of π_θ and V_θ; the caller divides by the counts of the whole step.

    Attributes:
        policy: π_θ.
        value: V_θ, or None.
        reference: π_ref, for a KL over the vocabulary.
        temperature: τ of the log-probs of responses.
    """

    policy: PolicyModel
    value: ScalarModel | None
    reference: Reference
    temperature: float

    def counts(self, algorithm: Algorithm, minibatch: Experience, text: TextBatch | None) -> Tensor:
        """Return this process's denominators of a step: the reduction's and the text tokens, (2,)."""
        actions = algorithm.reduction.count(minibatch.action_mask)
        words = torch.zeros_like(actions) if text is None else text.target.sum()
        return torch.stack([actions, words])

    def actions(self, algorithm: Algorithm, piece: Experience) -> Loss:
        """Return surrogate, KL in the loss and value loss over the actions of some rows."""
        old = piece.rollout
        logprobs, vocabulary = self._measured(algorithm, piece)
        values = None if self.value is None else self.value.response_values(old)
        per_action = algorithm.action_loss(logprobs, values, piece, vocabulary)
        return algorithm.reduction.total(per_action.loss, piece.action_mask), MeanMetrics.of(
            per_action.stats, piece.action_mask
        )

    def text(self, text: TextBatch, *, count: Tensor) -> Loss:
        """Return −Σ log π_θ(token) / count, in nats per token: the pretraining term before its weight γ."""
        logprobs = self.policy.text_logprobs(text)
        return next_token_loss(logprobs, text.target, count=count), MeanMetrics.of(
            {"ptx/loss": -logprobs}, text.target[:, 1:]
        )

    @torch.no_grad()
    def kl_old(self, algorithm: Algorithm, piece: Experience) -> MeanMetrics:
        """KL(π_old‖π_θ) per action, by k3 at the samples of π_old (PPO §4)."""
        old = piece.rollout
        log_ratio = algorithm.level.log_ratio(self.logprobs(piece), old.logprobs, old.response_mask)
        return MeanMetrics.of({"policy/kl_old": k3(-log_ratio)}, piece.action_mask, only_where_counted=True)

    def logprobs(self, piece: Experience) -> Tensor:
        """log π_θ of each response token, (B, R), nats."""
        return self.policy.response_logprobs(piece.rollout, temperature=self.temperature)

    def _measured(self, algorithm: Algorithm, piece: Experience) -> tuple[Tensor, VocabularySums | None]:
        """Return log π_θ of each response token with the sums over the vocabulary that the loss needs, (B, R) each."""
        old = piece.rollout
        if not algorithm.needs_vocabulary:
            return self.logprobs(piece) if old.logprobs_with_grad is None else old.logprobs_with_grad, None
        predictions, reference = self.policy.response_predictions(old), None
        if algorithm.kl_term.over_vocabulary:
            with torch.no_grad(), self.reference.model() as model:
                reference = model.response_predictions(old)
        response = old.response_mask
        chosen = old.tokens[:, old.prompt_width :][response]
        sums = vocabulary_sums(predictions, reference, temperature=self.temperature)

        def placed(x: Tensor) -> Tensor:
            return x.new_zeros(response.shape).masked_scatter(response, x)

        logprobs = placed(predictions.logprobs(chosen, temperature=self.temperature))
        return logprobs, VocabularySums(placed(sums.entropy), placed(sums.kl_ref))


def pretraining_of(batch: PPOBatch, ptx_coef: float) -> TextBatch | None:
    """Return the pretraining texts of a batch; returns None if γ is 0.

    Raises:
        ValueError: there are none, or γ is no number.
    """
    check_not_negative(ptx_coef=ptx_coef)
    if ptx_coef == 0:
        return None
    if "pretrain" not in batch:
        raise ValueError(
            f"`ptx_coef` is {ptx_coef}, but the data serves no pretraining texts: set the data's `pretrain`, "
            "or `ptx_coef` to 0"
        )
    return batch["pretrain"]
