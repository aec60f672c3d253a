"""Conversion of text and dialogues to token ids, for data and rewards."""

from lightning_rlhf.text.continuation import Continuation
from lightning_rlhf.text.encoder import LONG_TEXT, Encoder, Exchange, Tokens, load_tokenizer
from lightning_rlhf.text.ends import after_turn, end_tokens, turn_end
from lightning_rlhf.text.messages import Message, Prompt, as_dialogue, checked_answer, checked_messages, checked_prompt

__all__ = [
    "LONG_TEXT",
    "Continuation",
    "Encoder",
    "Exchange",
    "Message",
    "Prompt",
    "Tokens",
    "after_turn",
    "as_dialogue",
    "checked_answer",
    "checked_messages",
    "checked_prompt",
    "end_tokens",
    "load_tokenizer",
    "turn_end",
]
