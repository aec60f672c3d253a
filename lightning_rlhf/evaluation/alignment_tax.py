"""What the RL stage costs in language modelling: the regression that PPO-ptx is there to undo (Ouyang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rlhf.core import ratio_standard_error
from lightning_rlhf.evaluation.evaluator import Columns, Evaluator, Texts


@dataclass(frozen=True, kw_only=True)
class AlignmentTax(Evaluator):
    """Held-out pretraining loss of the policy less that of the reference on the same tokens, nats per token.

    Logs `ptx_loss_reference`, `alignment_tax` and `alignment_tax_se`, its standard error over texts; those cut from one
    document count as independent.
    """

    name = "alignment_tax"
    serves = "texts"

    def of_texts(self, texts: Texts) -> Columns:
        """Nats of both, and how many tokens, (B,) each."""
        reference, tokens = texts.reference(), texts.texts.target.sum(1)
        nats = {"policy": texts.logprobs, "reference": reference}
        return {name: -logprobs.double().sum(1) for name, logprobs in nats.items()} | {"tokens": tokens}

    def conclude(self, notes: Columns) -> dict[str, float]:
        """Σ nats/Σ tokens over all texts."""
        extra, tokens = notes["policy"] - notes["reference"], notes["tokens"]
        return {
            "ptx_loss_reference": float(notes["reference"].sum() / tokens.sum()),
            "alignment_tax": float(extra.sum() / tokens.sum()),
            "alignment_tax_se": ratio_standard_error(extra, tokens),
        }
