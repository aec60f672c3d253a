"""The demonstrations of an exported reward model have mean 0, read by plain transformers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf.callbacks import EMA, Export, RunCheckpoint
from lightning_rlhf.data import ComparisonDataModule
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import RewardModule

PROMPTS = ["a b", "c", "d e f", "g", "h i", "j k l m"]
DEMONSTRATIONS = [{"prompt": p, "response": f"x {p}"} for p in PROMPTS[:5]]


@pytest.fixture
def trained(tmp_path, make_folder, make_trainer, write_rows):
    """A run of two epochs on six pairs, and the folder that it exports."""

    def train(*callbacks, val=False, **options) -> tuple[RewardModule, str]:
        pairs = write_rows("pairs", [{"prompt": p, "chosen": f"x {p}", "rejected": f"{p} y z"} for p in PROMPTS])
        data = ComparisonDataModule(
            train=pairs,
            val=pairs if val else None,
            demonstrations=write_rows("demonstrations", DEMONSTRATIONS),
            batch_size=2,
        )
        source = ModelSource(path=make_folder(scorer=True))
        module = RewardModule(source, optimizer=partial(torch.optim.SGD, lr=0.5))
        folder = str(tmp_path / "exported")
        options = {"max_epochs": 2, "precision": "32-true", "enable_checkpointing": True} | options
        saver = RunCheckpoint(str(tmp_path / "kept"), every_n_batches=100)
        make_trainer(callbacks=[*callbacks, Export(folder), saver], **options).fit(module, data)
        return module, folder

    return train


def mean_of_demonstrations(folder: str) -> tuple[float, float]:
    """The mean logit of the demonstrations in plain transformers, in float32, and the folder's bias."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = []
    for row in DEMONSTRATIONS:
        text = f"{row['prompt']} {row['response']}"
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits.append(float(model(torch.tensor([ids])).logits))
    return sum(logits) / len(logits), model.config.demonstration_bias


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_export_has_demonstrations_at_zero_without_a_validation(trained, precision):
    _, folder = trained(precision=precision)
    raw, bias = mean_of_demonstrations(folder)
    assert abs(raw) > 0.01
    assert raw + bias == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("options", [{"check_val_every_n_epoch": 2, "max_epochs": 3}, {"limit_val_batches": 1}])
def test_export_has_demonstrations_at_zero_whenever_the_last_validation_was(trained, options):
    raw, bias = mean_of_demonstrations(trained(val=True, **options)[1])
    assert raw + bias == pytest.approx(0.0, abs=1e-5)


def test_last_checkpoint_has_the_bias_of_its_weights(trained, tmp_path):
    module, folder = trained()
    end = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["state_dict"]
    assert end["model._extra_state"]["demonstration_bias"] == module.model.bias
    assert mean_of_demonstrations(folder)[1] == module.model.bias != 0


def test_averaged_weights_are_exported_with_a_bias_of_their_own(trained):
    module, folder = trained(EMA(decay=0.9))
    raw, bias = mean_of_demonstrations(folder)
    assert raw + bias == pytest.approx(0.0, abs=1e-5)
    assert abs(bias - module.model.bias) > 1e-3  # which is that of the weights without the average


def test_exported_model_scores_padded_batches_as_single_texts(trained):
    _, folder = trained()
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [text + tokenizer.eos_token for text in ("a b", "c d e f g")]
    with torch.no_grad():
        together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.squeeze(1)
        alone = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert together.tolist() == pytest.approx(alone, abs=1e-6)
