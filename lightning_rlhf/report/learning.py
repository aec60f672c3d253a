"""Figures of fine-tuning (loss) and RL (reward, KL, length, entropy, size of updates)."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.report.figure import Figure, Mark, Missing, Points
from lightning_rlhf.report.metrics import Series
from lightning_rlhf.report.quantity import ROLLOUTS, STEPS, Quantity, line_of
from lightning_rlhf.report.responses import Responses
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.statistics import correlation, deciles, mean_interval

_LOG = "metrics.csv of a PPOModule (Lightning's CSVLogger, as in every config)"

REWARD = Quantity(
    name="reward",
    title="Reward",
    y="score, reward units",
    line=("objective/scores",),
    points=("eval/reward", "test/reward"),
    column="score",
    interval=mean_interval,
    caption="Mean score after shaping. Bands and bars: 95 % confidence of the mean, where the responses were logged.",
    remedy=f"needs objective/scores or eval/reward in {_LOG}, or rollouts.jsonl",
)
KL = Quantity(
    name="kl_reference",
    title="KL to the reference",
    y="KL(π‖π_ref), nats per response",
    line=("objective/kl",),
    points=("eval/kl", "test/kl"),
    column="kl",
    interval=mean_interval,
    level=0.0,
    caption="What the reward was paid for with: Σ log π − log π_ref, summed over a response. Bands as for the reward.",
    remedy=f"needs objective/kl or eval/kl in {_LOG}, or rollouts.jsonl",
)
KL_OLD = Quantity(
    name="kl_old",
    title="KL to the policy that sampled",
    y="nats per action",
    line=("policy/approxkl_avg",),
    points=("policy/kl_old",),
    span=(0.0, None),
    labels=("½(log ρ)², over the update", "KL(π_old‖π_θ), after the update"),
    caption="How far one update goes from the policy that wrote the responses. The second is measured by KLPen.",
    remedy=f"needs policy/approxkl_avg in {_LOG}",
)
CLIPPED = Quantity(
    name="clip_fraction",
    title="Clip fraction",
    y="share of clipped actions",
    line=("policy/clipfrac_avg",),
    span=(0.0, None),
    caption="Actions whose gradient CLIP took away: at 0 the bound never binds, near 1 the batch teaches nothing more.",
    remedy=f"needs policy/clipfrac_avg in {_LOG}",
)
LENGTH = Quantity(
    name="length",
    title="Response length",
    y="tokens",
    line=("objective/response_length",),
    points=("eval/response_length", "test/response_length"),
    column="length",
    interval=deciles,
    caption="Mean length. Bands and bars: the middle 80 % of responses, where they were logged.",
    remedy=f"needs objective/response_length in {_LOG}, or rollouts.jsonl",
)
TURNS = Quantity(
    name="turns",
    title="Turns",
    y="turns of the policy",
    line=("objective/turns",),
    points=("eval/turns", "test/turns"),
    caption="Mean turns of the policy in an episode.",
    remedy="",
)
FAILED = Quantity(
    name="failed",
    title="Failed environments",
    y="share of episodes",
    line=("objective/failed",),
    points=("eval/failed", "test/failed"),
    span=(0.0, 1.0),
    caption="Nothing is learned from these episodes.",
    remedy="",
)
ENDED = Quantity(
    name="ended",
    title="Responses that end",
    y="share with an end token",
    line=("objective/eos_rate",),
    points=("eval/eos_rate", "test/eos_rate"),
    column="ended",
    span=(0.0, 1.0),
    caption="The others were cut at the length limit.",
    remedy=f"needs objective/eos_rate in {_LOG}, or rollouts.jsonl",
)
ENTROPY = Quantity(
    name="entropy",
    title="Entropy of a response",
    y="−log π(y|x), nats",
    line=("objective/entropy",),
    points=("eval/entropy", "test/entropy"),
    column="entropy",
    interval=mean_interval,
    caption="Summed over the response: it moves with length, too. Towards 0 the policy says one thing only.",
    remedy=f"needs objective/entropy in {_LOG}, or rollouts.jsonl",
)
TOKEN_ENTROPY = Quantity(
    name="token_entropy",
    title="Entropy of the next token",
    y="nats per token",
    line=("policy/entropy_avg",),
    caption="Under the weights that sample, mean over tokens: does not depend on length.",
    remedy=f"needs policy/entropy_avg in {_LOG}",
)
LEARNED_FROM = Quantity(
    name="learned_from",
    title="Groups learned from",
    y="share of drawn groups",
    line=("filter/pass_rate",),
    span=(0.0, 1.0),
    caption="The others were all right or all wrong and were drawn for nothing, or their prompts rest.",
    remedy="needs filter/pass_rate, from `--model.algorithm.dynamic_sampling` or a `--model.curriculum`",
)
DRAWN = Quantity(
    name="drawn",
    title="Tokens drawn for a response",
    y="response tokens per response learned from",
    line=("filter/tokens_per_response",),
    span=(0.0, None),
    caption="What was drawn in all, over what is learned from: above the response length by what the filter drops.",
    remedy="needs filter/tokens_per_response, from `--model.algorithm.dynamic_sampling` or a `--model.curriculum`",
)
PRETRAINING = Quantity(
    name="pretraining",
    title="Pretraining loss",
    y="nats per token of text",
    line=("ptx/loss",),
    points=("eval/ptx_loss", "test/ptx_loss"),
    caption="What PPO-ptx keeps from rising: the loss on texts, and on held-out ones.",
    remedy="needs ptx/loss, from `--model.algorithm.ptx_coef` above 0 and `--data.pretrain`, or eval/ptx_loss of "
    "held-out texts",
)
GRADIENTS = Quantity(
    name="gradient_ratio",
    title="Pretraining gradient over RL gradient",
    y="ratio of gradient norms",
    line=("ptx/grad_norm_ratio",),
    span=(0.0, None),
    level=1.0,
    caption="‖γ·∇ of the pretraining loss‖ over ‖∇ of the surrogate‖: far above 1 the texts steer, far below not.",
    remedy="needs ptx/grad_norm_ratio in metrics.csv, which is logged where both gradients are measured apart",
)


NEXT_TOKEN = Quantity(
    name="loss",
    title="Next-token loss",
    y="nats per token",
    line=("train/loss",),
    points=("eval/loss", "test/loss"),
    x=STEPS,
    caption="Held-out rising while training falls is overfitting; InstructGPT went on all the same, for the reward.",
    remedy="needs train/loss or eval/loss in metrics.csv of an SFTModule",
)


def length_bias(runs: Sequence[Run]) -> Figure | Missing:
    """Compose the figure of the correlation of length and score over the responses of each rollout."""
    marks: list[Mark] = []
    for run in runs:
        names = ("training", "held out") if len(runs) == 1 else (run.name, f"{run.name}, held out")
        trained, tested = _correlations(run.rollouts), _correlations(run.held_out)
        if trained:
            marks.append(line_of(trained, {}, None, label=names[0], color=run.color))
        if tested:
            marks.append(Points(label=names[1], x=tested.x, y=tested.y, color=run.color))
    title = "Correlation of score and length"
    if not marks:
        return Missing(title=title, remedy="needs rollouts.jsonl or samples.jsonl, in which length and score both vary")
    caption = (
        "Pearson's, over the responses of a rollout or evaluation: near +1 the reward is all but a length. A rise of "
        "this and of length together is the usual way to overfit a reward model."
    )
    name, y = "length_correlation", "Pearson's correlation"
    return Figure(name=name, title=title, x=ROLLOUTS, y=y, marks=marks, caption=caption, level=0.0)


def _correlations(responses: Responses) -> Series:
    lengths, scores = responses.column("length"), responses.column("score")
    correlations = {i: correlation(lengths[i], scores[i]) for i in lengths if i in scores}
    known = {i: value for i, value in correlations.items() if value is not None}
    return Series(tuple(map(float, known)), tuple(known.values()))
