"""Tokenized rows ready for a batch; over-long rows are dropped and counted, never cut."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rlhf.data.columns import ColumnNames, template_arguments
from lightning_rlhf.data.drop_report import DropReport
from lightning_rlhf.data.formats import Answer, demonstration_of, is_document, label_of, prompt_of, text_of
from lightning_rlhf.data.rankings import Ranking, ranking_of
from lightning_rlhf.data.records import Located
from lightning_rlhf.text import Encoder, Exchange, Prompt, Tokens
from lightning_rlhf.types import Row


@dataclass(frozen=True, slots=True)
class PromptExample:
    """Tokens of a prompt to respond to.

    Attributes:
        tokens: at least one.
        record: where its row is.
        columns: names of the row's keys.
    """

    tokens: Tokens
    record: Located
    columns: ColumnNames = ColumnNames()

    @property
    def row(self) -> Row:
        """Raw row with its prompt under `prompt`, whatever its key; a table's row is read now."""
        row = self.record.row
        return {**row, "prompt": prompt_of(row, self.columns)}


@dataclass(frozen=True, slots=True)
class TextExample:
    """Tokens of a text to predict.

    Attributes:
        tokens: at least two.
        context: how many tokens at the start are given rather than predicted, at least 1.
    """

    tokens: Tokens
    context: int


@dataclass(frozen=True, slots=True)
class ComparisonExample:
    """Tokens of K ranked responses to one prompt.

    Attributes:
        texts: prompt + response + end token, K of them, at least two.
        ranks: 0 is best, equal ranks are ties, no gaps, K of them.
        strength: ratings, K of them, or None.
        systems: names of who wrote them, K of them, or None.
        contexts: how many tokens at the start of each are the prompt, K of them, at least 1; none where unknown.
    """

    texts: list[Tokens]
    ranks: list[int]
    strength: list[float] | None = None
    systems: list[str] | None = None
    contexts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class LabeledExample:
    """Tokens of a response with its label.

    Attributes:
        text: prompt + response + end token.
        good: the response is desirable.
    """

    text: TextExample
    good: bool

    @property
    def tokens(self) -> Tokens:
        """Token ids of the text."""
        return self.text.tokens


def prompt_examples(
    records: Sequence[Located], encoder: Encoder, columns: ColumnNames, tally: DropReport
) -> list[PromptExample]:
    """Tokenize the prompts of the records that fit `tally.limit` tokens.

    Raises:
        ValueError: a record is no prompt (names file and line), or none is left.
    """
    examples = []
    for record in records:
        with record.located():
            row = record.row
            prompt, arguments = prompt_of(row, columns), template_arguments(row, columns)
            tokens = None if tally.exceeded(encoder, prompt) else encoder.prompt(prompt, arguments)
        tally.rows += 1
        if tokens is not None and tally.fits(len(tokens)):
            examples.append(PromptExample(tokens, record, columns))
        else:
            tally.long_rows += 1
    tally.report()
    return examples


def demonstration_examples(
    records: Sequence[Located],
    encoder: Encoder,
    columns: ColumnNames,
    tally: DropReport,
    *,
    loss_on_prompt: bool = False,
) -> list[TextExample]:
    """Tokenize the demonstrations and documents of the records that fit `tally.limit` tokens.

    A demonstration is prompt + response + end token; a document is predicted whole.

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
            example = _demonstration(record.row, encoder, columns, tally)
        tally.rows += 1
        if example is not None and tally.fits(len(example.tokens)):
            examples.append(TextExample(example.tokens, context=1) if loss_on_prompt else example)
        else:
            tally.long_rows += 1
    tally.report()
    return examples


def comparison_examples(
    records: Sequence[Located], encoder: Encoder, columns: ColumnNames, tally: DropReport
) -> list[ComparisonExample]:
    """Tokenize the rankings of the records, without responses over `tally.limit` tokens.

    The limit covers the prompt and the end token.

    Raises:
        ValueError: a record is no ranking (names file and line), or none is left.
    """
    examples = []
    for record in records:
        with record.located():
            row = record.row
            example = _comparison(ranking_of(row, columns), template_arguments(row, columns), encoder, tally)
        tally.rows += 1
        if len(example.texts) < 2:
            tally.long_rows += 1
        elif max(example.ranks) == 0:
            tally.tied_rows += 1
        else:
            examples.append(example)
    tally.report()
    return examples


def labeled_examples(
    records: Sequence[Located], encoder: Encoder, columns: ColumnNames, tally: DropReport
) -> list[LabeledExample]:
    """Tokenize the labeled responses of the records that fit `tally.limit` tokens.

    The limit covers the prompt and the end token.

    Raises:
        ValueError: a record is no response with a label (names file and line), or none is left.
    """
    examples = []
    for record in records:
        with record.located():
            row = record.row
            good, bare = label_of(row, columns), {name: value for name, value in row.items() if name != "label"}
            example = _answer(bare, encoder, columns, tally)
        tally.rows += 1
        if example is not None and tally.fits(len(example.tokens)):
            examples.append(LabeledExample(example, good))
        else:
            tally.long_rows += 1
    tally.report()
    return examples


def pretraining_blocks(
    records: Sequence[Located], encoder: Encoder, columns: ColumnNames, *, block: int
) -> list[TextExample]:
    """Concatenate documents and cut them every `block` tokens.

    A shorter last block is kept if it has a token to predict.

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


def _demonstration(row: Row, encoder: Encoder, columns: ColumnNames, tally: DropReport) -> TextExample | None:
    if is_document(row, columns):
        text = text_of(row, columns)
        if tally.exceeded(encoder, text):
            return None
        tokens = encoder.document(text)
        if len(tokens) < 2:
            raise ValueError(f"`{columns.text}` has no token to predict: remove the row")
        return TextExample(tokens, context=1)
    return _answer(row, encoder, columns, tally)


def _answer(row: Row, encoder: Encoder, columns: ColumnNames, tally: DropReport) -> TextExample | None:
    demonstration = demonstration_of(row, columns)
    exchange = _exchange(demonstration.prompt, demonstration.response, template_arguments(row, columns), encoder, tally)
    return None if exchange is None else TextExample(exchange.prompt + exchange.response, context=len(exchange.prompt))


def _exchange(
    prompt: Prompt, answer: Answer, arguments: Mapping[str, Any], encoder: Encoder, tally: DropReport
) -> Exchange | None:
    """Tokenize prompt and answer; returns None if they are too long to be tokenized."""
    if tally.exceeded(encoder, prompt, answer):
        return None
    exchange = encoder.exchange(prompt, answer, arguments)
    tally.mended += exchange.mended
    return exchange


def _comparison(
    ranking: Ranking, arguments: Mapping[str, Any], encoder: Encoder, tally: DropReport
) -> ComparisonExample:
    exchanges = [_exchange(ranking.prompt, answer, arguments, encoder, tally) for answer in ranking.responses]
    texts = [array("i") if exchange is None else exchange.prompt + exchange.response for exchange in exchanges]
    indices = [index for index, text in enumerate(texts) if text and tally.fits(len(text))]
    tally.responses += len(texts)
    tally.long_responses += len(texts) - len(indices)
    order = sorted({ranking.places[index] for index in indices})
    ranks = [order.index(ranking.places[index]) for index in indices]
    strength = None if ranking.strength is None else [ranking.strength[index] for index in indices]
    systems = None if ranking.systems is None else [ranking.systems[index] for index in indices]
    contexts = [0 if exchange is None else len(exchange.prompt) for exchange in exchanges]
    return ComparisonExample(
        [texts[index] for index in indices], ranks, strength, systems, [contexts[index] for index in indices]
    )
