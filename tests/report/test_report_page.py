"""The page: all figures, nothing from outside, and nothing that a model wrote runs, as Chromium sees it."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from run_files import sample, write_csv

from lightning_rlhf import Report
from lightning_rlhf.cli import main
from lightning_rlhf.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ATTACK = "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"


def test_command_writes_page_pictures_and_numbers(rl_run: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    folder = rl_run()
    main(["report", str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report" / "report.html")
    assert (folder / "report" / "reward.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "report" / "report.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["figure"] == "clip_fraction"]
    assert [float(row["y"]) for row in rows] == pytest.approx([0.1 * i for i in range(8)])


def test_page_shows_the_fit_and_needs_nothing_else(rl_run: Callable[..., Path], tmp_path: Path) -> None:
    page = write_report([rl_run()], output=tmp_path / "out").read_text(encoding="utf-8")
    assert "α = 2" in page
    assert "β = 0.5" in page
    assert "best of n" in page.lower()
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", page)
    assert "default-src 'none'" in page


def test_figure_that_the_logs_do_not_give_says_what_would(rl_run: Callable[..., Path], tmp_path: Path) -> None:
    page = write_report([rl_run(samples=[])], output=tmp_path / "out").read_text(encoding="utf-8")
    assert "needs ptx/loss" in page
    assert "Needs samples.jsonl" in page
    assert not (tmp_path / "out" / "pretraining.png").exists()


def test_several_runs_are_overlaid(rl_run: Callable[..., Path], reward_run: Path, tmp_path: Path) -> None:
    page = write_report([rl_run("one"), rl_run("two"), reward_run], output=tmp_path / "out").read_text(encoding="utf-8")
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["series"] for row in rows if row["figure"] == "reward"} >= {"one", "two"}
    curve = [(row["x"], row["y"]) for row in rows if row["figure"] == "reliability" and row["low"]]
    assert [tuple(map(float, point)) for point in curve] == [(0.55, 0.5), (0.95, 1.0)]
    assert "Where the settings differ" in page


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@a"])
def test_name_of_a_run_is_no_formula(name: str, rl_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = rl_run("policy").rename(tmp_path / name)
    write_report([folder, rl_run("other")], output=tmp_path / "out")
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["series"] for row in rows if row["figure"] == "reward"} >= {f"'{name}", "other"}
    assert not any(row["series"].startswith(name) for row in rows)
    assert min(float(row["y"]) for row in rows if row["figure"] == "reward") == 0.0  # numbers stay as they are


def test_link_in_the_place_of_a_file_is_replaced(rl_run: Callable[..., Path], tmp_path: Path) -> None:
    """What it leads to stays as it is."""
    mine, out = tmp_path / "mine.txt", tmp_path / "out"
    mine.write_text("mine")
    out.mkdir()
    names = ["report.html", "report.csv", "reward.png"]
    for name in [*names, *(f".{name}.part" for name in names), "report.html.part"]:
        (out / name).symlink_to(mine)
    write_report([rl_run()], output=out)
    assert mine.read_text() == "mine"
    assert not any((out / name).is_symlink() for name in names)
    assert not any((out / f".{name}.part").exists() for name in names)


def test_link_in_the_place_of_the_folder_is_refused(
    rl_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = rl_run()
    (tmp_path / "mine").mkdir()
    (folder / "report").symlink_to(tmp_path / "mine")
    with pytest.raises(SystemExit):
        main(["report", str(folder)])
    assert "is a link: say where the report goes by --output" in capsys.readouterr().err
    assert not any((tmp_path / "mine").iterdir())


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize("text", [BOMB, "a: &a {b: *a}", "a: &a [*a]", "[" * 5000], ids=["bomb", "map", "list", "deep"])
def test_config_without_end_is_refused(text: str, rl_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = rl_run()
    (folder / "version_0" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml is no YAML \("):
        write_report([folder], output=tmp_path / "out")


def test_several_runs_need_a_place_to_write(rl_run: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(rl_run("one")), str(rl_run("two"))])
    assert stopped.value.code == 2
    assert "--output DIR" in capsys.readouterr().err


def test_callback_reports_with_the_last_lines_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = CSVLogger(tmp_path, name="run", flush_logs_every_n_steps=100)
    trainer = Trainer(logger=log, accelerator="cpu", enable_checkpointing=False, enable_model_summary=False)
    log.log_metrics({"objective/scores": 1.0}, step=0)
    report = Report(str(tmp_path / "run"))
    report.setup(trainer, LightningModule(), "fit")
    report.on_fit_end(trainer, LightningModule())
    assert "objective/scores" in (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    assert (tmp_path / "run" / "report" / "reward.png").exists()


def test_callback_warns_of_a_log_it_cannot_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_csv(tmp_path / "run" / "metrics.csv", [{"step": 0, "objective/scores": "often"}])
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_model_summary=False)
    report = Report(str(tmp_path / "run"))
    report.setup(trainer, LightningModule(), "fit")
    report.on_fit_end(trainer, LightningModule())
    assert "no report" in caplog.text
    assert "often" in caplog.text


def test_missing_matplotlib_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        Report("run").setup(None, None, "fit")


def seen(page: Path, profile: Path, state: str = "") -> str:
    """The document as Chromium has it after the page's script ran."""
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags = [*quiet.split(), "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, f"{page.as_uri()}{state}"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_browser_searches_sorts_and_runs_no_text(rl_run: Callable[..., Path], tmp_path: Path) -> None:
    texts = ["plain", "a needle here", ATTACK]
    rows = [sample(0, i, 0.0, "start") for i in range(3)] + [
        sample(8, i, float(i), text) for i, text in enumerate(texts)
    ]
    page = write_report([rl_run(samples=rows)], output=tmp_path / "out")
    whole, found = seen(page, tmp_path / "profile"), seen(page, tmp_path / "profile", "#q=needle")
    ordered = seen(page, tmp_path / "profile", "#sort=gain")
    assert "<title>Report of policy</title>" in whole  # neither the script nor the image's handler ran
    assert whole.count('<article class="pair"') == 3
    assert found.count('<article class="pair"') == 1
    assert "a needle here" in found
    assert "1 of 3" in found
    assert ordered.index("onerror") < ordered.index("a needle here") < ordered.index(">plain<")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_browser_shows_the_number_one_points_at(rl_run: Callable[..., Path], tmp_path: Path) -> None:
    """A second script points at the first and the last number; the page's policy would not let it run."""
    point = """<script>
      const figure = [...document.querySelectorAll("figure")].find((one) => one.textContent.includes("Clip fraction"));
      const svg = figure.querySelector("svg"), dots = JSON.parse(figure.dataset.dots);
      for (const [left, top] of [dots[0], dots[7]]) {
        const box = svg.getBoundingClientRect();
        const place = { clientX: box.left + left * box.width + 3, clientY: box.top + top * box.height - 3 };
        svg.dispatchEvent(new PointerEvent("pointermove", place));
        document.body.append(`[${document.getElementById("tip").textContent}]`);
      }
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX: -500, clientY: -500 }));
      document.body.append(`[far: ${document.getElementById("tip").hidden}]`);
    </script>"""
    page = write_report([rl_run()], output=tmp_path / "out")
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    page.write_text(text.replace("</body>", f"{point}</body>"), encoding="utf-8")
    shown = seen(page, tmp_path / "profile")
    assert "[training\n0: 0]" in shown
    assert "[training\n7: 0.7]" in shown
    assert "[far: true]" in shown
