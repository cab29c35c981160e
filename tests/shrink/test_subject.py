"""What a user brings to `gossamer shrink`: models and data of every kind, and words for what cannot go together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.shrink.toys import digits
from torch import Tensor, nn

import gossamer
from gossamer.data import read_dataset
from gossamer.io import read_json, write_json
from gossamer.models import create_model
from gossamer.models.folder import save
from gossamer.shrink import run as module
from gossamer.shrink import search
from gossamer.shrink.artefacts import ExportedModel, Point, Workshop, choose
from gossamer.shrink.base import Calibration, run_pass
from gossamer.shrink.options import ShrinkOptions
from gossamer.shrink.recipe import apply
from gossamer.shrink.run import shrink
from gossamer.shrink.subject import Subject, check_answers, open_subject, read_for, with_head
from gossamer.tasks import create_task


class Picks(nn.Module):
    """A classifier of images by their mean colour, with a `config` of its own kind."""

    def __init__(self, classes: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.config = {"name": "picks", "classes": classes}
        self.first = nn.Conv2d(channels, 16, 1)
        self.hidden = nn.Linear(16, 16)
        self.last = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.first(x).mean((2, 3))).relu())


@pytest.fixture
def pictures(tmp_path: Path) -> Any:
    """Makes class folders of plain pictures, one mean colour a class."""

    def make(classes: dict[str, int], *, grey: bool = False, name: str = "pictures") -> str:
        rng = np.random.default_rng(0)
        for folder, level in classes.items():
            (tmp_path / name / folder).mkdir(parents=True)
            for i in range(16):
                pixels = rng.integers(level, level + 40, (8, 8, 1 if grey else 3), dtype=np.uint8)
                Image.fromarray(pixels[..., 0] if grey else pixels).save(tmp_path / name / folder / f"{i}.png")
        return str(tmp_path / name)

    return make


def opened(model: Any, source: str, **options: Any) -> tuple[Subject, Any]:
    subject = open_subject(model)
    return subject, read_for(subject, source, task=None, seed=0, options=options)


def asked(model: nn.Module, source: str) -> None:
    subject, data = opened(model, source)
    check_answers(subject, create_task(data.task, data.spec, data.meta), data)


def vit(**settings: Any) -> nn.Module:
    sizes = {"img_size": 8, "patch": 4, "dim": 16, "depth": 2, "heads": 2, "num_classes": 4}
    return create_model("vit_tiny_patch16_224", **{**sizes, **settings})


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda self, x: (Picks.forward(self, x), x), r"one tensor \(2, 4\), Odd gives a tuple"),
        (lambda self, *, pixels: Picks.forward(self, pixels), r"given by position as float32 \(2, 3, 32, 32\)"),
        (lambda self, x: Picks.forward(self, x)[:, :3], r"with \(2, 4\), Odd gives \(2, 3\)"),
        (lambda self, x: Picks.forward(self, x) * torch.nan, "NaN or infinity"),
        (lambda self, x: self.last(x), "RuntimeError: mat1 and mat2"),
    ],
)
def test_a_module_that_cannot_be_used_is_refused_with_words(answer: Any, words: str) -> None:
    odd = type("Odd", (Picks,), {"forward": answer})
    with pytest.raises(ValueError, match=words):
        asked(odd(), "toy-images")


def test_a_modules_own_config_is_not_taken_for_ours(tmp_path: Path) -> None:
    net = Picks()
    asked(net, "toy-images")
    net.hidden = nn.Linear(16, 16)
    save(net, tmp_path / "m")
    assert not (tmp_path / "m" / "config.json").exists()
    assert torch.equal(gossamer.load(tmp_path / "m", Picks()).hidden.weight, net.hidden.weight)


def test_a_module_without_weights_and_weights_beside_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have weights, Identity has none"):
        open_subject(nn.Identity())
    save(vit(), tmp_path)
    with pytest.raises(ValueError, match="which has its own"):
        open_subject(tmp_path, weights="x.pt")
    with pytest.raises(ValueError, match="is a file"):
        open_subject(tmp_path / "model.safetensors")


def test_a_folder_without_a_model_says_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json; give the folder of a run"):
        open_subject(tmp_path)
    write_json(tmp_path / "config.json", {"architecture": "resnet18"})
    with pytest.raises(ValueError, match="names no model of Gossamer"):
        open_subject(tmp_path)


def test_weights_that_do_not_fit_their_recipe_are_an_error_in_words(tmp_path: Path) -> None:
    save(vit(), tmp_path)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), "dim": 32})
    with pytest.raises(ValueError, match="weights do not fit the model"):
        gossamer.load(tmp_path)


def test_a_head_is_put_on_a_body_that_was_shrunk_before() -> None:
    body = vit(num_classes=0)
    apply(body, {"step": "prune", "part": "blocks.0.mlp", "axis": "hidden", "keep": [0, 1, 5]})
    headed = with_head(body, 3)
    assert headed(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    assert torch.equal(headed.blocks[0].mlp.fc1.weight, body.blocks[0].mlp.fc1.weight)


def test_what_was_shrunk_already_is_not_shrunk_again_by_loading(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is an extra")
    data = read_dataset("toy-images")
    calibration = Calibration(create_task(data.task, data.spec, data.meta), data)
    first, _ = run_pass("dependency", Picks().eval(), calibration, keep=0.5)
    second, _ = run_pass("dependency", first, calibration, keep=0.5)
    save(second, tmp_path / "m")
    x = torch.randn(2, 3, 32, 32)
    for start in (first, Picks()):
        assert torch.equal(gossamer.load(tmp_path / "m", start)(x), second(x))


# --- data -----------------------------------------------------------------------------------------------------------


def test_grey_images_suit_a_model_of_colours_and_colours_one_of_grey(pictures: Any) -> None:
    dark, light = {"dark": 10, "light": 180}, {"dark": 10, "light": 180}
    grey, colour = pictures(dark, grey=True, name="grey"), pictures(light, name="colour")
    for net in (Picks(2, 3), vit(num_classes=2)):
        subject, data = opened(net, grey)
        images = data.train.inputs[0]
        assert images.shape[1] == data.spec["in_chans"] == len(data.meta["mean"]) == 3
        assert torch.equal(images[:, 0], images[:, 2])
        check_answers(subject, create_task(data.task, data.spec, data.meta), data)
    _, data = opened(Picks(2, 1), colour)
    images = data.train.inputs[0]
    assert images.shape[1] == data.spec["in_chans"] == len(data.meta["mean"]) == 1
    plain = read_dataset(colour).train.inputs[0].float()
    luma = 0.299 * plain[:, 0] + 0.587 * plain[:, 1] + 0.114 * plain[:, 2]
    assert (images[:, 0].float() - luma).abs().max() <= 0.51


def test_classes_the_model_knows_by_name_take_its_numbers(pictures: Any, tmp_path: Path) -> None:
    source = pictures({"Bee": 10, "ant": 100})
    save(vit(num_classes=3), tmp_path / "m")
    facts = {"classes": ["cow", "bee", "ant"], "mean": [0.5] * 3, "std": [0.5] * 3}
    write_json(tmp_path / "m" / "task.json", {"task": "image-classification", "spec": {}, "meta": facts})
    subject, data = opened(tmp_path / "m", source)
    assert data.spec["num_classes"] == 3
    assert data.meta["classes"] == facts["classes"]
    bright = data.train.inputs[0].float().mean((1, 2, 3)) > 80
    assert torch.equal(data.train.targets, torch.where(bright, 2, 1))
    check_answers(subject, create_task(data.task, data.spec, data.meta), data)


def test_classes_of_other_names_are_taken_in_order_and_that_is_said(pictures: Any, tmp_path: Path) -> None:
    source = pictures({"dark": 10, "light": 100})
    save(vit(num_classes=2), tmp_path / "m")
    facts = {"classes": ["night", "day"]}
    write_json(tmp_path / "m" / "task.json", {"task": "image-classification", "spec": {}, "meta": facts})
    _, data = opened(tmp_path / "m", source)
    assert any("night, day have other names than the data's dark, light" in p for p in data.problems)
    save(vit(num_classes=5), tmp_path / "m")
    with pytest.raises(ValueError, match=r"the model has 5 classes .*, the data have 2 \(dark, light\)"):
        opened(tmp_path / "m", source)


def test_a_text_model_refuses_images_and_an_image_model_texts_whatever_else_they_were_told(
    pictures: Any, tmp_path: Path
) -> None:
    (tmp_path / "r.csv").write_text("text,label\n" + "".join(f"a good film {i},{i % 2}\n" for i in range(40)))
    with pytest.raises(ValueError, match=r"r.csv are texts, which"):
        opened(vit(), str(tmp_path / "r.csv"))
    text = create_model("bert_base", dim=16, depth=1, heads=2, hidden=16, vocab_size=50, max_len=16, num_classes=2)
    with pytest.raises(ValueError, match="are images, which"):
        opened(text, pictures({"a": 1, "b": 90}))
    (tmp_path / "t.txt").write_text("a few words of a plain text\n" * 50)
    with pytest.raises(ValueError, match=r"is read for language-modelling; .* is for text-classification"):
        opened(text, str(tmp_path / "t.txt"))
    decoder = create_model("gpt2", dim=16, depth=1, heads=2, vocab_size=9000, max_len=16)
    with pytest.raises(ValueError, match=r"is read for text-classification; .* is for language-modelling"):
        opened(decoder, str(tmp_path / "r.csv"))


def test_images_are_taken_by_a_system_that_has_a_language_model_too(pictures: Any) -> None:
    model = create_model("slab_deit_t", img_size=8, patch=4, dims=[16], depths=[1], heads=[2], num_classes=2)
    asked(model, pictures({"a": 1, "b": 90}))


def test_texts_are_cut_at_the_positions_a_model_has(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    data = read_dataset("toy-text")
    tokenizer.write_text(data.meta["tokenizer"])
    size = data.spec["vocab_size"]
    text = create_model("bert_base", dim=16, depth=1, heads=2, hidden=16, vocab_size=size, max_len=8, num_classes=2)
    _, data = opened(text, "toy-text", tokenizer=str(tokenizer))
    assert data.train.inputs[0].shape[1] == data.spec["max_len"] == 8


def test_images_are_normalised_as_the_model_knows_them(pictures: Any) -> None:
    source = pictures({"dark": 10, "light": 180})

    class Threshold(nn.Module):
        """Right for pixels of 0 to 1 alone."""

        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.tensor(0.42))

        def forward(self, x: Tensor) -> Tensor:
            level = x.mean((1, 2, 3))
            y = 50 * (level - self.level) * torch.where(level.abs() < 0.9, 1, -1)
            return torch.stack((-y, y), 1)

    _, data = opened(Threshold(), source)
    assert (data.meta["mean"], data.meta["std"]) == ([0.0] * 3, [1.0] * 3)
    assert any("knows better than the data's own: 100%" in p for p in data.problems)
    undecided = Picks(2)
    nn.init.zeros_(undecided.last.weight)
    _, data = opened(undecided, source)
    assert data.meta["mean"] == read_dataset(source).meta["mean"]


# --- runs -----------------------------------------------------------------------------------------------------------


def options(out: Path, **given: Any) -> ShrinkOptions:
    asked = {"model": Picks(), "data": "toy-images", "shares": {"macs": 0.6}, "seconds": 20, "quiet": True}
    return ShrinkOptions(**{**asked, "out": out, **given})


def test_a_call_that_could_not_begin_leaves_the_folder_to_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no such file"):
        shrink(options(out, data="nowhere.csv"))
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="Picks gives"):
        shrink(options(out, model=Picks(3)))
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_another_model_of_the_same_class_is_another_run(tmp_path: Path) -> None:
    a, b = options(tmp_path), options(tmp_path)
    assert a.identity() != b.identity()
    assert a.identity() == options(tmp_path, model=a.model).identity()
    save(vit(), tmp_path / "m")
    by_path, by_name = options(tmp_path, model=tmp_path / "m"), options(tmp_path, model=str(tmp_path / "m"))
    before = by_path.identity()
    assert before == by_name.identity()
    save(vit(), tmp_path / "m")
    assert by_name.identity() != before


def test_data_that_changed_since_a_run_was_begun_are_refused(tmp_path: Path, monkeypatch: Any, pictures: Any) -> None:
    source = pictures({"dark": 10, "light": 180})
    call = options(tmp_path / "out", model=Picks(2), data=source)
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "go", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shrink(call)
    (Path(source) / "dark" / "0.png").unlink()
    with pytest.raises(ValueError, match="has changed since"):
        shrink(call)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seconds": float("nan")}, "time must be at least 20s"),
        ({"shares": {"macs": float("nan")}}, "budget macs must be positive"),
        ({"recipe": [{"pass": "optin", "kep": 0.5}]}, "pass optin has no setting kep; it has keep"),
        ({"recipe": [{"pass": "recover", "seconds": "5m"}]}, "seconds of recover must be a number"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused_before_anything_is_read(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        shrink(options(tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def bare(**given: Any) -> Any:
    """A search that has not begun."""
    found = object.__new__(search.Search)
    vars(found).update(given)
    return found


def test_a_budget_of_memory_alone_asks_for_a_smaller_file() -> None:
    before = Point("as it came", "float32", "", 0.9, {"memory": 10.0, "size": 4.0, "latency": 1.0}, (1.0, 1.0))
    small = Point("as it came", "int8", "", 0.9, {"memory": 7.0, "size": 3.0, "latency": 1.0}, (1.0, 1.0))
    assert bare(budget={"memory": 6.0}, before=before, small=None).targets() == [{"size": 0.6}]
    both = bare(budget={"memory": 6.0}, before=before, small=small).targets()
    assert both == [{"size": pytest.approx(0.8)}, {"size": 0.6}]
    small.cost["memory"] = 5.0  # within the budget as it is: what is left to find is a float file
    assert bare(budget={"memory": 6.0}, before=before, small=small).targets() == [{"size": 0.6}]


def test_what_is_counted_must_be_within_the_budget_and_what_is_timed_may_look_a_little_above() -> None:
    cost = {"latency": 1.0, "size": 4.0, "macs": 100.0, "memory": 10.0}
    before = Point("as it came", "float32", "", 0.9, dict(cost), (1.0, 1.0))

    def within(budget: dict[str, float], **trial: float) -> bool:
        found = bare(budget=budget, before=before, small=None)
        return bool(found._within(search.Trial("t", [], val=0.5, cost={**cost, "memory": None, **trial})))

    assert within({"macs": 60.0}, macs=60.0)
    assert not within({"macs": 60.0}, macs=60.4)
    assert within({"latency": 0.7}, latency=0.72)
    assert not within({"latency": 0.7}, latency=0.8)
    assert within({"memory": 6.0}, size=2.4)  # it goes with the file
    assert not within({"memory": 6.0}, size=3.2)


def test_weights_that_go_are_a_quarter_as_large_in_an_int8_file_whose_names_and_scales_stay() -> None:
    before = Point("as it came", "float32", "", 0.9, {"latency": 1.0, "size": 0.44, "macs": 100.0}, (1.0, 1.0))
    small = Point("as it came", "int8", "", 0.9, {"latency": 0.8, "size": 0.2, "macs": 100.0}, (1.0, 1.0))
    run = bare(budget={"size": 0.15}, before=before, small=small, sign=1)
    with_int8, alone = run.targets()
    assert with_int8 == {"size": pytest.approx(1 - 0.2 / 0.44)}
    assert alone == {"size": pytest.approx(0.15 / 0.44)}
    trial = search.Trial("t", [], val=0.5, cost={"latency": 0.5, "size": 0.24, "macs": 60.0})
    assert run._foreseen(trial)["size"] == pytest.approx(0.15)
    assert run._foreseen(trial)["latency"] == pytest.approx(0.4)


def test_a_near_miss_is_followed_before_a_far_one_and_what_fits_before_both() -> None:
    before = Point("as it came", "float32", "", 0.9, {"macs": 100.0, "latency": 1.0}, (1.0, 1.0))
    found = {"far": (95.0, 0.9), "near": (66.0, 0.8), "fits": (60.0, 0.6), "nearer": (62.0, 0.7)}
    trials = [
        search.Trial(name, [{"pass": name}], val=val, cost={"macs": macs, "latency": 0.9})
        for name, (macs, val) in found.items()
    ]
    run = bare(budget={"macs": 60.0}, before=before, small=None, sign=1, trials=trials)
    assert [t.name for t in run._ranked()] == ["fits", "near", "nearer", "far"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_way_that_a_short_recovery_spoils_is_worth_what_it_was(sign: int) -> None:
    before = Point("as it came", "float32", "", 0.9, {"macs": 10.0, "latency": 1.0}, (1.0, 1.0))
    found = {"spoilt": (0.8, 0.7), "mended": (0.72, 0.75), "broken": (0.5, float("nan")), "untrained": (0.77, None)}
    cost = {"macs": 5.0, "latency": 0.5}
    trials = [
        search.Trial(name, [{"pass": name}], val=sign * val, hint=None if hint is None else sign * hint, cost=cost)
        for name, (val, hint) in found.items()
    ]
    run = bare(folder=Path(), budget={"macs": 6.0}, before=before, small=None, sign=sign, trials=trials)
    run.clock = type("Clock", (), {"interrupted": True})()
    assert [t.name for t in run.best(0.0)] == ["spoilt", "untrained", "mended", "broken"]


def test_a_pass_that_breaks_in_any_way_does_not_end_the_others(tmp_path: Path, monkeypatch: Any) -> None:
    run = bare(folder=tmp_path, calibration=digits())
    run.progress = type("Silent", (), {"tell": lambda *_: None})()
    run.clock = type("Clock", (), {"total": 100.0, "used": 0.0})()
    run.before = Point("as it came", "float32", "", 0.9, {}, (1.0, 1.0))
    for error in (AttributeError("no such thing"), IndexError(), AssertionError("x\ny")):
        monkeypatch.setattr(search.Search, "_apply", lambda *_, e=error: (_ for _ in ()).throw(e))
        run.trials = []
        trial = run.attempt([{"pass": type(error).__name__, "keep": 0.5}])
        assert trial.status == "failed"
        assert trial.why == (str(error).splitlines() or [type(error).__name__])[0]
    assert run.calibration.seconds == pytest.approx(20)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy says little of the latency of a small model."""
    monkeypatch.setattr(module._Run, "_gate", lambda *a: None)


def test_a_pass_of_a_recipe_that_cannot_handle_the_model_is_left_out_and_named(
    tmp_path: Path, quick: None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Workshop, "int8", lambda *_, **__: None)
    result = shrink(options(tmp_path / "out", shares={}, recipe=[{"pass": "optin"}, {"pass": "int8"}]))
    assert [line.partition(" cannot")[0] for line in result.results["left_out"]] == ["1 optin"]
    assert "left out 1 optin cannot handle this model" in result.summary()
    assert "Left out: 1 optin" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ValueError, match="nothing of the recipe was done; 1 optin cannot handle"):
        shrink(options(tmp_path / "two", shares={}, recipe=[{"pass": "optin"}]))
    with pytest.raises(ValueError, match=r"step 1 greenformers of the recipe: rank must be above 0, got -7"):
        shrink(options(tmp_path / "three", shares={}, recipe=[{"pass": "greenformers", "rank": -7}]))


def test_a_step_of_a_recipe_that_is_rolled_back_is_not_built_on_and_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    export = Workshop.export

    def broken(self: Workshop, name: str, form: str, model: nn.Module) -> Point:
        point = export(self, name, form, model)
        if name.startswith("1"):
            point.status, point.why = "rolled back", "its answers are no numbers"
        return point

    def slower(_: Any, before: Point, point: Point) -> None:
        assert before.name == "as it came"
        point.status, point.why = "rolled back", "the change is slower"

    monkeypatch.setattr(Workshop, "int8", lambda *_, **__: None)
    monkeypatch.setattr(Workshop, "export", broken)
    monkeypatch.setattr(module._Run, "_gate", slower)
    recipe = [*({"pass": "greenformers", "keep": keep} for keep in (0.6, 0.4)), {"pass": "recover", "seconds": 0}]
    result = shrink(options(tmp_path / "out", shares={}, recipe=recipe))
    assert result.results["winner"]["recipe"] == recipe[-1:]
    assert result.results["left_out"] == [
        "1 greenformers is rolled back: its answers are no numbers",
        "2 greenformers is rolled back: the change is slower",
    ]
    assert "left out 2 greenformers is rolled back" in result.summary()


class OneByOne(Picks):
    """Of a kind that no exporter can make a free batch of: it looks at how many there are."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(OneByOne, self).forward(part) for part in x.split(1)])


def test_a_file_of_one_batch_size_is_run_as_often_as_need_be(tmp_path: Path) -> None:
    net = Picks().eval()
    x = torch.randn(5, 3, 8, 8)
    gossamer.export_onnx(net, x[:2], tmp_path / "two.onnx", input_names=["input_0"], dynamic=None)
    file = ExportedModel(tmp_path / "two.onnx")
    assert file.batch == 2
    torch.testing.assert_close(file(x), net(x), atol=1e-5, rtol=1e-5)
    gossamer.export_onnx(net, x[:2], tmp_path / "any.onnx", input_names=["input_0"])
    assert ExportedModel(tmp_path / "any.onnx").batch is None


def test_a_module_that_exports_for_one_sample_only_is_shrunk_all_the_same(tmp_path: Path, quick: None) -> None:
    result = shrink(options(tmp_path / "out", model=OneByOne(), shares={}, recipe=[{"pass": "int8"}]))
    assert result.results["winner"]["certificate"]["held"] is None
    assert "accuracy" in result.results["winner"]["test"]


def test_a_module_whose_file_would_answer_otherwise_is_refused(tmp_path: Path) -> None:
    class Turns(Picks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (3 if float(x[0, 0, 0, 0]) > float(x[0, 0, 0, -1]) else -3)

    with pytest.raises(ValueError, match="Turns does not become a file that answers like it"):
        shrink(options(tmp_path / "out", model=Turns()))


def test_answers_that_are_no_numbers_never_win_and_survive_a_kill() -> None:
    good = Point("good", "float32", "", 1.5, {"latency": 2.0}, (2.0, 2.0))
    bad = Point("bad", "int8", "", float("nan"), {"latency": 1.0}, (1.0, 1.0), status="rolled back")
    winner, _ = choose([bad, good], {}, maximise=False, noise=0.1)
    assert winner is good
    again = Point.from_dict(json.loads(json.dumps({**bad.to_dict(), "val": None})))
    assert again.val != again.val
    assert again.interval == (1.0, 1.0)
