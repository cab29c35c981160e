"""MODEL and --input become a module and a sample; what is measured and exported is that module."""

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from gossamer.catalogue import published
from gossamer.cli import app
from gossamer.cli.subject import model_and_inputs
from gossamer.models import create_model

TINY = "cct_2_3x2_32"


def test_a_model_is_built_for_the_input_it_is_given() -> None:
    model, (x,) = model_and_inputs(TINY, "1x32x48")
    assert x.shape == (1, 1, 32, 48)
    assert model(x).shape == (1, 10)
    assert not model.training


def test_an_image_that_does_not_fit_takes_the_form_that_pads() -> None:
    model, (x,) = model_and_inputs("sit_tiny", "1x37x61")
    assert model.config["pad"]
    assert model(x).shape == (1, 192)
    assert "pad" not in model_and_inputs("sit_tiny", "3x32x48")[0].config


def test_tokens_and_series_are_told_by_the_model_itself() -> None:
    model, (ids,) = model_and_inputs("text_cct_2", "40")
    assert ids.shape == (1, 40)
    assert (ids != 0).all()
    assert model(ids).shape[0] == 1
    model, (x, marks) = model_and_inputs("autoformer_ettm2_96", "36x5")
    assert x.shape == (1, 36, 5)
    assert marks.shape[1] == 36 + 96
    assert model(x, marks).shape == (1, 96, 5)


def test_a_video_model_takes_clips() -> None:
    model, (clip,) = model_and_inputs("uniformer_s_video8", "3x4x32x64")
    assert clip.shape == (1, 3, 4, 32, 64)
    assert model(clip).shape == (1, 400)
    with pytest.raises(ValueError, match="CxTxHxW, like 3x16x224x224, for this video model; got 3x32x32"):
        model_and_inputs("uniformer_s_video8", "3x32x32")


def test_without_an_input_a_model_is_the_published_one() -> None:
    model, (x,) = model_and_inputs(TINY, None)
    row = published(TINY)
    assert row is not None
    assert list(x.shape[1:]) == row.input
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(row.params_m, rel=0.01)


def test_an_input_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="CxHxW, like 3x224x224, for this image model; got 128"):
        model_and_inputs(TINY, "128")


def test_a_saved_model_is_opened_by_its_folder(tmp_path: Path) -> None:
    from gossamer import save

    saved = create_model(TINY, img_size=16, depth=1, num_classes=3).eval()
    save(saved, tmp_path / "run" / "model")
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        model, (x,) = model_and_inputs(str(folder), None)
        assert x.shape == (1, 3, 16, 16)
        torch.testing.assert_close(model(x), saved(x))


def test_measure_prints_json_with_the_figures_and_the_published_ones() -> None:
    words = ["measure", TINY, "--input", "3x24x24", "--forms", "eager", "--batch", "1,2", "--time", "0.1s", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    model = create_model(TINY, img_size=24)
    assert data["parameters"] == sum(p.numel() for p in model.parameters())
    assert data["macs"] == data["macs_second"] > 0
    assert data["input"] == [[1, 3, 24, 24]]
    assert [(row["form"], row["batch"]) for row in data["latency"]] == [("eager", 1), ("eager", 2)]
    assert data["published"]["params_m"] == 0.284
    assert data["device"]["torch"] == torch.__version__


def test_export_writes_a_file_that_runs_at_another_batch_and_certifies_it(tmp_path: Path) -> None:
    from gossamer import save

    save(create_model(TINY, img_size=16, depth=1, num_classes=3), tmp_path / "m")
    path = tmp_path / "new" / "m.onnx"
    result = CliRunner().invoke(app, ["export", str(tmp_path / "m"), "--out", str(path), "--json"])
    assert result.exit_code == 0, result.output
    certificate = json.loads(result.stdout)
    assert certificate["passed"]
    assert certificate["held"] == "batch"
    x = torch.randn(5, 3, 16, 16)
    (out,) = onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})
    model, _ = model_and_inputs(str(tmp_path / "m"), None)
    torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=1e-4, atol=1e-4)
