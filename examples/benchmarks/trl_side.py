"""TRL's side: the same step by `RLOOTrainer`, its defaults but gradient checkpointing. One process."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from models import Ending, held, prompts_of, tokenizer_of, vader, waiter
from transformers import TrainerCallback
from trl import RLOOConfig, RLOOTrainer
from turns import Turns
from work import Work


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return vader(prompts, completions)


class TimedTrainer(RLOOTrainer):
    """Times the phases that are methods of the trainer; the rest of a step is its update."""

    def __init__(self, *args: Any, wait: Callable[[], None], **kwargs: Any) -> None:
        self.wait = wait
        self.seconds: defaultdict[str, float] = defaultdict(float)
        super().__init__(*args, **kwargs)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] += time.perf_counter() - start

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.phase("generate"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self.phase("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with self.phase("reference" if model is self.ref_model else "old_logprobs"):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)


class Baton(TrainerCallback):
    """A turn is what lies between the starts of two steps."""

    def __init__(self, work: Work) -> None:
        self.work, self.turns, self.logged, self.trainer = work, Turns(waiter(work.device)), {}, None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._next()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "reward" in logs:
            self.logged = logs

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._next()

    def _next(self) -> None:
        found = dict(self.trainer.seconds) | held(self.work.device)
        if self.logged:
            produced = self.logged["completions/mean_length"] * self.work.responses
            found |= {"score": self.logged["reward"], "tokens": produced}
        self.turns.next(found)
        self.trainer.seconds.clear()


def main(work: Work) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = RLOOConfig(
            output_dir=folder,
            use_cpu=work.device == "cpu",
            bf16=work.precision == "bf16-mixed",
            gradient_checkpointing=False,
            per_device_train_batch_size=work.responses,
            num_generations=work.samples,
            max_completion_length=work.tokens,
            beta=work.beta,
            learning_rate=work.lr,
            lr_scheduler_type="constant",
            max_steps=work.steps,
            seed=work.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        )
        baton = Baton(work)
        trainer = TimedTrainer(
            model=work.folder,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts_of(work)]),
            processing_class=tokenizer_of(work),
            callbacks=[baton],
            wait=waiter(work.device),
        )
        baton.trainer = trainer
        Ending.put_on(trainer.model, work.end)
        trainer.train()


if __name__ == "__main__":
    main(Work(**json.loads(sys.argv[1])))
