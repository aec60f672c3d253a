"""Whether tokenizer, embeddings and chat template fit each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule

QUESTION, ANSWER = "How are you?", "Well, thank you."


def vocabulary_problems(module: LightningModule, tokenizer: Any) -> Iterator[str]:
    """Tokens without an embedding, and an end token that no response can have."""
    network = (getattr(module, "policy", None) or module.model).network
    rows = network.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        yield (
            f"the tokenizer has ids up to {highest}, but the network embeds {rows} tokens: take the tokenizer that "
            f"stands beside the weights, or call resize_token_embeddings({highest + 1}) and save the model again"
        )
    for name in ("eos_token_id", "pad_token_id"):
        found = getattr(tokenizer, name)
        if found is not None and found >= rows:
            yield f"the tokenizer's {name} is {found}, but the network embeds {rows} tokens: set one that it knows"


def template_problems(tokenizer: Any) -> Iterator[str]:
    """A template that fails or loses the texts."""
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
    """What to say where the prompt for an answer is not how the dialogue with that answer begins."""
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


def _written(tokenizer: Any) -> tuple[str, str]:
    """A question with the generation prompt, and the question with its answer."""
    asked = [{"role": "user", "content": QUESTION}]
    whole = [*asked, {"role": "assistant", "content": ANSWER}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return prompt, tokenizer.apply_chat_template(whole, tokenize=False)
