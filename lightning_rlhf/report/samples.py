"""Responses to held-out prompts before and after training, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rlhf.report.runs import Run
from lightning_rlhf.text.escape import html

MOST = 500
"""Most prompts on a page, which a browser searches at once; all others are in `samples.jsonl`."""
LONGEST = 6000
"""Longest text on a page, in characters."""
Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """Evaluation of a run, or of several with equal responses.

    Attributes:
        title: above its responses.
        samples: by prompt.
    """

    title: str
    samples: dict[str, Sample]


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """First and last evaluation of each run, without duplicates between runs."""
    evaluations: dict[str, tuple[list[str], str, dict[str, Sample]]] = {}
    for run in runs:
        for iteration, rows in _ends(run).items():
            when = "before training" if iteration == 0 else f"after {iteration} rollouts"
            samples = _by_prompt(rows)
            said = json.dumps([when, [(key, row.get("response"), row["score"]) for key, row in samples.items()]])
            evaluations.setdefault(said, ([], when, samples))[0].append(run.name)
    alone = [run.name for run in runs if _ends(run)]
    return [
        Column(when if names == alone else f"{', '.join(names)}, {when}", samples)
        for names, when, samples in evaluations.values()
    ]


def _ends(run: Run) -> dict[int, list[Sample]]:
    """Lines of the first and last evaluation of all held-out sets, by iteration."""
    ends: dict[int, list[Sample]] = {}
    for responses in (run.held_out, *run.sets.values()):
        for iteration in responses.ends if responses.rows else ():
            ends.setdefault(iteration, []).extend(responses.rows[iteration])
    return dict(sorted(ends.items()))


def _by_prompt(rows: Sequence[Sample]) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    seen: dict[str, int] = {}
    for row in rows:
        prompt = json.dumps(row.get("prompt"))
        seen[prompt] = seen.get(prompt, 0) + 1
        samples[f"{prompt} {seen[prompt]}"] = row
    return samples


def pairs(columns: Sequence[Column]) -> str:
    """Compose controls and pairs as HTML with escaped text; without its script all pairs are shown."""
    prompts = list(dict.fromkeys(key for column in columns for key in column.samples))
    shown = prompts[:MOST]
    note = f" Of {len(prompts)} prompts the first {MOST} are here; samples.jsonl has all." * (len(prompts) > MOST)
    boxes = "".join(
        f'<label><input type="checkbox" data-column="{i}" checked> {html(column.title)}</label>'
        for i, column in enumerate(columns)
    )
    articles = "\n".join(_pair(place, key, columns) for place, key in enumerate(shown))
    return f"""<p class="caption">The policy's answers to held-out prompts, first and last evaluation.{note}</p>
<form class="controls" id="controls" hidden>
<input type="search" name="q" placeholder="search prompts and responses" aria-label="search prompts and responses">
<label>show <select name="show"><option value="">all</option><option value="better">score went up</option>
<option value="worse">score went down</option><option value="cut">last one cut off</option></select></label>
<label>sort by <select name="sort"><option value="">order of the file</option><option value="gain">gain</option>
<option value="loss">loss</option><option value="high">highest score</option><option value="low">lowest score</option>
<option value="long">longest</option><option value="far">highest KL</option></select></label>
<span class="columns">{boxes}</span>
<output id="count"></output>
</form>
<div id="pairs">
{articles}
</div>"""


def _pair(place: int, key: str, columns: Sequence[Column]) -> str:
    samples = [column.samples.get(key) for column in columns]
    present = [sample for sample in samples if sample is not None]
    first, last = present[0], present[-1]
    data = {
        "gain": last["score"] - first["score"],
        "score": last["score"],
        "length": last.get("length"),
        "kl": last.get("kl"),
        "cut": float(last.get("ended") is False),
    }
    numbers = "".join(f' data-{name}="{value:.6g}"' for name, value in data.items() if _is_number(value))
    sides = "".join(
        _side(i, column.title, sample) for i, (column, sample) in enumerate(zip(columns, samples, strict=True))
    )
    return (
        f'<article class="pair" data-place="{place}"{numbers}><div class="prompt text">{_prompt(first.get("prompt"))}'
        f'</div><div class="sides">{sides}</div></article>'
    )


def _side(number: int, title: str, sample: Sample | None) -> str:
    if sample is None:
        return f'<div class="side" data-column="{number}"><header>{html(title)}</header><p class="faint">none</p></div>'
    facts = [f"<b>{sample['score']:+.3g}</b>"]
    facts += [f"{sample['length']:.0f} tokens"] * _is_number(sample.get("length"))
    facts += [f"KL {sample['kl']:.3g}"] * _is_number(sample.get("kl"))
    facts += ["cut off"] * (sample.get("ended") is False)
    parts = [f"{name[6:]} {sample[name]:.3g}" for name in sample if name[:6] == "score/" and _is_number(sample[name])]
    facts += [html(part) for part in parts]
    facts += ["environment failed"] * (sample.get("failed") is True)
    text, turns = sample.get("response"), sample.get("turns")
    shown = _cut(text) if isinstance(text, str) else "<i>no text: the run had no tokenizer</i>"
    if isinstance(turns, list) and isinstance(text, str):
        shown = "".join(_turn(turn) for turn in turns if isinstance(turn, dict))
    return (
        f'<div class="side" data-column="{number}"><header>{html(title)}<span>{" · ".join(facts)}</span></header>'
        f'<div class="text">{shown}</div></div>'
    )


def _turn(turn: dict[str, Any]) -> str:
    """Compose a turn of an episode with its writer and reward."""
    reward = turn.get("reward")
    given = f' <i class="faint">{reward:+.3g}</i>' if _is_number(reward) and reward else ""
    writer = "environment" if turn.get("role") == "environment" else "policy"
    return f'<p class="{writer}"><b>{writer}</b>{given} {_cut(str(turn.get("text")))}</p>'


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list):
        said = [message if isinstance(message, dict) else {} for message in prompt]
        return "".join(
            f"<p><b>{html(str(message.get('role')))}</b> {_cut(str(message.get('content')))}</p>" for message in said
        )
    return _cut(prompt if isinstance(prompt, str) else json.dumps(prompt))


def _cut(text: str) -> str:
    rest = len(text) - LONGEST
    return html(text[:LONGEST]) + (f' <i class="faint">… {rest} more characters</i>' if rest > 0 else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
