"""Digests of rows and of their tokens, which identify the data of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from lightning_rlhf.data.records import Located


class HashedRecords(Sequence[Located]):
    """Records whose rows are hashed as they are read.

    Args:
        records: what is read.
    """

    def __init__(self, records: Sequence[Located]) -> None:
        self._records = records
        self._hash = hashlib.blake2b(digest_size=8)

    def __len__(self) -> int:
        """Number of rows in the records."""
        return len(self._records)

    @overload
    def __getitem__(self, place: int) -> Located: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Located]: ...

    def __getitem__(self, place: int | slice) -> Any:
        """Return a record without hashing it."""
        return self._records[place]

    def __iter__(self) -> Iterator[Located]:
        """Yield each record in order and hash its row."""
        for record in self._records:
            with record.located():
                self._hash.update(json.dumps(record.row, sort_keys=True, default=str).encode() + b"\n")
            yield record

    @property
    def digest(self) -> str:
        """Return the digest of all rows read so far."""
        return self._hash.hexdigest()


def digest_of_tokens(examples: Iterable[Any]) -> str:
    """Return the digest of the tokens of prompts, texts or comparisons."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        texts: Sequence[array[int]] = example.texts if hasattr(example, "texts") else [example.tokens]
        for tokens in texts:
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()
