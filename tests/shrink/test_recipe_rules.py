"""Recipes: the order of their stages, the ones that have a name, and what composing passes comes to."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

import gossamer
from gossamer.cli import app
from gossamer.io import export_onnx, onnx_session, quantize_onnx, read_json, write_json
from gossamer.models.folder import save
from gossamer.shrink.artefacts import calibration_feeds
from gossamer.shrink.base import passes, run_pass
from gossamer.shrink.options import ShrinkOptions
from gossamer.shrink.recipe import as_written, check_recipe, presets, read_recipe
from gossamer.shrink.run import shrink
from shrink.toys import digits, encoder, learned, texts, vision


def lines(*names):
    return [{"pass": name} for name in names]


@pytest.mark.parametrize(
    "names",
    [
        ("magnitude", "recover", "int8"),
        ("optin", "recover", "merging", "recover", "int8"),
        ("greenformers", "pre_rmsnorm", "optin"),
        ("otfusion", "magnitude", "gpusq_vit"),
        ("recover",),
        ("gpusq_vit", "recover"),
        (),
    ],
)
def test_stages_in_their_order_are_taken(names):
    assert check_recipe(lines(*names)) == lines(*names)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("int8", "magnitude"), "'magnitude' behind 'int8'"),
        (("int8", "recover"), "'recover' behind 'int8'"),
        (("int8", "pre_rmsnorm"), "'pre_rmsnorm' behind 'int8'"),
        (("gpusq_vit", "recover", "magnitude"), "'magnitude' behind 'gpusq_vit'"),
        (("merging", "otfusion"), "'otfusion' behind 'merging'"),
        (("teaching", "optin"), "'optin' behind 'teaching'"),
    ],
)
def test_a_wrong_order_is_refused_and_names_the_right_one_unless_it_is_asked_for(names, words):
    if not set(names) - {"int8", "recover"} <= set(passes()):
        pytest.skip("a pass of that name is not there")
    with pytest.raises(ValueError, match=words) as caught:
        check_recipe(lines(*names))
    assert "search -> prune -> distil -> quantise -> export" in str(caught.value)
    free = {"order": "free", "passes": lines(*names)}
    assert check_recipe(free) == lines(*names)
    assert ShrinkOptions(model="m", data="digits", recipe=free).recipe == lines(*names)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (lines("melt"), "pass must be one of .*search -> prune"),
        ({"order": "free", "passes": lines("melt")}, "pass must be one of"),
        ({"order": "chaos", "passes": []}, "order one of stages, free"),
        ({"passes": []}, "order one of"),
        ("optin", "must be a list of passes, got str"),
        ([{"keep": 0.5}], "each line of a recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe, words):
    with pytest.raises(ValueError, match=words):
        check_recipe(recipe)


def test_recipes_by_name_are_sound_and_a_file_is_read_with_its_order(tmp_path):
    assert {"bert_cpu_int8", "vit_prune_distil"} <= set(presets())
    for name in presets():
        found = read_recipe(name)
        assert found
        for entry in found:
            settings = set(entry) - {"pass"}
            if entry["pass"] not in ("int8", "recover"):
                assert settings <= set(passes()[entry["pass"]].settings)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"order": "free", "passes": lines("int8", "recover")}))
    assert check_recipe(read_recipe(file)) == lines("int8", "recover")
    file.write_text(yaml.safe_dump(lines("int8", "recover")))
    with pytest.raises(ValueError, match="behind 'int8'"):
        read_recipe(file)
    with pytest.raises(ValueError, match="recipes by name are bert_cpu_int8"):
        read_recipe("no_such_recipe")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A trained classifier of digits, as a folder."""
    calibration = digits()
    net = learned(vision(dim=48, heads=4), calibration, steps=80)
    folder = save(net, tmp_path_factory.mktemp("model"))
    data = calibration.data
    write_json(folder / "task.json", {"task": data.task, "spec": data.spec, "meta": data.meta})
    return folder


def test_an_empty_recipe_gives_the_same_model_to_the_bit(classifier, tmp_path):
    options = ShrinkOptions(model=str(classifier), data="digits", recipe=[], seconds=20, out=tmp_path / "o", quiet=True)
    result = shrink(options)
    before, after = gossamer.load(classifier), gossamer.load(result.folder)
    assert result.results["winner"]["recipe"] == []
    for (name, a), (other, b) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    x = digits().example(8)
    with torch.no_grad():
        assert torch.equal(before(*x), after(*x))


def test_a_recipe_is_found_by_name_on_the_command_line(classifier, tmp_path):
    call = ["shrink", str(classifier), "--data", "digits", "--recipe", "bert_cpu_int8"]
    answer = CliRunner().invoke(app, [*call, "--time", "20s", "--out", str(tmp_path / "o"), "--json"])
    assert answer.exit_code == 0, answer.output
    assert read_json(tmp_path / "o" / "run.json")["recipe"] == [{"pass": "int8"}]
    results = json.loads(answer.stdout)
    assert results["trials"] == []
    assert {p["name"] for p in results["points"]} == {"as it came"}
    answer = CliRunner().invoke(app, [*call[:-1], "no_such_recipe", "--out", str(tmp_path / "p")])
    assert answer.exit_code == 2
    assert "recipes by name are bert_cpu_int8" in answer.output


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_pruned_then_quantised_has_the_product_of_both_ratios_of_size(kind, tmp_path):
    if kind == "vit":
        net, calibration = vision(dim=192, heads=6, depth=3).eval(), digits()
    else:
        net, calibration = encoder(dim=192, heads=6, hidden=768, depth=3).eval(), texts()
    pruned, _ = run_pass("magnitude", net, calibration, keep=0.6)
    sizes = {}
    for name, model in (("dense", net), ("pruned", pruned)):
        x = calibration.example()
        path, small = tmp_path / f"{name}.onnx", tmp_path / f"{name}-int8.onnx"
        export_onnx(model, x, path, exporter="fast")
        quantize_onnx(path, small, calibration_feeds(path, [x]), mode="dynamic")
        sizes[name], sizes[f"{name}-int8"] = path.stat().st_size, small.stat().st_size
    prune, int8 = sizes["pruned"] / sizes["dense"], sizes["dense-int8"] / sizes["dense"]
    both = sizes["pruned-int8"] / sizes["dense"]
    assert prune < 0.75
    assert int8 < 0.35
    assert abs(both / (prune * int8) - 1) < 0.05


@pytest.mark.parametrize("names", [("optin", "recover", "int8"), ("low_bits", "optin")])
def test_what_a_run_writes_is_taken_back(names):
    recipe = [{"pass": name} for name in names]
    written = as_written(recipe)
    assert check_recipe(written) == recipe
    assert isinstance(written, dict) == (names[0] == "low_bits")


def test_every_stage_together_makes_a_small_classifier_four_times_smaller_for_less_than_three_points(tmp_path):
    calibration = digits()
    dense = learned(vision(dim=96, depth=2, heads=4), calibration, steps=250, lr=1.5e-3)
    recipe = check_recipe(read_recipe("tiny_demo"))
    assert [entry["pass"] for entry in recipe] == ["pre_rmsnorm", "greenformers", "recover", "int8"]
    small, x = dense, calibration.example(64)
    for entry in recipe[:2]:
        small, _ = run_pass(entry["pass"], small, calibration, **{k: v for k, v in entry.items() if k != "pass"})
    calibration.trainer(small, teacher=dense, lr=1e-3, ema=0.0).train(steps=60, schedule="linear")
    whole, floats, last = (tmp_path / f"{name}.onnx" for name in ("dense", "floats", "int8"))
    export_onnx(dense, x, whole, exporter="fast")
    export_onnx(small.eval(), x, floats, exporter="fast")
    quantize_onnx(floats, last, calibration_feeds(floats, [x]), mode="dynamic")
    assert whole.stat().st_size > 4 * last.stat().st_size
    right = []
    for path in (whole, last):
        session = onnx_session(path)
        found = [
            torch.from_numpy(session.run(None, {"input": inputs[0].numpy()})[0]).argmax(-1) == target
            for inputs, target in calibration.batches(10_000, split="val")
        ]
        right.append(float(torch.cat(found).float().mean()))
    assert right[0] > 0.75
    assert right[1] > right[0] - 0.03, right
