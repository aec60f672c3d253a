"""Verdict on a run in a sentence, with doubts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import variance

from lightning_rlhf.report.reward_model import CONFIDENCES, last
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.statistics import NORMAL, share_interval
from lightning_rlhf.report.summary import Change, changes, edge

FALL = 0.1
"""Smallest drop of the share of ended responses that raises a doubt."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verdict on a run by its numbers.

    Attributes:
        said: one sentence; "" if the needed numbers were not logged.
        doubts: sentences on missing evidence or bad signs.
    """

    said: str
    doubts: tuple[str, ...] = ()


def verdict(run: Run) -> Verdict:
    """Judge a run by the numbers of its stage."""
    return (_fine_tuning, _reward_model, _rl)[run.stage](run, changes(run))


def number(value: float, sign: str = "") -> str:
    """Format a number with three significant digits and a real minus sign."""
    return f"{value:{sign}.3g}".replace("-", "−")


def _rl(run: Run, found: Mapping[str, Change]) -> Verdict:
    held, doubts = found.get("held-out reward"), []
    if held is None:
        doubts.append("No held-out evaluation was logged: these are training responses.")
    elif held.moved is None and "reward" in found:
        doubts.append(
            f"One held-out evaluation alone was logged, of reward {number(held.last)}: these are training responses."
        )
    kind = "held-out " if held is not None and (held.moved is not None or "reward" not in found) else ""
    reward, kl, ended = (
        found.get(f"{kind}{what}") for what in ("reward", "KL to the reference, nats", "responses that end")
    )
    if reward is None:
        return Verdict("")
    if reward.moved is None:
        said = f"{kind}reward {number(reward.last)}"
    else:
        said = f"{kind}reward {number(reward.moved, '+')} ({number(reward.first)} → {number(reward.last)})"
        doubts += _unsure(run, reward.moved, held_out=bool(kind))
    said += f" for {number(kl.last)} nats of KL" if kl else ""
    if ended:
        said += f"; {100 * ended.last:.0f} % of the responses end"
        doubts += _cut_off(ended)
    if run.metrics["eval/gold/overoptimized"].y[-1:] == (1.0,):
        doubts.append("The gold reward fell while the score rose: overoptimized.")
    return Verdict(_sentence(said), tuple(doubts))


def _unsure(run: Run, moved: float, *, held_out: bool) -> list[str]:
    """Doubts about a change of the mean score that is not finite or within its error."""
    if not math.isfinite(moved):
        return ["The reward is not a number at one end of the run."]
    if moved == 0:
        return ["The reward did not move."]
    error = _error((run.held_out if held_out else run.rollouts).column("score"), held_out=held_out)
    if error is None or abs(moved) > NORMAL * error:
        return []
    return [f"The reward did not move by more than its error, ±{number(NORMAL * error)} (95 %)."]


def _error(scores: Mapping[int, Sequence[float]], *, held_out: bool) -> float | None:
    """Standard error of the last mean minus the first; None if single scores were not logged."""
    size = 1 if held_out else edge(len(scores))
    if len(scores) < 2:
        return None
    rows = list(scores.values())
    ends = [[value for row in part for value in row] for part in (rows[:size], rows[-size:])]
    if min(map(len, ends)) < 2:
        return None
    return math.sqrt(sum(variance(values) / len(values) for values in ends))


def _cut_off(ended: Change) -> list[str]:
    if ended.last < ended.first - FALL:
        return [f"Responses stop ending: {100 * ended.first:.0f} % → {100 * ended.last:.0f} %."]
    return ["Most responses are cut off at the length limit."] * (ended.last < 0.5)


def _reward_model(run: Run, found: Mapping[str, Change]) -> Verdict:
    right = found.get("accuracy on held-out pairs")
    if right is None:
        return Verdict("", ("No accuracy on held-out pairs was logged.",))
    counts = [last(run, f"pairs_confidence_{name}") for name in CONFIDENCES]
    pairs = sum(count for count in counts if count)
    said, doubts = f"accuracy {number(right.last)}", []
    if pairs:
        said += f" on {pairs:,.0f} held-out pairs"
        if share_interval(right.last, pairs)[0] <= 0.5:
            doubts.append("So few pairs do not tell it from a coin.")
    longer = last(run, "longer_wins")
    if longer is not None:
        said += f"; preferring the longer response: {number(longer)}"
        if right.last <= longer:
            doubts.append("It is no better than preferring the longer response.")
    return Verdict(_sentence(said), tuple(doubts))


def _fine_tuning(run: Run, found: Mapping[str, Change]) -> Verdict:
    held, trained = found.get("held-out loss"), found.get("training loss")
    parts, doubts = [], []
    for name, loss in (("held-out", held), ("training", trained)):
        if loss is not None:
            way = "" if loss.moved is None else f"{number(loss.first)} → "
            parts.append(f"{name} loss {way}{number(loss.last)}")
    if trained is not None and held is None:
        doubts.append("No held-out evaluation was logged.")
    if held is not None and held.last > 1.01 * min(held.series.y):
        doubts.append(f"The held-out loss was lower before, {number(min(held.series.y))}: overfitting.")
    return Verdict(_sentence("; ".join(parts)), tuple(doubts))


def _sentence(said: str) -> str:
    return f"{said[:1].upper()}{said[1:]}." if said else ""
