"""HTTP client of one vLLM server."""

from __future__ import annotations

import ipaddress
import logging
import time
from typing import Any
from urllib.parse import urlsplit

from lightning_rlhf.engines.engine import EngineError

logger = logging.getLogger(__name__)

PAUSE = 0.5
"""Seconds before the second try; each further pause is twice as long, up to `LONGEST_PAUSE`."""
LONGEST_PAUSE = 10.0
NO_JSON = "answered with something else than JSON: is that a vLLM server?"
NEEDED = "start it by `lightning-rlhf serve`, which sets what is needed"


class Client:
    """Connection to one server, for several threads.

    No proxy, redirect or other address than the given one is followed.

    Args:
        url: `http://HOST:PORT` or `https://HOST:PORT`.
        timeout: most seconds of one call.
        patience: seconds to try again where the server does not answer.
        private: accept plain HTTP to another machine.

    Raises:
        ValueError: the URL is none, or is plain HTTP to another machine.
        ImportError: `httpx` is not installed.

    Attributes:
        untied: whether the server needs the output layer as weights of its own.
    """

    def __init__(self, url: str, *, timeout: float, patience: float, private: bool) -> None:
        check_url(url, private=private)
        try:
            import httpx
        except ImportError as error:
            raise ImportError("an engine on a server needs httpx: pip install 'lightning-rlhf[vllm]'") from error
        self.url = url.rstrip("/")
        self.patience = patience
        self.untied = False
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.Client(timeout=timeout, limits=limits, trust_env=False, follow_redirects=False)
        self._lost = httpx.TransportError
        self._unsent = (httpx.ConnectError, httpx.ConnectTimeout)

    def get(self, path: str) -> dict[str, Any]:
        """Ask for a route.

        Raises:
            EngineError: the server does not answer, or refuses.
        """
        return self._called("GET", path, None, repeats=True, answers=True)

    def post(self, path: str, body: dict[str, Any], *, repeats: bool, answers: bool = True) -> dict[str, Any]:
        """Send a body to a route and return the answer, empty if it is none.

        Args:
            path: of the route.
            body: as JSON.
            repeats: whether the call may be made twice: a lost answer is then asked for again.
            answers: whether the route answers with JSON; others with a word that is left unread.

        Raises:
            EngineError: the server does not answer, or refuses.
        """
        return self._called("POST", path, body, repeats=repeats, answers=answers)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _called(
        self, method: str, path: str, body: dict[str, Any] | None, *, repeats: bool, answers: bool
    ) -> dict[str, Any]:
        deadline = time.monotonic() + self.patience
        pause = PAUSE
        while True:
            problem, again = self._tried(method, path, body)
            if not isinstance(problem, str):
                return problem
            if problem is NO_JSON and not answers:
                return {}
            if not (again or repeats) or time.monotonic() + pause > deadline:
                raise EngineError(f"the vLLM server at {self.url} {problem}")
            logger.warning("the vLLM server at %s %s; trying again in %.1f s", self.url, problem, pause)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _tried(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[dict[str, Any] | str, bool]:
        """Return the answer, or what went wrong and whether the call was never made.

        Raises:
            EngineError: the server refuses, so that asking again is in vain.
        """
        try:
            answer = self._http.request(method, self.url + path, json=body)
        except self._unsent as error:
            return f"cannot be reached ({error or type(error).__name__}): start it, then resume the run", True
        except self._lost as error:
            return f"did not answer {path} in full ({type(error).__name__}): see its log, then resume the run", False
        if answer.status_code >= 500:
            return f"failed at {path} (status {answer.status_code}: {_told(answer)}): see its log", False
        if answer.status_code in (403, 404, 405):
            raise EngineError(f"the vLLM server at {self.url} has no route {path} ({_told(answer)}): {NEEDED}")
        if answer.status_code >= 300:
            raise EngineError(f"the vLLM server at {self.url} refuses {path}: {_told(answer)}")
        if not answer.content:
            return {}, False
        try:
            values = answer.json()
        except ValueError:
            return NO_JSON, False
        return (values if isinstance(values, dict) else {}), False


def check_url(url: str, *, private: bool) -> None:
    """Raise ValueError unless a URL may be contacted.

    The routes of a server have no password: whoever reaches it can exchange its weights.

    Args:
        url: of a server.
        private: accept plain HTTP to another machine.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"`urls`: {url!r} is no address of a server; write http://127.0.0.1:8000")
    if parts.scheme == "http" and not private and not is_loopback(parts.hostname):
        raise ValueError(
            f"`urls`: {url} is plain HTTP to another machine, and a vLLM server for RLHF takes weights from whoever "
            "reaches it: set `private_network` to true if only your machines do"
        )


def is_loopback(host: str) -> bool:
    """Return True if an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _told(answer: Any) -> str:
    """Return what an answer says, on one line."""
    return " ".join(answer.text.split())[:300] or "no text"
