"""All three stages on real rankings; then whose answers the reward model tells apart, and what PPO gained by it."""

import json
import sys
from pathlib import Path
from statistics import covariance, mean, stdev, variance

from lightning_rlhf.cli import main

HERE, RUN, (DATA, MODEL, *FLAGS) = Path(__file__).parent, Path("runs/rankings"), sys.argv[1:]
PPO = [f"--model.reference.path={RUN}/sft/model", f"--model.reward.path={RUN}/reward/model"]
PPO += ["--model.updates.minibatch=8", "--model.generation.max_new_tokens=96"]
PPO += ["--model.algorithm.advantage.baseline=BatchMean"]


def run(command, stage, *flags, **files):
    configs = [f"--config={HERE.parents[1] / 'configs' / stage}.yaml", f"--config={HERE / 'rankings.yaml'}"]
    data = (f"--data.{name}={DATA}/{file}.jsonl" for name, file in files.items())
    return main([command, *configs, f"--run={RUN}/{stage}", *data, *flags, *FLAGS]).trainer.callback_metrics


def answers(policy):
    flags = [f"--model.policy.path={RUN}/{policy}/model", f"--predictions.path={RUN}/{policy}.jsonl"]
    run("predict", "ppo", *PPO, *flags, "--model.algorithm.shaping=[]", predict="prompts_val")
    return [json.loads(line) for line in (RUN / f"{policy}.jsonl").open(encoding="utf-8")]


run("fit", "sft", f"--model.model.path={MODEL}", "--data.max_tokens=160", train="demonstrations_train")
files = {"train": "rankings_train", "val": "rankings_val", "demonstrations": "demonstrations_val"}
found = run("fit", "reward", f"--model.model.path={RUN}/sft/model", "--data.max_tokens=160", **files)
rows = [(k, found[k], found[w]) for k in found if k != (w := k.replace("accuracy", "longer_wins", 1)) and w in found]
run("fit", "ppo", *PPO, f"--model.policy.path={RUN}/sft/model", train="prompts_train")
before, after = answers("sft"), answers("ppo")
rows += [(k, mean(row[k] for row in after), mean(row[k] for row in before)) for k in ("score", "kl", "length", "ended")]
gain, longer = ([b[k] - a[k] for a, b in zip(before, after, strict=True)] for k in ("score", "length"))
error, with_length = stdev(gain) / len(gain) ** 0.5, covariance(gain, longer) / (variance(longer) or 1) * mean(longer)
rows += [("gain and its standard error", mean(gain), error), ("gain that goes with length", with_length)]
lines = ["measure,model or PPO,longer wins or SFT", *(",".join([k, *map("{:.3f}".format, x)]) for k, *x in rows)]
(RUN / "report.csv").write_text("\n".join(lines), "utf-8")
print(*lines, sep="\n")
