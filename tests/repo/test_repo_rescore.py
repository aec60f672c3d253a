"""`lightning-rlhf rescore`: scores by hand, streams, refusals by file and line."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf.cli import main, rescore
from lightning_rlhf.rewards import FunctionReward, TextReward

CONFIGS = Path(__file__).parents[2] / "configs"
LINES = [
    {"iteration": i // 3, "prompt": f"p {i}", "response": text, "tokens": [i + 5], "ended": True, "raw_score": score}
    | {"row": {"weight": i}}
    for i, (text, score) in enumerate([("a", 1.0), ("b b", 0.5), ("c c c", 0.25), ("d", -1.0), ("e e", 2.0)])
]


class Words(TextReward):
    """Words times a factor, and the record's weight."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def score(self, prompts, responses, /, **columns):
        return [self.factor * len(text.split()) + w for text, w in zip(responses, columns["weight"], strict=True)]


def words(prompts, responses):
    return [float(len(text.split())) for text in responses]


@pytest.fixture
def log(workplace: Path) -> Callable[..., str]:
    """A log of `LINES`, of which one may be changed."""

    def write(place: int = 0, **changes: Any) -> str:
        lines = [line | changes if i == place else line for i, line in enumerate(LINES)]
        lines = [{name: value for name, value in line.items() if value is not None} for line in lines]
        Path("log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return "log.jsonl"

    return write


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_function_scores_every_line(log, size, capsys):
    main(["rescore", log(), "--reward", f"{__name__}.words", "--output=deep/out.jsonl", f"--batch_size={size}"])
    assert read("deep/out.jsonl") == [line | {"rescored": float(i % 3 + 1)} for i, line in enumerate(LINES)]
    assert not list(Path("deep").glob("*.part"))
    report = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {name: value.split()[0] for name, value in report.items()} == {
        "responses": "5",
        "mean raw_score": "0.5500",
        "mean rescored": "1.8000",
        "Pearson correlation": f"{pearson([1.0, 0.5, 0.25, -1.0, 2.0], [1, 2, 3, 1, 2]):.4f}",
        "rank agreement": "0.2500",  # 3 pairs of the first rollout disagree, the pair of the second agrees
        "written to": "deep/out.jsonl",
    }


def pearson(x: list[float], y: list[float]) -> float:
    a, b = ([v - sum(values) / len(values) for v in values] for values in (x, y))
    return sum(p * q for p, q in zip(a, b, strict=True)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def test_class_takes_its_arguments_and_the_record_s_columns(log):
    main(["rescore", log(), f"--reward={__name__}.Words", "--reward.factor=10", "--output=out.jsonl"])
    assert [line["rescored"] for line in read("out.jsonl")] == [10.0, 21.0, 32.0, 13.0, 24.0]


@pytest.fixture(scope="module")
def rolled_out(tiny, tmp_path_factory) -> Path:
    """What configs/ppo.yaml leaves behind: two rollouts scored by the tiny reward model."""
    folder = tmp_path_factory.mktemp("rolled_out")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lightning-rlhf"])
        main(["fit", *tiny.arguments(CONFIGS / "ppo.yaml", model__generation__max_new_tokens=6)])
    return folder / "runs" / "ppo" / "rollouts.jsonl"


def test_same_reward_model_gives_the_same_scores_from_the_policy_s_tokens(rolled_out, tiny, workplace):
    main(["rescore", str(rolled_out), "--reward", tiny.reward, "--tokenizer", tiny.policy, "--output=out.jsonl"])
    lines = read("out.jsonl")
    assert len(lines) == 8
    assert len({line["raw_score"] for line in lines}) > 4
    for line in lines:
        assert line["rescored"] == pytest.approx(line["raw_score"], abs=1e-5)  # float32 in batches of other widths


def test_reward_model_reads_texts_with_its_own_tokenizer(rolled_out, tiny, workplace):
    """Scores of prompt, response and, where it ended, end token, each alone and unpadded."""
    main(["rescore", str(rolled_out), f"--reward={tiny.reward}", "--output=out.jsonl"])
    network = AutoModelForSequenceClassification.from_pretrained(tiny.reward).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.reward)
    for line in read("out.jsonl"):
        tokens = tokenizer(line["prompt"] + " " + line["response"])["input_ids"] + [3] * line["ended"]
        with torch.no_grad():
            states = network.model(torch.tensor([tokens]))[0]
            assert line["rescored"] == pytest.approx(float(network.score(states)[0, -1, 0]), abs=1e-5)


def test_pandas_reads_what_was_logged_and_what_was_rescored(rolled_out, workplace):
    pandas = pytest.importorskip("pandas")
    main(["rescore", str(rolled_out), f"--reward={__name__}.words", "--output=out.jsonl"])
    for path, more in ((rolled_out, set()), (Path("out.jsonl"), {"rescored"})):
        frame = pandas.read_json(path, lines=True)
        assert set(frame.columns) == set(read(str(rolled_out))[0]) | more
        assert (frame["length"] == frame["tokens"].map(len)).all()
        assert frame.groupby("iteration").size().tolist() == [4, 4]


def test_reward_on_token_ids_needs_the_tokenizer(rolled_out, workplace, monkeypatch):
    (workplace / "theirs_of_the_log.py").write_text(
        "import torch\n"
        "class Length(torch.nn.Module):\n"
        "    def forward(self, tokens, mask):\n"
        "        return mask.sum(1)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(workplace)
    arguments = ["rescore", str(rolled_out), "--reward=theirs_of_the_log.Length", "--output=out.jsonl"]
    with pytest.raises(ValueError, match="Length reads token ids.*name the policy's tokenizer"):
        main(arguments)
    assert not list(Path().glob("out*"))
    main([*arguments, "--tokenizer", str(Path(rolled_out.parents[2]) / "runs/ppo/model")])
    assert [line["rescored"] for line in read("out.jsonl")] == [3.0 + line["length"] for line in read("out.jsonl")]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"response": 3}, "log.jsonl, line 2: `response` is 3"),
        ({"tokens": []}, "log.jsonl, line 2: `tokens` must be at least one token id"),
        ({"tokens": [1.5]}, "log.jsonl, line 2: `tokens` must be at least one token id"),
        ({"ended": 1}, "log.jsonl, line 2: `ended` is 1"),
        ({"raw_score": True}, "log.jsonl, line 2: `raw_score` is True"),
        ({"raw_score": None}, "log.jsonl, line 2: `raw_score` is None"),
        ({"prompt": {}}, "log.jsonl, line 2: `prompt` is {}"),
    ],
)
def test_bad_line_is_named(log, changes, says):
    with pytest.raises(ValueError, match=says.replace("{", r"\{")):
        main(["rescore", log(1, **changes), f"--reward={__name__}.words", "--output=out.jsonl"])
    assert not list(Path().glob("out*"))


def test_broken_and_empty_logs_are_refused(log):
    path = Path(log())
    path.write_text(path.read_text() + '{"iteration": 1, "pro', encoding="utf-8")
    with pytest.raises(ValueError, match="log.jsonl, line 6: .*broken JSON"):
        main(["rescore", str(path), f"--reward={__name__}.words", "--output=out.jsonl"])
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="log.jsonl holds no response"):
        main(["rescore", str(path), f"--reward={__name__}.words", "--output=out.jsonl"])


def test_remote_code_is_turned_on_by_its_own_flag_alone(log, capsys):
    inline = json.dumps({"class_path": f"{__name__}.Remote", "init_args": {"trust_remote_code": True}})
    with pytest.raises(SystemExit) as stopped:
        main(["rescore", log(), f"--reward={inline}", "--output=out.jsonl"])
    assert stopped.value.code == 2
    assert "on the command line, --reward.trust_remote_code=true" in capsys.readouterr().err
    main(["rescore", log(), f"--reward={__name__}.Remote", "--reward.trust_remote_code=true", "--output=out.jsonl"])
    assert read("out.jsonl")[1]["rescored"] == 5.0


class Remote(Words):
    def __init__(self, trust_remote_code: bool = False) -> None:
        super().__init__(2.0 if trust_remote_code else 1.0)


def test_log_is_read_as_it_is_scored(log, monkeypatch):
    """No more than a batch is in memory: the first is scored before the second is read."""
    seen: list[str] = []
    real = rescore.stream_records

    def watched(path):
        for record in real(path):
            seen.append("read")
            yield record

    def scored(prompts, responses):
        seen.append(f"score {len(responses)}")
        return [0.0] * len(responses)

    monkeypatch.setattr(rescore, "stream_records", watched)
    monkeypatch.setattr(rescore, "as_reward", lambda _: FunctionReward(scored))
    main(["rescore", log(), f"--reward={__name__}.words", "--output=out.jsonl", "--batch_size=2"])
    grouped = [(name, len(list(group))) for name, group in itertools.groupby(seen)]
    assert grouped == [("read", 2), ("score 2", 1), ("read", 2), ("score 2", 1), ("read", 1), ("score 1", 1)]


def test_scores_that_never_vary_have_no_correlation(log, monkeypatch, capsys):
    monkeypatch.setattr(rescore, "as_reward", lambda _: FunctionReward(lambda prompts, responses: [1e9] * len(prompts)))
    main(["rescore", log(), f"--reward={__name__}.words", "--output=out.jsonl"])
    report = capsys.readouterr().out
    assert "Pearson correlation  nan" in report
    assert "rank agreement       nan of 0 pairs" in report
