"""Requests to vLLM's token route and checks of its answers."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lightning_rlhf.engines.engine import EngineError, Request
from lightning_rlhf.engines.response_buffer import Sampled

ROUTE = "/inference/v1/generate"
PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Filters that a server's generation config may set, switched off."""


class Response(NamedTuple):
    """One response.

    Attributes:
        tokens: end token included.
        logprobs: of each token, nats.
    """

    tokens: list[int]
    logprobs: list[float]


def body_of(prompt: list[int], request: Request, *, label: str, model: str | None = None) -> dict[str, Any]:
    """Return the body that asks for k responses to one prompt.

    Responses end at the request's end tokens and at no others.

    Args:
        prompt: its token ids.
        request: what it is a part of.
        label: of the weights, which keeps prefixes that other weights computed apart.
        model: that is asked for; None is the server's own.
    """
    sampling = PLAIN | {
        "n": request.samples,
        "max_tokens": request.params.max_new_tokens,
        "temperature": 0.0 if request.is_greedy else request.params.temperature,
        "repetition_penalty": 1.0,
        "logprobs": 0,
        "ignore_eos": True,
        "stop_token_ids": list(request.end_tokens),
        "detokenize": False,
    }
    body = {"request_id": uuid.uuid4().hex, "token_ids": prompt, "sampling_params": sampling, "cache_salt": label}
    return body if model is None else body | {"model": model}


def responses_of(answer: dict[str, Any], body: dict[str, Any], *, label: str, url: str) -> list[Response]:
    """Return the responses of an answer after checking that they are whole and by the right weights.

    Args:
        answer: as it came.
        body: that was sent.
        label: of the weights that must have drawn every token.
        url: of the server, for the message.

    Raises:
        EngineError: the answer is of another request, a response is missing or incomplete, or other weights drew it.
    """
    wanted = body["sampling_params"]["n"]
    problem = None
    responses: list[Response] = []
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if not str(answer["request_id"]).endswith(body["request_id"]):
            problem = f"answered request {answer['request_id']}"
        elif [choice["index"] for choice in choices] != list(range(wanted)):
            problem = f"returned {len(choices)} responses"
        for choice in choices:
            problem = problem or _problem(choice, label, longest=body["sampling_params"]["max_tokens"])
            responses.append(Response(list(choice["token_ids"]), _logprobs(choice)))
    except (KeyError, TypeError, ValueError) as error:
        problem = f"left out or mistyped a field ({error!r})"
    if problem is not None:
        raise EngineError(
            f"the vLLM server at {url} {problem}, where {wanted} responses of one request by weights {label} were "
            "expected: it was restarted, another run uses it, or something between changes its answers. Resume the run "
            "with a server of its own"
        )
    return responses


def _problem(choice: dict[str, Any], label: str, *, longest: int) -> str | None:
    """Return what is wrong with a response; None if nothing is."""
    tokens = choice["token_ids"]
    content = choice["logprobs"]["content"]
    spans = choice["weight_versions"] or []
    versions = {span["version"] for span in spans}
    covered = sum(span["end"] - span["start"] for span in spans)
    if choice["finish_reason"] not in ("stop", "length"):
        return f"ended a response by {choice['finish_reason']!r}"
    if not 1 <= len(tokens) <= longest:
        return f"returned a response of {len(tokens)} tokens, 1 to {longest} were asked for"
    if [entry["token_id"] for entry in content] != tokens:
        return f"returned {len(content)} log-probs of other tokens than the {len(tokens)} of the response"
    if versions != {label} or covered != len(tokens):
        return f"drew {covered} of {len(tokens)} tokens by weights {', '.join(sorted(versions)) or 'without a name'}"
    return None


def _logprobs(choice: dict[str, Any]) -> list[float]:
    return [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]


def sampled_of(responses: Sequence[Response], request: Request, *, version: int) -> Sampled:
    """Combine responses into padded tensors on the device of the prompts.

    Args:
        responses: B·k, those of one prompt in consecutive rows.
        request: they answer.
        version: of the weights that drew them.
    """
    rows, length = len(responses), request.params.max_new_tokens
    tokens = torch.full((rows, length), request.end_tokens[0])
    mask = torch.zeros(rows, length, dtype=torch.bool)
    logprobs = torch.zeros(rows, length)
    for row, response in enumerate(responses):
        end = len(response.tokens)
        tokens[row, :end] = torch.tensor(response.tokens)
        mask[row, :end] = True
        logprobs[row, :end] = torch.tensor(response.logprobs)
    last = torch.tensor([response.tokens[-1] for response in responses])
    sampled = Sampled(
        tokens=tokens,
        response_mask=mask,
        ended=torch.isin(last, torch.tensor(list(request.end_tokens))),
        logprobs=logprobs,
        entropy=-logprobs,
        versions=torch.full_like(tokens, version),
    )
    return Sampled(*(field.to(request.prompts.tokens.device) for field in sampled))
