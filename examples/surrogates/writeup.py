"""The write-up: one page of Markdown, every figure from the CSV files, and every verdict that could turn."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import bandit_findings
from bandit import BETA
from model_findings import model
from table import Row, chosen, values

HEAD = """# CLIP, KLPEN or neither?

Written by `python examples/surrogates/run.py`; the rows are in `bandit.csv` and `model.csv`.

![reward against KL](surrogates.png)
"""
SECTIONS = {
    "Does KLPEN duplicate the KL to SFT?": bandit_findings.duplicate,
    "The grid on the bandit": bandit_findings.grid,
    "When does a trust region matter?": bandit_findings.trust,
    "What does the missing baseline cost?": bandit_findings.baselines,
}


def setting(bandit: Sequence[Row]) -> str:
    """What the bandit is."""
    own = chosen(bandit, experiment="grid")
    return (
        f"The **bandit**: 8 prompts of 32 responses, scores N(2, 1), a softmax table as policy, 8 responses per prompt "
        f"and rollout, 4 minibatches, Adam, {values(own, 'rollout')[-1]:.0f} rollouts, {len(values(own, 'seed'))} "
        f"seeds (mean ± standard error; batch-mean baseline where nothing else is said). J = E[r] − {BETA}·KL(π‖π_SFT) "
        "is enumerated; the *gap closed* is (J − J_SFT)/(J* − J_SFT) with J* = β·log Z: 1 at the optimum π*, below 0 "
        "where it is worse than no training. The **model**: SmolLM2-135M through `PPOModule`, whole responses as "
        "actions, reward VADER, batch-mean baseline."
    )


def section(title: str, parts: Sequence[str]) -> str:
    """A heading, a paragraph and a table."""
    text, table = parts
    return f"## {title}\n\n{wrapped(text)}\n\n{table}\n"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def writeup(bandit: Sequence[Row], rows: Sequence[Row]) -> str:
    """Markdown; a part that was not run is left out."""
    page = [HEAD]
    if bandit:
        page += [wrapped(setting(bandit)) + "\n"]
        page += [section(title, findings(bandit)) for title, findings in SECTIONS.items()]
    if any(row["surrogate"] != "start" and row["reward"] for row in rows):
        page.append(section("SmolLM2-135M", model(rows)))
    return "\n".join(page)
