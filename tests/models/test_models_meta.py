"""Networks that are built without weights: the same as read whole, while each process reads its rows alone."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_reads import READERS, counting
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter

from lightning_rlhf import LearnedReward, SFTModule
from lightning_rlhf.models import ModelSource, PolicyModel, ScalarModel, meta

PROCESSES = 4


@pytest.fixture
def expecting() -> Iterator[None]:
    """Shards are expected."""
    meta.expect_shards()
    yield
    meta.settle()


@pytest.fixture
def read_numbers(monkeypatch) -> Counter:
    """How many numbers were read from files, by the library or by transformers."""
    counted: Counter = Counter()
    for module in READERS:
        monkeypatch.setattr(module, "safe_open", counting(counted))
    return counted


@pytest.fixture
def as_process() -> Iterator[Callable[[int], Any]]:
    """The mesh as one of four processes sees it; what they say to each other is made up."""

    def make(rank: int) -> Any:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=PROCESSES)
        return init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("data_parallel",))

    yield make
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def source(path: str, **options: Any) -> ModelSource:
    return ModelSource(path=path, **({"dtype": "float64"} | options))


def policy(path: str, wrap: Callable[[ModelSource], ModelSource] = lambda x: x) -> nn.Module:
    torch.manual_seed(5)
    return PolicyModel(wrap(source(path)).causal_lm())


def scorer(path: str, wrap: Callable[[ModelSource], ModelSource] = lambda x: x) -> nn.Module:
    """With a new head, so that random numbers are drawn."""
    torch.manual_seed(5)
    return ScalarModel(wrap(source(path)).scorer(new_head=True))


def size(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


CASES = [("gpt2", policy), ("gpt2", scorer), ("llama", policy), ("llama", scorer)]


@pytest.mark.parametrize(("kind", "build"), CASES)
def test_every_process_reads_its_rows_of_every_weight(make_folder, as_process, read_numbers, kind, build) -> None:
    """Of four; the vocabulary of 37 and the 1 row of the scalar head leave them unequal shares. GPT-2 is tied."""
    path = make_folder(kind, vocab=37)
    whole = build(path)
    after = torch.rand(2)
    expected = {name: weight.detach().chunk(PROCESSES) for name, weight in whole.named_parameters()}
    names = {name for name, _ in whole.named_parameters(remove_duplicate=False)}
    read_numbers.clear()
    most = 0
    for rank in range(PROCESSES):
        meta.expect_shards()
        model = build(path, meta.unread)
        assert torch.equal(torch.rand(2), after)  # as many random numbers were drawn
        assert sum(w.numel() for w in model.parameters() if not w.is_meta) <= 16  # a new head at most
        before = read_numbers["numbers"]
        model.shard(as_process(rank))
        meta.settle()
        most = max(most, read_numbers["numbers"] - before)
        assert {name for name, _ in model.named_parameters(remove_duplicate=False)} == names
        assert len(list(model.parameters())) == len(expected)  # tied weights are one
        for name, weight in model.named_parameters():
            parts = expected[name]
            mine = parts[rank] if rank < len(parts) else parts[0][:0]
            assert torch.equal(weight.to_local(), mine), (rank, name)
        for (name, buffer), (_, other) in zip(whole.named_buffers(), model.named_buffers(), strict=True):
            assert torch.equal(buffer, other), name
    stored = size(whole) - (16 if build is scorer else 0)
    assert read_numbers["numbers"] == stored  # all processes together read each number once
    assert most < 0.3 * stored


def test_source_that_is_read_at_once_reads_it_all(make_folder, read_numbers) -> None:
    """Or the count above would say nothing."""
    model = policy(make_folder("llama", vocab=37))
    assert read_numbers["numbers"] == size(model)


def described(network: nn.Module) -> tuple[Any, ...]:
    config = network.config.to_dict()
    generation = network.generation_config.to_dict() if network.can_generate() else None
    return config, generation, network.training, network.name_or_path, type(network)


@pytest.mark.parametrize("options", [{}, {"attention": "eager", "dtype": "bfloat16", "gradient_checkpointing": True}])
def test_network_is_the_one_that_is_read_whole(make_folder, expecting, options) -> None:
    path = make_folder("llama", vocab=37, end=[0, 3])
    for load in (ModelSource.causal_lm, lambda x: x.scorer(new_head=True)):
        torch.manual_seed(5)
        whole = load(source(path, **options))
        torch.manual_seed(5)
        network = load(meta.unread(source(path, **options)))
        assert any(weight.is_meta for weight in network.parameters())
        meta.settle()  # nothing was sharded: it is read whole
        assert described(network) == described(whole)
        mine, expected = network.state_dict(), whole.state_dict()
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[key], expected[key]) for key in expected)
        assert {key: x.dtype for key, x in mine.items()} == {key: x.dtype for key, x in expected.items()}
        meta.expect_shards()


def test_buffers_are_those_of_a_whole_read_where_numbers_are_made_in_bfloat16(make_folder, expecting) -> None:
    """Which is what Lightning sets around `configure_model` under bf16-true."""
    path = make_folder("llama")
    torch.set_default_dtype(torch.bfloat16)
    try:
        whole, network = (x.causal_lm() for x in (source(path), meta.unread(source(path))))
    finally:
        torch.set_default_dtype(torch.float32)
    buffers = dict(network.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys() != set()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in whole.named_buffers())


def test_copy_of_an_unread_policy_is_read_too(make_folder, expecting, as_process) -> None:
    path = make_folder("llama")
    model = PolicyModel(meta.unread(source(path)).causal_lm())
    reference = model.frozen_copy(torch.bfloat16)
    for network in (model, reference):
        network.shard(as_process(1))
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine.to_local().bfloat16(), other.to_local())
        assert (mine.requires_grad, other.requires_grad) == (True, False)


def test_weights_in_several_files_are_found(make_folder, expecting) -> None:
    """And those of a base model, whose names lack the prefix."""
    path = make_folder("llama")
    expected = source(path).causal_lm().state_dict()
    found = load_file(f"{path}/model.safetensors")
    (folder := Path(path, "model.safetensors")).unlink()
    bare = {name.removeprefix("model."): weight for name, weight in found.items()}
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(bare)}
    for file in set(places.values()):
        save_file({name: bare[name] for name in bare if places[name] == file}, folder.with_name(file), {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    folder.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    network = meta.unread(source(path)).causal_lm()
    assert all(weight.is_meta for weight in network.parameters())
    meta.settle()
    assert all(torch.equal(network.state_dict()[name], expected[name]) for name in expected)


# What is read whole


def change(path: str, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = f"{path}/model.safetensors"
    save_file({name: x.contiguous() for name, x in edit(load_file(file)).items()}, file, {"format": "pt"})


def twice(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return found | {"lm_head.weight": found["transformer.wte.weight"].clone()}


def rounded(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return found | {"transformer.ln_f.bias": found["transformer.ln_f.bias"].to(torch.int8)}


@pytest.mark.parametrize(
    ("edit", "reason"), [(twice, "under two names"), (rounded, "not made of floating-point numbers")]
)
def test_weights_that_need_more_than_a_cast_are_read_whole(make_folder, expecting, caplog, edit, reason) -> None:
    path = make_folder("gpt2")
    change(path, edit)
    expected = source(path).causal_lm().state_dict()
    with caplog.at_level(logging.INFO):
        network = meta.unread(source(path)).causal_lm()
    assert f"each process reads all of {path} before it keeps its shard" in caplog.text
    assert reason in caplog.text
    assert all(torch.equal(weight, expected[name]) for name, weight in network.state_dict().items())


def test_weights_that_transformers_converts_are_read_whole(make_folder, expecting, caplog, monkeypatch) -> None:
    """Under other names, and where a rule keeps the name and changes the numbers."""
    path = make_folder("gpt2")
    GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=36, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(f"{path}/neox")
    rule = WeightConverter("wpe.weight", "wpe.weight", operations=[Transpose(0, 1)])
    with caplog.at_level(logging.INFO):
        meta.unread(source(f"{path}/neox")).causal_lm()
        monkeypatch.setattr(meta, "get_model_conversion_mapping", lambda network: [rule])
        meta.unread(source(path)).causal_lm()
    assert "they lie under other names: there is no lm_head.weight" in caplog.text
    assert "transformers converts them as it reads them" in caplog.text


def test_adapter_is_put_on_whole_weights(make_folder, expecting, lora, caplog) -> None:
    with caplog.at_level(logging.INFO):
        network = meta.unread(source(make_folder(), peft=lora())).causal_lm()
    assert "an adapter is put on whole weights" in caplog.text
    assert not any(weight.is_meta for weight in network.parameters())


def test_gguf_weights_and_code_of_a_model_are_read_whole(make_folder, expecting, caplog) -> None:
    folder = make_folder()
    with caplog.at_level(logging.INFO):
        for options, reason in (
            ({"gguf_file": "m.gguf"}, "GGUF"),
            ({"trust_remote_code": True}, "code of the model's"),
        ):
            found = source(folder, **options)
            assert meta.unread(found) is found
            assert reason in caplog.messages[-1]
    assert len(caplog.messages) == 2


def test_checkpoint_is_read_whole(tmp_path, expecting, caplog) -> None:
    (file := tmp_path / "last.ckpt").write_text("no checkpoint")
    reward = LearnedReward(str(file))
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="no checkpoint"):
        reward.load()
    assert caplog.messages == [f"each process reads all of {file} before it keeps its shard: it is a checkpoint"]


def test_missing_weight_is_refused_as_ever(make_folder, expecting) -> None:
    path = make_folder("gpt2")
    change(path, lambda found: {name: x for name, x in found.items() if "h.1.attn.c_attn.weight" not in name})
    with pytest.raises(ValueError, match="lacks 1 of the weights .*h.1.attn.c_attn.weight"):
        meta.unread(source(path)).causal_lm()


def test_without_shards_a_source_is_itself(make_folder) -> None:
    found = source(make_folder())
    assert meta.unread(found) is found


def test_build_that_broke_off_leaves_nothing_behind(make_folder, expecting) -> None:
    """The next trainer shards nothing, and its networks have their weights at once."""
    path = make_folder()
    meta.unread(source(path)).causal_lm()
    SFTModule(source(path)).configure_model()
    found = source(path)
    assert meta.unread(found) is found
