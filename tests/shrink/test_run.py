"""`gossamer shrink` end to end on small models: budgets, recipes, kills, files that work."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gossamer
from gossamer.cli import app
from gossamer.data import read_dataset
from gossamer.io import onnx_session, read_json, write_json
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.models.folder import save
from gossamer.shrink import run as module
from gossamer.shrink import search
from gossamer.shrink.artefacts import Point
from gossamer.shrink.options import ShrinkOptions
from gossamer.shrink.run import shrink
from gossamer.tasks import create_task
from gossamer.train import Settings, Trainer

pytestmark = pytest.mark.flight


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A ViT that has learnt the digits, as a folder."""
    data = read_dataset("digits")
    task = create_task(data.task, data.spec, data.meta)
    torch.manual_seed(0)
    net = create_model("vit_tiny_patch16_224", patch=2, dim=48, depth=2, heads=4, **data.spec)
    trainer = Trainer(net, task, data, Settings(lr=4e-3, warmup=20, ema=0.0, strength=0.0, precision="float32"))
    trainer.train(steps=250, schedule="linear")
    folder = tmp_path_factory.mktemp("model")
    save(net, folder)
    write_json(folder / "task.json", {"task": data.task, "spec": data.spec, "meta": data.meta})
    return folder


@pytest.fixture(scope="module")
def few():
    """Only two passes are tried: what the search does with more is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "TRIED", ("magnitude", "merging"))
        patch.setattr(module, "MOST_FINALISTS", 1)
        # On a busy machine a small model's latency says little; what the gate does is tested by itself.
        patch.setattr(module._Run, "_gate", lambda *a: None)
        yield


@pytest.fixture(scope="module")
def done(digits, few, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    options = ShrinkOptions(model=str(digits), data="digits", shares={"macs": 0.6}, seconds=60, out=out, quiet=True)
    return shrink(options), options


def test_a_budget_in_multiply_adds_is_met_and_everything_is_there(done, digits):
    result, _ = done
    r = result.results
    assert result.meets_budget
    before, after = r["before"], r["winner"]
    assert after["cost"]["macs"] <= 0.6 * before["cost"]["macs"]
    assert before["test"]["accuracy"] > 0.8
    assert after["test"]["accuracy"] > before["test"]["accuracy"] - 0.1
    assert [t["recipe"][0]["pass"] for t in r["trials"]][:2] == ["magnitude", "merging"]
    folder = result.folder
    net = gossamer.load(folder)
    data = read_dataset("digits")
    task = create_task(data.task, data.spec, data.meta)
    assert macs(net, task.example(data.test)).total == after["cost"]["macs"]
    answer = onnx_session(folder / "model.onnx").run(None, {"input_0": task.example(data.test, 4)[0].numpy()})[0]
    assert answer.shape == (4, 10)
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "as it came" in page
    words = result.summary()
    assert "before" in words
    assert "macs" in words


def test_passes_that_each_reach_a_part_of_the_work_are_tried_together():
    def tried(name, macs, val):
        return search.Trial(name, [{"pass": name, "keep": 0.6}], val=val, cost={"macs": macs})

    before = Point("as it came", "float32", "", 0.9, {"macs": 100.0}, (1.0, 1.0))
    whole = SimpleNamespace(sign=1, model=None, before=before, calibration=SimpleNamespace(score=lambda *_, **__: 0.9))
    whole.trials = [
        tried("word_tables", 70.0, 0.9),
        tried("optin", 80.0, 0.88),
        tried("magnitude", 80.0, 0.5),  # of optin's family, and dearer
        tried("greenformers", 99.0, 0.9),  # saves nothing
        tried("merging", 90.0, 0.6),  # not needed
    ]
    both = [("optin", 1.0), ("word_tables", 1.0)]  # in the order in which they are done, not of their price
    assert search.Search.kindest_together(whole, {"macs": 0.6}) == both
    whole.trials[0] = tried("word_tables", 55.0, 0.9)
    assert search.Search.kindest_together(whole, {"macs": 0.6}) == []


@pytest.mark.parametrize(
    ("budget", "shares", "latency", "kept"),
    [
        ({}, {"size": 0.3}, 1.0, ["size"]),
        ({}, {"size": 0.3, "params": 0.9}, 1.0, ["size"]),
        ({}, {"size": 0.3}, 1.2, []),  # slower
        ({}, {"size": 0.3, "latency": 0.9}, 1.0, []),
        ({"latency": 2.0, "size": 3.0}, {}, 1.0, ["size"]),  # fast enough as it was
        ({"latency": 0.5, "size": 3.0}, {}, 1.0, []),
        ({}, {"params": 0.3}, 1.0, []),
    ],
)
def test_what_is_smaller_and_no_slower_is_kept_where_no_more_speed_was_asked_for(budget, shares, latency, kept):
    def point(latency, size):
        cost = {"latency": latency, "size": size, "params": 10.0}
        return Point("net", "float32", "", 0.9, cost, (latency - 0.05, latency + 0.05))

    asked = SimpleNamespace(options=SimpleNamespace(budget=budget, shares=shares))
    assert module._Run._smaller(asked, point(1.0, 4.0), point(latency, 1.0)) == kept


def test_the_same_call_gives_the_same_answer_without_work(done):
    result, options = done
    assert shrink(options).results == result.results
    with pytest.raises(ValueError, match="another shares"):
        shrink(
            ShrinkOptions(
                model=options.model, data="digits", shares={"macs": 0.5}, seconds=options.seconds, out=options.out
            )
        )


def test_a_killed_run_takes_up_what_was_finished(digits, few, tmp_path, monkeypatch):
    """Killed as it tries its second change, and again when it has chosen what to train."""
    options = ShrinkOptions(
        model=str(digits), data="digits", shares={"macs": 0.6}, seconds=20, out=tmp_path / "out", quiet=True
    )
    original = search.Search._apply
    tried = []

    def apply(self, recipe):
        if recipe in finished:
            pytest.fail("a finished trial was run again")
        tried.append(recipe)
        if not finished and len(tried) == 2:
            raise KeyboardInterrupt
        return original(self, recipe)

    def die(*_):
        raise KeyboardInterrupt

    def stamps():
        return {t: t.stat().st_mtime_ns for t in (tmp_path / "out" / "trials").glob("*/trial.json")}

    finished = []
    monkeypatch.setattr(search.Search, "_apply", apply)
    with pytest.raises(KeyboardInterrupt):
        shrink(options)
    first = stamps()
    finished += [json.loads(t.read_text())["recipe"] for t in first]
    assert finished == tried[:1]

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_finish", die)
        with pytest.raises(KeyboardInterrupt):
            shrink(options)
    before, chosen = stamps(), read_json(tmp_path / "out" / "chosen.json")
    assert len(before) > len(first)
    assert len(chosen) == module.MOST_FINALISTS
    finished += [json.loads(t.read_text())["recipe"] for t in before]

    # What was chosen is not chosen again, nor is more tried: all time that is left goes into training.
    result = shrink(options)
    assert result.meets_budget
    assert stamps() == before
    names = [e["name"] for e in result.results["trials"] if e["status"] == "finished"]
    assert names == chosen


def test_a_recipe_is_followed_in_order(digits, few, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("- {pass: pre_rmsnorm}\n- {pass: magnitude, keep: 0.75}\n- {pass: recover, seconds: 2}\n")
    out = tmp_path / "out"
    call = ["shrink", str(digits), "--data", "digits", "--recipe", str(file), "--time", "20s", "--out", str(out)]
    answer = CliRunner().invoke(app, [*call, "--json"])
    assert answer.exit_code == 0, answer.output
    results = json.loads(answer.stdout)
    assert [e["pass"] for e in results["winner"]["recipe"]] == ["pre_rmsnorm", "magnitude", "recover"]
    steps = read_json(out / "model" / "recipe.json")
    assert steps[0] == {"step": "pre_rmsnorm", "form": "rms"}
    assert {s["step"] for s in steps[1:]} == {"prune"}


def test_recovery_learns_what_signals_name(digits, few, tmp_path, monkeypatch):
    taught = []
    original = module.objective
    monkeypatch.setattr(module, "objective", lambda **how: taught.append(how["signals"]) or original(**how))
    signals = ["logits", "relations"]
    recipe = [{"pass": "magnitude", "keep": 0.5}, {"pass": "recover", "seconds": 3, "signals": signals}]
    options = ShrinkOptions(
        model=str(digits), data="digits", recipe=recipe, seconds=20, out=tmp_path / "out", quiet=True
    )
    result = shrink(options)
    assert taught
    assert all(t == signals for t in taught)
    assert result.results["winner"]["recipe"] == recipe


def test_any_module_is_shrunk_through_the_api(few, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "TRIED", ("magnitude", "dependency"))
    pytest.importorskip("torch_pruning", reason="torch-pruning is an extra")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 64, 10),
    )  # fmt: skip
    options = ShrinkOptions(
        model=net, data="digits", shares={"macs": 0.6}, seconds=20, out=tmp_path / "out", quiet=True
    )
    result = shrink(options)
    assert result.meets_budget
    tried = {t["recipe"][0]["pass"]: t for t in result.results["trials"]}
    assert "no part of Sequential states a pruning rule" in tried["magnitude"]["why"]
    again = gossamer.load(result.folder, net)
    assert again[0].out_channels < 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "swin_t"}, "by name alone has no trained weights"),
        ({"model": "./nowhere"}, "no model folder"),
        ({"shares": {"macs": 1.4}}, "at most 100 %"),
        ({"shares": {"speed": 0.4}}, "budget must name"),
        ({"recipe": [{"keep": 0.5}]}, "each line of a recipe"),
        ({"recipe": [{"pass": "melt"}]}, "pass must be one of"),
        ({"recipe": [{"pass": "recover", "minutes": 3}]}, "recover has no setting minutes"),
        ({"recipe": [{"pass": "recover"}, {"pass": "depth", "keep": 7}]}, r"keep of depth must be in \(0, 1\], got 7"),
        ({"recipe": [{"pass": "magnitude", "keep": "half"}]}, r"keep of magnitude must be in \(0, 1\], got 'half'"),
        ({"recipe": [{"pass": "recover", "seconds": -1}]}, "seconds of recover must be a number, 0 or more, got -1"),
        ({"recipe": [{"pass": "recover", "seconds": math.inf}]}, "0 or more, got inf"),
        ({"recipe": [{"pass": "recover", "seconds": 700}] * 2}, "are 1400 in all, more than the time for everything"),
        ({"recipe": [{"pass": "recover", "signals": ["smells"]}]}, "signals"),
        ({"recipe": [{"pass": "recover", "relation_heads": 2}]}, "relation_heads without signals"),
        ({"data": "toy-text"}, "toy-text are texts"),
    ],
)
def test_what_cannot_work_is_refused_with_words(digits, tmp_path, change, words):
    given = {"model": str(digits), "data": "digits", "shares": {"macs": 0.6}, "out": tmp_path / "out", "quiet": True}
    with pytest.raises(ValueError, match=words):
        shrink(ShrinkOptions(**{**given, **change}))
