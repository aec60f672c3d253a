"""Draws docs/architecture.svg: one PPO step above the rooms of the library; `python docs/architecture.py` writes it.

A test holds the rooms to those that tests/repo/test_repo_architecture.py knows, and the file to this program.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

STEP = [
    ("prompts", "x", "PromptDataModule", ""),
    ("rollout", "y ~ π_old(·|x)", "SamplingParams", "Collector"),
    ("scores", "r(x, y)", "Reward", "Shaping"),
    ("advantages", "r − β·log π/π_SFT", "ActionLevel, KL", "AdvantageEstimator"),
    ("minibatches", "epochs × pieces", "UpdateSchedule", "OldLogprobs"),
    ("update", "CLIP, KLPEN + γ·ptx", "Surrogate", "Reduction"),
    ("metrics", "β, b adapt", "KLController", "callbacks"),
]
"""Stage of a training step, what it computes, and the objects that decide how."""

ROOMS: list[dict[str, str]] = [
    {"__main__": "python -m"},
    {"cli": "the command line: configs, errors in one sentence, tools"},
    {"modules": "SFT, reward model, RL as LightningModules", "callbacks": "checks, checkpoints, guards, export"},
    {"evaluation": "win rate, best of n, gold reward", "report": "a page from a run's logs"},
    {"rollout": "prompts to responses and scores; order of updates", "data": "files of text to batches of tokens"},
    {"environments": "answer the turns of a dialogue"},
    {"engines": "draw tokens", "rewards": "score responses", "distributed": "the processes of a run"},
    {"models": "networks: policy, scalar head, adapters"},
    {"text": "messages, templates, token ids, what ends a response"},
    {"core": "the mathematics: torch only", "folders": "looks into a folder before it is loaded"},
    {"types": "what flows between the stages"},
]
"""Rooms from the top row to the bottom one, with what they are for. A room imports only from rows below its
own."""

WIDTH, MARGIN, GAP = 980, 20, 12
STYLE = """
  text { font-family: system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; font-size: 12px; fill: #1f2328 }
  .paper { fill: #ffffff; stroke: #d0d7de } .room { fill: #f6f8fa; stroke: #8c959f }
  .stage { fill: #ddf4ff; stroke: #54aeff }
  .title { font-weight: 600; font-size: 14px } .head { font-weight: 600; font-size: 13px } .small { font-size: 11px }
  .quiet { fill: #59636e } .line { stroke: #59636e; fill: none; stroke-width: 1.5 } .tip { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .paper { fill: #0d1117; stroke: #30363d } .room { fill: #161b22; stroke: #6e7681 }
    .stage { fill: #0c2d6b; stroke: #388bfd } .quiet { fill: #9198a1 } .line { stroke: #9198a1 } .tip { fill: #9198a1 }
  }
"""


def text(x: float, y: float, words: str, kind: str, anchor: str = "middle") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rounded rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="{kind}"/>'


def columns(count: int) -> tuple[list[float], float]:
    """Left edges and width of `count` boxes side by side."""
    width = (WIDTH - 2 * MARGIN - (count - 1) * GAP) / count
    return [MARGIN + i * (width + GAP) for i in range(count)], width


def arrow(points: str) -> str:
    """A line with a tip at its end."""
    return f'<polyline points="{points}" class="line" marker-end="url(#tip)"/>'


def step(top: float) -> list[str]:
    """The stages, an arrow from each to the next, and back from the update to the next rollout."""
    lefts, width = columns(len(STEP))
    drawn = [text(MARGIN, top, "One training step of PPOModule", "title", "start")]
    for left, (name, equation, *objects) in zip(lefts, STEP, strict=True):
        middle = left + width / 2
        drawn += [box(left, top + 14, width, 84, "stage"), text(middle, top + 34, name, "head")]
        drawn += [text(middle, top + 52, equation, "small")]
        drawn += [text(middle, top + 72 + 15 * i, word, "small quiet") for i, word in enumerate(objects)]
        if left != lefts[-1]:
            drawn.append(arrow(f"{left + width:g},{top + 56:g} {left + width + GAP - 3:g},{top + 56:g}"))
    start, end, low = lefts[-1] + width / 2, lefts[1] + width / 2, top + 118
    drawn.append(arrow(f"{start:g},{top + 98:g} {start:g},{low:g} {end:g},{low:g} {end:g},{top + 101:g}"))
    return [
        *drawn,
        text((start + end) / 2, low + 15, "the next rollout samples from the updated policy", "small quiet"),
    ]


def rooms(top: float) -> list[str]:
    """A row of boxes for each level of imports."""
    drawn = [text(MARGIN, top, "The rooms: each imports only from rows below its own", "title", "start")]
    for i, row in enumerate(ROOMS):
        lefts, width = columns(len(row))
        for left, (name, purpose) in zip(lefts, row.items(), strict=True):
            y = top + 14 + i * 56
            drawn += [box(left, y, width, 46, "room"), text(left + width / 2, y + 19, name, "head")]
            drawn.append(text(left + width / 2, y + 36, purpose, "small quiet"))
    return drawn


def drawing() -> str:
    """The file."""
    height = 184 + 14 + 56 * len(ROOMS) + 10
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    title = f"<title>One PPO step: {', '.join(name for name, *_ in STEP)}; below it the rooms of the library</title>"
    defs = f'<defs>{tip}<path d="M0,0 L8,4 L0,8 z" class="tip"/></marker></defs>'
    paper = box(0.5, 0.5, WIDTH - 1, height - 1, "paper")
    return "\n".join([head, title, f"<style>{STYLE}</style>", defs, paper, *step(30), *rooms(192), "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing(), encoding="utf-8")
