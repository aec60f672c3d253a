"""InstructGPT's three stages on a real model, on two CPU cores, without a download from a model hub.

SmolLM2-135M-Instruct comes from a PyPI package, the labeler is VADER, the data stands beside this file. Each stage is
the command line's own: this script only prepares data, samples the responses that are ranked, and measures.

    python examples/quickstart/run.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ingredients import prepare, rank, read_jsonl, smollm2, write_jsonl
from report import report

from lightning_rlhf.cli import main as lightning_rlhf

HERE, RUN = Path(__file__).parent, Path("runs/quickstart")
CONFIGS = HERE.parent.parent / "configs"
SEED, HELD_OUT, LENGTH = 0, 96, 40
RANKED, COMPARED, K, BATCH = 160, 32, 4, 32  # prompts ranked, of those held out, responses each, prompts at a time


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"\n=== {name} ===", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    print(f"{name}: {seconds[name]:.0f} s", flush=True)


def fit(config: str, overlay: str, *flags: str) -> None:
    lightning_rlhf(["fit", "--config", str(CONFIGS / config), "--config", str(HERE / overlay), *flags])


def sample_comparisons() -> None:
    """K responses of the SFT model to each of the first prompts, ranked by the labeler."""
    from lightning_rlhf import ModelSource, PromptDataModule, SamplingParams
    from lightning_rlhf.engines import row_uniforms, sample
    from lightning_rlhf.models import PolicyModel
    from lightning_rlhf.types import PromptBatch

    source = ModelSource(path=str(RUN / "sft/model"), attention="eager")
    policy = PolicyModel(source.causal_lm(), source.tokenizer())
    params = SamplingParams(max_new_tokens=LENGTH, temperature=0.7, dtype="bfloat16")
    prompts = str(RUN / "data/prompts_train.jsonl")
    data = PromptDataModule(predict=prompts, eval_batch_size=BATCH, tokenizer=policy.tokenizer)
    data.setup("predict")
    rows: list[dict] = []
    for step, batch in zip(range(RANKED // BATCH), data.predict_dataloader(), strict=False):
        repeated = PromptBatch(*(field.repeat_interleave(K, 0) for field in batch[:3]), rows=[])
        uniforms = row_uniforms(seed=SEED, stream="comparisons", iteration=step, rows=range(BATCH * K), length=LENGTH)
        drawn = sample(policy, repeated, uniforms, params)
        kept = [tokens[mask] for tokens, mask in zip(drawn.tokens, drawn.response_mask, strict=True)]
        texts = policy.tokenizer.batch_decode(kept, skip_special_tokens=True)
        rows += rank([row["prompt"] for row in batch.rows], [texts[i : i + K] for i in range(0, len(texts), K)])
        print(f"sampled {len(rows) * K} of {RANKED * K} responses", flush=True)
    write_jsonl(RUN / "data/comparisons_val.jsonl", rows[:COMPARED])
    write_jsonl(RUN / "data/comparisons_train.jsonl", rows[COMPARED:])


def measure(name: str, policy: str) -> dict:
    """Responses to the held-out prompts, and the held-out pretraining loss."""
    common = [f"--config={CONFIGS / 'ppo_ptx.yaml'}", f"--config={HERE / 'ppo.yaml'}", "--trainer.logger=false"]
    common += [f"--model.policy.path={RUN / policy / 'model'}"]
    responses = RUN / f"responses_{name}.jsonl"
    lightning_rlhf(["predict", *common, f"--predictions.path={responses}"])
    cli = lightning_rlhf(["validate", *common, "--data.val=null", "--trainer.limit_val_batches=1.0"])
    return {"responses": read_jsonl(responses), "ptx_loss": float(cli.trainer.callback_metrics["eval/ptx_loss"])}


def main() -> None:
    seconds: dict[str, float] = {}
    until_reward_model(seconds)
    with stage("before", seconds):
        before = measure("before", "sft")
    with stage("PPO-ptx", seconds):
        fit("ppo_ptx.yaml", "ppo.yaml")
    with stage("after", seconds):
        after = measure("after", "ppo")
    report(RUN, before, after, seconds)


def until_reward_model(seconds: dict[str, float]) -> None:
    """Data, SFT and reward model: what the RL stage starts from."""
    gguf = smollm2()
    with stage("data", seconds):
        prepare(RUN / "data", seed=SEED, held_out=HELD_OUT)
    with stage("SFT", seconds):
        fit("sft.yaml", "sft.yaml", f"--model.model.path={gguf.parent}", f"--model.model.gguf_file={gguf.name}")
    with stage("comparisons", seconds):
        sample_comparisons()
    with stage("reward model", seconds):
        fit("reward.yaml", "reward.yaml")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
