"""The network that samples: the same numbers, other weights, nothing of the policy touched."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from lightning_rlhf.models import sampling_copy as module
from lightning_rlhf.models.sampling_copy import PackedLinear, make_actor

TOKENS = torch.tensor([[12, 13, 14, 15], [20, 21, 22, 23]])


def logits(network):
    with torch.no_grad():
        return network(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_same_precision_shares_the_weights(make_lm, kind):
    network = make_lm(kind).train()
    twin = make_actor(network, torch.float32, passes=1)
    assert not twin.training
    assert network.training
    pointers = {p.data_ptr() for p in network.parameters()}
    assert {p.data_ptr() for p in twin.parameters()} == pointers
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert torch.equal(logits(twin), logits(network.eval()))


def test_low_precision_is_a_copy_with_its_tied_weights_and_buffers(make_lm):
    network = make_lm("llama", tie_word_embeddings=True).eval()
    before = copy.deepcopy(network.state_dict())
    twin = make_actor(network, torch.bfloat16, passes=1)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.allclose(logits(twin).float(), logits(network), rtol=0.1, atol=0.2)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.skipif(not module._can_pack("cpu", torch.float32), reason="this torch cannot pack linear maps")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_packed_maps_compute_the_same(make_lm, dtype, tolerance):
    network = make_lm("llama").eval()
    plain, packed = (make_actor(network, dtype, passes=passes) for passes in (module.WORTH_PACKING - 1, 64))
    kinds = [type(m) for m in packed.modules()]
    assert kinds.count(PackedLinear) == 2 * 7 + 1
    assert not any(type(m) is PackedLinear for m in plain.modules())
    assert torch.allclose(logits(packed).float(), logits(plain).float(), rtol=0, atol=tolerance)
    assert type(network.lm_head) is torch.nn.Linear


def test_hooked_maps_stay_as_they_are(make_lm):
    network = make_lm("llama").eval()
    network.lm_head.register_forward_hook(lambda *args: args[2] + 1.0)
    twin = make_actor(network, torch.float32, passes=64)
    assert type(twin.lm_head) is torch.nn.Linear
    assert torch.allclose(logits(twin), logits(network), rtol=0, atol=1e-4)


def test_missing_operators_leave_the_maps_unpacked(make_lm, monkeypatch):
    def missing(*_):
        raise AttributeError("no such operator")

    module._can_pack.cache_clear()
    monkeypatch.setattr(module.PackedLinear, "__init__", missing)
    twin = make_actor(make_lm("llama").eval(), torch.float32, passes=64)
    module._can_pack.cache_clear()
    assert type(twin.lm_head) is torch.nn.Linear


def test_adapter_is_folded_in_and_the_policy_keeps_it(make_lm):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    network = peft.get_peft_model(make_lm("llama").double().eval(), config)
    before, state = logits(network), copy.deepcopy(network.state_dict())
    twin = make_actor(network, torch.float64, passes=1)
    assert not any("lora" in name for name, _ in twin.named_parameters())
    assert torch.allclose(logits(twin), before, rtol=0, atol=1e-11)
    assert torch.equal(logits(network), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    with network.disable_adapter():
        assert float((logits(network) - before).abs().max()) > 0.1


def test_network_that_reads_its_weights_stays_unpacked():
    torch.manual_seed(0)
    network = MambaForCausalLM(MambaConfig(vocab_size=36, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    for _ in range(2):
        twin = make_actor(network, torch.float32, passes=64)
        assert not any(type(m) is PackedLinear for m in twin.modules())
        assert torch.allclose(logits(twin), logits(network), rtol=0, atol=1e-5)


class Doubled(PackedLinear):
    """A packed map that is wrong."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.skipif(not module._can_pack("cpu", torch.float32), reason="this torch cannot pack linear maps")
@pytest.mark.parametrize("silent", [[0, 1], list(range(36))])
def test_packed_maps_are_not_trusted_for_tokens_without_embedding(make_lm, monkeypatch, silent):
    """Logits that are 0 agree with anything."""
    network = make_lm("llama").eval()
    network.model.embed_tokens.weight.data[silent] = 0
    monkeypatch.setattr(module, "_UNPACKABLE", set())
    monkeypatch.setattr(module, "PackedLinear", Doubled)
    twin = make_actor(network, torch.float32, passes=64)
    assert not any(isinstance(m, PackedLinear) for m in twin.modules())
    monkeypatch.undo()
    assert torch.equal(logits(twin), logits(network))
