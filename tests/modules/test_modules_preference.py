"""PreferenceModule: the losses through the network against loops, its evaluation by hand, and its reference."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from lightning_rlhf.callbacks import EMA
from lightning_rlhf.core import DPO, IPO, KTO, ConstantSchedule
from lightning_rlhf.data import ComparisonDataModule, LabeledDataModule
from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PreferenceModule, RewardModule
from lightning_rlhf.modules.preference_batch import as_comparisons, mismatched
from lightning_rlhf.types import ComparisonBatch, LabeledBatch

peft = pytest.importorskip("peft")

# (prompt, responses with their rank), of other lengths than one another
RANKED = [
    ([12, 13], [([20, 0], 0), ([21, 22, 23, 0], 1), ([0], 2)]),
    ([10], [([30, 0], 1), ([31, 32, 0], 0)]),
    ([14, 15, 16], [([20, 0], 0), ([33, 0], 1), ([34, 0], 1), ([0], 2)]),
    ([16], [([20, 0], 0), ([21, 0], 0)]),  # no pair
]
LABELED = [([12, 13], [20, 0], True), ([10], [31, 32, 0], False), ([14, 15, 16], [0], True)]
SGD = partial(torch.optim.SGD, lr=0.01)
LOSSES = [DPO(beta=0.3), DPO(beta=0.5, label_smoothing=0.1), IPO(beta=0.4), KTO(beta=0.3, desirable=1.5)]
KTO_LOSS = KTO(beta=0.3, desirable=1.5, undesirable=0.5)


@pytest.fixture
def comparisons():
    def make(ranked=RANKED, *, fill: int = 0, extra: int = 0) -> ComparisonBatch:
        k = max(len(responses) for _, responses in ranked)
        width = max(len(x) + len(y) for x, responses in ranked for y, _ in responses) + extra
        tokens = torch.full((len(ranked), k, width), fill)
        mask, target = (torch.zeros(tokens.shape, dtype=torch.bool) for _ in range(2))
        rank = torch.full((len(ranked), k), -1)
        for b, (x, responses) in enumerate(ranked):
            for j, (y, place) in enumerate(responses):
                tokens[b, j, : len(x) + len(y)] = torch.tensor(x + y)
                mask[b, j, : len(x) + len(y)] = True
                target[b, j, len(x) : len(x) + len(y)] = True
                rank[b, j] = place
        return ComparisonBatch(tokens, mask, rank, torch.full(rank.shape, torch.nan), target=target)

    return make


@pytest.fixture
def labels(right_padded):
    def make(rows=LABELED) -> LabeledBatch:
        texts = right_padded([x + y for x, y, _ in rows])
        starts = torch.tensor([len(x) for x, _, _ in rows])
        target = texts.mask & (torch.arange(texts.mask.shape[1]) >= starts.unsqueeze(1))
        return LabeledBatch(texts.tokens, texts.mask, target, torch.tensor([good for *_, good in rows]))

    return make


@pytest.fixture
def make_module(make_lm, make_folder):
    """A policy that has left its reference, in float64."""

    def make(kind: str = "gpt2", *, loss=DPO(beta=0.3), policy=None, other: bool = True, **options) -> PreferenceModule:
        reference = ModelSource(path=make_folder(kind, seed=5)) if other else None
        usual = {"optimizer": SGD, "schedule": ConstantSchedule(), "reference": reference}
        module = PreferenceModule(make_lm(kind).double() if policy is None else policy, loss, **usual | options)
        module.configure_model()
        module.reference.frozen.double()
        return module.double()

    return make


def logprob(network, prompt, response):
    """log π(y|x) of an unpadded text, by the plain transformers model."""
    logits = network(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + t, token] for t, token in enumerate(response))


def log_ratio(networks, prompt, response):
    policy, reference = networks
    with torch.no_grad():
        other = logprob(reference, prompt, response)
    return logprob(policy, prompt, response) - other


def naive_kl(networks, prompts, answers):
    """max(0, mean log-ratio of each prompt with the responses to the next one)."""
    following = answers[1:] + answers[:1]
    width = max(len(x) + len(y) for x, ys in zip(prompts, answers, strict=True) for y in ys)
    found = []
    with torch.no_grad():
        for x, ys in zip(prompts, following, strict=True):
            found += [float(log_ratio(networks, x, y[: width - len(x)])) for y in ys]
    return max(0.0, sum(found) / len(found))


def value(loss, h, good):
    """KTO's loss of one response."""
    return (loss.desirable if good else loss.undesirable) * torch.sigmoid(-h if good else h)


def naive_loss(loss, networks, ranked=RANKED):
    losses = []
    if isinstance(loss, KTO):
        counting = [(x, [y for y, _ in responses]) for x, responses in ranked if any(place for _, place in responses)]
        z = naive_kl(networks, *zip(*counting, strict=True))
        for x, responses in ranked:
            worst = max(place for _, place in responses)
            ends = [(y, place == 0) for y, place in responses if worst and place in (0, worst)]
            here = [value(loss, loss.beta * (log_ratio(networks, x, y) - z), good) for y, good in ends]
            losses += [sum(here) / len(here)] if here else []
        return sum(losses) / len(losses)
    for x, responses in ranked:
        ratios = [(log_ratio(networks, x, y), place) for y, place in responses]
        margins = [a - b for a, i in ratios for b, j in ratios if i < j]
        if isinstance(loss, IPO):
            here = [(m - 0.5 / loss.beta) ** 2 for m in margins]
        else:
            e = loss.label_smoothing
            pull, push = ([-torch.sigmoid(sign * loss.beta * m).log() for m in margins] for sign in (1, -1))
            here = [(1 - e) * a + e * b for a, b in zip(pull, push, strict=True)]
        losses += [sum(here) / len(here)] if here else []
    return sum(losses) / len(losses)


def plain(make_lm, kind="gpt2"):
    """Policy and reference as they start, to differentiate."""
    return [make_lm(kind, seed=seed).double().eval() for seed in (0, 5)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_loss_and_gradient_equal_a_loop(make_module, make_lm, make_trainer, as_loader, comparisons, kind, loss):
    module = make_module(kind, loss=loss)
    before = torch.cat([p.detach().flatten().clone() for p in module.model.parameters()])
    trainer = make_trainer()
    trainer.fit(module, as_loader([comparisons(fill=7, extra=2 if kind == "gpt2" and not loss.needs_kl else 0)]))
    after = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    networks = plain(make_lm, kind)
    expected = naive_loss(loss, networks)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in networks[0].parameters()])
    tolerance = 1e-9 if kind == "gpt2" else 1e-5  # Llama's norm computes in float32 whatever its weights are
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(
        expected.item(), abs=1e-5
    )  # logged as float32
    assert float(((before - after) / 0.01 - gradient).abs().max()) < tolerance
    assert float(gradient.abs().max()) > 1e-2


def test_labels_are_learned_by_kto(make_module, make_lm, make_trainer, as_loader, labels):
    module = make_module(loss=KTO_LOSS)
    before = torch.cat([p.detach().flatten().clone() for p in module.model.parameters()])
    trainer = make_trainer()
    trainer.fit(module, as_loader([labels()]))
    networks = plain(make_lm)
    z = naive_kl(networks, [x for x, *_ in LABELED], [[y] for _, y, _ in LABELED])
    each = [value(KTO_LOSS, 0.3 * (log_ratio(networks, x, y) - z), good) for x, y, good in LABELED]
    loss = sum(each) / len(each)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in networks[0].parameters()])
    after = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    assert float(((before - after) / 0.01 - gradient).abs().max()) < 1e-9
    logged = trainer.callback_metrics
    assert float(logged["train/loss"]) == pytest.approx(loss.item(), abs=1e-6)
    assert float(logged["train/kl"]) == pytest.approx(z, abs=1e-6)
    assert z > 0.01


def test_mismatched_estimate_is_not_that_of_the_own_responses(make_module, make_lm, labels):
    module = make_module(loss=KTO_LOSS)
    networks = plain(make_lm)
    own = naive_kl(networks, [x for x, *_ in LABELED], [[LABELED[(i - 1) % 3][1]] for i in range(3)])
    found = float(module.estimated_kl(as_comparisons(labels())))
    assert found == pytest.approx(naive_kl(networks, [x for x, *_ in LABELED], [[y] for _, y, _ in LABELED]), abs=1e-9)
    assert abs(found - own) > 1e-3


def test_kl_is_a_mean_over_all_processes(make_module, labels, monkeypatch):
    """Of a second process whose 5 pairs sum to 2.5."""
    module, batch = make_module(loss=KTO_LOSS), as_comparisons(labels())
    own = float(module.estimated_kl(batch))
    monkeypatch.setattr(Ranks, "sum", lambda self, x: x + torch.tensor([2.5, 5.0], dtype=x.dtype))
    assert float(module.estimated_kl(batch)) == pytest.approx((3 * own + 2.5) / 8, abs=1e-9)
    assert abs(own - 0.5) > 0.01


def test_one_prompt_has_no_mismatched_pair(make_module, labels):
    module = make_module(loss=KTO_LOSS)
    assert float(module.estimated_kl(as_comparisons(labels(LABELED[:1])))) == 0.0
    assert make_module().estimated_kl(as_comparisons(labels())) is None  # DPO has no use for it


def test_fillers_count_nowhere(make_module, labels, make_trainer, as_loader):
    whole = labels()
    filled = whole._replace(target=whole.target & torch.tensor([[True], [True], [False]]))
    found = []
    for batch in (filled, labels(LABELED[:2])):
        module = make_module(loss=KTO_LOSS)
        found += make_trainer().validate(module, as_loader([batch]), verbose=False)
    kept = {"eval/chosen_logprob", "eval/rejected_logprob", "eval/chosen_reward", "eval/rejected_reward"}
    assert {name: found[0][name] for name in kept} == pytest.approx({name: found[1][name] for name in kept}, abs=1e-6)
    assert found[0].keys() == kept | {"eval/loss"}


@pytest.mark.parametrize("method", ["validate", "test"])
def test_evaluation_by_hand(make_module, make_lm, make_trainer, as_loader, comparisons, method):
    module = make_module()
    (logged,) = getattr(make_trainer(), method)(
        module, as_loader([comparisons(RANKED[:2]), comparisons(RANKED[2:])]), verbose=False
    )
    stage = {"validate": "eval", "test": "test"}[method]
    networks = plain(make_lm)
    margins, sides = [], {True: [], False: []}
    with torch.no_grad():
        for x, responses in RANKED:
            ratios = [(0.3 * float(log_ratio(networks, x, y)), place) for y, place in responses]
            margins += [a - b for a, i in ratios for b, j in ratios if i < j]
            worst = max(place for _, place in responses)
            for (reward, place), (y, _) in zip(ratios, responses, strict=True):
                if worst and place in (0, worst):
                    sides[place == 0].append((reward, float(logprob(networks[0], x, y))))
        loss = float(naive_loss(DPO(beta=0.3), networks))
    expected = {"accuracy": sum(m > 0 for m in margins) / len(margins), "margin": sum(margins) / len(margins)}
    for name, good in (("chosen", True), ("rejected", False)):
        rewards, logprobs = zip(*sides[good], strict=True)
        expected |= {f"{name}_reward": sum(rewards) / len(rewards), f"{name}_logprob": sum(logprobs) / len(logprobs)}
    for name, number in (expected | {"loss": loss}).items():
        assert logged[f"{stage}/{name}"] == pytest.approx(number, abs=1e-5), name
    assert {f"{stage}/calibration_error", f"{stage}/longer_wins", f"{stage}/score_length_correlation"} <= logged.keys()
    assert len({round(number, 3) for number in expected.values()}) == len(expected)


def test_training_logs_both_sides(make_module, make_lm, make_trainer, as_loader, comparisons):
    trainer = make_trainer()
    trainer.fit(make_module(), as_loader([comparisons(RANKED[1:2])]))
    policy, reference = plain(make_lm)
    with torch.no_grad():
        for side, y in (("chosen", [31, 32, 0]), ("rejected", [30, 0])):
            ours, other = (float(logprob(network, [10], y)) for network in (policy, reference))
            assert float(trainer.callback_metrics[f"train/{side}_logprob"]) == pytest.approx(ours, abs=1e-5)
            assert float(trainer.callback_metrics[f"train/{side}_reward"]) == pytest.approx(
                0.3 * (ours - other), abs=1e-5
            )


def test_training_prefers_the_chosen_and_leaves_the_reference(make_module, make_trainer, as_loader, comparisons):
    module = make_module(other=False, optimizer=partial(torch.optim.Adam, lr=0.003))
    frozen = [p.clone() for p in module.reference.frozen.parameters()]
    (before,) = make_trainer().validate(module, as_loader([comparisons()]), verbose=False)
    make_trainer().fit(module, as_loader([comparisons()] * 30))
    (after,) = make_trainer().validate(module, as_loader([comparisons()]), verbose=False)
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-7)  # π_θ is π_ref
    assert before["eval/margin"] == before["eval/chosen_reward"] == 0.0
    assert after["eval/loss"] < 0.4
    assert after["eval/accuracy"] == 1.0
    assert all(map(torch.equal, frozen, module.reference.frozen.parameters()))
    assert not any(p.requires_grad for p in module.reference.frozen.parameters())
    assert all(name.startswith("model.") for name in module.state_dict())


def test_wrong_way_round_prefers_the_rejected(make_module, make_trainer, as_loader, comparisons):
    """Negative control of the test above."""
    module = make_module(other=False, optimizer=partial(torch.optim.Adam, lr=0.003))
    batch = comparisons()
    worst = batch.rank.amax(1, keepdim=True)
    flipped = batch._replace(rank=torch.where(batch.rank >= 0, worst - batch.rank, -1))
    make_trainer().fit(module, as_loader([flipped] * 30))
    (after,) = make_trainer().validate(module, as_loader([batch]), verbose=False)
    assert after["eval/accuracy"] == 0.0


@pytest.mark.parametrize("loss", LOSSES[:3], ids=repr)
def test_padding_has_no_influence(make_module, comparisons, loss):
    module = make_module(loss=loss)
    found = [module.rewards(comparisons(**options)) for options in ({}, {"extra": 5}, {"extra": 5, "fill": 20})]
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=0, atol=1e-12)
    assert (found[0].abs() > 1e-3).sum() == sum(len(responses) for _, responses in RANKED)


def test_under_an_adapter_the_reference_is_the_policy_without_it(make_folder, make_trainer, as_loader, comparisons):
    folder = make_folder()
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn"])
    module = PreferenceModule(
        ModelSource(path=folder, peft=lora), optimizer=partial(torch.optim.Adam, lr=0.05), schedule=ConstantSchedule()
    )
    trainer = make_trainer(precision="32-true")
    trainer.fit(module, as_loader([comparisons()] * 10))
    assert module.reference.frozen is None
    start = AutoModelForCausalLM.from_pretrained(folder).eval()
    rewards = module.eval().rewards(comparisons())
    with torch.no_grad():
        for b, (x, responses) in enumerate(RANKED):
            for j, (y, _) in enumerate(responses):
                h = logprob(module.model.network, x, y) - logprob(start, x, y)
                assert float(rewards[b, j]) == pytest.approx(0.1 * float(h), abs=1e-4)
    assert rewards.abs().max() > 0.05


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true", "64-true"])
def test_policy_starts_as_its_reference_in_every_precision(make_lm, make_trainer, as_loader, comparisons, precision):
    """Lightning casts the policy alone, and the copy follows."""
    module = PreferenceModule(make_lm(), optimizer=SGD)
    (logged,) = make_trainer(precision=precision).validate(module, as_loader([comparisons()]), verbose=False)
    assert logged["eval/margin"] == logged["eval/chosen_reward"] == 0.0


def test_average_of_the_weights_is_evaluated_against_the_same_reference(
    make_lm, make_trainer, as_loader, comparisons, tmp_path
):
    module = PreferenceModule(
        make_lm().double(), optimizer=partial(torch.optim.Adam, lr=0.003), schedule=ConstantSchedule()
    )
    average = EMA(decay=0.9)
    trainer = make_trainer(callbacks=[average])
    trainer.fit(module, as_loader([comparisons()] * 10), as_loader([comparisons()]))
    clone = copy.deepcopy(module)
    assert clone.reference.frozen is module.reference.frozen
    assert torch.equal(clone.rewards(comparisons()), module.rewards(comparisons()))
    assert float(trainer.callback_metrics["eval/margin"]) > 0.0


def test_exported_folder_is_the_policy(make_module, make_folder, make_trainer, as_loader, comparisons, tmp_path):
    module = PreferenceModule(make_folder(), optimizer=SGD, schedule=ConstantSchedule())
    make_trainer(precision="32-true").fit(module, as_loader([comparisons()]))
    module.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[12, 13, 14, 15]])
    assert torch.allclose(again(input_ids=tokens).logits, module.model.network.eval()(input_ids=tokens).logits)


def test_gradient_is_that_of_the_whole_step_when_batches_accumulate(make_module, make_trainer, as_loader, comparisons):
    found = []
    for batches, options in (([RANKED], {}), ([RANKED[:1], RANKED[1:]], {"accumulate_grad_batches": 2})):
        module = make_module()
        make_trainer(**options).fit(module, as_loader([comparisons(batch) for batch in batches]))
        found.append(torch.cat([p.detach().flatten() for p in module.model.parameters()]))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-12)


ROWS = [{"prompt": x, "chosen": "c d", "rejected": y} for x, y in zip("abefghij", "klmnopqr", strict=True)]
UNPAIRED = [{"prompt": x, "completion": y, "label": x in "aeg"} for x, y in zip("abefghij", "klmnopqr", strict=True)]


@pytest.mark.parametrize("data", ["pairs", "labels"])
def test_run_killed_in_the_middle_of_an_epoch_goes_on_to_the_bit(
    make_lm, make_trainer, toy_tokenizer, write_rows, tmp_path, data
):
    """Weights, and what is logged, after 2 epochs of 4 batches, of which the first run saw 6."""
    path = write_rows("rows.jsonl", ROWS if data == "pairs" else UNPAIRED)

    class Interruption(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                trainer.should_stop = True

    def run(*callbacks, ckpt_path=None):
        kind, loss = (ComparisonDataModule, DPO()) if data == "pairs" else (LabeledDataModule, KTO())
        module = PreferenceModule(
            make_lm().double(),
            loss,
            tokenizer=toy_tokenizer,
            optimizer=partial(torch.optim.Adam, lr=0.01),
            schedule=ConstantSchedule(),
        )
        trainer = make_trainer(max_epochs=2, min_epochs=0, callbacks=list(callbacks))
        trainer.fit(module, kind(path, batch_size=2), ckpt_path=ckpt_path)
        assert trainer.global_step == (6 if callbacks else 8)
        return [*module.state_dict().values()], {name: float(x) for name, x in trainer.callback_metrics.items()}

    whole, logged = run()
    half, _ = run(Interruption())
    rest, relogged = run(ckpt_path=tmp_path / "mid.ckpt")
    assert all(map(torch.equal, whole, rest))
    assert relogged == {name: logged[name] for name in relogged}  # a batch may have good responses alone
    assert {"train/loss", "lr"} <= relogged.keys()
    assert not any(map(torch.equal, whole[:2], half[:2]))


def test_other_start_of_the_reference_is_no_resume(make_lm, make_trainer, as_loader, comparisons, tmp_path):
    def run(seed, ckpt_path=None):
        module = PreferenceModule(make_lm(seed=seed).double(), optimizer=SGD)
        trainer = make_trainer(max_epochs=2 if ckpt_path else 1)
        trainer.fit(module, as_loader([comparisons()]), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "x.ckpt")

    run(0)
    run(0, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="policy.weights at the start"):
        run(1, tmp_path / "x.ckpt")


def test_checkpoint_is_none_of_another_stage(make_scorer, make_lm, make_trainer, as_loader, comparisons, tmp_path):
    module = PreferenceModule(make_lm().double(), optimizer=SGD)
    trainer = make_trainer()
    trainer.fit(module, as_loader([comparisons()]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="written by PreferenceModule, not by RewardModule"):
        make_trainer().fit(
            RewardModule(make_scorer().double()), as_loader([comparisons()]), ckpt_path=tmp_path / "x.ckpt"
        )


def test_labels_are_refused_by_losses_of_pairs(make_module, make_trainer, as_loader, labels):
    with pytest.raises(ValueError, match=r"DPO compares the responses to a prompt.*KTO\(\)"):
        make_trainer().fit(make_module(), as_loader([labels()]))


def test_comparisons_that_do_not_say_where_responses_begin_are_refused(
    make_module, make_trainer, as_loader, comparisons
):
    with pytest.raises(ValueError, match="`target` is None"):
        make_trainer().fit(make_module(), as_loader([comparisons()._replace(target=None)]))


def test_text_longer_than_the_network_is_refused(make_module, make_trainer, as_loader, comparisons):
    with pytest.raises(ValueError, match="lower the data's `max_tokens`"):
        make_trainer().fit(make_module(), as_loader([comparisons([([10] * 70, [([20, 0], 0), ([0], 1)])])]))


def test_prompt_that_counts_nowhere_is_in_no_mismatched_pair(make_module, comparisons):
    """As a filler, which must not change the mean; without it the estimate is the same."""
    module = make_module(loss=KTO_LOSS)
    with_tie, without = (float(module.estimated_kl(comparisons(rows))) for rows in (RANKED, RANKED[:3]))
    assert with_tie == pytest.approx(without, abs=1e-12)
    assert without > 0.01
    between = [RANKED[0], RANKED[3], *RANKED[1:3]]
    assert float(module.estimated_kl(comparisons(between))) == pytest.approx(without, abs=1e-12)


def test_mismatched_texts_are_cut_at_the_width_of_the_batch(make_module, comparisons):
    """A long prompt and another prompt's long response together would outgrow the table of positions."""
    ranked = [([11] * 40, [([20, 0], 0), ([0], 1)]), ([12], [([21] * 40 + [0], 0), ([0], 1)])]
    texts, counts = mismatched(comparisons(ranked), Ranks(make_module()))
    assert texts.tokens.shape == (4, 42)
    assert texts.tokens[0].tolist() == [11] * 40 + [21] * 2
    assert texts.target[0].tolist() == [False] * 40 + [True] * 2
    assert texts.tokens[2][:3].tolist() == [12, 20, 0]
    assert texts.target[2].tolist() == [False, True, True] + [False] * 39
    assert counts.all()
