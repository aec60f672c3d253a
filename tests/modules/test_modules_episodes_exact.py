"""A game of two turns with a random environment, small enough to enumerate, through PPOModule and Trainer."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from gathered import gathered
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from lightning_rlhf import PPOModule, SamplingParams, UpdateSchedule
from lightning_rlhf.core import (
    BanditAdvantage,
    Clip,
    FixedKL,
    KLPen,
    LeaveOneOut,
    LinearSchedule,
    SeqMeanTokenSum,
    SequenceLevel,
    TokenLevel,
)
from lightning_rlhf.environments import Done, Environment, Reply
from lightning_rlhf.rewards import EnvironmentReward, Scores
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.rollout.episode import Episode
from lightning_rlhf.rollout.episode_rollout import rollout_of
from lightning_rlhf.types import Experience, PromptBatch, Rollout

BETA = 0.6
WORDS = {"</s>": 0, "a": 1, "b": 2, "c": 3, "d": 4}
PROMPTS = [[2, 3, 1], [4, 2]]
TEXTS = ["b c a", "d b"]
REPLIES = [3, 4]


class Rules(NamedTuple):
    """Turns of a game: five that the environment answers, and those without an end token, of which it is not asked."""

    ended: list[list[int]]
    cut: list[list[int]]
    ends: list[int]

    @property
    def turns(self) -> list[list[int]]:
        return self.ended + self.cut

    def heard(self, text: str) -> list[int]:
        """The turn with this text."""
        words = [WORDS[word] for word in text.split()]
        return next(turn for turn in self.ended if [token for token in turn if token] == words)


WORD = Rules([[a] for a in range(5)], [], list(range(5)))
"""Any word is a turn."""
TWO = Rules([[0], *([a, 0] for a in range(1, 5))], [[a, b] for a in range(1, 5) for b in range(1, 5)], [0])
"""A turn is up to two tokens, and 0 ends it."""


class Path(NamedTuple):
    """One course of the game: its prompt, turns and reply, and the reply's probability."""

    prompt: int
    first: list[int]
    reply: int | None
    second: list[int]
    chance: float


def chance(prompt: int, first: int, reply: int) -> float:
    """P(reply | first turn): the environment throws a coin whose bias depends on which turn it heard."""
    of_c = [0.3, 0.8, 0.5, 0.1, 0.65][first]
    of_c = of_c if prompt == 0 else 1 - of_c
    return of_c if reply == REPLIES[0] else 1 - of_c


def every_path(rules: Rules) -> list[Path]:
    paths = []
    for prompt in range(2):
        paths += [Path(prompt, first, None, [], 1.0) for first in rules.cut]
        paths += [
            Path(prompt, rules.ended[first], reply, second, chance(prompt, first, reply))
            for first, reply, second in itertools.product(range(5), REPLIES, rules.turns)
        ]
    return paths


def tables(flip: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward of the first turn, (2, 5), and of the end, (2, 5, 2, 5)."""
    generator = torch.Generator().manual_seed(11)
    first = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    last = torch.randn(2, 5, 2, 5, generator=generator, dtype=torch.float64)
    return flip * 0.5 * first, flip * last


def rewards_of(path: Path, rules: Rules) -> tuple[float, float]:
    """Rewards of the two turns."""
    if path.reply is None:
        return 0.0, 0.0
    first, last = tables()
    place = path.prompt, rules.ended.index(path.first)
    if path.second not in rules.ended:
        return float(first[place]), 0.0
    return float(first[place]), float(last[(*place, REPLIES.index(path.reply), rules.ended.index(path.second))])


class Game(Environment):
    """Throws a coin after the first turn and pays after the second."""

    def __init__(self, rules: Rules, flip: float = 1.0) -> None:
        self.rules, (self.first, self.last) = rules, tables(flip)
        self.heard: list[int] = []

    def reset(self, row):
        self.prompt, self.coin = TEXTS.index(row["prompt"]), random.Random(self.seed)

    def step(self, text, tool_calls):
        self.heard.append(self.rules.ended.index(self.rules.heard(text)))
        if len(self.heard) == 1:
            self.reply = int(self.coin.random() >= chance(self.prompt, self.heard[0], REPLIES[0]))
            return Reply("cd"[self.reply], float(self.first[self.prompt, self.heard[0]]))
        return Done(float(self.last[self.prompt, self.heard[0], self.reply, self.heard[1]]))


def path_logprobs(network, rules: Rules) -> torch.Tensor:
    """Σ log π of the policy's tokens of every path, one unpadded pass of the plain network at a time."""
    table = []
    for path in every_path(rules):
        ids = [*PROMPTS[path.prompt], *path.first, *([] if path.reply is None else [path.reply]), *path.second]
        logits = network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(PROMPTS[path.prompt])
        own = [*range(start, start + len(path.first)), *range(len(ids) - len(path.second), len(ids))]
        table.append(sum(logits[i - 1, ids[i]] for i in own))
    return torch.stack(table)


def objective_value(logp: torch.Tensor, logp_ref: torch.Tensor, rules: Rules) -> torch.Tensor:
    """J = E[r − β·log(π/π_ref)] over prompts, turns and coins."""
    chances = torch.tensor([path.chance for path in every_path(rules)], dtype=torch.float64)
    rewards = torch.tensor([sum(rewards_of(path, rules)) for path in every_path(rules)], dtype=torch.float64)
    return (chances * logp.exp() * (rewards - BETA * (logp - logp_ref))).sum() / 2


def optimum(network, rules: Rules) -> float:
    """J*: β·log Σ_y π_ref(y)·exp(Q(y)/β) at each turn, where Q is the mean over the coin of what follows."""
    total = 0.0
    first_turns, last = tables()
    nothing = torch.zeros(len(rules.cut), dtype=torch.float64)
    for prompt in range(2):
        values = []
        for first, turn in enumerate(rules.ended):
            value = first_turns[prompt, first]
            for i, reply in enumerate(REPLIES):
                context = [*PROMPTS[prompt], *turn, reply]
                rewards = torch.cat([last[prompt, first, i], nothing])
                follows = BETA * (turn_logprobs(network, context, rules) + rewards / BETA).logsumexp(0)
                value = value + chance(prompt, first, reply) * follows
            values.append(value)
        whole = turn_logprobs(network, PROMPTS[prompt], rules) + torch.cat([torch.stack(values), nothing]) / BETA
        total += float(BETA * whole.logsumexp(0))
    return total / 2


def turn_logprobs(network, context: list[int], rules: Rules) -> torch.Tensor:
    """log π(turn | context) of every turn."""
    table = []
    for turn in rules.turns:
        logits = network(input_ids=torch.tensor([context + turn])).logits[0].log_softmax(-1)
        table.append(sum(logits[len(context) + i - 1, token] for i, token in enumerate(turn)))
    return torch.stack(table)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(WORDS, unk_token="d"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture
def make_module(tokenizer):
    def make(network, rules: Rules, *, flip: float = 1.0, samples: int = 1, lr: float = 0.02, **options) -> PPOModule:
        return PPOModule(
            **gathered(
                policy=network,
                reward=EnvironmentReward(),
                tokenizer=tokenizer,
                generation=SamplingParams(max_new_tokens=len(rules.turns[-1]), samples_per_prompt=samples),
                environment=Episodes(factory=partial(Game, rules, flip), tokens=8, patience=30),
                beta=FixedKL(coef=BETA),
                shaping=(),
                optimizer=partial(torch.optim.Adam, lr=lr, eps=1e-8),
                **({"updates": UpdateSchedule(epochs=2, minibatch=64, max_grad_norm=None)} | options),
            )
        )

    return make


@pytest.fixture
def gap_closed(make_lm, make_module, make_trainer, left_padded, as_loader):
    """Trains; the share of the way from J(π_ref) to J* that is gone."""

    def run(*, rollouts: int, episodes: int = 512, **options) -> float:
        network = make_lm("gpt2", vocab=5, end=WORD.ends, initializer_range=0.15)
        reference = copy.deepcopy(network).double().eval()
        module = make_module(network, WORD, schedule=LinearSchedule(), samples=episodes // 2, **options)
        batch = left_padded(PROMPTS, rows=[{"prompt": text} for text in TEXTS])
        make_trainer(max_epochs=1).fit(module, as_loader([{"prompts": batch}] * rollouts))
        with torch.no_grad():
            before, after = path_logprobs(reference, WORD), path_logprobs(module.policy.network.eval(), WORD)
            best = optimum(reference, WORD)
        start, end = (float(objective_value(logp, before, WORD)) for logp in (before, after))
        assert end <= best + 1e-12
        return (end - start) / (best - start)

    return run


@pytest.mark.slow
def test_two_turns_reach_the_optimum(gap_closed):
    options = {"advantage": BanditAdvantage(baseline=LeaveOneOut()), "lr": 0.01}
    updates = UpdateSchedule(epochs=6, max_grad_norm=None)
    assert gap_closed(surrogate=Clip(), updates=updates, rollouts=100, **options) > 0.97


def test_two_turns_on_flipped_rewards_move_away(gap_closed):
    assert gap_closed(surrogate=Clip(), flip=-1.0, rollouts=6) < 0


def played(network, reference, rules: Rules) -> Rollout:
    """Every path once, as episodes; the numbers are those of plain passes."""
    episodes = []
    for place, path in enumerate(every_path(rules)):
        episode = Episode(place=place, prompt=place, row={})
        episode.open(PROMPTS[path.prompt])
        for turn, reply, reward in zip(
            (path.first, path.second), (path.reply, None), rewards_of(path, rules), strict=True
        ):
            if turn:
                episode.add_turn(turn, [0.0] * len(turn), [0.0] * len(turn))
                episode.give(reward)
            if reply is not None:
                episode.add_reply([reply])
        episode.state = "done" if path.second in rules.ended else "truncated"
        episodes.append(episode)
    tokens = torch.zeros(len(episodes), 3, dtype=torch.long)
    mask = torch.zeros(len(episodes), 3, dtype=torch.bool)
    for i, path in enumerate(every_path(rules)):
        prompt = PROMPTS[path.prompt]
        tokens[i, 3 - len(prompt) :], mask[i, 3 - len(prompt) :] = torch.tensor(prompt), True
    batch = PromptBatch(tokens, mask, torch.ones(len(episodes), dtype=torch.bool), [{}] * len(episodes))
    rollout = rollout_of(episodes, batch, pad=0, dtype=torch.float64)

    def logprobs(model) -> torch.Tensor:
        table = torch.zeros(rollout.response_mask.shape, dtype=torch.float64)
        for i, (row, real, own) in enumerate(
            zip(rollout.tokens, rollout.attention_mask, rollout.response_mask, strict=True)
        ):
            ids = row[real]
            start = int(real[: rollout.prompt_width].sum())
            logits = model(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1)
            for t in own.nonzero().flatten().tolist():
                table[i, t] = logits[start + t - 1, ids[start + t]]
        return table

    with torch.no_grad():
        old = logprobs(network)
        return replace(rollout, logprobs=old, sampler_logprobs=old, ref_logprobs=logprobs(reference))


@pytest.fixture
def exact(make_lm, make_module):
    """A module whose policy has left its reference, every path, their weights, and the gradient of J."""

    def make(**options):
        network = make_lm("gpt2", vocab=5, seed=1, initializer_range=0.15)
        reference = make_lm("gpt2", vocab=5, seed=2, initializer_range=0.15).double().eval()
        module = make_module(network, TWO, advantage=BanditAdvantage(), **options)
        module.configure_model()
        module.double()
        rollout = played(network.eval(), reference, TWO)
        logp = path_logprobs(network, TWO)
        with torch.no_grad():
            logp_ref = path_logprobs(reference, TWO)
        parameters = list(network.parameters())
        expected = torch.autograd.grad(objective_value(logp, logp_ref, TWO), parameters)
        chances = torch.tensor([path.chance for path in every_path(TWO)], dtype=torch.float64)
        return module, rollout, chances * logp.detach().exp() / 2, parameters, expected

    return make


def furthest(module: PPOModule, rollout: Rollout, weights, parameters, expected) -> float:
    """Largest difference between the gradient of the loss of every path, by its weight, and −∇J."""
    experience = module.credit(rollout, Scores(EnvironmentReward()(rollout, []), {}))
    factor = weights.unsqueeze(1)
    weighted = replace(experience, advantages=experience.advantages * factor)
    gradient = torch.autograd.grad(module.objective.actions(module.algorithm, weighted)[0], parameters)
    return max(float((f + e).abs().max()) for f, e in zip(gradient, expected, strict=True))


@pytest.mark.parametrize("surrogate", [Clip(), KLPen(coef=1.0, target=None)], ids=["clip", "klpen"])
@pytest.mark.parametrize("level", [SequenceLevel(), TokenLevel()], ids=["sequence", "token"])
def test_gradient_is_that_of_the_objective(exact, surrogate, level):
    module, *rest, expected = exact(surrogate=surrogate, level=level, reduction=SeqMeanTokenSum())
    assert sum(rest[1]) == pytest.approx(1.0, abs=1e-12)
    assert furthest(module, *rest, expected) < 1e-9
    assert max(float(e.abs().max()) for e in expected) > 1e-2


def test_gradient_with_one_bit_of_the_mask_flipped_is_not(exact):
    """An environment's token that counts as the policy's: 1 of 452 rows."""
    module, rollout, *rest = exact(surrogate=Clip())
    i = next(i for i, path in enumerate(every_path(TWO)) if path.reply is not None and path.second in TWO.ended)
    mask = rollout.response_mask.clone()
    mask[i, len(every_path(TWO)[i].first)] = True
    assert furthest(module, replace(rollout, response_mask=mask), *rest) > 1e-5


def test_gradient_of_an_environment_s_tokens_is_exactly_0(exact):
    module, rollout, *_ = exact(surrogate=Clip(), level=TokenLevel(), reduction=SeqMeanTokenSum())
    experience: Experience = module.credit(rollout, Scores(EnvironmentReward()(rollout, []), {}))
    leaf = rollout.logprobs.clone().requires_grad_()
    loss = module.algorithm.action_loss(leaf, None, experience).loss.sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert not gradient[~rollout.response_mask].any()
    assert gradient[rollout.response_mask].all()
