"""The pages: the picture is that of the architecture test, the API pages list what is public, links hold."""

from __future__ import annotations

import logging
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from public import ROOMS, classes_of
from test_repo_architecture import BELOW

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def picture() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "architecture.py"))


def test_picture_is_the_program_s(picture: dict[str, Any]) -> None:
    assert (DOCS / "architecture.svg").read_text(encoding="utf-8") == picture["drawing"](), "run docs/architecture.py"


def test_words_of_a_stage_fit_into_its_box(picture: dict[str, Any]) -> None:
    _, width = picture["columns"](len(picture["STEP"]))
    for _, *words in picture["STEP"]:
        assert max(map(len, words)) * 6.2 < width, f"{words}: a letter of 11 px is about 6.2 px wide"


def test_picture_has_every_room_above_what_it_imports(picture: dict[str, Any]) -> None:
    """`__init__` is no room: it names the others' contents."""
    rows = {name: number for number, row in enumerate(picture["ROOMS"]) for name in row}
    assert rows.keys() == BELOW.keys() - {"__init__"}, "draw the room in docs/architecture.py"
    for name, row in rows.items():
        for target in BELOW[name]:
            assert rows[target] > row or rows[target] == row == 0, f"{name} imports {target}: draw it in a lower row"


def test_every_public_name_is_on_an_api_page() -> None:
    hook = runpy.run_path(str(DOCS / "complete.py"))
    pages = {path.stem: hook["completed"](path.read_text("utf-8"), path.stem) for path in (DOCS / "api").glob("*.md")}
    assert set(ROOMS) <= pages.keys()
    for room in ROOMS:
        for name, kind in classes_of(room).items():
            assert f"\n::: {kind.__module__}\n" in pages[room], f"{name} is not on docs/api/{room}.md"


def test_hook_puts_an_unnamed_module_behind() -> None:
    completed = runpy.run_path(str(DOCS / "complete.py"))["completed"]
    page = completed("# Networks\n\n::: lightning_rlhf.models.source\n", "models")
    assert page.count("::: lightning_rlhf.models.source") == 1
    assert page.count("::: lightning_rlhf.models.policy") == 1


def warnings_of(pages: Path, site: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What `mkdocs build --strict` would end with."""
    pytest.importorskip("mkdocstrings_handlers.python")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build(load_config(str(pages / "mkdocs.yml"), site_dir=str(site)))
    return [record.getMessage() for record in caplog.records]


@pytest.mark.slow
def test_pages_build_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Links, anchors, docstrings; and what a browser would fetch lies in the site."""
    assert not warnings_of(DOCS.parent, tmp_path, caplog)
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r'<(script|link|img|iframe)\b[^>]*\b(src|href)="(https?:)?//', page.read_text("utf-8"))
    for room in ROOMS:
        api = (tmp_path / "api" / room / "index.html").read_text(encoding="utf-8")
        for kind in classes_of(room).values():
            anchor = f'id="{kind.__module__}.{kind.__qualname__}"'
            assert anchor in api or kind.__name__ == "PPOBatch", f"{kind.__name__} is filtered out in mkdocs.yml"
    modules = (tmp_path / "api/modules/index.html").read_text(encoding="utf-8")
    assert not re.search(r'id="[^"]*\.(on_\w+|configure_\w+|[A-Z]{4,})"', modules)


def test_equations_are_drawn_by_what_lies_in_the_site() -> None:
    """KaTeX, its fonts and its license are beside the pages, and no style asks for a font elsewhere."""
    katex = DOCS / "assets" / "katex"
    style = (katex / "katex.min.css").read_text(encoding="utf-8")
    fonts = re.findall(r"url\(([^)]+)\)", style)
    assert fonts
    assert not [font for font in fonts if not font.startswith("fonts/")]
    assert all((katex / font).is_file() for font in fonts if font.endswith(".woff2"))
    assert "MIT" in (katex / "LICENSE").read_text(encoding="utf-8")
    settings = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for name in re.findall(r"assets/[\w./-]+", settings):
        text = (DOCS / name).read_text(encoding="utf-8")
        asked = set(re.findall(r"https?://[^\s\"')]+", text))
        assert asked <= {"http://www.w3.org/1998/Math/MathML", "http://www.w3.org/2000/svg"}, (
            "names of XML, not fetched"
        )


def test_equations_close() -> None:
    """A `$$` without its partner would turn the rest of a page into an equation."""
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"(?m)^\$\$$", text)) % 2 == 0, page.name
        assert text.count("$$") == len(re.findall(r"(?m)^\$\$$", text)), f"{page.name}: $$ stands in a line of its own"


def test_broken_anchor_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Negative control: the settings of mkdocs.yml on a page that points at no function."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[x](index.md#nowhere)\n", encoding="utf-8")
    settings = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    validation = settings[settings.index("validation:") : settings.index("nav:\n  -")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\n{validation}", encoding="utf-8")
    (warning,) = warnings_of(tmp_path, tmp_path / "site", caplog)
    assert "nowhere" in warning


def test_memory_page_shows_today_s_estimate() -> None:
    """To renew it, put what `python docs/memory.py` prints into docs/memory.md."""
    pytest.importorskip("peft")
    memory = runpy.run_path(str(DOCS / "memory.py"))
    page = (DOCS / "memory.md").read_text(encoding="utf-8")
    assert memory["fits"]() in page
    assert memory["pieces"]() in page


def test_memory_of_the_smallest_model_is_counted_by_hand() -> None:
    """494,032,768 weights: 16 bytes each and 2 of the reference stay; 2 of autocast and the activations come on top."""
    memory = runpy.run_path(str(DOCS / "memory.py"))
    activations = 4096 * 896 * (2 * 2 * 24 + 34 * 1.4)  # inputs of 24 layers in float32, one layer whole (autocast)
    assert memory["peak_of"](memory["parts_of"]("0.5B")) * 2**30 == pytest.approx(
        494_032_768 * (16 + 2 + 2) + activations, rel=1e-3
    )
    assert memory["card_of"](21.6) == "24 GB"
    assert memory["card_of"](21.7) == "48 GB"
    assert memory["card_of"](72.1) == "several"


def starts() -> list[list[str]]:
    """Rows of the table of defaults in docs/methods.md, without marks."""
    page = (DOCS / "methods.md").read_text(encoding="utf-8").partition("## Where to start from")[2]
    table = re.search(r"(?ms)^\| config .*?\n\n", page)[0].splitlines()[2:]
    return [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in table if row]


@pytest.mark.parametrize("row", starts(), ids=lambda row: row[0])
def test_numbers_to_start_from_are_the_configs(row: list[str]) -> None:
    """Which are themselves held to the papers by tests/repo/test_repo_configs.py."""
    names, *cells, source = row
    assert source
    for name in re.findall(r"\w+", names):
        config = yaml.safe_load((DOCS.parent / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        numbers = [
            model["optimizer"]["init_args"]["lr"],
            model["algorithm"]["init_args"]["beta"],
            model["generation"].get("samples_per_prompt", 1),
            data["batch_size"],
            model["updates"]["minibatch"],
            model["updates"]["epochs"],
        ]
        assert [None if cell == "all" else float(cell) for cell in cells] == numbers, name


def test_every_method_with_a_config_has_numbers_to_start_from() -> None:
    named = {name for row in starts() for name in re.findall(r"\w+", row[0])}
    stages = {path.stem for path in (DOCS.parent / "configs").glob("*.yaml")}
    assert named | {"bandit_klpen"} == stages - {
        "sft",
        "reward",
        "dpo",
        "kto",
        "evaluate",
        "qlora",
    }  # ppo but for KLPEN
