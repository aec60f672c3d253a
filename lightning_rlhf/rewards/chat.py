"""Concurrent client of an OpenAI-compatible chat endpoint that tries again and keeps answers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lightning_rlhf.core.checks import check_count, check_not_negative, check_positive
from lightning_rlhf.rewards.answer_store import AnswerStore
from lightning_rlhf.rewards.concurrent import each_awaited, in_loop

logger = logging.getLogger(__name__)

PAUSE = 0.5
"""Seconds before the second try; each further pause is twice as long, up to `LONGEST_PAUSE`, less up to a half."""
LONGEST_PAUSE = 20.0
JSON = {"Content-Type": "application/json"}
BUSY = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""


class Reading(NamedTuple):
    """Value read from an answer.

    Attributes:
        value: what it says; None if no answer could be read.
        text: the last answer.
    """

    value: float | None
    text: str


class _Trouble(Exception):
    """Failure of one try after which another may succeed; `pause` is the server's wish in seconds."""

    def __init__(self, told: str, pause: float = 0.0) -> None:
        super().__init__(told)
        self.pause = pause


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """Model behind an OpenAI-compatible endpoint, which is sent one message and answers with text.

    A lost connection, a timeout, and the statuses 429 and 5xx are tried again for `patience` seconds, `Retry-After` is
    heeded. No proxy and no redirect is followed. The key is read from the environment when it is used and stands in no
    config, log, error, file or checkpoint.

    Raises:
        ValueError: an argument is out of range, the URL is none, or a key would be sent over plain HTTP to another
            machine.
        ImportError: `httpx` is not installed.
    """

    url: str
    """Up to `/v1`, such as `http://127.0.0.1:8000/v1`."""
    model: str
    """Name by which the server knows it."""
    key_from: str | None = None
    """Name of the environment variable that holds the API key; None sends no key."""
    temperature: float = 0.0
    """≥ 0; 0 is greedy."""
    max_tokens: int = 1024
    """Most tokens of an answer."""
    seed: int = 0
    """Of the server's sampling."""
    attempts: int = 3
    """Number of times a prompt is asked whose answer can't be read: each with the next seed, and from the second on at
    a temperature of 1 where it is 0."""
    fields: dict[str, Any] | None = None
    """Further fields of the request. None as a value leaves a field out, in Python or a config file:
    `{max_tokens: null, max_completion_tokens: 1024}`."""
    timeout: float = 120.0
    """Most seconds of one call."""
    patience: float = 120.0
    """Seconds to try again after the first failure of a call."""
    concurrency: int = 16
    """Most calls at a time, of each process."""
    cache: str | None = None
    """Folder of answers, which several processes and runs may share; None keeps none. An answer is known by model,
    message and sampling settings, and not by the URL: give two servers whose models only share a name two folders."""

    def __post_init__(self) -> None:
        if find_spec("httpx") is None:
            raise ImportError("a chat model needs httpx: pip install 'lightning-rlhf[rewards]', or httpx alone")
        check_not_negative(temperature=self.temperature, patience=self.patience)
        check_positive(timeout=self.timeout)
        check_count(max_tokens=self.max_tokens, attempts=self.attempts, concurrency=self.concurrency)
        _check_url(self.url, with_key=self.key_from is not None)
        if self.key_from is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_from):
            raise ValueError("`key_from` must be the name of an environment variable such as OPENAI_API_KEY, not a key")

    def identity(self) -> dict[str, Any]:
        """Describe what decides the answers."""
        names = ("model", "temperature", "max_tokens", "seed", "attempts", "fields")
        return {name: getattr(self, name) for name in names}

    def key(self) -> str | None:
        """Return the API key.

        Raises:
            ValueError: the environment variable is not set, or holds no key.
        """
        if self.key_from is None:
            return None
        key = os.environ.get(self.key_from, "").strip()
        if not key:
            raise ValueError(f"`key_from`: the environment variable {self.key_from} is not set: export the key in it")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"`key_from`: the key in {self.key_from} holds a space or a character that no header takes"
            )
        return key

    def readings(
        self,
        messages: Mapping[int, str],
        read: Callable[[str], float | None],
        *,
        prompts: Sequence[Any],
        source: str,
    ) -> dict[int, Reading]:
        """Ask for an answer to each message and read it.

        Args:
            messages: by row.
            read: value of an answer, None if it has none.
            prompts: of all rows, for the error.
            source: who asks, for the error.

        Raises:
            RuntimeError: the server refuses or was lost; the row is named.
            ValueError: there is no key.
        """
        key = self.key()

        async def ask_all() -> list[Reading | None]:
            async with _Session(self, key) as session:

                async def ask(i: int) -> Reading | None:
                    return await session.reading(messages[i], read) if i in messages else None

                return await each_awaited(ask, prompts, most=self.concurrency, source=source)

        return {i: reading for i, reading in enumerate(in_loop(ask_all)) if reading is not None}

    def body(self, message: str, attempt: int) -> dict[str, Any]:
        """Return the request without the fields that are left out.

        Args:
            message: text.
            attempt: number of times the message was asked before.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": self.temperature or float(attempt > 0),
            "max_tokens": self.max_tokens,
            "seed": self.seed + attempt,
        } | (self.fields or {})
        return {name: value for name, value in body.items() if value is not None}


class _Session:
    """Connections to the endpoint in one event loop."""

    def __init__(self, chat: ChatModel, key: str | None) -> None:
        import httpx

        self._chat, self._key = chat, key
        self._url = f"{chat.url.rstrip('/')}/chat/completions"
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=chat.concurrency)
        self._http = httpx.AsyncClient(
            timeout=None, limits=limits, headers=headers, trust_env=False, follow_redirects=False
        )
        self._lost = httpx.TransportError
        self._store = None if chat.cache is None else AnswerStore(chat.cache)

    async def __aenter__(self) -> _Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def reading(self, message: str, read: Callable[[str], float | None]) -> Reading:
        """Ask until an answer can be read, `attempts` times at most."""
        text, fresh = "", []
        for attempt in range(self._chat.attempts):
            body = self._chat.body(message, attempt)
            kept = None if self._store is None else self._store.get(body)
            text = await self._answer(body) if kept is None else kept
            if kept is None:
                fresh.append((body, text))
            value = read(text)
            if value is not None:
                self._keep(fresh)
                return Reading(value, text)
        return Reading(None, text)

    def _keep(self, answers: list[tuple[dict[str, Any], str]]) -> None:
        """Keep answers that led to a value, so that what can't be read is asked again in another run."""
        if self._store is not None:
            for body, text in answers:
                self._store.put(body, text)

    async def _answer(self, body: dict[str, Any]) -> str:
        """Return the answer to a request, tried again where that may help.

        Raises:
            RuntimeError: the server refuses, or was lost for too long.
        """
        deadline, pause = None, PAUSE
        while True:
            try:
                async with asyncio.timeout(self._chat.timeout):
                    return await self._tried(body)
            except TimeoutError:
                problem = _Trouble(f"did not answer within {self._chat.timeout:g} s")
            except _Trouble as trouble:
                problem = trouble
            now = time.monotonic()
            deadline = now + self._chat.patience if deadline is None else deadline
            wait = max(problem.pause, pause * (0.5 + _CHANCE.random() / 2))
            if now + wait > deadline:
                told = f" and wants a pause of {problem.pause:.0f} s" if problem.pause > self._chat.patience else ""
                raise RuntimeError(f"the server at {self._chat.url} {problem}{told}: see to it, then resume the run")
            logger.warning("the server at %s %s; trying again in %.1f s", self._chat.url, problem, wait)
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _tried(self, body: dict[str, Any]) -> str:
        try:
            answer = await self._http.post(self._url, content=json.dumps(body), headers=JSON)
        except self._lost as error:
            what = "cannot be reached" if "Connect" in type(error).__name__ else "broke off its answer"
            raise _Trouble(f"{what} ({self._safe(str(error)) or type(error).__name__})") from None
        status, told = answer.status_code, self._safe(answer.text)
        if status >= 500 or status in BUSY:
            raise _Trouble(f"is busy or failed (status {status}: {told})", _pause(answer.headers.get("retry-after")))
        if status in (401, 403):
            name = self._chat.key_from
            hint = "name the variable that holds a key in `key_from`" if name is None else f"see the key in {name}"
            raise RuntimeError(f"the server at {self._chat.url} wants another key (status {status}: {told}): {hint}")
        if status == 404:
            raise RuntimeError(
                f"the server at {self._chat.url} has no model {self._chat.model!r} or no chat there ({told}): a `url` "
                "mostly ends in /v1"
            )
        if status >= 300:
            raise RuntimeError(f"the server at {self._chat.url} refuses the request (status {status}: {told})")
        try:
            return _content(answer.json())
        except (ValueError, KeyError, IndexError, TypeError):
            raise RuntimeError(
                f"the server at {self._chat.url} answered with something else than a chat: {told}"
            ) from None

    def _safe(self, text: str) -> str:
        """Return the start of a text on one line without the key, which some servers repeat."""
        text = " ".join(text.split())
        return (text if self._key is None else text.replace(self._key, "…"))[:300] or "no text"


_CHANCE = random.Random()
"""Of the pauses alone, so that no seed of the run moves."""


def _content(answer: Mapping[str, Any]) -> str:
    """Return the text of an answer, empty where a reasoning model ran out of tokens before it."""
    return str(answer["choices"][0]["message"]["content"] or "")


def _pause(wanted: str | None) -> float:
    """Return the seconds of a header `Retry-After`, which is a number or a date."""
    if wanted is None:
        return 0.0
    try:
        return max(0.0, float(wanted))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(wanted).timestamp() - time.time())
    except ValueError:
        return 0.0


def _check_url(url: str, *, with_key: bool) -> None:
    """Raise ValueError unless it is an address without secrets in it to which a key may be sent."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise ValueError("`url` must hold no name, password or query, which would stand in logs: use `key_from`")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"`url`: {url!r} is no address of a server; write http://127.0.0.1:8000/v1")
    if with_key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"`url`: {url} is plain HTTP to another machine, where a key could be read: write https://")
