"""RewardModule: the ranking loss through the network, and the bias that puts demonstrations at 0."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf.core import Centered, ConstantSchedule, PlackettLuce, RankingLoss
from lightning_rlhf.models import ModelSource, ScalarModel, score_at_end
from lightning_rlhf.modules import RewardModule
from lightning_rlhf.types import ComparisonBatch

# prompt, responses best first or tied: (tokens, rank)
RANKED = [
    [([12, 13, 20, 0], 0), ([12, 13, 21, 22, 23, 0], 1), ([12, 13, 0], 2)],
    [([10, 30, 0], 1), ([10, 31, 32, 0], 0)],
    [([14, 15, 20, 0], 0), ([14, 15, 33, 0], 1), ([14, 15, 34, 0], 1), ([14, 15, 0], 2)],
    [([16, 20, 0], 0), ([16, 21, 0], 0)],  # no pair
]
DEMONSTRATIONS = [[12, 13, 25, 0], [10, 26, 0], [14, 15, 27, 28, 29, 0]]
ADAM = partial(torch.optim.Adam, lr=0.01)


@pytest.fixture
def comparison_batch():
    def make(ranked=RANKED, *, fill: int = 0, extra: int = 0, ratings: tuple[float, ...] = ()) -> ComparisonBatch:
        k = max(map(len, ranked))
        width = max(len(tokens) for texts in ranked for tokens, _ in texts) + extra
        tokens = torch.full((len(ranked), k, width), fill)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        rank = torch.full((len(ranked), k), -1)
        strength = torch.full(rank.shape, torch.nan)
        for b, texts in enumerate(ranked):
            for j, (ids, place) in enumerate(texts):
                tokens[b, j, : len(ids)] = torch.tensor(ids)
                mask[b, j, : len(ids)] = True
                rank[b, j] = place
                if ratings:
                    strength[b, j] = ratings[place]
        return ComparisonBatch(tokens, mask, rank, strength)

    return make


@pytest.fixture
def make_reward(make_scorer):
    def make(kind: str = "gpt2", *, model=None, **options) -> RewardModule:
        usual = {"optimizer": ADAM, "schedule": ConstantSchedule()}
        module = RewardModule(make_scorer(kind).double() if model is None else model, **usual | options)
        module.configure_model()
        return module.double()

    return make


def naive_score(network, tokens: list[int]) -> torch.Tensor:
    """The head on the last hidden state of an unpadded text."""
    backbone = getattr(network, network.base_model_prefix)
    return network.score(backbone(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]).squeeze()


def naive_loss(network, ranked=RANKED, *, margin: float = 0.0, ratings=(0, 0, 0), eta: float = 0.0) -> torch.Tensor:
    """A loop over prompts and pairs, K forwards a prompt; prompts without a pair count nowhere."""
    losses = []
    for texts in ranked:
        scores = [naive_score(network, tokens) for tokens, _ in texts]
        pairs = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if texts[i][1] < texts[j][1]]
        needed = [margin * (ratings[texts[i][1]] - ratings[texts[j][1]]) for i, j in pairs]
        if pairs:
            here = [-torch.sigmoid(scores[i] - scores[j] - m).log() for (i, j), m in zip(pairs, needed, strict=True)]
            here += [eta * (scores[i] + scores[j]) ** 2 for i, j in pairs]
            losses.append(sum(here) / len(pairs))
    return sum(losses) / len(losses)


def raw_demonstrations(network, demonstrations=DEMONSTRATIONS) -> float:
    with torch.no_grad():
        return sum(float(naive_score(network, d)) for d in demonstrations) / len(demonstrations)


def gradient(network) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_loss_and_gradient_equal_a_loop_over_pairs(
    make_reward, make_scorer, make_trainer, as_loader, comparison_batch, kind
):
    lr = 0.01
    module = make_reward(kind, optimizer=partial(torch.optim.SGD, lr=lr))
    before = torch.cat([p.detach().flatten().clone() for p in module.model.parameters()])
    trainer = make_trainer()
    trainer.fit(module, as_loader([comparison_batch(fill=7, extra=2)]))
    after = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    network = make_scorer(kind).double().eval()
    loss = naive_loss(network)
    loss.backward()
    expected = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in network.parameters()])
    tolerance = 1e-9 if kind == "gpt2" else 1e-5  # Llama's norm computes in float32 whatever its weights are
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(loss), abs=1e-6)  # logged as float32
    assert float(((before - after) / lr - expected).abs().max()) < tolerance
    assert float(expected.abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (RankingLoss(margin=0.5), {"margin": 0.5, "ratings": (7.0, 3.0, 2.0)}),
        (Centered(coef=0.5), {"eta": 0.5}),
        (Centered(loss=RankingLoss(margin=0.5), coef=0.5), {"margin": 0.5, "ratings": (7.0, 3.0, 2.0), "eta": 0.5}),
    ],
)
def test_margin_and_centring_reach_training_and_validation(
    make_reward, make_scorer, make_trainer, as_loader, comparison_batch, loss, options
):
    module, batch = make_reward(loss=loss), comparison_batch(ratings=options.get("ratings", ()))
    trainer = make_trainer(limit_train_batches=0)
    module.model.bias = 3.0  # the bias is no business of the loss, though centring would see it
    (logged,) = trainer.validate(module, as_loader([batch]), verbose=False)
    network = make_scorer().double().eval()
    with torch.no_grad():
        expected, plain = float(naive_loss(network, **options)), float(naive_loss(network))
    assert logged["eval/loss"] == pytest.approx(expected, abs=1e-6)  # logged as float32
    trainer = make_trainer()
    trainer.fit(module, as_loader([batch]))
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected, abs=1e-6)
    assert abs(expected - plain) > 1e-2


def test_margin_without_ratings_stops_the_run(make_reward, make_trainer, as_loader, comparison_batch):
    module = make_reward(loss=RankingLoss(margin=0.5))
    with pytest.raises(ValueError, match="`margin=0.5` needs the ratings"):
        make_trainer().fit(module, as_loader([comparison_batch()]))


def test_plackett_luce_trains_the_best_upwards(make_reward, make_trainer, as_loader, comparison_batch):
    module = make_reward(loss=PlackettLuce())
    (before,) = make_trainer().validate(module, as_loader([comparison_batch()]), verbose=False)
    make_trainer().fit(module, as_loader([comparison_batch()] * 20))
    (after,) = make_trainer().validate(module, as_loader([comparison_batch()]), verbose=False)
    assert after["eval/loss"] < 0.2 < before["eval/loss"]
    assert after["eval/accuracy"] == 1.0


def test_loss_of_the_first_pair_alone_is_another(make_scorer):
    network = make_scorer().double().eval()
    pairs_only = [texts[:2] for texts in RANKED]
    assert abs(float(naive_loss(network) - naive_loss(network, pairs_only))) > 1e-3


def test_rank_gives_each_response_its_score(make_reward, comparison_batch):
    module = make_reward().eval()
    found = module.rank(comparison_batch(fill=9))
    for b, texts in enumerate(RANKED):
        for j, (tokens, _) in enumerate(texts):
            assert float(found[b, j]) == pytest.approx(float(naive_score(module.model.network, tokens)), abs=1e-10)
        assert not found[b, len(texts) :].any()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_score_does_not_depend_on_padding(make_scorer, kind):
    model = ScalarModel(make_scorer(kind).double()).eval()
    text = [12, 13, 0, 20, 0]  # the padding id may stand inside
    tokens, mask = torch.full((3, 9), 0), torch.zeros(3, 9, dtype=torch.bool)
    for row, first in enumerate((0, 4, 2)):  # padded right, left, on both sides
        tokens[row, first : first + 5], mask[row, first : first + 5] = torch.tensor(text), True
    tokens[~mask] = 31
    found = score_at_end(model(tokens, mask), mask)
    expected = float(naive_score(model.network, text))
    assert found.tolist() == pytest.approx([expected] * 3, abs=1e-10 if kind == "gpt2" else 1e-5)


# The bias


@pytest.fixture
def validate(make_trainer, as_loader, comparison_batch, right_padded):
    """Validation on comparisons and demonstrations; what was logged."""

    def run(module, demonstrations=DEMONSTRATIONS, *, method="validate"):
        loaders = [as_loader([comparison_batch()]), as_loader([right_padded(demonstrations, context=1)])]
        return {
            k: v for found in getattr(make_trainer(), method)(module, loaders, verbose=False) for k, v in found.items()
        }

    return run


def test_validation_puts_demonstrations_at_zero(make_reward, validate, right_padded):
    module = make_reward()
    raw = raw_demonstrations(module.model.network.eval())
    assert abs(raw) > 0.01
    logged = validate(module)
    assert module.model.bias == pytest.approx(-raw, abs=1e-6)  # accumulated in float32
    batch = right_padded(DEMONSTRATIONS)
    assert abs(float(module(batch.tokens, batch.mask).mean())) < 1e-6
    assert logged["eval/demonstrations"] == pytest.approx(raw, abs=1e-6)  # before the bias moved from 0
    assert logged["eval/demonstration_bias"] == pytest.approx(-raw, abs=1e-6)
    assert validate(module)["eval/demonstrations"] == pytest.approx(0.0, abs=1e-6)


def test_bias_is_idempotent_and_leaves_the_ranking(make_reward, validate, comparison_batch):
    module = make_reward().eval()
    before = module.rank(comparison_batch())
    first = validate(module)
    bias = module.model.bias
    after = module.rank(comparison_batch())
    second = validate(module)
    assert module.model.bias == pytest.approx(bias, abs=1e-7)
    for name in ("eval/accuracy", "eval/margin", "eval/loss"):
        assert second[name] == pytest.approx(first[name], abs=1e-7)
    present = comparison_batch().rank >= 0
    assert torch.allclose((after - before)[present], torch.tensor(bias, dtype=torch.float64), atol=1e-12)


def test_validation_measures_by_hand(make_reward, validate):
    module = make_reward()
    network = module.model.network.eval()
    logged = validate(module)
    margins, losses = [], []
    for texts in RANKED:
        scores = [float(naive_score(network, tokens)) for tokens, _ in texts]
        here = [
            a - b
            for a, (_, i) in zip(scores, texts, strict=True)
            for b, (_, j) in zip(scores, texts, strict=True)
            if i < j
        ]
        margins += here
        losses += [sum(math.log1p(math.exp(-m)) for m in here) / len(here)] if here else []
    assert logged["eval/accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert logged["eval/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-6)
    assert logged["eval/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def pairs_of(network, ranked) -> list[tuple[float, int]]:
    """Of every pair r_w − r_l and by how many tokens w is longer."""
    found = []
    for texts in ranked:
        scored = [(float(naive_score(network, tokens)), len(tokens), place) for tokens, place in texts]
        found += [(r - s, n - m) for r, n, i in scored for s, m, j in scored if i < j]
    return found


LONG = [*RANKED, [([18, *range(20, 32), 0], 0), ([18, 0], 1), ([18, *range(35, 20, -1), 0], 2)]]


@pytest.mark.parametrize("method", ["validate", "test"])
def test_evaluation_measures_calibration_and_length_by_hand(
    make_reward, make_trainer, as_loader, comparison_batch, method
):
    module = make_reward()
    network = module.model.network.eval()
    batches = [comparison_batch(LONG[:2]), comparison_batch(LONG[2:])]
    (logged,) = getattr(make_trainer(), method)(module, as_loader(batches), verbose=False)
    stage = {"validate": "eval", "test": "test"}[method]
    pairs = pairs_of(network, LONG)
    expected, error = {}, 0.0
    for low in (50, 60, 70, 80, 90):
        sure = [(1 / (1 + math.exp(-abs(m))), m > 0) for m, _ in pairs]
        here = [(c, right) for c, right in sure if low <= 100 * c < low + 10]
        if here:
            confidence, accuracy = (sum(x) / len(here) for x in zip(*here, strict=True))
            expected[f"accuracy_confidence_{low}_{low + 10}"] = accuracy
            expected[f"mean_confidence_{low}_{low + 10}"] = confidence
            expected[f"pairs_confidence_{low}_{low + 10}"] = len(here)
            error += len(here) / len(pairs) * abs(accuracy - confidence)
    kinds = {"longer": lambda n: n > 10, "similar": lambda n: -10 <= n <= 10, "shorter": lambda n: n < -10}
    expected["longer_wins"] = sum((n > 0) + (n == 0) / 2 for _, n in pairs) / len(pairs)
    for name, chosen in kinds.items():
        here = [m > 0 for m, n in pairs if chosen(n)]
        expected |= {f"accuracy_{name}": sum(here) / len(here), f"pairs_{name}": len(here)}
    counted = [texts for texts in LONG if len({place for _, place in texts}) > 1]  # a row of ties may be a filler
    points, centered = [], []
    for texts in counted:
        here = [(float(naive_score(network, tokens)), len(tokens)) for tokens, _ in texts]
        points += here
        centered += [[a - sum(x) / len(x) for a, x in zip(p, zip(*here, strict=True), strict=True)] for p in here]
    for name, observed in (("", points), ("_within_prompt", centered)):
        matrix = torch.corrcoef(torch.tensor(observed, dtype=torch.float64).T)
        expected[f"score_length_correlation{name}"] = float(matrix[0, 1])
    expected["calibration_error"] = error
    expected["accuracy"] = sum(m > 0 for m, _ in pairs) / len(pairs)
    found = {name.removeprefix(f"{stage}/"): value for name, value in logged.items()}
    assert found.keys() - {"margin", "loss"} == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name  # logged as float32


def test_evaluation_does_not_depend_on_padding(make_reward, make_trainer, as_loader, comparison_batch):
    """Lengths are of real tokens: the padding id stands inside texts, ends them, and is the end token."""
    found = []
    for options in ({}, {"extra": 7}, {"extra": 7, "fill": 20}):
        batch = comparison_batch(LONG, **options)
        found += make_trainer().validate(make_reward(), as_loader([batch]), verbose=False)
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], abs=1e-6)


def test_evaluation_without_a_pair_logs_nothing(make_reward, make_trainer, as_loader, comparison_batch):
    (logged,) = make_trainer().validate(make_reward(), as_loader([comparison_batch(RANKED[3:])]), verbose=False)
    assert logged == {}


def test_metrics_are_not_in_the_checkpoint(make_reward):
    assert all(key.startswith("model.") for key in make_reward().state_dict())


def test_demonstrations_are_averaged_in_full_under_bf16_true(make_reward, make_trainer, as_loader, right_padded):
    """Summed in bfloat16 the count would stop at 256, and the bias would be off by the rest."""
    batches = [right_padded(DEMONSTRATIONS)] * 200
    module = make_reward()
    trainer = make_trainer(precision="bf16-true")
    trainer.validate(module, as_loader(batches), verbose=False)
    raw = raw_demonstrations(module.model.network.float().eval())
    assert module.model.bias == pytest.approx(-raw, abs=1e-6)


def test_filler_demonstrations_do_not_count(make_reward, make_trainer, as_loader, comparison_batch, right_padded):
    batch = right_padded(DEMONSTRATIONS)
    filled = batch._replace(target=batch.target & torch.tensor([[True], [True], [False]]))
    module = make_reward()
    make_trainer().validate(module, [as_loader([comparison_batch()]), as_loader([filled])], verbose=False)
    assert module.model.bias == pytest.approx(
        -raw_demonstrations(module.model.network.eval(), DEMONSTRATIONS[:2]), abs=1e-6
    )


def test_sanity_check_and_test_leave_the_bias(
    make_reward, make_trainer, as_loader, comparison_batch, right_padded, validate
):
    module = make_reward()
    loaders = [as_loader([comparison_batch()]), as_loader([right_padded(DEMONSTRATIONS)])]
    trainer = make_trainer(num_sanity_val_steps=2, limit_train_batches=0)
    trainer.fit(module, as_loader([comparison_batch()]), loaders)
    assert module.model.bias == 0.0
    logged = validate(module, method="test")
    assert module.model.bias == 0.0
    assert logged["test/demonstrations"] == pytest.approx(raw_demonstrations(module.model.network.eval()), abs=1e-6)
    validate(module)
    assert module.model.bias != 0.0


def test_sanity_check_does_not_leak_into_the_first_validation(
    make_reward, make_trainer, as_loader, comparison_batch, right_padded
):
    module = make_reward(optimizer=partial(torch.optim.SGD, lr=1.0))
    loaders = [as_loader([comparison_batch()]), as_loader([right_padded(DEMONSTRATIONS)])]
    make_trainer(num_sanity_val_steps=2).fit(module, as_loader([comparison_batch()]), loaders)
    assert module.model.bias == pytest.approx(-raw_demonstrations(module.model.network.eval()), abs=1e-5)


def test_bias_stands_in_the_checkpoint(make_reward, validate, make_trainer, as_loader, comparison_batch, tmp_path):
    module = make_reward()
    validate(module)
    trainer = make_trainer()
    trainer.fit(module, as_loader([comparison_batch()]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = make_reward()
    other.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
    assert other.model.bias == module.model.bias != 0.0


def test_checkpoint_loads_by_lightnings_own_method(
    make_reward, make_scorer, make_trainer, as_loader, comparison_batch, tmp_path
):
    module = make_reward()
    module.model.bias = 0.5
    trainer = make_trainer()
    trainer.fit(module, as_loader([comparison_batch()]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = RewardModule.load_from_checkpoint(tmp_path / "x.ckpt", model=make_scorer(seed=8).double())
    batch = comparison_batch()
    assert torch.allclose(loaded.eval().rank(batch), module.eval().rank(batch), atol=1e-12)
    assert loaded.model.bias == 0.5


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_exported_folder_loads_with_its_bias(make_folder, validate, tmp_path, kind, comparison_batch):
    folder = make_folder(kind, pad_token_id=2)  # a language model's folder: the head is new
    module = RewardModule(ModelSource(path=folder))
    validate(module)
    module.float()
    module.save_pretrained(tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert plain.config.num_labels == 1
    assert plain.config.demonstration_bias == module.model.bias != 0.0
    text = RANKED[0][0][0]
    assert float(plain.eval()(input_ids=torch.tensor([text])).logits) == pytest.approx(
        float(naive_score(module.model.network.eval(), text)), abs=1e-5
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    again = ScalarModel.load(ModelSource(path=str(tmp_path / "out")), new_head=False)
    assert again.bias == module.model.bias
    batch = comparison_batch()
    tokens, mask = (field[batch.rank >= 0] for field in (batch.tokens, batch.mask))
    found = score_at_end(again.eval()(tokens, mask), mask)
    assert torch.allclose(found, module.eval()(tokens, mask), atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_exported_folder_without_padding_token_scores_at_the_end_token(make_folder, tmp_path, kind):
    """With the end token as padding, transformers would score the token before the end."""
    module = RewardModule(ModelSource(path=make_folder(kind, scorer=True, pad_token_id=None)))
    module.save_pretrained(tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    text = RANKED[0][0][0]
    expected = float(naive_score(module.model.network.eval(), text))
    assert float(plain(input_ids=torch.tensor([text])).logits) == pytest.approx(expected, abs=1e-5)


def test_exported_folder_keeps_a_padding_token_of_id_zero(make_folder, toy_tokenizer, tmp_path):
    toy_tokenizer.pad_token, toy_tokenizer.eos_token = "</s>", "<|im_end|>"  # 0 and 4
    folder = make_folder(scorer=True, tokenizer=toy_tokenizer, end=4, pad_token_id=None)
    RewardModule(ModelSource(path=folder)).save_pretrained(tmp_path / "out")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.pad_token_id == 0


def test_new_head_has_its_variance(make_folder):
    """N(0, 1/(d + 1)) of a head on d = 1024: 1,024 draws, within 10 %."""
    torch.manual_seed(0)
    head = ModelSource(path=make_folder(width=1024)).scorer(new_head=True).score.weight
    assert head.shape == (1, 1024)
    assert float(head.std()) == pytest.approx(1025**-0.5, rel=0.1)


# On demand


def test_normalize_on_demand(make_reward, right_padded):
    module = make_reward()
    module.model.bias = 5.0
    raw = raw_demonstrations(module.model.network.eval())
    batches = [right_padded(DEMONSTRATIONS[:2]), right_padded(DEMONSTRATIONS[2:])]  # of unequal size
    assert module.normalize(batches) == pytest.approx(-raw, abs=1e-9)
    assert module.normalize(batches) == pytest.approx(-raw, abs=1e-9)
    assert module.model.bias == pytest.approx(-raw, abs=1e-9)


def test_normalize_skips_fillers(make_reward, right_padded):
    module = make_reward()
    batch = right_padded(DEMONSTRATIONS)
    none = batch._replace(target=torch.zeros_like(batch.target))
    some = batch._replace(target=batch.target & torch.tensor([[True], [False], [False]]))
    raw = raw_demonstrations(module.model.network.eval(), DEMONSTRATIONS[:1])
    assert module.normalize([none, some]) == pytest.approx(-raw, abs=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_normalize_without_a_demonstration_says_so(make_reward, right_padded, count):
    batch = right_padded(DEMONSTRATIONS)
    none = [batch._replace(target=torch.zeros_like(batch.target))] * count
    with pytest.raises(ValueError, match="`demonstrations` is empty"):
        make_reward().normalize(none)


def test_head_of_two_labels_is_refused(make_scorer):
    network = make_scorer()
    network.score = torch.nn.Linear(16, 2)
    with pytest.raises(ValueError, match="2 outputs"):
        RewardModule(network).configure_model()


def test_language_model_is_no_reward_model(make_lm):
    with pytest.raises(ValueError, match="no linear head"):
        RewardModule(make_lm()).configure_model()


@pytest.mark.parametrize("method", ["validate", "test"])
def test_training_follows_an_evaluation(
    make_reward, make_trainer, as_loader, comparison_batch, right_padded, method, validate
):
    """Outside `fit` an evaluation is inference mode, whose tensors can't be written later."""
    module = make_reward(optimizer=partial(torch.optim.SGD, lr=1.0))
    validate(module, method=method)
    loaders = [as_loader([comparison_batch()]), as_loader([right_padded(DEMONSTRATIONS)])]
    make_trainer().fit(module, as_loader([comparison_batch()] * 2), loaders)
    assert module.model.bias == pytest.approx(-raw_demonstrations(module.model.network.eval()), abs=1e-5)
