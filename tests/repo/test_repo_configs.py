"""Each file in `configs/` parses, survives `--print_config`, and runs."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import set_parsing_settings
from stopped import shown

from lightning_rlhf import core
from lightning_rlhf.cli import main
from lightning_rlhf.cli.parser import Parser
from lightning_rlhf.core import (
    DAPO,
    GRPO,
    GSPO,
    LUSPO,
    RLOO,
    TLDR,
    AdaptiveKL,
    Algorithm,
    CISPOMethod,
    DrGRPO,
    InstructGPT,
    KLPen,
    MaskTruncated,
    OffPolicyMask,
    ReinforcePP,
    SAPOMethod,
    SeqMeanTokenSum,
    TopEntropy,
    VESPOMethod,
)

CONFIGS = Path(__file__).parents[2] / "configs"
EVALUATE = CONFIGS / "evaluate.yaml"
"""Trains nothing."""
LAYER = CONFIGS / "qlora.yaml"
"""Goes behind a stage; `test_repo_examples.py` runs it."""
STAGES = sorted(set(CONFIGS.glob("*.yaml")) - {EVALUATE, LAYER})
WITHOUT_RL = {"sft", "reward", "dpo", "kto"}
STRATEGIES = sorted((CONFIGS / "strategy").glob("*.yaml"))

PAPERS: dict[str, dict[str, Any]] = {
    "instructgpt": {  # Ouyang et al. 2022, C.3, C.4
        "model.algorithm.beta": 0.02,
        "model.generation.temperature": 1.0,
        "model.updates.epochs": 1,
        "model.updates.minibatch": 64,
        "model.algorithm.surrogate.epsilon": 0.2,
        "model.algorithm.advantage.estimator.gamma": 1.0,
        "model.value_lr": 9e-6,
        "model.algorithm.ptx_coef": 27.8,
        "model.optimizer.betas": [0.9, 0.95],
        "model.schedule.warmup": 10,
        "model.schedule.warmup_start": 0.1,
        "data.batch_size": 512,
        "data.max_prompt_tokens": 1024,
        "data.pretrain_ratio": 8.0,
    },
    "tldr": {  # Huang et al. 2024, details 20-25
        "model.algorithm.beta": 0.05,
        "model.generation.temperature": 0.7,
        "model.generation.max_new_tokens": 53,
        "model.updates.epochs": 4,
        "model.updates.minibatch": None,
        "model.algorithm.surrogate.epsilon": 0.2,
        "model.algorithm.advantage.estimator.lam": 0.95,
        "model.algorithm.value_loss.epsilon": 0.2,
        "model.algorithm.value_loss.coef": 0.1,
        "model.optimizer.lr": 3e-6,
        "model.optimizer.eps": 1e-5,
        "model.schedule": "LinearSchedule",
        "data.batch_size": 512,
    },
    "rloo": {
        "model.algorithm.beta": 0.03,
        "model.generation.samples_per_prompt": 4,
        "model.updates.epochs": 1,
    },  # 2402.14740
    "grpo": {  # 2402.03300, §4.1; 16 prompts times 64 are a batch of 1,024
        "model.algorithm.beta": 0.04,
        "model.algorithm.kl_term.estimator": "K3",
        "model.generation.samples_per_prompt": 64,
        "model.updates.epochs": 1,
        "model.updates.minibatch": None,
        "model.optimizer.lr": 1e-6,
        "data.batch_size": 1024 // 64,
    },
    "dr_grpo": {  # 2503.20783, and the authors' scripts
        "model.algorithm.beta": 0.0,
        "model.generation.samples_per_prompt": 8,
        "model.generation.max_new_tokens": 3000,
        "model.algorithm.reduction.length": 3000,
        "model.algorithm.surrogate.epsilon": 0.2,
        "model.updates.minibatch": 128,
        "data.batch_size": 128,
    },
    "dapo": {  # 2503.14476, §4.1
        "model.algorithm.beta": 0.0,
        "model.generation.samples_per_prompt": 16,
        "model.generation.max_new_tokens": 16_384 + 4_096,
        "model.algorithm.surrogate.epsilon": 0.2,
        "model.algorithm.surrogate.epsilon_high": 0.28,
        "model.updates.minibatch": 512,
        "model.optimizer.lr": 1e-6,
        "model.schedule.warmup": 20,
        "data.batch_size": 512,
    },
    "gspo": {  # 2507.18071, §5.1; 128 prompts times 8 in 4 minibatches
        "model.algorithm.beta": 0.0,
        "model.algorithm.surrogate.epsilon": 3e-4,
        "model.algorithm.surrogate.epsilon_high": 4e-4,
        "model.updates.minibatch": 128 * 8 // 4,
        "model.generation.samples_per_prompt": 8,
        "data.batch_size": 128,
    },
    "dpo": {  # 2305.18290, B
        "model.loss.beta": 0.1,
        "model.optimizer.lr": 1e-6,
        "model.optimizer": "RMSprop",
        "model.schedule.warmup": 150,
        "model.schedule.warmup_start": 0.0,
        "data.batch_size": 64,
    },
    "kto": {"model.loss.beta": 0.1, "model.loss.desirable": 1.0, "model.loss.undesirable": 1.0},  # 2402.01306
    "reinforce_pp": {  # 2501.03262
        "model.algorithm.beta": 0.001,
        "model.algorithm.surrogate.epsilon": 0.2,
        "model.algorithm.advantage.estimator.gamma": 1.0,
        "model.generation.samples_per_prompt": 1,
    },
}
"""What the papers print, by preset."""


def named(path: Path) -> str:
    return path.stem


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "fit") -> str:
    return shown(capsys, command, *arguments, "--print_config")


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_there_are_configs_to_test() -> None:
    stages = {"sft", "reward", "ppo", "ppo_ptx", "bandit_klpen"}
    assert stages | PAPERS.keys() <= {path.stem for path in STAGES}
    assert {"ddp", "fsdp", "fsdp2", "deepspeed", "deepspeed3"} <= {path.stem for path in STRATEGIES}


@pytest.mark.parametrize("config", STAGES, ids=named)
def test_stage_says_what_it_reproduces_departs_from_and_how_to_run_it(config: Path) -> None:
    opening = header(config)
    for word in ("Reproduces", "Departs", f"Run: lightning-rlhf fit --config {config.stem} "):
        assert word in opening


def inside(written: Any) -> Any:
    """A class's arguments, or what stands there."""
    return written.get("init_args", written) if isinstance(written, dict) else written


def of_class(written: Any) -> str:
    """A class as the README writes it: its name, with the classes inside it."""
    if not isinstance(written, dict):
        return str(written).rsplit(".", 1)[-1]
    inner = [x for x in written.get("init_args", {}).values() if isinstance(x, dict | str)]
    return of_class(written["class_path"]) + (f"({', '.join(map(of_class, inner))})" if inner else "")


@pytest.mark.parametrize("preset", PAPERS)
def test_preset_has_the_numbers_of_its_paper(preset: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text(encoding="utf-8"))
    for name, number in PAPERS[preset].items():
        found = config
        for key in name.split("."):
            found = inside(found)[key]
        assert number in (found, of_class(found)), name


def published_methods() -> dict[str, list[str]]:
    """The rows of the table of methods that name a config, by that name."""
    text = (CONFIGS.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    text = text[text.index("## Every method") : text.index("## Where to start from")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {name: row for row in rows if len(row) == 7 for name in re.findall(r"`(\w+)`", row[6])}


def test_table_lists_every_preset() -> None:
    assert published_methods().keys() == {path.stem for path in STAGES} - WITHOUT_RL


def test_every_method_has_its_paper_proof_and_parity() -> None:
    """Each file of a proof is there, and holds the method or one of its parts."""
    text = (CONFIGS.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line[:1] == "|" and "test_" in line]
    named = {name for row in rows for name in re.findall(r"`(\w+)", row[0])}
    methods = {name for name, kind in vars(core).items() if isinstance(kind, type) and issubclass(kind, Algorithm)}
    assert methods - {"Algorithm"} <= named
    masks = {name for name, kind in vars(core).items() if isinstance(kind, type) and issubclass(kind, core.LossMask)}
    assert masks - {"LossMask"} <= named
    kind = core.DirectPreferenceLoss
    direct = {name for name, found in vars(core).items() if isinstance(found, type) and issubclass(found, kind)}
    assert direct - {"DirectPreferenceLoss", "PairLoss"} <= named
    for row in rows:
        files = re.findall(r"`(\w+/test_\w+\.py)`", "|".join(row[2:]))
        assert files
        for file in files:
            assert (CONFIGS.parent / "tests" / file).is_file(), file


@pytest.mark.parametrize("config", [path for path in STAGES if path.stem not in WITHOUT_RL], ids=named)
def test_table_says_what_the_preset_is_made_of(config: Path) -> None:
    _, *cells, _ = [cell.strip("`") for cell in published_methods()[config.stem]]
    level, advantage, surrogate, reduction, kl = (re.sub(r"`", "", cell) for cell in cells)
    written = inside(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["init_args"]["algorithm"])
    assert level == of_class(written["level"])
    assert advantage == of_class(written["advantage"])
    assert surrogate.split("(")[0] == of_class(written["surrogate"])
    numbers = [float(x) for x in re.findall(r"[\d.]+(?:e-?\d+)?", surrogate.partition("(")[2])]
    assert set(numbers) <= set(inside(written["surrogate"]).values() if numbers else [])
    assert reduction == of_class(written.get("reduction", "TokenMean"))
    term = of_class(written.get("kl_term", "KLInReward"))
    expected = "none" if written["beta"] == 0 else term.replace("KLInReward", "in the reward")
    assert kl == expected


def algorithm_of(*arguments: str) -> Algorithm:
    """What the command line makes of these arguments; saved and read again it is the same."""
    set_parsing_settings(subclasses_enabled=[Algorithm])
    parser = Parser(exit_on_error=False)
    parser.add_argument("--algorithm", type=Algorithm | None)
    parsed = parser.parse_args([*arguments])
    algorithm = parser.instantiate(parsed).algorithm
    assert parser.instantiate(parser.parse_string(parser.dump(parsed))).algorithm == algorithm
    return algorithm


METHODS = (
    Algorithm,
    InstructGPT,
    TLDR,
    RLOO,
    ReinforcePP,
    GRPO,
    DrGRPO,
    DAPO,
    GSPO,
    CISPOMethod,
    LUSPO,
    SAPOMethod,
    VESPOMethod,
)


@pytest.mark.parametrize("method", METHODS)
def test_method_by_name_has_its_own_defaults(method: type[Algorithm]) -> None:
    """jsonargparse could as well take those of `Algorithm`, or of each part's class."""
    assert algorithm_of(f"--algorithm={method.__name__}") == method()
    wider = algorithm_of(
        f"--algorithm={method.__name__}", "--algorithm.beta=0.5", "--algorithm.reduction=SeqMeanTokenSum"
    )
    assert wider == method(beta=0.5, reduction=SeqMeanTokenSum())


def test_part_alone_changes_the_bandit() -> None:
    assert algorithm_of("--algorithm.surrogate=KLPen") == Algorithm(surrogate=KLPen())
    adaptive = algorithm_of("--algorithm.beta=AdaptiveKL", "--algorithm.beta.target=3")
    assert adaptive == Algorithm(beta=AdaptiveKL(target=3.0))


def test_masks_are_named_like_other_parts() -> None:
    assert algorithm_of("--algorithm=GRPO", "--algorithm.masks=MaskTruncated") == GRPO(masks=MaskTruncated())
    named = ["--algorithm=GRPO", "--algorithm.masks=OffPolicyMask", "--algorithm.masks.threshold=0.5"]
    assert algorithm_of(*named) == GRPO(masks=OffPolicyMask(threshold=0.5))
    several = '[{"class_path": "TopEntropy", "init_args": {"share": 0.3}}, {"class_path": "MaskTruncated"}]'
    found = algorithm_of("--algorithm=GRPO", f"--algorithm.masks={several}")
    assert found == GRPO(masks=(TopEntropy(share=0.3), MaskTruncated()))


@pytest.mark.parametrize("preset", sorted(PAPERS.keys() - WITHOUT_RL))
def test_preset_is_the_method_of_its_name(preset: str) -> None:
    """Its numbers are the class's defaults, so that Python and YAML mean one thing by a method's name."""
    written = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    configured = algorithm_of(f"--algorithm={json.dumps(written['algorithm'])}")
    run = {"learned_reward": True, "max_new_tokens": written["generation"]["max_new_tokens"]}
    assert configured.for_run(**run) == type(configured)().for_run(**run)


@pytest.mark.parametrize("config", STRATEGIES, ids=named)
def test_strategy_gives_a_command(config: Path) -> None:
    assert re.search(rf"lightning-rlhf fit --config (sft|ppo) --config strategy/{config.stem} ", header(config))


@pytest.mark.parametrize("config", STAGES, ids=named)
def test_stage_keeps_its_values_and_survives_print_config(
    config: Path, tiny: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands in the file is what runs: no value of it is lost under the required arguments."""
    given = [f"--{name}={value}" for name, value in tiny.required(config).items()]
    first = printed(capsys, "--config", str(config), *given)
    assert not list(lost(yaml.safe_load(config.read_text(encoding="utf-8")), yaml.safe_load(first)))
    Path("printed.yaml").write_text(first, encoding="utf-8")
    assert printed(capsys, "--config", "printed.yaml") == first


def lost(written: Any, result: Any, path: str = "") -> Any:
    """Places at which `result` has not what was written; a class may be named by its last word alone."""
    if isinstance(written, dict) and isinstance(result, dict):
        result = result if "class_path" in written else inside(result)
        for name, value in written.items():
            yield from lost(value, result.get(name), f"{path}.{name}")
    elif isinstance(written, list) and isinstance(result, list) and len(written) == len(result):
        for i, (one, other) in enumerate(zip(written, result, strict=True)):
            yield from lost(one, other, f"{path}[{i}]")
    else:
        name = result["class_path"] if isinstance(result, dict) and "class_path" in result else result
        if name != written and str(name).rsplit(".", 1)[-1] != written:
            yield f"{path}: {written!r} became {result!r}"


@pytest.mark.parametrize("config", STAGES, ids=named)
def test_stage_runs_two_steps_and_exports(config: Path, tiny: Any, workplace: Path) -> None:
    main(["fit", *tiny.arguments(config)])
    (metrics,) = Path("runs").rglob("metrics.csv")
    with metrics.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert not [value for row in rows for value in row.values() if "nan" in value]
    assert list(Path("runs").rglob("model/model.safetensors"))


def measured() -> dict[str, float]:
    """The one line of numbers that the command in the working directory wrote."""
    (metrics,) = Path("runs/evaluate").rglob("metrics.csv")
    with metrics.open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    return {name: float(value) for name, value in row.items() if value}


def test_evaluation_says_what_it_reproduces_and_keeps_its_values(tiny: Any, workplace: Path, capsys: Any) -> None:
    for word in ("Reproduces", "Departs", "Run: lightning-rlhf validate --config evaluate "):
        assert word in header(EVALUATE)
    first = printed(capsys, *tiny.evaluation(), command="validate")
    written = yaml.safe_load(EVALUATE.read_text(encoding="utf-8"))
    written["trainer"]["precision"] = "32-true"  # as `tiny` asks
    written["data"]["init_args"].pop("batch_size")
    written["model"]["init_args"]["generation"].pop("max_new_tokens")
    assert not list(lost(written, yaml.safe_load(first)))


@pytest.mark.parametrize(("command", "stage"), [("validate", "eval"), ("test", "test")])
def test_evaluation_of_a_folder_against_itself(command: str, stage: str, tiny: Any, workplace: Path) -> None:
    """There is no KL and no tax."""
    main([command, *tiny.evaluation(command)])
    found = measured()
    assert not [name for name, value in found.items() if value != value]
    expected = {"win_rate", "win_rate_length_controlled", "best_of_16/kl", "best_of_n/lead", "ptx_loss_reference"}
    assert {f"{stage}/{name}" for name in expected} <= found.keys()
    assert found[f"{stage}/kl"] == pytest.approx(0.0, abs=1e-5)  # float32
    assert found[f"{stage}/alignment_tax"] == 0.0
    assert found[f"{stage}/best_of_16/reward"] > found[f"{stage}/best_of_1/reward"]


def test_evaluation_of_a_checkpoint(
    ppo: Callable[..., list[str]], tiny: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's weights are the checkpoint's, the reference is the folder; a judge is named by a dotted path."""
    main(["fit", *ppo(model__optimizer__lr=0.05, model__schedule__warmup=0)])
    monkeypatch.syspath_prepend(workplace)
    Path("preferring.py").write_text("def longer(prompts, first, second):\n    return [0.25] * len(first)\n")
    gold = {"class_path": "LearnedReward", "init_args": {"path": tiny.reward}}
    evaluations = [
        {"class_path": "WinRate", "init_args": {"judge": "preferring.longer", "name": "judge"}},
        {"class_path": "GoldReward", "init_args": {"reward": gold}},
        {"class_path": "AlignmentTax"},
    ]
    checkpoint = ["--ckpt_path", "runs/ppo/checkpoints/last.ckpt"]
    changes = ["--model.algorithm.shaping=[]", f"--model.evaluations={json.dumps(evaluations)}"]
    main(["validate", *tiny.evaluation(), *checkpoint, *changes])
    found = measured()
    assert (found["eval/judge"], found["eval/judge_first"]) == (0.5, 0.25)
    assert abs(found["eval/alignment_tax"]) > 1e-4
    assert found["eval/gold/correlation"] == pytest.approx(1.0)  # it is the reward itself


@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
def test_strategy_lies_over_a_stage(strategy: Path, tiny: Any, workplace: Path, capsys: Any) -> None:
    text = printed(capsys, *tiny.arguments(CONFIGS / "sft.yaml"), "--config", str(strategy))
    written = yaml.safe_load(strategy.read_text(encoding="utf-8"))
    assert not list(lost(written, yaml.safe_load(text)))
    Path("printed.yaml").write_text(text, encoding="utf-8")
    assert printed(capsys, "--config", "printed.yaml") == text


@pytest.mark.slow
def test_ddp_runs_on_two_processes(ppo: Callable[..., list[str]], forking_python: str, workplace: Path) -> None:
    arguments = [*ppo(data__batch_size=2), "--config", str(CONFIGS / "strategy" / "ddp.yaml"), "--trainer.devices=2"]
    command = [forking_python, "-m", "lightning_rlhf", "fit", *arguments]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with Path("runs/ppo/version_0/metrics.csv").open(encoding="utf-8") as file:
        episodes = [float(row["episode"]) for row in csv.DictReader(file) if row["episode"]]
    assert episodes == [4, 8]  # two rollouts of 2 prompts on each of 2 processes


@pytest.mark.parametrize("method", [GRPO, GSPO, ReinforcePP, Algorithm])
def test_method_named_beside_a_config_is_the_method(
    method: type[Algorithm], ppo: Callable[..., list[str]], workplace: Path, capsys: Any
) -> None:
    """The parts that the config's own algorithm lists do not stay under the other name."""
    words = [*ppo(model__algorithm__beta=None), f"--model.algorithm={method.__name__}", "--model.algorithm.beta=0.5"]
    written = yaml.safe_load(printed(capsys, *words))["model"]["init_args"]["algorithm"]
    assert algorithm_of(f"--algorithm={json.dumps(written)}") == method(beta=0.5)


@pytest.mark.parametrize("written", ["GSPO", {"class_path": "lightning_rlhf.GSPO", "init_args": {"beta": 0.5}}])
def test_method_named_by_a_later_config_is_the_method(
    written: Any, ppo: Callable[..., list[str]], workplace: Path, capsys: Any
) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"algorithm": written}}}), encoding="utf-8")
    parsed = yaml.safe_load(printed(capsys, *ppo(), "--config", "mine.yaml"))["model"]["init_args"]["algorithm"]
    expected = GSPO(beta=0.5) if isinstance(written, dict) else GSPO()
    assert algorithm_of(f"--algorithm={json.dumps(parsed)}") == expected


def test_later_config_that_names_no_method_changes_a_part(
    ppo: Callable[..., list[str]], workplace: Path, capsys: Any
) -> None:
    part = {"model": {"init_args": {"algorithm": {"init_args": {"beta": 0.5}}}}}
    Path("mine.yaml").write_text(yaml.safe_dump(part), encoding="utf-8")
    parsed = yaml.safe_load(printed(capsys, *ppo(), "--config", "mine.yaml"))["model"]["init_args"]["algorithm"]
    changed = algorithm_of(f"--algorithm={json.dumps(parsed)}")
    assert (type(changed), changed.beta, changed.shaping[0].value) == (Algorithm, 0.5, -1.0)
