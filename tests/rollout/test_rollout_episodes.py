"""Episodes of a random network with scripted environments: tokens, limits, failures, time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM

from lightning_rlhf import LearnedReward, PPOModule, SamplingParams
from lightning_rlhf.engines import VLLMServer
from lightning_rlhf.environments import Done, Environment, Reply
from lightning_rlhf.rewards import EnvironmentReward, ZeroReward
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.rollout.episode_sampler import EpisodeError
from lightning_rlhf.rollout.stage import Call, wait_for_some
from lightning_rlhf.types import PromptBatch, Rollout

PROMPTS = [[12, 13, 14], [10]]
ENDS = [0, 1, 2, 4]
SAMPLES = 3


class Echo(Environment):
    """Answers each turn with `answer` until `turns` are over; every turn is worth 1, the end 10."""

    def __init__(self, turns: int = 3, answer: Any = "x y", opening: Any = None) -> None:
        self.turns, self.answer, self.opening = turns, answer, opening
        self.heard: list[str] = []

    def reset(self, row):
        return self.opening

    def step(self, text, tool_calls):
        self.heard.append(text)
        return Done(10.0) if len(self.heard) >= self.turns else Reply(self.answer, 1.0)


@pytest.fixture
def play(make_lm, toy_tokenizer, left_padded) -> Callable[..., tuple[PPOModule, Rollout]]:
    """A module, and its rollout of `SAMPLES` episodes of each prompt."""

    def played(
        factory: Callable[[], Environment] | None,
        *,
        prompts: Any = PROMPTS,
        rows: Any = None,
        length: int = 6,
        kind: str = "llama",
        server: bool = False,
        **limits: Any,
    ) -> tuple[PPOModule, Rollout]:
        network = make_lm(kind, end=ENDS).eval()
        module = PPOModule(
            network,
            ZeroReward() if factory is None else EnvironmentReward(),
            tokenizer=toy_tokenizer,
            generation=SamplingParams(max_new_tokens=length, samples_per_prompt=SAMPLES),
            engine=VLLMServer(urls=[FakeVLLM(network).url]) if server else None,
            environment=None
            if factory is None
            else Episodes(factory=factory, **{"tokens": 40, "patience": 30} | limits),
        )
        module.configure_model()
        batch = left_padded(prompts, rows=rows)
        return module, module.responder.collect(batch, samples=SAMPLES, iteration=3)

    return played


def rows_of(rollout: Rollout) -> list[tuple[list[int], list[bool]]]:
    """Ids after the prompt and who wrote them, of each episode."""
    ids, own = rollout.tokens[:, rollout.prompt_width :].tolist(), rollout.response_mask.tolist()
    return [(a[:n], b[:n]) for a, b, n in zip(ids, own, rollout.extents.tolist(), strict=True)]


def turns_of(ids: list[int], own: list[bool]) -> list[list[int]]:
    """The policy's turns."""
    turns: list[list[int]] = []
    for i, (token, mine) in enumerate(zip(ids, own, strict=True)):
        if mine and (i == 0 or not own[i - 1]):
            turns.append([])
        if mine:
            turns[-1].append(token)
    return turns


def test_one_turn_is_the_single_response_to_the_bit(play):
    _, single = play(None)
    _, episodes = play(lambda: Echo(turns=1))
    names = ("attention_mask", "response_mask", "sampler_logprobs", "logprobs", "entropy", "prompt_index", "ended")
    for name in names:
        assert torch.equal(getattr(episodes, name), getattr(single, name)), name
    assert torch.equal(episodes.tokens[episodes.attention_mask], single.tokens[single.attention_mask])
    assert torch.equal(episodes.rewards.sum(1), torch.where(single.ended, 10.0, 0.0))
    assert single.rewards is None


def test_turns_are_drawn_by_a_vllm_server(play):
    """Whose log-probs the trainer confirms, of every turn in its context."""
    module, rollout = play(Echo, kind="gpt2", server=True)
    assert int(rollout.spans.max()) > 1
    torch.testing.assert_close(rollout.sampler_logprobs, rollout.logprobs, rtol=0, atol=1e-4)
    assert rollout.logprobs[rollout.response_mask].all()
    module.teardown("fit")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokens_and_log_probs_of_turns(play, kind):
    """A row is the prompt, a turn, the environment's ids, a turn, …; its log-probs are those of one forward."""
    module, rollout = play(Echo, kind=kind)
    answer = module.tokenizer.convert_tokens_to_ids(["x", "y"])
    lengths = set()
    for i, (ids, own) in enumerate(rows_of(rollout)):
        turns = turns_of(ids, own)
        lengths.add(len(turns))
        foreign = [token for token, mine in zip(ids, own, strict=True) if not mine]
        assert foreign == answer * (len(turns) - 1)
        assert all(turn[-1] in ENDS for turn in turns[:-1])
        assert bool(rollout.ended[i]) == (len(turns) == 3 and turns[-1][-1] in ENDS)
        prompt = PROMPTS[i // SAMPLES]
        logits = module.policy.network(input_ids=torch.tensor([prompt + ids])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).flatten()
        expected = torch.where(torch.tensor(own), expected, 0.0)
        torch.testing.assert_close(rollout.sampler_logprobs[i, : len(ids)], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(rollout.logprobs[i, : len(ids)], expected, rtol=0, atol=1e-5)
        last = [j for j, mine in enumerate(own) if mine and (j + 1 == len(own) or not own[j + 1])]
        given = torch.zeros(len(ids))
        given[last[: len(turns) - 1]] = 1.0
        if rollout.ended[i]:
            given[last[-1]] = 10.0
        assert torch.equal(rollout.rewards[i, : len(ids)], given)
    assert lengths >= {1, 3}
    assert torch.equal(rollout.spans, torch.tensor([len(turns_of(*row)) for row in rows_of(rollout)]))


def test_environment_hears_the_turns_without_special_tokens(play):
    heard: list[Echo] = []

    def built() -> Echo:
        heard.append(Echo())
        return heard[-1]

    module, rollout = play(built)
    said = [turns_of(*row) for row in rows_of(rollout)]
    said = [[turn for turn in turns if turn[-1] in ENDS] for turns in said]
    texts = sorted(module.tokenizer.batch_decode(turns, skip_special_tokens=True) for turns in said)
    assert sorted(echo.heard for echo in heard) == texts
    assert len(heard) == len(rollout)


def test_dialogue_is_written_by_the_chat_template(play, toy_tokenizer):
    """Between two turns stand the ids of the template alone: what it writes after the end that the policy drew."""
    row = {"prompt": [{"role": "user", "content": "a b"}]}
    prompt = toy_tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    _, rollout = play(Echo, prompts=[prompt], rows=[row], tokens=60)
    after = toy_tokenizer("<|im_end|> <|im_start|> user x y <|im_end|> <|im_start|> assistant").input_ids
    long = [row for row in rows_of(rollout) if len(turns_of(*row)) > 1]
    assert long
    for ids, own in long:
        foreign = [token for token, mine in zip(ids, own, strict=True) if not mine]
        assert foreign == after * (len(turns_of(ids, own)) - 1)


def test_opening_belongs_to_the_prompt_where_all_episodes_share_it(play, toy_tokenizer):
    _, rollout = play(lambda: Echo(opening=" z"), rows=[{"prompt": "c d e"}, {"prompt": "a"}])
    opened = [[12, 13, 14, 35], [10, 35]]
    for i in range(len(rollout)):
        real = rollout.attention_mask[i, : rollout.prompt_width]
        assert rollout.tokens[i, : rollout.prompt_width][real].tolist() == opened[i // SAMPLES]
    numbers = iter(range(100))
    _, rollout = play(lambda: Echo(opening=" " + "xyz"[next(numbers) % 3]), rows=[{"prompt": "c d e"}, {"prompt": "a"}])
    assert rollout.prompt_lengths.tolist() == [3] * 3 + [1] * 3
    assert not rollout.response_mask[:, 0].any()
    assert sorted(rollout.tokens[:3, rollout.prompt_width].tolist()) == [33, 34, 35]


def test_prompt_that_the_data_encode_otherwise_is_refused(play):
    with pytest.raises(ValueError, match="other tokens in the data.*environment.prompt_role"):
        play(lambda: Echo(opening=" z"), rows=[{"prompt": "c d"}, {"prompt": "a"}])


def test_limit_of_turns(play):
    _, rollout = play(lambda: Echo(turns=9), turns=2)
    assert int(rollout.spans.max()) == 2
    assert not rollout.ended.any()
    assert all(own[-1] for _, own in rows_of(rollout))


def test_limit_of_tokens(play):
    _, rollout = play(lambda: Echo(turns=9, answer="x y z x"), tokens=11)
    assert int(rollout.extents.max()) <= 11
    assert int(rollout.spans.max()) > 1
    assert not rollout.ended.any()
    assert all(own[-1] for _, own in rows_of(rollout))  # no reply that nothing follows


def test_limit_of_bytes(play):
    _, rollout = play(lambda: Echo(turns=2, answer="x y z x y z"), bytes=5)
    ids, own = max(rows_of(rollout), key=lambda row: len(row[0]))
    assert [t for t, mine in zip(ids, own, strict=True) if not mine] == [33, 34, 35]


class Broken(Echo):
    """Fails at its second turn if the row says so, by an error, a wrong answer or no answer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def reset(self, row):
        self.bad = row["bad"]

    def step(self, text, tool_calls):
        if self.bad and self.how == "raises":
            raise KeyError("no such door")
        if self.bad and self.how == "answers":
            return 7
        if self.bad:
            time.sleep(5)
        return Done(1.0)


BAD = [{"prompt": "c d e", "bad": True}, {"prompt": "a", "bad": False}]


@pytest.mark.parametrize(
    ("how", "said"),
    [("raises", "KeyError: 'no such door'"), ("answers", "int: 7"), ("hangs", "did not answer in time")],
)
def test_failed_environment_costs_its_episode(play, how, said):
    _, rollout = play(lambda: Broken(how), rows=BAD, failures=0.5, seconds=0.5)
    lasts = rollout.tokens[:3, rollout.prompt_width :].gather(1, rollout.extents[:3, None] - 1)
    asked = torch.isin(lasts.flatten(), torch.tensor(ENDS))
    assert torch.equal(rollout.failed, torch.cat([asked, torch.zeros(3, dtype=torch.bool)]))
    assert rollout.failed.any()
    with pytest.raises(EpisodeError, match=f"(?s)environments failed, more than `environment.failures`=0.1.*{said}"):
        play(lambda: Broken(how), rows=BAD, seconds=0.5)


def test_environment_that_cannot_be_built_costs_its_episode(play):
    numbers = iter(range(100))

    def built() -> Echo:
        if next(numbers) == 0:
            raise OSError("no more doors")
        return Echo()

    _, rollout = play(built, failures=0.5)
    assert int(rollout.failed.sum()) == 1
    assert int(rollout.lengths[rollout.failed].item()) == 0
    assert not rollout.sampler_logprobs[rollout.failed].any()


def test_environment_is_closed_once(play):
    closed: list[int] = []
    lock = threading.Lock()

    class Closing(Broken):
        def close(self):
            with lock:
                closed.append(id(self))

    _, rollout = play(lambda: Closing("raises"), rows=BAD, failures=1.0)
    deadline = time.monotonic() + 5
    while len(closed) < len(rollout) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(closed) == len(set(closed)) == len(rollout)


def test_async_close_is_awaited(play):
    closed: list[int] = []

    class Closing(Echo):
        async def close(self):
            await asyncio.sleep(0.2)
            closed.append(id(self))

    _, rollout = play(Closing)
    deadline = time.monotonic() + 5
    while len(closed) < len(rollout) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(closed) == len(rollout)


def test_seed_is_the_episode_s(play):
    """The same for the same run, another for each episode and each rollout."""
    seeds: list[int] = []

    class Seeded(Echo):
        def reset(self, row):
            seeds.append(self.seed)

    module, _ = play(Seeded)
    first = set(seeds)
    seeds.clear()
    play(Seeded)
    assert set(seeds) == first
    assert len(first) == 2 * SAMPLES
    seeds.clear()
    batch = PromptBatch(torch.tensor([[10]]), torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool), [{}])
    module.responder.collect(batch, samples=SAMPLES, iteration=4)
    assert not first.intersection(seeds)


class Slow(Echo):
    def step(self, text, tool_calls):
        time.sleep(0.1)
        return super().step(text, tool_calls)


class Async(Echo):
    async def reset(self, row):
        await asyncio.sleep(0.01)
        return " z"

    async def step(self, text, tool_calls):
        await asyncio.sleep(0.1)
        return Echo.step(self, text, tool_calls)


@pytest.mark.parametrize("kind", [Slow, Async])
def test_slow_environments_wait_beside_each_other(play, kind):
    rows = [{"prompt": "c d e"}, {"prompt": "a"}] * 10
    play(Echo, prompts=PROMPTS * 10, rows=rows)
    start = time.perf_counter()
    _, rollout = play(kind, prompts=PROMPTS * 10, rows=rows)
    took = time.perf_counter() - start
    assert int((rollout.spans - 1 + rollout.ended.long()).sum()) * 0.1 > 6  # what they would wait one after the other
    assert took < 3


def test_one_slow_environment_holds_back_nobody(play):
    """The others are over while it sleeps: with patience it is waited for, without it they go on."""
    slept: list[float] = []

    class Sleeper(Echo):
        def reset(self, row):
            self.slow = row["slow"]

        def step(self, text, tool_calls):
            if self.slow:
                time.sleep(0.4)
            else:
                slept.append(time.monotonic())
            return super().step(text, tool_calls)

    rows = [{"prompt": "c d e", "slow": True}, {"prompt": "a", "slow": False}]
    spread = {}
    for patience in (0.0, 2.0):
        slept.clear()
        _, rollout = play(lambda: Sleeper(turns=3), rows=rows, patience=patience)
        assert int(rollout.spans[3:].max()) > 1
        spread[patience] = max(slept) - min(slept)
    assert spread[0.0] < 0.35 < spread[2.0]
    assert not rollout.failed.any()


class Ends(Call):
    """Is over from the second time on that it is asked."""

    def __init__(self) -> None:
        super().__init__(Future(), deadline=time.monotonic() + 60)
        self.asked = 0

    @property
    def is_over(self) -> bool:
        self.asked += 1
        if self.asked == 2:
            self.future.set_result(None)
        return self.asked >= 2


@pytest.mark.parametrize("patience", [0.0, 5.0])
def test_calls_may_end_between_two_looks(patience):
    calls = [Ends()]
    wait_for_some(calls, patience=patience)
    assert all(call.is_over for call in calls)


def test_same_seed_gives_the_same_episodes(play):
    first, second = (play(Echo)[1] for _ in range(2))
    for name in ("tokens", "response_mask", "sampler_logprobs", "rewards"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    turns = [turns_of(*row) for row in rows_of(first)]
    assert any(len(t) > 1 and t[0] != t[1] for t in turns)


def test_reward_model_reads_the_whole_episode(play, make_scorer, make_folder, toy_tokenizer):
    """With the policy's tokenizer: the score at the last token, after all turns and replies."""
    module, rollout = play(Echo, length=4)
    folder = make_folder("llama", scorer=True)
    reward = LearnedReward(folder)
    reward.prepare(toy_tokenizer)
    scores = reward(rollout, [{"prompt": "c d e"}] * SAMPLES + [{"prompt": "a"}] * SAMPLES)
    head = make_scorer("llama").eval()
    ends = []
    for i, (ids, _) in enumerate(rows_of(rollout)):
        if rollout.ended[i]:
            ids = [*ids[:-1], toy_tokenizer.eos_token_id]  # as comparisons are taught to end
        text = torch.tensor([PROMPTS[i // SAMPLES] + ids])
        hidden = head.model(input_ids=text).last_hidden_state
        ends.append(head.score(hidden)[0, -1, 0])
    torch.testing.assert_close(scores, torch.stack(ends).detach(), rtol=0, atol=1e-5)
    assert int(rollout.spans.max()) > 1
