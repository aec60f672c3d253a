"""Checks that tokenizer, embeddings and chat template fit each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule

from lightning_rlhf.text import after_turn, end_tokens, turn_end

QUESTION, ANSWER = "How are you?", "Well, thank you."


def vocabulary_problems(module: LightningModule, tokenizer: Any) -> Iterator[str]:
    """Check that all tokens including the end and padding tokens have an embedding."""
    network = _model(module).network
    rows = network.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        yield (
            f"the tokenizer has ids up to {highest}, but the network embeds {rows} tokens: take the tokenizer that "
            f"stands beside the weights, or call resize_token_embeddings({highest + 1}) and save the model again"
        )
    for name in ("eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if token is not None and token >= rows:
            yield f"the tokenizer's {name} is {token}, but the network embeds {rows} tokens: set one that it knows"


def template_problems(tokenizer: Any) -> Iterator[str]:
    """Check that the chat template renders and keeps the texts."""
    if tokenizer.chat_template is None:
        return
    try:
        prompt, dialogue = _written(tokenizer)
    except Exception as error:  # a template is a program of somebody else's, and raises what it likes
        yield f"the chat template fails on a question and its answer ({error}): mend tokenizer.chat_template"
        return
    if QUESTION not in prompt or ANSWER not in dialogue:
        yield "the chat template does not write the content of a message: mend tokenizer.chat_template"


def template_warning(tokenizer: Any) -> str | None:
    """Warn if a prompt is no prefix of the dialogue with its answer; returns None if it is."""
    if tokenizer.chat_template is None:
        return None
    prompt, dialogue = _written(tokenizer)
    if dialogue.startswith(prompt):
        return None
    return (
        f"the chat template asks for an answer with {prompt[-40:]!r}, which is not in the dialogue with that answer: a "
        "model trained on dialogues is asked otherwise than it was taught; unless that is meant, mend the part of "
        "tokenizer.chat_template under add_generation_prompt"
    )


def end_report(module: LightningModule, tokenizer: Any) -> str:
    """List the tokens that end a response."""
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in _ends(module, tokenizer))
    return f"a response ends at any of: {names}"


def end_warnings(module: LightningModule, tokenizer: Any) -> Iterator[str]:
    """Warn of ends of a response that are not special tokens, in the template or the generation config."""
    after = after_turn(tokenizer)
    if after and turn_end(tokenizer) is None:
        yield (
            f"the chat template ends a turn with {after[:40]!r}, which is no special token: answers to dialogues are "
            f"taught to end with {tokenizer.eos_token!r} instead, which no turn in a prompt ends with; unless that is "
            "meant, let tokenizer.chat_template end turns with a special token"
        )
    special = {*end_tokens(tokenizer), *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for token in _ends(module, tokenizer):
        if token not in special:
            name = tokenizer.convert_ids_to_tokens(token)
            meant = "no token of the tokenizer" if name is None else f"{name!r}, an ordinary token of the tokenizer"
            yield (
                f"the generation config ends responses at token {token}, which is {meant}: set `eos_token_id` in "
                f"generation_config.json to {end_tokens(tokenizer)}"
            )


def _ends(module: LightningModule, tokenizer: Any) -> list[int]:
    """End tokens of the tokenizer and of the generation config, which a reward model has not."""
    config = getattr(_model(module).network, "generation_config", None)
    return end_tokens(tokenizer, getattr(config, "eos_token_id", None))


def _model(module: LightningModule) -> Any:
    return getattr(module, "policy", None) or module.model


def _written(tokenizer: Any) -> tuple[str, str]:
    """Render a question with the generation prompt, and the question with its answer."""
    asked = [{"role": "user", "content": QUESTION}]
    whole = [*asked, {"role": "assistant", "content": ANSWER}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return prompt, tokenizer.apply_chat_template(whole, tokenize=False)
