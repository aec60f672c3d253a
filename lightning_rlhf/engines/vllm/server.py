"""Engine that samples on vLLM servers."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.checks import check_count, check_positive
from lightning_rlhf.engines.engine import Engine, EngineError, Processes, Request
from lightning_rlhf.engines.response_buffer import Sampled
from lightning_rlhf.engines.vllm.answers import ROUTE, Response, body_of, responses_of, sampled_of
from lightning_rlhf.engines.vllm.canary import LIMIT, Canary, canary_tokens, trainer_logprobs
from lightning_rlhf.engines.vllm.client import Client, check_url
from lightning_rlhf.engines.vllm.local_server import LocalServer
from lightning_rlhf.engines.vllm.process import ServerProcess
from lightning_rlhf.engines.vllm.run_server import start_for_run
from lightning_rlhf.engines.vllm.sync import Sent, SharedFolder, WeightSync
from lightning_rlhf.engines.vllm.untied import UNTIED
from lightning_rlhf.models.policy import PolicyModel
from lightning_rlhf.types import Rollout

logger = logging.getLogger(__name__)

FEW = 8
"""Tokens below which a response says too little about its log-probs."""


@dataclass(kw_only=True, eq=False)
class VLLMServer(Engine):
    """Engine on one or several vLLM servers, which load today's weights before each rollout.

    Token ids go out and come back; nothing is tokenized twice. Every process of a run asks for its own prompts, and the
    first one sends the weights. That they arrived is checked by the version of each token, by the log-probs of a fixed
    text after every transfer and by those of each rollout. The servers draw random numbers of their own: a run on
    them does not repeat to the bit.

    `lightning-rlhf serve` starts a server with the options that it needs.
    """

    urls: Sequence[str] = ()
    """Addresses, such as `http://127.0.0.1:8000`; prompts are dealt to them in turn. No other address is contacted."""
    serve: LocalServer | None = None
    """Server that the run starts on its own machine and stops at its end, beside those of `urls`."""
    sync: WeightSync = field(default_factory=SharedFolder)
    """Way by which weights get there."""
    overlap: bool = False
    """Draw the next rollout while the policy learns from this one, by the weights from before."""
    concurrency: int = 256
    """Most prompts of a process that are asked for at the same time."""
    timeout: float = 600.0
    """Most seconds of one call."""
    patience: float = 60.0
    """Seconds to try again where a server does not answer."""
    tolerance: float | None = None
    """Largest mean difference between log-probs of servers and trainer, nats per token. None: three times that of a
    fixed text after the first transfer."""
    private_network: bool = False
    """Accept plain HTTP to other machines, because only yours reach them."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_count(concurrency=self.concurrency)
        check_positive(timeout=self.timeout, patience=self.patience)
        if self.tolerance is not None:
            check_positive(tolerance=self.tolerance)
        if not self.urls and self.serve is None:
            raise ValueError(
                "`urls` is empty: name a server, such as http://127.0.0.1:8000, or have one started by `serve`"
            )
        for url in self.urls:
            check_url(url, private=self.private_network)
        self._ranks: Processes | None = None
        self._own: ServerProcess | None = None
        self._clients: list[Client] = []
        self._canaries: list[Canary] = []
        self._canary_text: list[int] = []
        self._label = ""
        self._version = 0
        self._longest = 0
        self._bound = 0.0
        self._measured: dict[str, float] = {}

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        """True if the next rollout is drawn during the update."""
        return self.overlap

    def attach(self, ranks: Processes) -> None:
        """Take note of the processes, of which the first sends the weights."""
        self._ranks = ranks

    @torch.no_grad()
    def load(self, policy: PolicyModel, version: int) -> None:
        """Send today's weights to every server and check that they arrived."""
        if not self._clients:
            self._connect(policy)
        start = time.perf_counter()
        self._version, self._label = version, self._shared_label(version)
        dtype: Any = str(policy.computing_dtype(next(policy.parameters()).device.type)).removeprefix("torch.")
        problem: Exception | None = None
        sent: Sent | None = None
        try:
            sent = self.sync.send(policy, self._clients if self._sends else [], label=self._label, dtype=dtype)
        except Exception as error:  # any: the other processes wait
            problem = error
        seconds = time.perf_counter() - start
        trainer = trainer_logprobs(policy, self._canary_text)
        if sent is not None:
            try:
                apart = self._sing(trainer, sent)
                self._measured = {"sync/seconds": seconds, "sync/gib": sent.size / 2**30, "sync/canary": apart}
            except Exception as error:
                problem = error
        self._agree(problem)
        self._bound = self._of_first(max(canary.bound or 0.0 for canary in self._canaries))

    def generate(self, request: Request) -> Sampled:
        """Draw k responses to each prompt by concurrent requests whose order is restored."""
        prompts = request.prompts
        rows = [tokens[mask].tolist() for tokens, mask in zip(prompts.tokens.cpu(), prompts.mask.cpu(), strict=True)]
        longest = max(map(len, rows)) + request.params.max_new_tokens
        if longest > self._longest:
            raise EngineError(
                f"the vLLM servers take {self._longest} tokens, prompts and responses have up to {longest}: start them "
                "with a larger `--max-model-len`, or lower the data's `max_prompt_tokens` or `max_new_tokens`"
            )
        watch = self.watch if threading.current_thread() is threading.main_thread() else None
        if watch is not None:
            watch.begin(len(rows) * request.samples, torch.device("cpu"))
        responses: list[Response] = []
        with ThreadPoolExecutor(min(self.concurrency, len(rows))) as pool:
            calls = [pool.submit(self._ask, i, row, request) for i, row in enumerate(rows)]
            try:
                for call in calls:
                    responses += call.result()
                    if watch is not None:
                        watch.count(request.samples, sum(len(r.tokens) for r in responses[-request.samples :]))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # each that waits would be tried for `patience` seconds
                raise
        if watch is not None:
            watch.end()
        return sampled_of(responses, request, version=self._version)

    def confirm(self, rollout: Rollout, logprobs: Tensor, *, same_weights: bool) -> None:
        """Compare the servers' log-probs with the trainer's, for the rollout and for each response."""
        bound = self._bound if same_weights else max(self._bound, LIMIT)
        mask = rollout.response_mask
        apart = (rollout.sampler_logprobs - logprobs).abs().double() * mask
        lengths = mask.sum(1)
        of_rows = apart.sum(1) / lengths
        whole = float(apart.sum() / lengths.sum())
        allowed = bound * (1 + 6 / lengths.double().sqrt())
        wrong = ((of_rows > allowed) & (lengths >= FEW)).nonzero().flatten().tolist()
        self._measured["sync/gap"] = whole
        if whole <= bound and not wrong:
            self._agree(None)
            return
        which = f"those of response {wrong[0]} by {float(of_rows[wrong[0]]):.3g}" if wrong else f"by {whole:.3g}"
        problem = EngineError(
            f"log-probs of the vLLM servers differ from the trainer's, {which} nats per token, and the bound is "
            f"{bound:.3g}: a server returns them before the temperature (`--logprobs-mode processed_logprobs`), has "
            "other weights, or answers with other requests' responses. Restart it by `lightning-rlhf serve` and resume "
            "the run; if the precision of the server explains it, set `tolerance`"
        )
        self._agree(problem)

    def metrics(self) -> dict[str, float]:
        """Return what to log: differences, and seconds and GiB of the transfer since the last call (0 without one)."""
        measured = super().metrics() | self._measured
        self._measured |= {name: 0.0 for name in ("sync/seconds", "sync/gib") if name in self._measured}
        return measured

    def close(self) -> None:
        """Close connections and remove what was written."""
        self.sync.close()
        for client in self._clients:
            client.close()
        self._clients = []
        if self._own is not None:
            self._own.stop()
        self._own = None

    def _ask(self, number: int, row: list[int], request: Request) -> list[Response]:
        """Return the responses to a prompt, from the server whose turn it is."""
        rank = 0 if self._ranks is None else self._ranks.rank
        client = self._clients[(number + rank) % len(self._clients)]
        body = body_of(row, request, label=self._label, model=self.sync.model(self._label))
        return responses_of(client.post(ROUTE, body, repeats=True), body, label=self._label, url=client.url)

    def _connect(self, policy: PolicyModel) -> None:
        """Connect to every server."""
        options = {"timeout": self.timeout, "patience": self.patience, "private": self.private_network}
        urls = list(self.urls)
        if self.serve is not None:
            self._own, started = start_for_run(policy, self.serve, self._ranks)
            urls.append(started)
        self._clients = [Client(url, **options) for url in urls]  # type: ignore[arg-type]
        self._canaries = [Canary(self.tolerance) for _ in self._clients]
        self._canary_text = canary_tokens(policy)
        problem: Exception | None = None
        try:
            self._longest = min(_greeted(client) for client in self._clients)
        except Exception as error:
            problem = error
        try:
            self._agree(problem)
        except Exception:
            self.close()
            raise

    def _sing(self, trainer: Tensor, sent: Sent) -> float:
        """Check every server's log-probs of the fixed text and return the largest mean difference."""
        body = {
            "token_ids": self._canary_text,
            "sampling_params": {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False},
            "cache_salt": self._label,
            "model": self.sync.model(self._label),
        }
        apart = 0.0
        for client, canary in zip(self._clients, self._canaries, strict=True):
            told = client.post(ROUTE, body, repeats=True).get("prompt_logprobs") or []
            if len(told) != len(self._canary_text):
                raise EngineError(f"the vLLM server at {client.url} returned no log-probs of the fixed text")
            pairs = zip(told[1:], self._canary_text[1:], strict=True)
            try:
                server = torch.tensor([of[str(token)]["logprob"] for of, token in pairs], dtype=torch.float64)
            except (KeyError, TypeError) as error:
                raise EngineError(
                    f"the vLLM server at {client.url} returned log-probs of another text than the fixed one ({error!r})"
                ) from error
            apart = max(apart, canary.check(server, trainer, weights=sent.fingerprint, url=client.url))
        return apart

    @property
    def _sends(self) -> bool:
        """True if this process sends the weights."""
        return self._ranks is None or self._ranks.rank == 0

    def _shared_label(self, version: int) -> str:
        """Return a name of the weights that no other run gives, the same on every process."""
        label = f"{version}-{uuid.uuid4().hex[:8]}" if self._sends else ""
        return label if self._ranks is None else self._ranks.gather_text(label)

    def _of_first(self, number: float) -> float:
        """Return a number of the process that sends the weights."""
        if self._ranks is None:
            return number
        mine = torch.tensor(number if self._sends else 0.0, dtype=torch.float64, device=self._ranks.device)
        return float(self._ranks.sum(mine))

    def _agree(self, problem: Exception | None) -> None:
        """Raise on every process if one has a problem."""
        if self._ranks is not None:
            self._ranks.agree(problem)
        elif problem is not None:
            raise problem


def _greeted(client: Client) -> int:
    """Check that a server has the routes and return the most tokens that it takes.

    Raises:
        EngineError: it does not answer, or is started otherwise.
    """
    version = client.get("/version").get("version", "unknown")
    model: dict[str, Any] = next(iter(client.get("/v1/models").get("data") or []), {})
    client.get("/weight_info")
    client.untied = model.get("id") == UNTIED
    logger.info("sampling on vLLM %s at %s", version, client.url)
    return int(model.get("max_model_len") or 0)
