"""Trained reward model as the reward, with its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.folders.fingerprint import fingerprint
from lightning_rlhf.models import ModelSource, ScalarModel, score_at_end
from lightning_rlhf.models.checkpoint import read_checkpoint
from lightning_rlhf.models.limits import check_length, check_rows
from lightning_rlhf.models.meta import tell_whole, unread
from lightning_rlhf.models.microbatching import batches_of
from lightning_rlhf.models.source import DType
from lightning_rlhf.rewards.reward import TextReward, check_prompts, checked_scores
from lightning_rlhf.text import Encoder, as_dialogue
from lightning_rlhf.types import Rollout, Row


class LearnedReward(TextReward):
    """Reward r_φ from a folder or checkpoint; demonstrations score 0 on average if it carries a bias.

    Where its vocabulary is the policy's it scores the policy's very tokens; otherwise prompt and response go through
    its own tokenizer and template.

    Args:
        path: a Hugging Face sequence-classification folder with one label, or a checkpoint of `RewardModule`.
        dtype: of its weights.
        prompt_role: role under which a text prompt becomes a message of its template, where it tokenises anew; None
            leaves it plain text.
        batch_tokens: the most tokens it reads at a time, padding included; responses of similar length go together.

    Raises:
        ValueError: `batch_tokens` is not positive.
    """

    def __init__(
        self, path: str, dtype: DType = "float32", prompt_role: str | None = None, batch_tokens: int = 32768
    ) -> None:
        check_positive(batch_tokens=batch_tokens)
        self.path, self.dtype = expanduser(path), dtype
        self.prompt_role, self.batch_tokens = prompt_role, batch_tokens
        self.model: ScalarModel = None  # type: ignore[assignment]  # until `prepare`
        self.shares_vocabulary = True

    def identity(self) -> dict[str, Any]:
        """Describe the content of the folder or checkpoint and the encoding of texts."""
        file = Path(self.path)
        model = fingerprint(file) if file.is_file() else ModelSource(path=self.path, dtype=self.dtype)
        return {"model": model, "dtype": self.dtype, "prompt_role": self.prompt_role}

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Load the network and compare its vocabulary with the policy's.

        Raises:
            ValueError: it can't be loaded, or has no embedding for a token of its own tokenizer.
        """
        super().prepare(tokenizer)
        if not self.model:
            self.model = self.load().eval().requires_grad_(False)
        own = self.model.tokenizer
        check_rows(self.model.network, own, name="reward")
        self.shares_vocabulary = own is None or tokenizer is None or own.get_vocab() == tokenizer.get_vocab()

    def load(self) -> ScalarModel:
        """Load a new copy of the network, for example to start a value network."""
        if Path(self.path).is_file():
            tell_whole(self.path, "it is a checkpoint")
            return load_checkpoint(self.path, dtype=self.dtype)
        return ScalarModel.load(unread(ModelSource(path=self.path, dtype=self.dtype)), new_head=False)

    @property
    def is_learned(self) -> bool:
        """Return True, because the reward is a reward model."""
        return True

    def networks(self) -> list[nn.Module]:
        """List the scalar model as the only frozen network."""
        return [self.model] if self.model else []

    @torch.no_grad()
    def __call__(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Return the scores at the last token of each response, (B,), float32.

        Raises:
            ValueError: the texts are too long, or it reads the policy's tokens and the prompts have none.
        """
        tokens, mask = rollout.tokens, rollout.attention_mask
        if not self.shares_vocabulary:
            tokens, mask = self.encode(rollout, rows)
        else:
            check_prompts(rollout, source=self.path)
            tokens = self._as_taught(rollout, rows)
        check_length(self.model.network, tokens.shape[1], limits="the data's `max_prompt_tokens` or `max_new_tokens`")
        return checked_scores(self._scores(tokens, mask), count=len(rollout), source=self.path)

    def _scores(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Score batches of similar length, (B,); a sharded model gets one batch.

        Otherwise its processes would run different numbers of passes.
        """
        batches, scores = batches_of(mask, tokens=self.batch_tokens), torch.empty(0)
        if self.model.blueprint is not None:
            batches = [(torch.arange(len(mask), device=mask.device), slice(None))]
        for rows, columns in batches:
            real = mask[rows, columns]
            part = score_at_end(self.model(tokens[rows, columns], real), real)
            scores = scores if len(scores) else part.new_empty(len(mask))
            scores[rows] = part
        return scores

    def _as_taught(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Replace the end token of each ended response by the one that comparisons taught for its prompt."""
        own, given = self.model.tokenizer, self.tokenizer
        if own is None or given is None or own.eos_token_id is None or given.eos_token_id is None:
            return rollout.tokens
        encoder, policy = Encoder(own), Encoder(given)
        tokens, width = rollout.tokens, rollout.prompt_width
        last = (width + rollout.extents - 1).unsqueeze(1)
        ends, ended = tokens.gather(1, last).flatten().tolist(), rollout.ended.tolist()
        prompts = zip(tokens[:, :width].tolist(), rollout.prompt_lengths.tolist(), strict=True)
        for i, (columns, length) in enumerate(prompts):
            prompt = rows[i].get("prompt")
            if ended[i] and prompt is not None:
                plain = isinstance(prompt, str) and _given_as_it_is(prompt, columns[width - length :], policy)
                ends[i] = encoder.end_after(prompt if plain else as_dialogue(prompt))
        return tokens.scatter(1, last, tokens.new_tensor(ends).unsqueeze(1))

    def score(self, prompts: list[Any], responses: list[str], /, **columns: list[Any]) -> Tensor:
        """Score texts, (B,), with each response taken as ended."""
        tokens, mask = self._encode(prompts, responses, [True] * len(responses))
        return self._scores(tokens, mask)

    def encode(self, rollout: Rollout, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Encode prompt and response in the reward model's own tokens, right-padded: tokens and mask, (B, L)."""
        return self._encode([row["prompt"] for row in rows], self.responses(rollout), rollout.ended.tolist())

    def _encode(self, prompts: list[Any], responses: list[str], ended: list[bool]) -> tuple[Tensor, Tensor]:
        encoder = Encoder(self.model.tokenizer, prompt_role=self.prompt_role)  # type: ignore[arg-type]
        device = next(self.model.parameters()).device
        texts = []
        for prompt, response, closed in zip(prompts, responses, ended, strict=True):
            answer = list(encoder.response(response, prompt))
            texts.append(torch.tensor(list(encoder.prompt(prompt)) + (answer if closed else answer[:-1])))
        lengths = torch.tensor([len(text) for text in texts])
        tokens = pad_sequence(texts, batch_first=True, padding_value=encoder.pad)
        return tokens.to(device), (torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)).to(device)


def _given_as_it_is(prompt: str, tokens: list[int], encoder: Encoder) -> bool:
    """Return True if a prompt is plain text and no message by the data's `prompt_role`."""
    try:
        return encoder.prompt(prompt).tolist() == tokens
    except ValueError:  # as plain text it has no tokens
        return False


_NO_CHECKPOINT = (
    "{} is no checkpoint of a RewardModule built from a ModelSource without adapter: export the model with "
    "`RewardModule.save_pretrained(folder)` and give the folder"
)
_PLACE = ("path", "gguf_file", "attention")
"""Fields of its source that a checkpoint may set. A model's own code is never run because of a checkpoint."""


def load_checkpoint(path: str, *, dtype: DType) -> ScalarModel:
    """Load the scalar model from a checkpoint of `RewardModule`.

    Raises:
        ValueError: the file is no checkpoint, belongs to another module, does not say which model it continues, or its
            weights do not fit that model.
    """
    try:
        checkpoint = read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{_NO_CHECKPOINT.format(path)} ({error})") from error
    state = checkpoint["state_dict"]
    weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    record = checkpoint.get("rlhf")
    source = record.get("model") if isinstance(record, dict) and "_extra_state" in weights else None
    if not isinstance(source, dict) or not isinstance(source.get("path"), str):
        raise ValueError(_NO_CHECKPOINT.format(path))
    place = {name: source[name] for name in _PLACE if name in source}
    model = ScalarModel.load(ModelSource(**place, dtype=dtype), new_head=True)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit the model in {source['path']}, which it says it continues: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return model
