"""Tables, figures and samples of several runs, and the numbers behind each figure."""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import sample, write_csv

from lightning_rlhf.report import read_runs, write_report
from lightning_rlhf.report.frontier import GaoCurve, _told
from lightning_rlhf.report.glossary import meaning
from lightning_rlhf.report.metrics import Series
from lightning_rlhf.report.palette import RUNS
from lightning_rlhf.report.samples import columns_of
from lightning_rlhf.report.settings import read_settings
from lightning_rlhf.report.summary import ROWS


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def test_runs_are_in_the_order_of_stages(rl_run: Callable[..., Path], reward_run: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "zero" / "metrics.csv", [{"step": 0, "train/loss": 1.0}])
    runs = read_runs([rl_run("b"), reward_run, rl_run("a"), tmp_path / "zero"])
    assert [run.name for run in runs] == ["zero", "reward", "a", "b"]
    assert [run.color for run in runs] == list(RUNS[:4])


def test_a_number_has_one_row_with_a_cell_for_each_run(rl_run: Callable[..., Path], tmp_path: Path) -> None:
    page = write_report([rl_run("one"), rl_run("two")], output=tmp_path / "out").read_text(encoding="utf-8")
    table = page[page.index("<h2>Start and end</h2>") :]
    rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")])
    cells = [[text_of(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    assert cells[0] == ["", "one", "two"]
    assert [row[0] for row in cells[1:]] == list(dict.fromkeys(row[0] for row in cells[1:]))
    assert cells[1] == ["held-out reward", *["1.5 → 2+0.5"] * 2]  # scores 0 … 3; then one more each, the last one less
    assert ["clip fraction", *["0 → 0.7+0.7"] * 2] in cells
    assert 'title="objective/kl: mean Σ_t log π_old' in table


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_has_a_meaning(row: tuple[str, tuple[str, ...], str]) -> None:
    _, names, _ = row
    assert all(meaning(name) and not meaning(name).startswith("as ") for name in names)


def test_class_without_arguments_is_its_name(tmp_path: Path) -> None:
    config = """
model:
  class_path: lightning_rlhf.PPOModule
  init_args:
    advantage:
      class_path: lightning_rlhf.core.BanditAdvantage
      init_args: {baseline: {class_path: lightning_rlhf.core.NoBaseline, init_args: {}}}
    shaping: [{class_path: lightning_rlhf.core.TruncatedScore, init_args: {value: -1.0, other: null}}]
    extra: {}
"""
    (tmp_path / "config.yaml").write_text(config)
    assert read_settings([tmp_path / "config.yaml"]) == {
        "model": "PPOModule",
        "model.advantage": "BanditAdvantage",
        "model.advantage.baseline": "NoBaseline",
        "model.shaping": "[TruncatedScore(value=-1.0)]",
        "model.extra": "{}",
    }


def test_settings_without_config_are_the_module_s(tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text("_instantiator: x\nlr: 0.1\n")
    assert read_settings([], [tmp_path / "hparams.yaml"]) == {"model.lr": "0.1"}
    (tmp_path / "hparams.yaml").write_text("lr: !!python/object:os.system {}\n")
    assert read_settings([], [tmp_path / "hparams.yaml"]) == {}


@pytest.mark.parametrize(("beta", "said"), [(0.01, "no peak in the measured range"), (0.5, "peaks at √KL = 2.72")])
def test_peak_is_told_where_it_was_measured(beta: float, said: str) -> None:
    """e^(α/β − 1): with α = 2β it is e; with β = 0.01 and α = 1, e^99."""
    curve = GaoCurve(start=0.0, alpha=1.0, beta=beta, residual=0.0)
    points = Series((0.0, 4.0), (0.0, 1.0))
    assert (said if beta == 0.01 else f"it {said}") in _told(curve, points)


def test_numbers_to_point_at_are_those_logged(rl_run: Callable[..., Path], tmp_path: Path) -> None:
    page = write_report([rl_run()], output=tmp_path / "out").read_text(encoding="utf-8")
    figures = re.findall(r'<figure class="card" data-dots="([^"]*)"><h3>([^<]*)</h3>', page)
    dots = {title: json.loads(html.unescape(text)) for text, title in figures}
    assert [dot[2:5] for dot in dots["Clip fraction"]] == [["training", float(i), 0.1 * i] for i in range(8)]
    left, top = zip(*(dot[:2] for dot in dots["Clip fraction"]), strict=True)
    assert list(left) == sorted(left)
    assert list(top) == sorted(top, reverse=True)  # rising numbers stand higher
    assert all(0 < place < 1 for place in (*left, *top))
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["figure"] == "kl_reference"]
    assert [(d[2], d[3], d[4]) for d in dots["KL to the reference"]] == [
        (row["series"], float(row["x"]), float(row["y"])) for row in rows
    ]


def test_name_of_a_run_stays_inside_its_attribute(rl_run: Callable[..., Path], tmp_path: Path) -> None:
    name = """a"><img src=x onerror='1'>&quot;"""
    folder = rl_run("one").rename(tmp_path / name)
    page = write_report([folder, rl_run("two")], output=tmp_path / "out").read_text(encoding="utf-8")
    assert "<img" not in page
    text = re.search(r'data-dots="([^"]*)"><h3>Clip fraction', page)[1]
    assert {dot[2] for dot in json.loads(html.unescape(text))} == {name, "two"}


def test_clip_fraction_of_zero_is_on_the_floor(tmp_path: Path) -> None:
    rows = [{"step": i, "objective/scores": 0.0, "policy/clipfrac_avg": 0.0} for i in range(3)]
    write_csv(tmp_path / "run" / "metrics.csv", rows)
    page = write_report([tmp_path / "run"], output=tmp_path / "out").read_text(encoding="utf-8")
    figure = page[page.index("<h3>Clip fraction</h3>") :]
    figure = figure[: figure.index("</figure>")]
    assert "−0.0" not in figure
    assert ">0.00<" in figure


def test_start_that_runs_share_is_shown_once(rl_run: Callable[..., Path]) -> None:
    runs = read_runs([rl_run("one"), rl_run("two")])
    assert [column.title for column in columns_of(runs)] == ["before training", "after 8 rollouts"]
    other = [sample(0, 0, 1.0, "same"), sample(8, 0, 2.0, "other")]
    third = read_runs([rl_run("one"), rl_run("two"), rl_run("three", samples=other)])
    assert [column.title for column in columns_of(third)] == [
        "one, two, before training",
        "one, two, after 8 rollouts",
        "three, before training",
        "three, after 8 rollouts",
    ]


def luminance(color: str) -> float:
    """Of WCAG 2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("ground", ["#ffffff", "#171c26"])
@pytest.mark.parametrize("color", RUNS)
def test_color_stands_out_on_both_grounds(color: str, ground: str) -> None:
    """3 : 1, what WCAG 2 asks of graphics."""
    dark, light = sorted((luminance(color), luminance(ground)))
    assert (light + 0.05) / (dark + 0.05) >= 3
