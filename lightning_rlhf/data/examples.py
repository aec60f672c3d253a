"""Rows as tokens, ready for a batch; over-long rows are dropped and counted, never cut."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_rlhf.data.columns import Columns
from lightning_rlhf.data.formats import Ranking, demonstration_of, prompt_of, ranking_of, text_of
from lightning_rlhf.data.records import Record
from lightning_rlhf.data.tally import Tally
from lightning_rlhf.text import Encoder, Tokens
from lightning_rlhf.types import Row


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt to respond to.

    Attributes:
        tokens: at least one.
        row: the raw record, its prompt under `prompt` whatever the file calls it.
    """

    tokens: Tokens
    row: Row


@dataclass(frozen=True, slots=True)
class TextExample:
    """A text to predict.

    Attributes:
        tokens: at least two.
        context: how many tokens at the start are given rather than predicted, at least 1.
    """

    tokens: Tokens
    context: int


@dataclass(frozen=True, slots=True)
class ComparisonExample:
    """K ranked responses to one prompt.

    Attributes:
        texts: prompt + response + end token, K of them, at least two.
        ranks: 0 is best, equal ranks are ties, no gaps, K of them.
        strength: ratings, K of them, or None.
    """

    texts: list[Tokens]
    ranks: list[int]
    strength: list[float] | None = None


def prompt_examples(records: Sequence[Record], encoder: Encoder, columns: Columns, tally: Tally) -> list[PromptExample]:
    """The prompts of the records that fit `tally.limit` tokens.

    Raises:
        ValueError: a record is no prompt (names file and line), or none is left.
    """
    examples = []
    for record in records:
        with record.located():
            tokens = encoder.prompt(prompt_of(record.row, columns))
        tally.rows += 1
        if tally.fits(len(tokens)):
            examples.append(PromptExample(tokens, {**record.row, "prompt": record.row[columns.prompt]}))
        else:
            tally.long_rows += 1
    tally.report()
    return examples


def demonstration_examples(
    records: Sequence[Record], encoder: Encoder, columns: Columns, tally: Tally, *, loss_on_prompt: bool = False
) -> list[TextExample]:
    """Prompt + response + end token of the records that fit `tally.limit` tokens.

    Args:
        records: what was read.
        encoder: text to tokens.
        columns: names of the keys.
        tally: holds the limit, and counts.
        loss_on_prompt: predict the prompt as well, not the response alone.

    Returns:
        examples.

    Raises:
        ValueError: a record is no demonstration (names file and line), or none is left.
    """
    examples = []
    for record in records:
        with record.located():
            demonstration = demonstration_of(record.row, columns)
            prompt = encoder.prompt(demonstration.prompt)
            tokens = prompt + encoder.response(demonstration.response)
        tally.rows += 1
        if tally.fits(len(tokens)):
            examples.append(TextExample(tokens, context=1 if loss_on_prompt else len(prompt)))
        else:
            tally.long_rows += 1
    tally.report()
    return examples


def comparison_examples(
    records: Sequence[Record], encoder: Encoder, columns: Columns, tally: Tally
) -> list[ComparisonExample]:
    """The rankings of the records, without responses over `tally.limit` tokens (prompt and end token included).

    Raises:
        ValueError: a record is no ranking (names file and line), or none is left.
    """
    examples = []
    for record in records:
        with record.located():
            example = _comparison(ranking_of(record.row, columns), encoder, tally)
        tally.rows += 1
        if len(example.texts) < 2:
            tally.long_rows += 1
        elif max(example.ranks) == 0:
            tally.tied_rows += 1
        else:
            examples.append(example)
    tally.report()
    return examples


def pretraining_blocks(
    records: Sequence[Record], encoder: Encoder, columns: Columns, *, block: int
) -> list[TextExample]:
    """Documents end to end, cut every `block` tokens; a shorter last block is kept if it has a token to predict.

    Raises:
        ValueError: a record is no document (names file and line), or all of them make fewer than 2 tokens.
    """
    stream = array("i")
    for record in records:
        with record.located():
            stream += encoder.document(text_of(record.row, columns))
    blocks = [stream[start : start + block] for start in range(0, len(stream), block)]
    if len(stream) < 2:
        raise ValueError(f"{records[0].file} holds {len(stream)} tokens of text: at least 2 are needed to predict one")
    return [TextExample(tokens, context=1) for tokens in blocks if len(tokens) >= 2]


def _comparison(ranking: Ranking, encoder: Encoder, tally: Tally) -> ComparisonExample:
    prompt = encoder.prompt(ranking.prompt)
    texts = [prompt + encoder.response(response) for response in ranking.responses]
    kept = [index for index, text in enumerate(texts) if tally.fits(len(text))]
    tally.responses += len(texts)
    tally.long_responses += len(texts) - len(kept)
    order = sorted({ranking.places[index] for index in kept})
    ranks = [order.index(ranking.places[index]) for index in kept]
    strength = None if ranking.strength is None else [ranking.strength[index] for index in kept]
    return ComparisonExample([texts[index] for index in kept], ranks, strength)
