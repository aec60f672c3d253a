"""Engine that draws given turns."""

from __future__ import annotations

import torch

from lightning_rlhf.engines import Engine
from lightning_rlhf.engines.response_buffer import Sampled
from lightning_rlhf.text import Encoder


class Says(Engine):
    """Draws given turns, one after the other."""

    is_external = False

    def __init__(self, read, turns: list[str]) -> None:
        self.turns = [[*read(turn, add_special_tokens=False).input_ids, Encoder(read).turn_end] for turn in turns]
        self.asked: list[list[int]] = []

    def load(self, policy, version):
        return

    def generate(self, request):
        ids = self.turns[len(self.asked)]
        self.asked.append(request.prompts.tokens[0][request.prompts.mask[0]].tolist())
        tokens = torch.zeros(1, request.params.max_new_tokens, dtype=torch.long)
        tokens[0, : len(ids)] = torch.tensor(ids)
        mask = torch.arange(tokens.shape[1]).unsqueeze(0) < len(ids)
        numbers = torch.where(mask, -1.0, 0.0)
        return Sampled(tokens, mask, torch.tensor([True]), numbers, -numbers, mask.long() * 0)
