"""What importing costs, and that the lazy table of names is whole."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.pytorch import Callback
from public import classes_of
from switch_harness import settable

import lightning_rlhf
from lightning_rlhf import core, modules

PACKAGE = Path(lightning_rlhf.__file__).parent


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "unwanted"),
    [
        ("lightning_rlhf", {"torch", "lightning", "transformers"}),
        ("lightning_rlhf.cli", {"torch", "lightning", "transformers"}),
        ("lightning_rlhf.core, lightning_rlhf.types", {"lightning", "pytorch_lightning", "transformers"}),
    ],
)
def test_import_loads_no_more_than_it_needs(name: str, unwanted: set[str]) -> None:
    first = "lightning_rlhf.GRPO;" if "core" in name else ""  # a name of core, asked for at the top, loads no more
    loaded = run(f"import {name}, sys; {first} print(*{{m.split('.')[0] for m in sys.modules}})").split()
    assert not unwanted & set(loaded)


def test_importing_the_package_takes_less_than_half_a_second() -> None:
    program = "import time; t = time.perf_counter(); import lightning_rlhf; print(time.perf_counter() - t)"
    assert any(float(run(program)) < 0.5 for _ in range(3))  # three tries, for machines that are busy


@pytest.mark.parametrize("name", lightning_rlhf.__all__)
def test_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(lightning_rlhf, name).__name__ == name
    assert name in dir(lightning_rlhf)


def test_public_names_are_sorted_and_distinct() -> None:
    assert lightning_rlhf.__all__ == sorted(set(lightning_rlhf.__all__))


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_rlhf' has no attribute 'PPOModul'"):
        lightning_rlhf.PPOModul  # noqa: B018


def test_top_level_has_the_names_of_a_first_day_and_no_more() -> None:
    """The stages, their data, the methods, rewards, callbacks, evaluations, and what a user extends."""
    assert len(lightning_rlhf.__all__) <= 56
    methods = {name for name, kind in classes_of("core").items() if issubclass(kind, core.Algorithm)}
    callbacks = {name for name, kind in classes_of("callbacks").items() if issubclass(kind, Callback)}
    assert set(lightning_rlhf.__all__) >= methods | callbacks | set(modules.__all__)


@pytest.mark.parametrize("room", sorted(lightning_rlhf._EXPORTS))
def test_lazy_name_lives_in_its_room(room: str) -> None:
    module = __import__(f"lightning_rlhf.{room}", fromlist=["_"])
    for name in lightning_rlhf._EXPORTS[room]:
        assert getattr(module, name) is getattr(lightning_rlhf, name)


def test_type_checkers_know_the_public_names() -> None:
    """A stub exports only what it imports under its own name."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert all(name.asname == name.name for node in imports for name in node.names)
    assert len(imports) == len(lightning_rlhf._EXPORTS) == 9


@pytest.mark.slow
def test_wrong_argument_is_found_by_mypy(tmp_path: Path) -> None:
    right = "module = PPOModule(policy='model', reward=len, algorithm=GRPO(beta=0.04))"
    lines = ["from lightning_rlhf import GRPO, PPOModule", right, right.replace("beta", "betta"), "reveal_type(module)"]
    (tmp_path / "script.py").write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "script.py"]
    environment = os.environ | {"MYPYPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert 'script.py:3: error: Unexpected keyword argument "betta" for "GRPO"' in done.stdout
    assert "script.py:2: error" not in done.stdout
    assert 'Revealed type is "lightning_rlhf.modules.ppo.PPOModule"' in done.stdout


def imports(path: Path) -> list[tuple[str, str]]:
    """Names that a file takes from this library, also inside functions."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    taken = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module and node.level == 0]
    own = [node for node in taken if node.module.split(".")[0] == "lightning_rlhf"]
    return [(node.module, name.name) for node in own for name in node.names]


@pytest.mark.parametrize("folder", ["lightning_rlhf", "examples", "docs"])
def test_every_import_finds_its_name(folder: str) -> None:
    """An import inside a function fails only when it is called, which may be after an hour of training."""
    for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
        for module, name in imports(path):
            found = hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None
            assert found, f"{path.relative_to(PACKAGE.parent)} takes {name} from {module}, which has none"


@pytest.mark.parametrize("name", sorted(settable()))
def test_command_line_can_read_every_annotation(name):
    """A name of a base class that the module of a class lacks would make all its arguments untyped."""
    parameters = get_signature_parameters(settable()[name])
    assert [parameter.name for parameter in parameters if isinstance(parameter.annotation, str)] == []
