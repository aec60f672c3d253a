"""Overlap of depth one: the next rollout is drawn during the update, by the weights from before it.

An engine in the process plays the server. It equals, to the bit, a serial program whose weights lag by one version.
"""

from __future__ import annotations

import copy
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from lightning_rlhf import PPOModule, PromptDataModule, UpdateSchedule
from lightning_rlhf.core import GAE, Algorithm, Clip, NoCorrection, TokenLevel
from lightning_rlhf.engines import EngineError, LocalEngine, Request, Sampled, SamplingParams
from lightning_rlhf.models import ModelSource, PolicyModel
from lightning_rlhf.rollout import RecomputedLogprobs, SamplerLogprobs
from lightning_rlhf.rollout.ahead import Ahead, keys_of

PLAIN = Algorithm(surrogate=NoCorrection(surrogate=Clip()))
ROWS = [{"prompt": " ".join(word)} for word in ("abc", "d", "ef", "ghij", "kl", "mno", "p", "qrs", "tu", "v")]


class Copied(LocalEngine):
    """Draws from a copy of the weights that were loaded, as a server does."""

    is_external = True
    overlaps = False

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.pause = pause
        self.drawn: list[tuple[int, bool]] = []
        self.running = False

    def load(self, policy: PolicyModel, version: int) -> None:
        assert not self.running, "weights change under a rollout"
        super().load(copy.deepcopy(policy).eval(), version)

    def generate(self, request: Request) -> Sampled:
        self.running = True
        time.sleep(self.pause)
        sampled = super().generate(request)
        self.running = False
        self.drawn.append((self.version, threading.current_thread() is threading.main_thread()))
        return sampled


class Overlapping(Copied):
    overlaps = True


class Lagging(LocalEngine):
    """The serial program: rollout n by the weights of rollout n − 1."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, PolicyModel] = {}

    def load(self, policy: PolicyModel, version: int) -> None:
        self.copies[version] = copy.deepcopy(policy).eval()
        super().load(self.copies.get(version - 1, self.copies[version]), version)


@pytest.fixture
def source(make_folder):
    return make_folder("llama")


@pytest.fixture
def make_run(source, token_reward, make_trainer, recorder, write_rows, toy_tokenizer):
    path = write_rows("prompts.jsonl", ROWS)

    def run(engine, *, callbacks=(), ckpt=None, val=False, module=None, **options):
        trainer_options = {name: options.pop(name) for name in ("max_epochs", "max_steps") if name in options}
        torch.manual_seed(0)
        usual = {"generation": SamplingParams(max_new_tokens=6, samples_per_prompt=2, seed=3), "lr": 0.02}
        module = PPOModule(ModelSource(path=source), token_reward(), engine=engine, **(usual | options))
        recorder.steps.clear()
        data = PromptDataModule(train=path, val=path if val else None, batch_size=3, tokenizer=toy_tokenizer, seed=1)
        trainer = make_trainer(
            **({"max_epochs": 2, "precision": "32-true"} | trainer_options), callbacks=[recorder, *callbacks]
        )
        trainer.fit(module, data, ckpt_path=ckpt)
        weights = torch.cat([weight.detach().flatten() for weight in module.policy.parameters()])
        return SimpleNamespace(weights=weights, steps=list(recorder.steps), module=module, trainer=trainer)

    return run


def logged(steps):
    """What depends on the tokens and the weights: not how the sampler is named."""
    return [{name: number for name, number in step.items() if not name.startswith("policy/sampler")} for step in steps]


OPTIONS = [
    {},
    {"updates": UpdateSchedule(epochs=2, minibatch=2)},
    {"algorithm": Algorithm(level=TokenLevel(), advantage=GAE()), "updates": UpdateSchedule(microbatch=2)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["bandit", "epochs", "tokens"])
def test_depth_one_is_the_serial_program_that_lags_by_one_version(make_run, options):
    updates = options.get("updates", UpdateSchedule())
    serial = make_run(
        Lagging(), **options | {"updates": UpdateSchedule(**vars(updates) | {"old_logprobs": SamplerLogprobs()})}
    )
    engine = Overlapping(pause=0.02)
    ahead = make_run(engine, **options)
    assert torch.equal(ahead.weights, serial.weights)
    assert logged(ahead.steps) == logged(serial.steps)
    assert len(ahead.steps) == 8
    assert engine.drawn == [(0, True)] + [(version, False) for version in range(7)]


def test_depth_one_differs_from_depth_zero(make_run):
    assert not torch.equal(make_run(Overlapping()).weights, make_run(Copied()).weights)


def test_depth_zero_of_a_copy_is_the_policy_itself(make_run):
    same = {"updates": UpdateSchedule(old_logprobs=RecomputedLogprobs()), "algorithm": PLAIN}
    assert torch.equal(make_run(Copied(), **same).weights, make_run(None, **same).weights)


class Save(Callback):
    """A checkpoint after a step, and a stop there."""

    def __init__(self, path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer, module, *_):
        if module.iteration == self.after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step  # at once


@pytest.mark.parametrize("after", [1, 2, 3, 4, 6])
def test_killed_and_resumed_is_uninterrupted(make_run, tmp_path, after):
    whole = make_run(Overlapping())
    path = tmp_path / "kill.ckpt"
    make_run(Overlapping(pause=0.05), callbacks=[Save(path, after)])
    stored = torch.load(path, weights_only=True)["rlhf"]
    assert stored["iteration"] == after
    assert stored["ahead"]["iteration"] == after
    resumed = make_run(Overlapping(), ckpt=path)
    assert torch.equal(resumed.weights, whole.weights)
    assert len(resumed.steps) == 8 - after
    assert logged(resumed.steps) == logged(whole.steps[after:])


def test_without_what_was_ahead_the_resumed_run_is_another(make_run, tmp_path):
    """The control of the test above: weights of version n draw what those of n − 1 drew."""
    whole = make_run(Overlapping())
    path = tmp_path / "kill.ckpt"
    make_run(Overlapping(), callbacks=[Save(path, 3)])
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["rlhf"]["ahead"] = {}
    torch.save(checkpoint, path)
    assert not torch.equal(make_run(Overlapping(), ckpt=path).weights, whole.weights)


def test_evaluations_see_today_s_weights_and_wait_for_the_flight(make_run, recorder):
    engine = Overlapping(pause=0.05)
    run = make_run(engine, val=True)
    of_evaluations = [version for version, main in engine.drawn if main]
    assert of_evaluations == [0, *[4] * 4, *[8] * 4]  # the first rollout, and four batches an epoch
    assert torch.equal(run.weights, make_run(Overlapping()).weights)


def test_nothing_is_drawn_for_a_step_that_will_not_come(make_run):
    for options in ({"max_epochs": 1}, {"max_epochs": -1, "max_steps": 5}):
        engine = Overlapping()
        run = make_run(engine, **options)
        assert len(engine.drawn) == run.module.iteration


def test_failure_of_what_is_ahead_stops_the_next_step(make_run, tmp_path):
    class Failing(Overlapping):
        def generate(self, request: Request) -> Sampled:
            if self.version == 2:
                raise EngineError("the server is gone")
            return super().generate(request)

    steps = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            steps.append(module.iteration)
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    with pytest.raises(EngineError, match="the server is gone"):
        make_run(Failing(), callbacks=[Count()])
    assert steps == [1, 2, 3]  # the rollout that version 2 should have drawn is the fourth
    assert make_run(Overlapping(), ckpt=tmp_path / "last.ckpt").module.iteration == 8


def test_old_log_probs_of_today_s_weights_are_refused(make_run):
    with pytest.raises(ValueError, match="draws ahead of the update"):
        make_run(Overlapping(), updates=UpdateSchedule(old_logprobs=RecomputedLogprobs()))


# The flight itself


def sampled_of(prompts, samples=2):
    rows = len(prompts.tokens) * samples
    numbers = torch.arange(samples).repeat(len(prompts.tokens))
    tokens = (prompts.tokens[:, -1].repeat_interleave(samples) * 10 + numbers)[:, None]
    mask = torch.ones(rows, 1, dtype=torch.bool)
    zeros = torch.zeros(rows, 1)
    return Sampled(tokens, mask, torch.ones(rows, dtype=torch.bool), zeros, zeros, torch.zeros_like(tokens))


def alone() -> SimpleNamespace:
    return SimpleNamespace(rank=0, world=1, all=lambda decision: decision, gather=lambda rows: rows)


def test_checkpoint_of_one_process_is_dealt_to_two(left_padded):
    prompts = left_padded([[5], [6], [7], [8]])
    one = Ahead(alone())
    one.start(lambda: sampled_of(prompts), prompts, iteration=4)
    state = one.state()
    for rank in (0, 1):
        two = Ahead(SimpleNamespace(rank=rank, world=2))
        two.restore(state)
        mine = left_padded([[5], [7]] if rank == 0 else [[6], [8]])
        taken = two.take(mine, iteration=4)
        assert torch.equal(taken.tokens, sampled_of(mine).tokens)


def test_responses_to_other_prompts_or_of_another_step_are_not_taken(left_padded):
    prompts = left_padded([[5], [6]])
    for other, iteration in ((left_padded([[5], [7]]), 4), (prompts, 5)):
        ahead = Ahead(alone())
        ahead.start(lambda: sampled_of(prompts), prompts, iteration=4)
        assert ahead.take(other, iteration=iteration) is None
        assert ahead.take(prompts, iteration=4) is None  # it is gone


def test_keys_tell_prompts_apart_whatever_their_padding(left_padded):
    prompts = left_padded([[5], [6], [5, 6], [6, 5], [0, 5]])
    assert len(set(keys_of(prompts).tolist())) == 5
    assert torch.equal(keys_of(prompts), keys_of(left_padded([[5], [6], [5, 6], [6, 5], [0, 5]], extra=3, fill=29)))
