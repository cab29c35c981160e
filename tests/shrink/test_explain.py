"""`--explain` measures what it says, and never proposes what cannot work."""

import json

import pytest
from typer.testing import CliRunner

from gossamer.catalogue.techniques import techniques
from gossamer.cli import app
from gossamer.data import read_dataset
from gossamer.io import write_json
from gossamer.models import create_model
from gossamer.models.folder import save
from gossamer.shrink.explain import PROBES, _judge, explain
from gossamer.shrink.options import ShrinkOptions


@pytest.fixture(scope="module")
def advice(tmp_path_factory):
    data = read_dataset("digits")
    net = create_model("vit_tiny_patch16_224", patch=2, dim=64, depth=2, heads=4, **data.spec)
    folder = save(net, tmp_path_factory.mktemp("model"))
    write_json(folder / "task.json", {"task": data.task, "spec": data.spec, "meta": data.meta})
    return folder, explain(ShrinkOptions(model=str(folder), data="digits", shares={"macs": 0.6}, quiet=True))


def test_what_is_expected_was_measured_and_marks_what_is_enough(advice):
    _, found = advice
    rows = {row.technique: row for row in found.rows}
    pruning = rows["head and neuron pruning by trajectories"]
    assert pruning.verdict == "suits"
    assert 0.4 < pruning.expected["macs"] < 0.7
    assert pruning.enough == (pruning.expected["macs"] <= 0.6 * 1.02)
    assert rows["int8, dynamic"].verdict == "does not suit"  # multiply-adds stay what they are
    assert rows["int8, dynamic"].reason.endswith("the budget is of macs")
    assert found.facts["tokens"] == 17
    assert 0 < found.facts["attention_share"] < 0.5
    assert found.facts["bound"] in ("products", "memory")


def test_every_technique_has_a_verdict_and_a_reason(advice):
    _, found = advice
    assert len(found.rows) >= 50
    assert all(row.reason for row in found.rows)
    assert "only 17 tokens" in next(r.reason for r in found.rows if r.technique == "kernel attention")


def test_the_command_prints_it(advice, monkeypatch):
    folder, found = advice
    monkeypatch.setattr("gossamer.shrink.explain.explain", lambda options: found)
    call = ["shrink", str(folder), "--data", "digits", "--budget", "macs=60%", "--explain"]
    answer = CliRunner().invoke(app, [*call, "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["facts"]["macs"] > 0
    assert "suits:" in CliRunner().invoke(app, call).stdout


def facts(**known):
    return {"decoder": False, "tokens": 2048, "attention_share": 0.5, **known}


@pytest.mark.parametrize("share", [{}, {"macs": 0.6}, {"latency": 0.5}, {"size": 0.3}])
def test_no_technique_that_looks_ahead_suits_a_decoder_whatever_was_measured(share):
    good = {name: dict.fromkeys(("latency", "macs", "params", "size"), 0.5) for name in ("int8", *PROBES)}
    rows = [_judge(t, good, facts(decoder=True), share) for t in techniques()]
    assert rows == [_judge(t, good, facts(decoder=True), share) for t in techniques()]
    for t, row in zip(techniques(), rows, strict=True):
        assert row.reason
        if not t.causal and t.covered:
            assert row.verdict == "does not suit"
            assert "decoder" in row.reason
    other = [_judge(t, good, facts(), share) for t in techniques()]
    merging = next(r for r in other if r.technique == "similarity merging")
    assert merging.verdict == ("does not suit" if "size" in share else "suits")


def test_what_saves_nothing_of_what_was_asked_for_does_not_suit():
    none = {name: dict.fromkeys(("latency", "macs", "params", "size"), 1.0) for name in ("int8", *PROBES)}
    rows = [_judge(t, none, facts(), {"latency": 0.7}) for t in techniques()]
    assert not [r for r in rows if r.verdict == "suits"]
    assert not [r for r in rows if r.enough]
