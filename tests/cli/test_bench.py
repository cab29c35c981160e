"""`gossamer bench mixers`: a table for people, JSON for programs, one line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gossamer.cli import app


def run(*words: str):
    return CliRunner().invoke(app, ["bench", "mixers", *words])


def test_the_table_has_a_row_for_each_mixer_and_the_reason_for_those_left_out(tmp_path: Path) -> None:
    words = ("--grid", "8x8", "--dim", "16", "--mixers", "pool, identity,sparse", "--time", "0.5s")
    result = run(*words, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    (head,) = [line for line in lines if line.startswith("mixer ")]
    assert head.split()[2:9] == ["2x2", "ms", "4x4", "ms", "8x8", "ms", "exponent"]
    starts = [line.split()[0] for line in lines if line]
    assert {"pool", "identity", "sparse"} <= set(starts)
    assert "works on 1 grid axes, not 2" in result.stdout
    assert (tmp_path / "results.json").exists()
    assert (tmp_path / "mixers.svg").exists()


def test_json_is_what_the_file_holds(tmp_path: Path) -> None:
    result = run("--grid", "32", "--dim", "16", "--mixers", "pool", "--time", "0.5s", "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--grid", "8xa"), "grid must be a positive whole number, got 'a'"),
        (("--mixers", "pol"), "'pol'"),
        (("--grid", "64", "--train", "digits"), "two axes"),
        (("--time", "3"), "3m or 1h30m"),
        (("--dim", "0"), "--dim"),
        (("--colour",), "No such option: --colour"),
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2(words: tuple[str, ...], says: str) -> None:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_its_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from gossamer.cli import app\n"
        "try: app(['bench', 'mixers', '--help'])\n"
        "except SystemExit: pass\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--grid" in out
    assert not {"torch", "numpy", "matplotlib", "onnxruntime"} & set(out.rpartition("LOADED")[2].split())
