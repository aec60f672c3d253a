"""Cost of the RL stage in language modelling, which PPO-ptx reduces (Ouyang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rlhf.core import ratio_standard_error
from lightning_rlhf.evaluation.evaluator import Columns, Evaluator, Texts


@dataclass(frozen=True, kw_only=True)
class AlignmentTax(Evaluator):
    """Held-out pretraining loss of the policy less that of the reference on the same tokens, in nats per token.

    Logs `ptx_loss_reference`, `alignment_tax` and `alignment_tax_se`, its standard error over texts; those cut from one
    document count as independent.
    """

    name = "alignment_tax"
    serves = "texts"

    def of_texts(self, texts: Texts) -> Columns:
        """Return the nats under both networks and the number of tokens, (B,) each."""
        reference, tokens = texts.reference(), texts.texts.target.sum(1)
        nats = {"policy": texts.logprobs, "reference": reference}
        return {name: -logprobs.double().sum(1) for name, logprobs in nats.items()} | {"tokens": tokens}

    def conclude(self, notes: Columns) -> dict[str, float]:
        """Average the nats per token over all texts."""
        extra, tokens = notes["policy"] - notes["reference"], notes["tokens"]
        return {
            "ptx_loss_reference": float(notes["reference"].sum() / tokens.sum()),
            "alignment_tax": float(extra.sum() / tokens.sum()),
            "alignment_tax_se": ratio_standard_error(extra, tokens),
        }
