"""Text and dialogues as token ids: what data and rewards both need."""

from lightning_rlhf.text.encoder import Encoder, Tokens, load_tokenizer
from lightning_rlhf.text.messages import Message, Prompt, as_dialogue, checked_answer, checked_messages, checked_prompt

__all__ = [
    "Encoder",
    "Message",
    "Prompt",
    "Tokens",
    "as_dialogue",
    "checked_answer",
    "checked_messages",
    "checked_prompt",
    "load_tokenizer",
]
