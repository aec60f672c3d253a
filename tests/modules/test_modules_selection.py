"""PPOModule that chooses what it learns from: dynamic sampling, its cap and its resume; a curriculum."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from lightning_rlhf import PPOModule, PromptDataModule, SamplingParams, UpdateSchedule
from lightning_rlhf.callbacks import RunCheckpoint
from lightning_rlhf.core import DAPO, ConstantSchedule, Curriculum, DynamicSampling, KLPen, SoftOverlong
from lightning_rlhf.engines import LocalEngine
from lightning_rlhf.rewards import Reward
from lightning_rlhf.rollout.scored import divided, joined
from lightning_rlhf.types import PromptBatch

ENDS = list(range(10))
K = 3
WORDS = ["a b", "c", "d e f", "g", "h i", "j k l m", "n", "o p", "q r s", "t", "u", "v w", "x", "y z", "b a", "e"]


class Chosen(Reward):
    """Responses to some prompts score by their last token, those to the others all the same."""

    def __init__(self, teaching: set[str], same: float = 0.3, fails_at: int | None = None) -> None:
        self.teaching, self.same = teaching, same
        self._fails_at, self._calls = fails_at, 0
        self._seen: list[list[str]] = []
        self._drawn: list[tuple[int, torch.Tensor]] = []

    def __call__(self, rollout, rows):
        self._calls += 1
        if self._calls == self._fails_at:
            raise RuntimeError("the power went out")
        self._seen.append([row["prompt"] for row in rows])
        tokens = rollout.tokens[:, rollout.prompt_width :]
        last = tokens.gather(1, rollout.lengths[:, None] - 1).squeeze(1)
        teaches = torch.tensor([row["prompt"] in self.teaching for row in rows])
        scores = torch.where(teaches, (last % 7).double(), torch.full(last.shape, self.same, dtype=torch.float64))
        self._drawn.append((int(rollout.lengths.sum()), scores))
        return scores


class Rollouts(Callback):
    """Prompts that each step learned from, with its logged numbers."""

    def __init__(self) -> None:
        self.prompts: list[list[str]] = []
        self.steps: list[dict[str, float]] = []
        self.outcomes = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.prompts.append([row["prompt"] for row in pl_module.outcome.rows][::K])
        self.outcomes.append(pl_module.outcome)
        self.steps.append({name: float(x) for name, x in trainer.callback_metrics.items() if "time" not in name})


@pytest.fixture
def make_run(make_lm, make_tokenizer, make_trainer, write_rows):
    """A module that was trained on WORDS, with what it saw."""

    def make(dynamic, *, reward=None, epochs=1, callbacks=(), ckpt_path=None, fit=True, **options):
        algorithm = options.pop("algorithm", None) or DAPO(shaping=(), dynamic_sampling=dynamic)
        torch.manual_seed(0)
        module = PPOModule(
            policy=make_lm(end=ENDS).double(),
            reward=reward or Chosen(set(WORDS[::2])),
            algorithm=algorithm,
            generation=options.pop("generation", SamplingParams(max_new_tokens=5, samples_per_prompt=K)),
            tokenizer=make_tokenizer(),
            optimizer=partial(torch.optim.Adam, lr=0.01),
            schedule=ConstantSchedule(),
            **options,
        )
        data = PromptDataModule(train=write_rows("p.jsonl", [{"prompt": w} for w in WORDS]), batch_size=4, seed=3)
        seen = Rollouts()
        saved = {"enable_checkpointing": bool(callbacks)}
        trainer = make_trainer(max_epochs=epochs, callbacks=[seen, *callbacks], **saved)
        if fit:
            trainer.fit(module, data, ckpt_path=ckpt_path)
        return module, seen, trainer, data

    return make


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


# What is learned from


def test_rollout_holds_only_groups_that_teach(make_run):
    module, seen, _, _ = make_run(DynamicSampling())
    assert len(seen.prompts) == 4
    for prompts, outcome in zip(seen.prompts, seen.outcomes, strict=True):
        assert len(prompts) == 4
        assert set(prompts) <= set(WORDS[::2])
        assert all(group.unique().numel() > 1 for group in outcome.raw_scores.view(4, K))
    drawn = [prompt for call in module.reward._seen for prompt in call[::K]]
    assert set(drawn) - set(WORDS[::2])  # the others were drawn, and left out


def test_without_dynamic_sampling_flat_groups_are_learned_from(make_run):
    _, seen, _, _ = make_run(None)
    assert {prompt for prompts in seen.prompts for prompt in prompts} == set(WORDS)
    assert "filter/pass_rate" not in seen.steps[0]


def test_logged_numbers_are_those_of_everything_drawn(make_run):
    """Counted by the reward, which sees every batch."""
    module, seen, _, _ = make_run(DynamicSampling(batches=3))
    calls = iter(module.reward._drawn)
    for step in seen.steps:
        drawn = [next(calls) for _ in range(int(step["filter/batches"]))]
        assert 1 <= len(drawn) <= 3
        scores = torch.cat([scores for _, scores in drawn]).view(-1, K)
        teaching = sum(len(set(group.tolist())) > 1 for group in scores)
        tokens = sum(count for count, _ in drawn)
        assert step["filter/pass_rate"] == pytest.approx(teaching / len(scores))
        assert step["filter/tokens"] == tokens
        assert step["filter/tokens_per_response"] == pytest.approx(tokens / (min(teaching, 4) * K))
        assert step["filter/raw_scores"] == pytest.approx(float(scores.mean()))
    assert next(calls, None) is None


def test_scores_are_compared_before_shaping(make_run):
    """A penalty on lengths makes equal scores differ; the group teaches nothing all the same."""
    shaped = DAPO(shaping=SoftOverlong(limit=5, buffer=4), dynamic_sampling=DynamicSampling(batches=2))
    _, seen, _, _ = make_run(None, algorithm=shaped, reward=Chosen(set()))
    assert all(step["filter/pass_rate"] == 0 for step in seen.steps)
    assert any(outcome.scores.view(4, K).std(1).any() for outcome in seen.outcomes)


# At the cap


def test_one_batch_with_flat_groups_kept_is_plain_training(make_run):
    plain, seen, _, _ = make_run(None)
    kept, same, _, _ = make_run(DynamicSampling(batches=1, keep_flat=True))
    assert torch.equal(weights(plain), weights(kept))
    assert seen.prompts == same.prompts
    dropped, _, _, _ = make_run(DynamicSampling(batches=1))
    assert not torch.equal(weights(plain), weights(dropped))  # whose denominators are smaller


def test_filtered_batch_has_the_gradient_of_its_kept_groups(make_run):
    """Σ over the rows that count / their number: as if the flat groups had never been drawn."""
    module, _, _, _ = make_run(DynamicSampling(batches=1), fit=False)
    module.configure_model()
    batch = prompt_batch()
    drawn = module.collect(batch)
    experience = module.credit(drawn.rollout, drawn.scores)
    assert 0 < int(drawn.learned.sum()) < len(drawn.learned)
    gradients = []
    for part in (experience.only(drawn.learned), experience.select(drawn.learned.nonzero().squeeze(1)), experience):
        module.zero_grad()
        loss, _ = module.objective.actions(module.algorithm, part)
        (loss / module.objective.counts(module.algorithm, part, None)[0]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.policy.parameters()]))
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-12
    assert float((gradients[0] - gradients[2]).abs().max()) > 1e-4


def prompt_batch() -> PromptBatch:
    tokens = torch.tensor([[10, 11, 12], [13, 14, 15], [16, 17, 18], [19, 20, 21]])
    rows = [{"prompt": word} for word in WORDS[:4]]
    return PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.ones(4, dtype=torch.bool), rows)


def test_nothing_teaches_and_nothing_moves(make_run):
    """Every batch up to the cap, a rollout of its size, no gradient, no NaN."""
    module, seen, _, _ = make_run(DynamicSampling(batches=3), reward=Chosen(set()))
    start, _, _, _ = make_run(DynamicSampling(), fit=False)
    start.configure_model()
    assert torch.equal(weights(module), weights(start))
    for step in seen.steps:
        assert step["filter/batches"] == 3
        assert step["filter/pass_rate"] == 0
        assert all(value == value for value in step.values())


def test_rollouts_that_teach_nothing_leave_an_adaptive_penalty_alone(make_run):
    """A KL of 0 over no action is no sign that the penalty is too high."""
    algorithm = DAPO(shaping=(), surrogate=KLPen(coef=1.0), dynamic_sampling=DynamicSampling(batches=1))
    flat, seen, _, _ = make_run(None, algorithm=algorithm, reward=Chosen(set()))
    assert flat.algorithm.surrogate.coef == 1.0
    assert {step["policy/kl_old"] for step in seen.steps} == {0.0}
    moved, _, _, _ = make_run(None, algorithm=algorithm)
    assert moved.algorithm.surrogate.coef != 1.0


def test_divided_rollout_joins_to_itself(make_run):
    module, _, _, _ = make_run(None, fit=False)
    module.configure_model()
    batch = prompt_batch()
    rollout = module.responder.draw(batch, samples=K, iteration=0, batch=0)
    scores = module.score(rollout, batch)
    groups = divided(batch, rollout, scores, places=range(4))
    prompts, whole, of_all = joined(groups, device=torch.device("cpu"))
    for name in ("attention_mask", "response_mask", "ended", "sampler_logprobs", "entropy", "prompt_index"):
        assert torch.equal(getattr(whole, name), getattr(rollout, name)), name
    assert torch.equal(whole.tokens[whole.attention_mask], rollout.tokens[rollout.attention_mask])
    assert torch.equal(of_all.total, scores.total)
    assert prompts.rows == batch.rows


# Resume


@pytest.mark.parametrize("fails_at", [4, 5, 6, 7])
def test_run_that_dies_while_refilling_goes_on_to_the_bit(make_run, tmp_path, fails_at):
    """In single precision: a float64 run rounds when its weights are read again."""
    dynamic, curriculum = DynamicSampling(batches=6), Curriculum(solved=5.0, rest=2)
    whole, seen, _, _ = make_run(dynamic, epochs=2, curriculum=curriculum)
    assert max(step["filter/batches"] for step in seen.steps) > 1

    def checkpoint():
        return RunCheckpoint(dirpath=str(tmp_path / f"{fails_at}"), every_n_batches=1)

    failing = Chosen(set(WORDS[::2]), fails_at=fails_at)
    with pytest.raises(Exception, match="power"):
        make_run(dynamic, epochs=2, curriculum=curriculum, reward=failing, callbacks=[checkpoint()])
    path = str(next((tmp_path / f"{fails_at}").glob("last*.ckpt")))
    resumed, rest, _, _ = make_run(dynamic, epochs=2, curriculum=curriculum, ckpt_path=path)
    assert rest.prompts == seen.prompts[-len(rest.prompts) :]
    assert torch.equal(weights(whole), weights(resumed))
    assert json.dumps(whole.selection.state(), default=str) == json.dumps(resumed.selection.state(), default=str)


# Curriculum


def test_solved_prompts_leave_and_come_back(make_run):
    """Every response is solved, so that each prompt rests for two rollouts; there are enough others."""
    module, seen, _, _ = make_run(
        None, algorithm=DAPO(shaping=(), dynamic_sampling=None), epochs=3, curriculum=Curriculum(solved=0.0, rest=2)
    )
    last: dict[str, int] = {}
    gaps = []
    for number, prompts in enumerate(seen.prompts):
        assert len(set(prompts)) == 4
        gaps += [number - last[prompt] for prompt in prompts if prompt in last]
        last |= dict.fromkeys(prompts, number)
    assert min(gaps) == 3  # two rollouts without it
    assert set(last) == set(WORDS)
    assert seen.steps[-1]["filter/resting"] == 8
    assert module.selection.state()["taken"] > 0


def test_without_curriculum_prompts_come_as_they_come(make_run):
    _, seen, _, _ = make_run(None, epochs=3)
    last: dict[str, int] = {}
    gaps = []
    for number, prompts in enumerate(seen.prompts):
        gaps += [number - last[prompt] for prompt in prompts if prompt in last]
        last |= dict.fromkeys(prompts, number)
    assert min(gaps) < 3


def test_all_prompts_rest_and_the_rollout_is_whole(make_run):
    _, seen, _, _ = make_run(
        None, algorithm=DAPO(shaping=(), dynamic_sampling=None), epochs=3, curriculum=Curriculum(solved=0.0, rest=50)
    )
    assert [len(prompts) for prompts in seen.prompts] == [4] * 12


# What cannot go together


def test_one_response_to_a_prompt_is_refused(make_run):
    with pytest.raises(ValueError, match="samples_per_prompt"):
        make_run(DynamicSampling(), generation=SamplingParams(samples_per_prompt=1), fit=False)


class Overlapping(LocalEngine):
    overlaps = True


def test_drawing_ahead_is_refused(make_run):
    with pytest.raises(ValueError, match="overlap"):
        make_run(DynamicSampling(), engine=Overlapping(), fit=False)


def test_data_without_further_prompts_are_refused_before_anything_is_drawn(make_run, as_loader):
    module, _, trainer, _ = make_run(DynamicSampling(), fit=False)
    with pytest.raises(ValueError, match="further_prompts"):
        trainer.fit(module, as_loader([{"prompts": prompt_batch()}]))
    assert not module.reward._seen


def test_data_without_further_prompts_serve_one_batch(make_run, as_loader):
    module, seen, trainer, _ = make_run(DynamicSampling(batches=1), fit=False, updates=UpdateSchedule(minibatch=6))
    trainer.fit(module, as_loader([{"prompts": prompt_batch()}]))
    assert seen.steps[0]["filter/batches"] == 1


def test_reward_that_reads_unmeasured_log_probs_is_told(make_run):
    class Implicit(Reward):
        def __call__(self, rollout, rows):
            return (rollout.logprobs - rollout.ref_logprobs).sum(1)

    with pytest.raises(Exception, match="finite"):
        make_run(DynamicSampling(), reward=Implicit())
