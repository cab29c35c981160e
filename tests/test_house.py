"""The rules of the house: light imports, one direction, every part documented, nothing heavy let in."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gossamer
from gossamer import catalogue

PACKAGE = Path(gossamer.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "numpy", "pandas", "onnxruntime", "matplotlib", "sklearn", "datasets", "optuna", "accelerate"}


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imported_by(*command: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `command`."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {['gossamer', *command]!r}\n"
        "try: runpy.run_module('gossamer', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(out.rpartition("LOADED")[2].split())


def test_importing_gossamer_loads_nothing_but_the_standard_library() -> None:
    code = "import sys; before = set(sys.modules); import gossamer; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    outside = {name.partition(".")[0] for name in out.split()} - set(sys.stdlib_module_names) - {"gossamer"}
    assert outside == set()


@pytest.mark.parametrize("command", [("--help",), ("list",), ("info", "swin"), ("fit", "--help")])
def test_commands_that_only_tell_load_nothing_heavy(command: tuple[str, ...]) -> None:
    loaded = imported_by(*command)
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_every_name_gossamer_offers_is_there() -> None:
    for name in gossamer.__all__:
        assert getattr(gossamer, name) is not None, name
    assert set(gossamer.__all__) == set(dir(gossamer))
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        _ = gossamer.create_modle


def test_version_is_the_one_of_the_package() -> None:
    from importlib.metadata import version

    assert gossamer.__version__ == version("gossamer")


def test_imports_go_down_only() -> None:
    checkout = PACKAGE.parents[1]
    if not (checkout / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_file_says_what_it_is() -> None:
    silent = [relative(f) for f in FILES if not ast.get_docstring(ast.parse(f.read_text(encoding="utf-8")))]
    assert silent == []


def test_every_floor_has_a_page() -> None:
    floors = sorted(p.parent for p in PACKAGE.glob("*/__init__.py"))
    assert [relative(f) for f in floors if not (f / "README.md").exists()] == []


@pytest.mark.parametrize("floor", ["mixers", "models"])
def test_every_mechanism_and_system_names_its_source(floor: str) -> None:
    helpers = {"__init__.py", "base.py", "registry.py"}
    bare = []
    for path in sorted((PACKAGE / floor).glob("*.py")):
        head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        registers = re.search(r"^@register_(mixer|system)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
        if path.name not in helpers and registers and "Source:" not in head:
            bare.append(relative(path))
    assert bare == []


def test_nothing_imports_torchvision_or_timm() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"torchvision", "timm", "torchaudio"}, relative(path)


def test_nothing_unpickles_or_configures_logging() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for word in ("pickle.load", "weights_only=False", "yaml.load(", "basicConfig("):
            assert word not in text, f"{relative(path)}: {word}"


@pytest.mark.parametrize(
    "slug",
    [
        s.slug
        for s in catalogue.systems()
        if s.status != "planned" and (s.variants or not (s.passes or s.kind == "survey"))
    ],
)
def test_the_catalogue_and_the_model_file_agree_on_variants_and_tasks(slug: str) -> None:
    entry = catalogue.find(slug)
    assert entry.module is not None
    importlib.import_module(entry.module)
    from gossamer.models.registry import system

    built = system(slug)
    assert sorted(built.variants) == sorted(entry.variants)
    assert sorted(built.tasks) == sorted(entry.tasks)


def test_passes_the_catalogue_promises_are_registered_and_say_where_they_come_from() -> None:
    from gossamer.shrink.base import passes

    known = passes()
    for s in catalogue.systems():
        for name in s.passes:
            assert known[name].paper == s.slug
    papers = {p.paper: name for name, p in known.items() if p.paper}
    assert papers.keys() <= {s.slug for s in catalogue.systems() if s.passes}


def test_mixers_the_catalogue_promises_are_registered() -> None:
    from gossamer.mixers import list_mixers

    promised = {name for s in catalogue.systems() for name in s.mixers}
    assert promised <= set(list_mixers())
