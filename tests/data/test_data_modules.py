from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_rlhf.data import ColumnNames, ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from lightning_rlhf.types import ComparisonBatch, PromptBatch, TextBatch

Write = Callable[..., str]
LETTERS = "abcdefgh"  # a is 10, …, h is 17; the end token is 0


@pytest.fixture
def prompts(write: Write) -> str:
    return write("prompts.jsonl", [{"prompt": letter, "id": place} for place, letter in enumerate(LETTERS)])


@pytest.fixture
def texts(write: Write) -> str:
    return write("texts.jsonl", [{"text": "a b c d e f g"}] * 3)  # 24 tokens with the end tokens


@pytest.fixture
def pairs(write: Write) -> str:
    return write("pairs.jsonl", [{"prompt": letter, "chosen": "a", "rejected": "b c"} for letter in LETTERS])


@pytest.fixture
def demonstrations(write: Write) -> str:
    return write("demonstrations.jsonl", [{"prompt": letter, "response": "a"} for letter in LETTERS])


def attach(data: Any, *, rank: int = 0, world: int = 1, fn: str = "fit", **module: Any) -> Any:
    place = None if world == 1 else {"rank": rank, "num_replicas": world}
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=place, lightning_module=SimpleNamespace(**module))
    return data


def test_prompt_batches_are_dicts_in_training_and_bare_in_evaluation(plain: Any, prompts: str, texts: str) -> None:
    data = PromptDataModule(prompts, val=prompts, tokenizer=plain, batch_size=3, eval_batch_size=5)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [set(batch) for batch in batches] == [{"prompts"}] * 3
    assert all(isinstance(batch["prompts"], PromptBatch) and len(batch["prompts"].rows) == 3 for batch in batches)
    (loader,) = data.val_dataloader()
    first, second = loader
    assert first.tokens.tolist() == [[10], [11], [12], [13], [14]]
    assert second.rows == [{"prompt": letter, "id": place} for place, letter in enumerate(LETTERS)][5:]


@pytest.mark.parametrize(("ratio", "samples", "expected"), [(8.0, 1, 16), (0.5, 1, 1), (0.75, 4, 6), (1.0, 3, 6)])
def test_pretraining_texts_per_episode(
    plain: Any, prompts: str, texts: str, ratio: float, samples: int, expected: int
) -> None:
    data = PromptDataModule(
        prompts, pretrain=texts, tokenizer=plain, batch_size=2, pretrain_ratio=ratio, text_tokens=10
    )
    attach(data, samples_per_prompt=samples).setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["prompts"].tokens.shape == (2, 1)
    assert isinstance(batch["pretrain"], TextBatch)
    assert len(batch["pretrain"].tokens) == expected


def test_blocks_of_the_pretraining_file(plain: Any, prompts: str, texts: str) -> None:
    data = PromptDataModule(prompts, val=prompts, val_pretrain=texts, tokenizer=plain, batch_size=4, text_tokens=10)
    data.setup("fit")
    _, loader = data.val_dataloader()
    (batch,) = loader
    assert batch.mask.sum(1).tolist() == [10, 10, 4]
    assert batch.target.sum(1).tolist() == [9, 9, 3]
    assert batch.tokens[0].tolist() == [10, 11, 12, 13, 14, 15, 16, 0, 10, 11]


def test_two_ranks_hold_the_batch_of_one_process(plain: Any, prompts: str, texts: str) -> None:
    def batches(batch_size: int, **place: int) -> list[Any]:
        data = PromptDataModule(
            prompts, pretrain=texts, tokenizer=plain, batch_size=batch_size, pretrain_ratio=1.0, text_tokens=5, seed=3
        )
        attach(data, **place).setup("fit")
        return list(data.train_dataloader())

    whole, left, right = batches(4), batches(2, rank=0, world=2), batches(2, rank=1, world=2)
    assert len(whole) == len(left) == len(right) == 2
    for one, first, second in zip(whole, left, right, strict=True):
        assert one["prompts"].rows[::2] == first["prompts"].rows
        assert one["prompts"].rows[1::2] == second["prompts"].rows
        targets = [batch["pretrain"].mask.sum(1).tolist() for batch in (one, first, second)]
        assert (targets[0][::2], targets[0][1::2]) == (targets[1], targets[2])


def test_evaluation_over_ranks_counts_each_row_once(plain: Any, prompts: str, pairs: str, demonstrations: str) -> None:
    ids, ranked, targets = [], [], []
    for rank in range(3):
        data = attach(PromptDataModule(val=prompts, tokenizer=plain, batch_size=7), rank=rank, world=3)
        data.setup("validate")
        for batch in data.val_dataloader()[0]:
            ids += [row["id"] for row, counted in zip(batch.rows, batch.is_real, strict=True) if counted]
        other = ComparisonDataModule(pairs, val=pairs, demonstrations=demonstrations, tokenizer=plain, batch_size=7)
        attach(other, rank=rank, world=3).setup("validate")
        comparisons, texts = other.val_dataloader()
        ranked += [rank for batch in comparisons for rank in batch.rank.tolist() if len(set(rank)) > 1]
        targets += [int(target.sum()) for batch in texts for target in batch.target if target.any()]
    assert sorted(ids) == list(range(8))
    assert ranked == [[0, 1]] * 8
    assert targets == [2] * 8


def test_filler_of_each_kind_counts_nowhere(plain: Any, write: Write) -> None:
    row = {"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}
    path = write("one.jsonl", [row])
    prompts = PromptDataModule(val=path, tokenizer=plain)
    comparisons = ComparisonDataModule(path, val=path, demonstrations=path, tokenizer=plain)
    for data in (prompts, comparisons):
        attach(data, rank=1, world=2).setup("validate")
    (prompt,) = prompts.val_dataloader()[0]
    (comparison,), (text,) = comparisons.val_dataloader()
    assert prompt.is_real.tolist() == [False]
    assert prompt.rows == [row]
    assert comparison.rank.tolist() == [[0, 0]]
    assert not text.target.any()
    assert text.mask.all()


def test_comparison_batches(plain: Any, pairs: str, demonstrations: str) -> None:
    data = ComparisonDataModule(
        pairs, val=pairs, test=pairs, demonstrations=demonstrations, tokenizer=plain, batch_size=4, eval_batch_size=8
    )
    data.setup("fit")
    data.setup("test")
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, ComparisonBatch)
    assert batch.tokens.shape == (4, 2, 4)
    for comparisons, texts in (data.val_dataloader(), data.test_dataloader()):
        (batch,), (text,) = comparisons, texts
        assert batch.tokens[1].tolist() == [[11, 10, 0, 0], [11, 11, 12, 0]]
        assert text.tokens[1].tolist() == [11, 10, 0]
    (text,) = data.demonstration_dataloader()
    assert text.tokens[:, 0].tolist() == list(range(10, 18))


@pytest.mark.parametrize(("loss_on_prompt", "target"), [(False, [0, 0, 1, 1]), (True, [0, 1, 1, 1])])
def test_demonstration_targets(plain: Any, write: Write, loss_on_prompt: bool, target: list[int]) -> None:
    path = write("d.jsonl", [{"prompt": "a b", "response": "c"}])
    data = DemonstrationDataModule(path, val=path, loss_on_prompt=loss_on_prompt, tokenizer=plain, batch_size=1)
    data.setup("fit")
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        (batch,) = loader
        assert batch.tokens.tolist() == [[10, 11, 12, 0]]
        assert batch.target.int().tolist() == [target]


def test_dropped_rows_by_argument(plain: Any, write: Write) -> None:
    train = write("t.jsonl", [{"prompt": "a"}, {"prompt": "a b"}, {"prompt": "a b c"}])
    data = PromptDataModule(train, val=write("v.jsonl", [{"prompt": "a"}]), tokenizer=plain, max_prompt_tokens=1)
    data.setup("fit")
    assert data.dropped == {"train": 2, "val": 0}
    responses = {"prompt": "a", "responses": ["b", "c", "d d"], "scores": [1, 1, 2]}
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    other = ComparisonDataModule(write("c.jsonl", [responses, pair]), tokenizer=plain, max_tokens=3)
    other.setup("fit")
    assert other.dropped == {"train": 1}
    assert other.tallies["train"].long_responses == 1
    assert other.tallies["train"].tied_rows == 1


def test_columns_prompt_role_and_seed_reach_the_batches(chat: Any, plain: Any, write: Write) -> None:
    path = write("q.jsonl", [{"question": letter} for letter in LETTERS])
    columns = ColumnNames(prompt="question")
    data = PromptDataModule(path, val=path, columns=columns, prompt_role="user", tokenizer=chat, batch_size=8)
    data.setup("fit")
    assert next(iter(data.val_dataloader()[0])).tokens[0].tolist() == [1, 3, 5, 10, 4, 3, 6]
    orders = []
    for seed in (0, 1):
        data = PromptDataModule(path, columns=columns, tokenizer=plain, batch_size=8, seed=seed)
        data.setup("fit")
        orders.append(next(iter(data.train_dataloader()))["prompts"].rows)
    assert orders[0] != orders[1]


def test_setup_reads_once_and_only_what_the_stage_needs(plain: Any, prompts: str, write: Write) -> None:
    val = write("val.jsonl", [{"prompt": "a"}])
    data = PromptDataModule(prompts, val=val, test="missing.jsonl", tokenizer=plain)
    data.setup("fit")
    write("val.jsonl", [{"prompt": "b"}])
    data.setup("fit")
    data.setup("validate")
    assert next(iter(data.val_dataloader()[0])).tokens.tolist() == [[10]]
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        data.setup("test")


def test_prediction_reads_predict_then_test_then_val(plain: Any, write: Write) -> None:
    a, b, c = (write(f"{letter}.jsonl", [{"prompt": letter}]) for letter in "abc")
    for arguments, expected in (
        ({"val": a}, 10),
        ({"val": a, "test": b}, 11),
        ({"val": a, "test": b, "predict": c}, 12),
    ):
        data = PromptDataModule(tokenizer=plain, **arguments)
        data.setup("predict")
        (batch,) = data.predict_dataloader()
        assert batch.tokens.tolist() == [[expected]]


@pytest.mark.parametrize(
    ("stage", "name"), [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")]
)
def test_missing_path_names_the_argument(plain: Any, stage: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"PromptDataModule needs `{name}` for this: pass {name}="):
        PromptDataModule(tokenizer=plain).setup(stage)


def test_loader_before_setup_says_what_to_do(plain: Any, pairs: str) -> None:
    data = ComparisonDataModule(pairs, tokenizer=plain)
    with pytest.raises(ValueError, match=r"no examples of `train`: call setup\(\)"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="no examples of `demonstrations`: pass demonstrations="):
        data.demonstration_dataloader()
    with pytest.raises(ValueError, match="no examples of `test`: pass test="):
        data.test_dataloader()


def test_tokenizer_comes_from_the_module_or_is_asked_for(plain: Any, opening: Any, prompts: str) -> None:
    data = attach(PromptDataModule(val=prompts), tokenizer=opening)
    data.setup("validate")
    assert next(iter(data.val_dataloader()[0])).tokens[0].tolist() == [1, 10]
    own = attach(PromptDataModule(val=prompts, tokenizer=plain), tokenizer=opening)
    own.setup("validate")
    assert next(iter(own.val_dataloader()[0])).tokens[0].tolist() == [10]
    for data in (PromptDataModule(val=prompts), attach(PromptDataModule(val=prompts))):
        with pytest.raises(ValueError, match="PromptDataModule has no tokenizer: pass tokenizer="):
            data.setup("validate")
