"""The study of surrogates: it runs at a tiny size, and what it says is what its figures say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
FOLDER = Path(__file__).parents[2] / "examples" / "surrogates"
RESULTS = FOLDER / "results"


@pytest.fixture
def study(monkeypatch):
    """The modules of the example, importable by their own names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_committed_write_up_is_that_of_the_committed_figures(study):
    from grid import read
    from writeup import writeup

    bandit, model = (read(RESULTS / f"{part}.csv") for part in ("bandit", "model"))
    assert (RESULTS / "WRITEUP.md").read_text(encoding="utf-8") == writeup(bandit, model)
    assert len({row["seed"] for row in bandit}) >= 3
    assert len([row for row in model if row["reward"]]) == 17  # the start, and 4 surrogates x 2 beta x 2 inner epochs


def test_write_up_takes_back_what_the_figures_do_not_show(study):
    """Negative control: with KLPEN at the optimum without the KL to SFT, the answer is no longer no."""
    from grid import read
    from writeup import writeup

    bandit = read(RESULTS / "bandit.csv")
    assert "**No.**" in writeup(bandit, [])
    for row in bandit:
        if row["experiment"] == "fixed point":
            row["gap_closed"] = "0.999"
    changed = writeup(bandit, [])
    assert "**No.**" not in changed
    assert "Not decided" in " ".join(changed.split())


def test_exact_figures_of_the_bandit_obey_theory(study):
    from bandit import BETA, Bandit, kl

    bandit = Bandit.drawn(range(2), prompts=2, responses=5)
    best = bandit.optimum()
    torch.testing.assert_close(bandit.objective(best), bandit.best(), rtol=0, atol=1e-12)
    other = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).log_softmax(-1)
    torch.testing.assert_close(bandit.objective(other), bandit.best() - BETA * kl(other, best), rtol=0, atol=1e-12)
    assert float(bandit.gradient(best).abs().max()) < 1e-12
    assert float(bandit.gap_closed(bandit.logp_ref).abs().max()) < 1e-12


def test_study_runs_at_a_tiny_size(study, tmp_path, make_lm, toy_tokenizer):
    import experiments
    import model
    import run
    from grid import read

    size = experiments.Size(seeds=2, rollouts=2, draws=4, epochs=(1, 2), rates=(0.01, 0.1), prices=(0.1, 1.0), steps=3)
    experiments.study(tmp_path / "bandit.csv", size)

    def material() -> model.Material:
        network = make_lm("llama", vocab=36)
        return model.Material(
            network=network,
            tokenizer=toy_tokenizer,
            prompts=["a b", "c d", "e f", "b c", "d e", "f a"],
            reward=lambda prompts, responses: [float(len(text)) for text in responses],
        )

    tiny = model.Size(rollouts=1, prompts=2, minibatch=1, held_out=2, tokens=3, precision="32-true")
    model.study(tmp_path / "model.csv", material, tiny)
    first = (tmp_path / "model.csv").read_text(encoding="utf-8")
    model.study(tmp_path / "model.csv", lambda: pytest.fail("a finished study loads no model"), tiny)
    assert (tmp_path / "model.csv").read_text(encoding="utf-8") == first

    run.report(tmp_path)
    rows = read(tmp_path / "bandit.csv")
    assert {row["experiment"] for row in rows} == {"grid", "trust", "fixed point", "baselines"}
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("reward", "kl", "gap_closed"))
    assert (tmp_path / "surrogates.png").stat().st_size > 10_000
    assert "SmolLM2" in (tmp_path / "WRITEUP.md").read_text(encoding="utf-8")
