"""QLoRA: rounded weights under an adapter, which is trained, sampled from, saved and folded into those in full."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from gathered import gathered
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_rlhf.distributed import strategies
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource, PolicyModel, ScalarModel
from lightning_rlhf.models.adapter import merged
from lightning_rlhf.models.quantization import is_quantized, shared
from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule
from lightning_rlhf.modules.networks import build_policy
from lightning_rlhf.types import ComparisonBatch

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = ["nf4", "int8"]


def lora(**options) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", **options)


@pytest.fixture
def folder(make_lm, toy_tokenizer, tmp_path):
    """A model whose layers are whole blocks of 64 weights."""
    PolicyModel(make_lm("llama", width=64, attn_implementation="eager"), toy_tokenizer).save_pretrained(tmp_path / "m")
    return str(tmp_path / "m")


@pytest.fixture
def source(folder):
    return partial(ModelSource, path=folder, peft=lora())


def layers(network):
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def rounded(layer) -> torch.Tensor:
    """The weight that a quantized layer stands for."""
    weight = layer.base_layer.weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.data.float() * (layer.base_layer.state.SCB if weight.SCB is None else weight.SCB)[:, None] / 127


@torch.no_grad()
def moved(network) -> None:
    """As if it had been trained: the adapter's start is 0."""
    torch.manual_seed(1)
    for weight in network.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn_like(weight) * 0.1)


def twin_of(network, folder):
    """The dense network with the rounded weights and the same adapter."""
    dense = ModelSource(path=folder, peft=lora()).causal_lm()
    dense.load_state_dict({n: w for n, w in network.state_dict().items() if "lora_" in n}, strict=False)
    for mine, theirs in zip(layers(dense).values(), layers(network).values(), strict=True):
        mine.base_layer.weight.data = rounded(theirs)
    return dense


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("kind", "near"), [("nf4", 1e-5), ("int8", 1e-3)])  # int8 in float16
def test_layers_and_their_gradients_are_those_of_the_rounded_weight(source, kind, near):
    network = source(quantization=kind).causal_lm()
    moved(network)
    for name, layer in layers(network).items():
        given = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        x, theirs = given.clone().requires_grad_(), given.clone().requires_grad_()
        a, b = (part["default"].weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
        y = layer(x)
        z = theirs @ rounded(layer).T + layer.scaling["default"] * theirs @ a.T @ b.T
        weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
        (y * weight).sum().backward()
        (z * weight).sum().backward()
        mine = x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        assert apart(y, z) < near, name
        assert all(apart(*pair) < near for pair in zip(mine, (theirs.grad, a.grad, b.grad), strict=True)), name
        assert layer.base_layer.weight.grad is None


def test_passes_and_gradients_are_those_of_the_rounded_weights(source, folder):
    network = source(quantization="nf4").causal_lm()
    moved(network)
    tokens = torch.randint(3, 36, (3, 7), generator=torch.Generator().manual_seed(0))
    dense, gradients = twin_of(network, folder), []
    for one in (network, dense):
        one(tokens).logits.log_softmax(-1)[..., 5].sum().backward()
        gradients.append({n: w.grad for n, w in one.named_parameters() if w.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lora_" in name for name in gradients[0])
    assert all(apart(gradient, gradients[1][name]) < 1e-4 for name, gradient in gradients[0].items())
    with torch.no_grad():
        assert apart(network(tokens).logits, dense(tokens).logits) < 1e-5
        other = ModelSource(path=folder, peft=lora()).causal_lm()  # negative control: without rounding it is another
        other.load_state_dict({n: w for n, w in network.state_dict().items() if "lora_" in n}, strict=False)
        assert apart(network(tokens).logits, other(tokens).logits) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_eval_mode_compute_alike(source, kind):
    """And no pass without gradient takes the gradient from a later one."""
    network = source(quantization=kind).causal_lm()
    tokens = torch.randint(3, 36, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        evaluated = network.eval()(tokens).logits
    trained = network.train()(tokens).logits
    assert torch.allclose(evaluated, trained, rtol=0, atol=1e-6)
    trained.sum().backward()
    assert max(float(w.grad.abs().max()) for n, w in network.named_parameters() if "lora_B" in n) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_response_depends_on_those_beside_it(source, kind):
    network = source(quantization=kind).causal_lm()
    layer = next(iter(layers(network).values()))
    rows = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    beside = rows.clone()
    beside[2] *= 100
    with torch.no_grad():
        assert torch.equal(layer(rows)[:2], layer(beside)[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_and_the_embedding_keep_their_precision(source, kind):
    network = source(quantization=kind).causal_lm().get_base_model()
    assert type(network.lm_head) is torch.nn.Linear
    assert network.model.embed_tokens.weight.dtype == torch.float32
    scorer = ScalarModel(source(quantization=kind).scorer(new_head=True))
    assert scorer._bare().score.original_module.weight.dtype == torch.float32
    assert is_quantized(scorer.network)


@pytest.fixture
def make_ppo(source, token_reward):
    def make(kind: str | None, **options) -> PPOModule:
        usual = {
            "policy": source(quantization=kind),
            "reward": token_reward(),
            "generation": SamplingParams(max_new_tokens=6),
            "shaping": (),
            "lr": 0.01,
        }
        return PPOModule(**gathered(**(usual | options)))

    return make


PROMPTS = [[12, 13], [10], [14, 15, 16, 11], [17]]


@pytest.fixture
def fit(make_trainer, as_loader, left_padded):
    def run(module, steps: int, ckpt_path=None, **options):
        torch.manual_seed(0)  # of the adapter's start
        trainer = make_trainer(max_steps=steps, max_epochs=-1, precision="32-true", **options)
        trainer.fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 4), ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_trains_the_adapter_alone_and_resumes_to_the_bit(make_ppo, fit, tmp_path, kind):
    whole, first, resumed = make_ppo(kind), make_ppo(kind), make_ppo(kind)
    torch.manual_seed(0)
    whole.configure_model()
    before = {name: weight.detach().clone() for name, weight in whole.policy.named_parameters()}
    fit(whole, 4)
    after = dict(whole.policy.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name, weight in after.items() if weight.requires_grad
    }
    fit(first, 2).save_checkpoint(tmp_path / "two.ckpt")
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    assert {name for name in state if name.startswith("policy.")} == {
        f"policy.{name}" for name, weight in after.items() if weight.requires_grad
    }
    fit(resumed, 4, ckpt_path=tmp_path / "two.ckpt")
    for name, weight in resumed.policy.named_parameters():
        assert torch.equal(weight, after[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_and_trainer_agree_and_the_reference_is_the_rounded_model(make_ppo, fit, kind):
    module = make_ppo(kind)
    fit(module, 1)
    logged = module.trainer.callback_metrics
    assert float(logged["objective/kl"]) == pytest.approx(0.0, abs=1e-4)
    rollout = module.outcome.scored.rollout if hasattr(module.outcome, "scored") else module.outcome.rollout
    gap = (rollout.sampler_logprobs - rollout.ref_logprobs)[rollout.response_mask].abs().max()
    assert float(gap) < 1e-3  # the first rollout: the adapter is 0
    assert module.reference.frozen is None


def test_what_samples_shares_all_weights_and_has_modes_of_its_own(source):
    network = source(quantization="nf4").causal_lm().train()
    actor = shared(network).eval()
    assert network.training
    assert not any(module.training for module in actor.modules())
    assert all(mine is theirs for mine, theirs in zip(actor.parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_export_folds_the_adapter_into_the_weights_in_full(source, folder, toy_tokenizer, tmp_path, kind):
    policy = PolicyModel(source(quantization=kind).causal_lm(), toy_tokenizer)
    moved(policy.network)
    policy.save_pretrained(tmp_path / "whole", merge_adapter=True)
    policy.save_pretrained(tmp_path / "adapter")
    found, before = load_file(tmp_path / "whole" / "model.safetensors"), load_file(f"{folder}/model.safetensors")
    changes = {name: layer.get_delta_weight("default") for name, layer in layers(policy.network).items()}
    for name, weight in before.items():
        change = next((d for n, d in changes.items() if n.endswith(name.removesuffix(".weight"))), torch.zeros(()))
        assert torch.allclose(found[name], weight + change, rtol=0, atol=1e-6), name
    assert sum(float(change.abs().max()) > 0.01 for change in changes.values()) == len(changes)
    tokens = torch.randint(3, 36, (2, 5), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    again = ModelSource(path=str(tmp_path / "adapter")).causal_lm().eval()
    assert "quantization_config" not in (tmp_path / "whole" / "config.json").read_text()
    assert torch.allclose(loaded(tokens).logits, again(tokens).logits, rtol=0, atol=1e-5)


def test_weights_take_a_quarter_or_half_of_those_in_bfloat16(source, folder):
    def size(network) -> int:
        names = [name for name, _ in layers(network).items()]
        bases = [network.get_submodule(name).base_layer.weight for name in names]
        return sum(weight.numel() * weight.element_size() for weight in bases)

    half = size(ModelSource(path=folder, peft=lora(), dtype="bfloat16").causal_lm())
    assert size(source(quantization="nf4", dtype="bfloat16").causal_lm()) == half / 4
    assert size(source(quantization="int8", dtype="bfloat16").causal_lm()) == half / 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft": None}, "only an adapter can be trained on them: set `peft`"),
        ({"gguf_file": "x.gguf"}, "give a folder of safetensors"),
        ({"dtype": "float64"}, "set `dtype` to bfloat16"),
        ({"quantization": "nf3"}, "there are only nf4 and int8"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(source, options, said):
    with pytest.raises(ValueError, match=said):
        source(**({"quantization": "nf4"} | options))


def test_policy_without_an_adapter_and_compiling_are_refused(source):
    network = source(quantization="nf4").causal_lm()
    with pytest.raises(ValueError, match="`compile` and `quantization` do not go together"):
        PolicyModel(network).compile_backbone()
    with pytest.raises(ValueError, match="only an adapter can be trained on them, and it has none"):
        build_policy(network.unload(), None)


def test_export_draws_no_random_number(source, tmp_path):
    policy = PolicyModel(source(quantization="nf4").causal_lm())
    before = torch.get_rng_state()
    policy.save_pretrained(tmp_path / "whole", merge_adapter=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_folder_of_an_adapter_alone_is_refused(source, tmp_path):
    PolicyModel(source().causal_lm()).save_pretrained(tmp_path / "adapter")
    other = ModelSource(path=str(tmp_path / "adapter"), peft=lora(), quantization="nf4")
    with pytest.raises(ValueError, match="holds an adapter without its model: write the two together"):
        other.causal_lm()
    with pytest.raises(ValueError, match="holds an adapter without its model"):
        other.scorer(new_head=True)


def test_other_sampling_dtype_and_other_networks_are_refused(make_ppo, fit, source):
    with pytest.raises(ValueError, match="a quantized policy samples from its own weights, in torch.float32"):
        fit(make_ppo("nf4", generation=SamplingParams(max_new_tokens=3, dtype="bfloat16")), 1)
    policy = PolicyModel(source(quantization="nf4").causal_lm())
    del policy.network.get_base_model().build_in_full_precision
    with pytest.raises(ValueError, match="it is not known where they are: build it by ModelSource"):
        policy.save_pretrained("nowhere", merge_adapter=True)


def test_missing_package_is_named(source, monkeypatch):
    given = source(quantization="nf4")
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-rlhf\[quantization\]'"):
        given.causal_lm()


OURS = "from lightning_rlhf.models.quantization import quantized_by; quantized_by('nf4', torch.bfloat16)"


@pytest.mark.slow
@pytest.mark.parametrize("asks", [OURS, "import bitsandbytes"])
def test_no_kernel_is_fetched(tmp_path, asks):
    """bitsandbytes asks the package `kernels` for code of a hub while it is imported, on some CPUs."""
    (tmp_path / "kernels.py").write_text("asked = []\ndef get_kernel(*given, **named):\n    asked.append(given)\n")
    program = f"""import sys, torch, kernels
{asks}
print(len(kernels.asked), sys.modules["kernels"] is kernels, "bitsandbytes" in sys.modules)
"""
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    said = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": paths},
    ).stdout.split()[-3:]
    if asks.startswith("import"):  # negative control, where the CPU is one of those
        assert said[1:] == ["True", "True"]
        if said[0] == "0":
            pytest.skip("bitsandbytes asks for no kernel on this CPU")
    else:
        assert said == ["0", "True", "True"]


def test_checkpoint_of_another_quantization_is_refused(make_ppo, fit, tmp_path):
    fit(make_ppo("nf4"), 1).save_checkpoint(tmp_path / "x.ckpt")
    for kind in ("int8", None):
        with pytest.raises(ValueError, match="policy.quantization: 'nf4' before"):
            fit(make_ppo(kind), 2, ckpt_path=tmp_path / "x.ckpt")


def test_only_frozen_weights_may_be_absent_from_a_checkpoint(source):
    policy = PolicyModel(source(quantization="nf4").causal_lm())
    state = policy.state_dict()
    policy.load_state_dict(state)
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key.*lora_"):
        policy.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        policy.load_state_dict(policy.state_dict() | {"network.other": torch.zeros(1)})


@pytest.mark.parametrize("kind", KINDS)
def test_reward_model_is_exported_with_its_head(source, kind, tmp_path):
    model = ScalarModel(source(quantization=kind).scorer(new_head=True))
    moved(model.network)
    model.bias = 0.5
    model.save_pretrained(tmp_path / "whole", merge_adapter=True)
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.randint(3, 36, (2, 5), generator=torch.Generator().manual_seed(0))
    scores = []
    for name in ("whole", "adapter"):
        assert "quantization_config" not in (tmp_path / name / "config.json").read_text()
        loaded = ScalarModel(ModelSource(path=str(tmp_path / name)).scorer(new_head=False)).eval()
        assert loaded.bias == 0.5
        scores.append(loaded(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    assert torch.allclose(*scores, rtol=0, atol=1e-5)
    head = model._bare().score.modules_to_save["default"].weight
    assert torch.equal(ModelSource(path=str(tmp_path / "whole")).scorer(new_head=False).score.weight, head)


@pytest.mark.parametrize("kind", KINDS)
def test_other_stages_train_the_adapter_alone(source, kind, make_trainer, as_loader, right_padded):
    tokens = torch.tensor([[[12, 13, 20, 0], [12, 13, 21, 0]], [[10, 30, 0, 0], [10, 31, 32, 0]]])
    mask = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]]]).bool()
    ranked = ComparisonBatch(tokens, mask, torch.tensor([[0, 1], [1, 0]]), torch.full((2, 2), torch.nan))
    texts = right_padded([[12, 13, 20, 21, 0], [10, 11, 0]])
    for stage, batch in ((SFTModule, texts), (RewardModule, ranked)):
        module = stage(source(quantization=kind), lr=0.05)
        module.configure_model()
        start = {name: weight.detach().clone() for name, weight in module.named_parameters()}
        make_trainer(precision="32-true").fit(module, as_loader([batch] * 3))
        trained = {name for name, weight in module.named_parameters() if not torch.equal(weight, start[name])}
        assert trained == {name for name, weight in module.named_parameters() if weight.requires_grad}
        assert any("score" in name for name in trained) == (stage is RewardModule)


def test_low_precision_trains_too(make_trainer, as_loader, left_padded, make_ppo, source):
    module = make_ppo("nf4", policy=source(quantization="nf4", dtype="bfloat16"))
    make_trainer(precision="bf16-mixed").fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 2))
    assert module.iteration == 2
    assert next(iter(layers(module.policy.network).values())).base_layer.compute_dtype is torch.bfloat16


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_cut_weights_are_refused(source, monkeypatch, strategy):
    monkeypatch.setattr(strategies, "stage_3_of", lambda module: None)
    monkeypatch.setattr(strategies, "strategy_of", lambda module: object.__new__(strategy))
    with pytest.raises(ValueError, match=f"{strategy.__name__} cuts or converts weights.*take the strategy ddp"):
        SFTModule(source(quantization="nf4")).configure_model()


@pytest.mark.parametrize("kind", KINDS)
def test_maps_that_are_stored_transposed_are_quantized_too(make_lm, tmp_path, kind):
    """GPT-2's `Conv1D`."""
    PolicyModel(make_lm("gpt2", width=64)).save_pretrained(tmp_path / "gpt2")
    given = partial(ModelSource, path=str(tmp_path / "gpt2"), peft=lora(fan_in_fan_out=True))
    network, dense = given(quantization=kind).causal_lm(), given().causal_lm()
    moved(network)
    dense.load_state_dict({n: w for n, w in network.state_dict().items() if "lora_" in n}, strict=False)
    assert len(layers(network)) == 8
    assert is_quantized(network)
    tokens = torch.randint(3, 36, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, rounded_to = dense.eval()(tokens).logits, network.eval()(tokens).logits
        assert torch.allclose(merged(network).eval()(tokens).logits, expected, rtol=0, atol=1e-4)
    assert 1e-4 < apart(rounded_to, expected) < (0.3 if kind == "nf4" else 0.03)
