"""The pages: the picture is that of the architecture test, the API pages list what is public, links hold."""

from __future__ import annotations

import logging
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from test_repo_architecture import BELOW

import lightning_rlhf

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def picture() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "architecture.py"))


def test_picture_is_the_program_s(picture: dict[str, Any]) -> None:
    assert (DOCS / "architecture.svg").read_text(encoding="utf-8") == picture["drawing"](), "run docs/architecture.py"


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
    assert lightning_rlhf._EXPORTS.keys() <= pages.keys()
    for room, names in lightning_rlhf._EXPORTS.items():
        for name in names:
            kind = getattr(lightning_rlhf, name)
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
    assert 'id="lightning_rlhf.core.clip.Clip"' in (tmp_path / "api/core/index.html").read_text(encoding="utf-8")


def test_broken_anchor_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Negative control: the settings of mkdocs.yml on a page that points at no function."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[x](index.md#nowhere)\n", encoding="utf-8")
    settings = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    validation = settings[settings.index("validation:") : settings.index("nav:\n  -")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\n{validation}", encoding="utf-8")
    (warning,) = warnings_of(tmp_path, tmp_path / "site", caplog)
    assert "nowhere" in warning
