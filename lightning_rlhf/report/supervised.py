"""What supervised fine-tuning did."""

from __future__ import annotations

from lightning_rlhf.report.quantity import STEPS, Quantity

LOSS = Quantity(
    name="loss",
    title="Next-token loss",
    y="nats per token",
    line=("train/loss",),
    points=("eval/loss", "test/loss"),
    x=STEPS,
    caption="Held-out rising while training falls is overfitting; InstructGPT went on all the same, for the reward.",
    remedy="needs train/loss or eval/loss in metrics.csv of an SFTModule",
)
