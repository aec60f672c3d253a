"""Sampler of episodes: turns of the policy by an engine, and replies of environments between them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.engines.engine import Request
from lightning_rlhf.engines.generation import row_uniforms
from lightning_rlhf.environments.environment import Done, Environment, Message, Reply, as_opening, as_reply
from lightning_rlhf.environments.tool_calls import call_format
from lightning_rlhf.rewards.text import texts_of
from lightning_rlhf.rollout.episode import Episode
from lightning_rlhf.rollout.episode_rollout import rollout_of
from lightning_rlhf.rollout.episodes import Episodes
from lightning_rlhf.rollout.sampler import Sampler
from lightning_rlhf.rollout.stage import Stage, wait_for_some
from lightning_rlhf.text import Continuation, Encoder
from lightning_rlhf.types import PromptBatch, Rollout


class EpisodeError(RuntimeError):
    """Failure of more environments than a rollout may lose, with the rows of some."""


class EpisodeSampler(Sampler):
    """Sampler whose responses are dialogues with an environment.

    Arguments other than these are those of `Sampler`.

    Args:
        episodes: what answers, and the limits.
        tokenizer: of the policy.

    Raises:
        ValueError: there is no tokenizer.
    """

    def __init__(self, *args: Any, episodes: Episodes, tokenizer: PreTrainedTokenizerBase | None, **named: Any) -> None:
        super().__init__(*args, **named)
        if tokenizer is None:
            raise ValueError("`environment` reads and writes text, and the policy has no tokenizer: give `tokenizer`")
        self.episodes = episodes
        self.tokenizer = tokenizer
        self.format = call_format(tokenizer)
        self.continuation = Continuation(Encoder(tokenizer, prompt_role=episodes.prompt_role))
        self._dtype = torch.float32  # of the engine's log-probs
        self._same_prompts = False
        self._played: list[Episode] = []
        self._refused: ValueError | None = None

    @property
    def longest(self) -> int:
        """Most tokens after a prompt, of the policy and the environment."""
        return self.episodes.tokens

    def status(self, done: int, total: int) -> str:
        """Describe how many episodes are over, and which turn is drawn of those that go on."""
        going = [episode for episode in self._played if episode.is_open]
        turn = max((len(episode.drawn) for episode in going), default=0) + 1
        return f"{len(self._played) - len(going)}/{len(self._played)} episodes, turn {turn}, {done}/{total} drawn"

    def collect(
        self, prompts: PromptBatch, samples: int, *, iteration: int, following: PromptBatch | None = None
    ) -> Rollout:
        """Return the episodes of a training step; none are drawn ahead."""
        self.outdate(iteration)
        return self.rollout(prompts, samples, stream="train", iteration=iteration)

    @torch.no_grad()
    def rollout(self, prompts: PromptBatch, samples: int, *, stream: str, iteration: int) -> Rollout:
        """Play B·k episodes with today's weights, those of one prompt in consecutive rows.

        Args:
            prompts: B prompts of this process.
            samples: k, episodes of each prompt.
            stream: names the random numbers.
            iteration: which rollout of that stream.

        Raises:
            EngineError: the engine failed, or what it returned is not whole.
            EpisodeError: more environments failed than `failures` allows.
        """
        self._load()
        rank, world = self.ranks.rank, self.ranks.world
        played = [
            Episode(place=(prompt * world + rank) * samples + i, prompt=prompt, row=prompts.rows[prompt])
            for prompt in range(len(prompts.tokens))
            for i in range(samples)
        ]
        self._played = played
        with self.clock.phase("generate"), Stage(seconds=self.episodes.seconds) as stage:
            for episode in played:
                self._begin(episode, stage, stream=stream, iteration=iteration)
            while not self.ranks.all(not any(episode.is_open for episode in played)):
                self._advance(played, prompts, samples, stage, stream=stream, iteration=iteration)
            for episode in played:
                if episode.environment is not None:
                    stage.start(episode.environment.close)
        self._check_failures(played)
        return rollout_of(played, prompts, pad=self.policy.end_tokens[0], dtype=self._dtype)

    def _begin(self, episode: Episode, stage: Stage, *, stream: str, iteration: int) -> None:
        """Build the environment and have it open the episode."""
        place: dict[str, Any] = {"iteration": iteration, "rows": [episode.place], "length": 1}
        number = row_uniforms(seed=self.generation.seed or 0, stream=f"{stream}/environment", **place)

        def opened() -> Any:
            environment = episode.environment = self.episodes.factory()
            environment.seed = int(number * 2**31)
            observed = environment.reset(episode.row)
            if inspect.isawaitable(observed):
                return _opening(observed, environment)
            return as_opening(observed), environment.schemas()

        episode.call = stage.start(opened)

    def _advance(
        self, played: list[Episode], prompts: PromptBatch, samples: int, stage: Stage, *, stream: str, iteration: int
    ) -> None:
        """Take the replies that are there and draw a turn of each episode that waits for one."""
        waiting = [episode.call for episode in played if episode.is_open and episode.call is not None]
        if waiting and all(episode.call is not None for episode in played if episode.is_open):
            wait_for_some(waiting, patience=self.episodes.patience)
        for episode in played:
            if episode.is_open and episode.call is not None and episode.call.is_over:
                self._answered(episode, prompts)
        ready = [episode for episode in played if episode.is_open and episode.call is None]
        self._draw(ready, prompts, samples if len(ready) == len(played) else 1, stream=stream, iteration=iteration)
        for episode in ready:
            if episode.is_open:
                self._ask(episode, stage)

    def _answered(self, episode: Episode, prompts: PromptBatch) -> None:
        """Take what the environment returned: the opening, a reply or the end."""
        call, episode.call = episode.call, None
        assert call is not None
        try:
            result = call.result()
            reply = as_reply(result) if episode.opening else None
        except Exception as error:
            episode.fail(error)
            return
        try:
            if reply is None:
                observed, schemas = result
                self._open(episode, observed, schemas, prompts)
            else:
                episode.give(reply.reward)
                self._reply(episode, reply)
        except ValueError as error:  # of the template: told to every process, which would wait otherwise
            episode.fail(error)
            self._refused = error

    def _open(
        self, episode: Episode, observed: str | list[Message], schemas: list[dict[str, Any]], prompts: PromptBatch
    ) -> None:
        """Write the opening: the prompt's own ids, or the prompt anew with what the environment adds."""
        own = prompts.tokens[episode.prompt][prompts.mask[episode.prompt]].tolist()
        prompt = episode.row.get("prompt", "")
        given = {name: episode.row[name] for name in ("tools", "chat_template_kwargs") if episode.row.get(name)}
        arguments = {**given.pop("chat_template_kwargs", {}), **given}
        episode.arguments = arguments | ({"tools": schemas} if schemas else {})
        episode.dialogue = self.continuation.opened(prompt, observed)
        if not observed and not schemas:
            episode.open(own)
            return
        if not self._same_prompts and list(self.continuation.opening(prompt, [], arguments)) != own:
            raise ValueError(
                f"the prompt {str(prompt)[:60]!r} has other tokens in the data than with `environment`, which writes "
                "it anew with what the environment adds: give `environment.prompt_role` as of the data module"
            )
        self._same_prompts = True  # once: a template may write today's date
        episode.open(self.continuation.opening(prompt, observed, episode.arguments))

    def _reply(self, episode: Episode, reply: Reply | Done) -> None:
        """Append a reply unless nothing could follow it."""
        if isinstance(reply, Done):
            episode.state = "done"
            return
        messages = [self._cut(message) for message in reply.messages]  # type: ignore[arg-type]
        turn = episode.drawn[-1]
        text = self._text(turn)
        ids = self.continuation.between(episode.dialogue, text, messages, episode.arguments, turn[-1])
        if len(episode.drawn) >= self.episodes.turns or episode.length + len(ids) >= self.episodes.tokens:
            episode.state = "truncated"
            return
        if episode.dialogue:
            episode.dialogue = [*episode.dialogue, {"role": "assistant", "content": text}, *messages]
        episode.add_reply(ids)

    def _cut(self, message: dict[str, Any]) -> dict[str, Any]:
        data = message["content"].encode()
        if len(data) <= self.episodes.bytes:
            return message
        return message | {"content": data[: self.episodes.bytes].decode(errors="ignore")}

    def _ask(self, episode: Episode, stage: Stage) -> None:
        """Have the environment answer the last turn, if the turn has its end."""
        turn, environment = episode.drawn[-1], episode.environment
        assert environment is not None
        if turn[-1] not in self.policy.end_tokens:
            episode.state = "truncated"
            return
        text, calls = self._text(turn), self.format.parse(str(self.tokenizer.decode(turn[:-1])))
        episode.call = stage.start(lambda: environment.step(text, calls))

    def _text(self, turn: list[int]) -> str:
        return texts_of([turn], self.tokenizer)[0]

    def _draw(self, ready: list[Episode], prompts: PromptBatch, samples: int, *, stream: str, iteration: int) -> None:
        """Draw one turn of each episode.

        Args:
            ready: those that wait for one.
            prompts: of this process.
            samples: k if all episodes are ready; their first turns are drawn from contexts that are read once.
            stream: names the random numbers.
            iteration: which rollout of that stream.
        """
        if self.ranks.all(not ready) if self._needs_all else not ready:
            return
        asked = ready or [_filler(prompts)]
        groups = [asked[i : i + samples] for i in range(0, len(asked), samples)]
        if any(episode.context != group[0].context for group in groups for episode in group):
            samples = 1
        request = self._turns(asked, samples, stream=stream, iteration=iteration)
        sampled = self._together(lambda: self._drawn(request, self.version))
        assert sampled is not None
        self._dtype = sampled.logprobs.dtype
        lengths = sampled.response_mask.sum(1).tolist()
        columns = (column.tolist() for column in (sampled.tokens, sampled.logprobs, sampled.entropy))
        for episode, length, *numbers in zip(ready, lengths, *columns, strict=False):
            most = min(length, self.episodes.tokens - episode.length)
            episode.add_turn(*(row[:most] for row in numbers))

    @property
    def _needs_all(self) -> bool:
        """True if every process must draw when one does: an external engine's failures are told to all."""
        return self.ranks.world > 1 and (self.engine.is_external or self.policy.blueprint is not None)

    def _turns(self, episodes: Sequence[Episode], samples: int, *, stream: str, iteration: int) -> Request:
        """Return the request of one turn of each episode; `samples` in a row have the same context."""
        device, pad = self.ranks.device, self.policy.end_tokens[0]
        contexts = [torch.tensor(episode.context) for episode in episodes[::samples]]
        tokens = pad_sequence(contexts, batch_first=True, padding_value=pad, padding_side="left")
        lengths = torch.tensor([len(context) for context in contexts])
        mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
        real = torch.ones(len(contexts), dtype=torch.bool, device=device)
        rows = [episode.row for episode in episodes[::samples]]
        left = max(self.episodes.tokens - episode.length for episode in episodes)
        params = replace(self.generation, max_new_tokens=min(self.generation.max_new_tokens, left))
        return Request(
            prompts=PromptBatch(tokens.to(device), mask.to(device), real, rows),
            samples=samples,
            uniforms=self._uniforms(episodes, params.max_new_tokens, stream=stream, iteration=iteration),
            params=params,
            end_tokens=self.policy.end_tokens,
        )

    def _uniforms(self, episodes: Sequence[Episode], length: int, *, stream: str, iteration: int) -> Tensor:
        """Random numbers of the next turn of each episode, (b, length): of the first those of a single response."""
        rows = []
        for episode in episodes:
            turn = f"{stream}/turn-{len(episode.drawn)}" if episode.drawn else stream
            place: dict[str, Any] = {"iteration": iteration, "rows": [episode.place], "length": length}
            rows.append(row_uniforms(seed=self.generation.seed or 0, stream=turn, **place))
        return torch.cat(rows)

    def _check_failures(self, played: list[Episode]) -> None:
        """Raise on every process if the template was refused on one, or too many environments failed."""
        failed = [episode for episode in played if episode.state == "failed"]
        problem: Exception | None = self._refused
        if problem is None and len(failed) > self.episodes.failures * len(played):
            rows = "; ".join(f"{str(dict(episode.row))[:200]}: {episode.problem}" for episode in failed[:3])
            problem = EpisodeError(
                f"{len(failed)} of {len(played)} environments failed, more than `environment.failures`="
                f"{self.episodes.failures} allows: mend the environment and resume. {rows}"
            )
        self.ranks.agree(problem)


async def _opening(observed: Any, environment: Environment) -> tuple[str | list[Message], list[dict[str, Any]]]:
    """Await what `reset` returns."""
    return as_opening(await observed), environment.schemas()


def _filler(prompts: PromptBatch) -> Episode:
    """Return an episode for a process that has none left to draw while others have."""
    return Episode(place=0, prompt=0, row=prompts.rows[0], context=prompts.tokens[0][prompts.mask[0]].tolist())
