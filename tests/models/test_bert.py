"""BERT and its kin: sizes, padding that changes nothing, post-norm blocks, heads."""

from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.io import export_onnx
from gossamer.models import create_model

TINY: dict[str, Any] = dict(dim=32, depth=2, heads=4, hidden=48, vocab_size=50, max_len=12)


def tiny(**changes: Any) -> nn.Module:
    model = create_model("bert_base", **{**TINY, **changes}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Less the pooler (only classifiers have it) and the segments' table, which is part of the positions.
        ("bert_base", 109_482_240 - (768 * 768 + 768) - 2 * 768),
        ("bert_large", 335_141_888 - (1024 * 1024 + 1024) - 2 * 1024),
        ("minilm_l6_h384", 22_713_216 - (384 * 384 + 384) - 2 * 384),
        ("minilm_l12_h384", 33_360_000 - (384 * 384 + 384) - 2 * 384),
        ("distilbert_base", 66_362_880),
        # RoBERTa's table has two rows more, for padding, and one segment.
        ("roberta_base", 124_645_632 - (768 * 768 + 768) - 768 - 2 * 768),
    ],
)
def test_released_models_have_as_many_parameters_as_published(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("pad_id", [0, 7])
@pytest.mark.parametrize("pool", ["mean", "max", "token"])
def test_padding_changes_nothing(pool: str, pad_id: int) -> None:
    model = tiny(pool=pool, pad_id=pad_id)
    ids = torch.randint(10, 50, (2, 6))
    with torch.no_grad():
        padded = model(torch.nn.functional.pad(ids, (0, 5), value=pad_id))
        torch.testing.assert_close(padded, model(ids), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(torch.nn.functional.pad(ids, (0, 5), value=9)), model(ids), atol=1e-3)


def test_sentence_vectors_have_length_one_unless_asked_otherwise() -> None:
    ids = torch.randint(1, 50, (3, 9))
    torch.testing.assert_close(tiny()(ids).norm(dim=-1), torch.ones(3))
    assert (tiny(normalize=False)(ids).norm(dim=-1) - 1).abs().min() > 1e-3


def test_blocks_normalise_the_sum_of_stream_and_branch() -> None:
    block = tiny().blocks[0]
    x = torch.randn(2, 5, 32)
    y = block.norm1(x + block.mixer(x))
    torch.testing.assert_close(block(x), block.norm2(y + block.mlp(y)))


def test_a_classifier_reads_the_first_token_through_a_dense_layer() -> None:
    model, ids = tiny(num_classes=3, head_act="relu"), torch.randint(1, 50, (3, 9))
    first = model.encode(ids)[0][:, 0]
    want = model.head.fc(model.head.dense(first).relu())
    torch.testing.assert_close(model(ids), want)


def test_saved_and_exported_models_answer_the_same(tmp_path) -> None:
    model, ids = tiny(num_classes=3), torch.randint(1, 50, (2, 12))
    ids[1, 6:] = 0
    gossamer.save(model, tmp_path / "m")
    assert torch.equal(gossamer.load(tmp_path / "m")(ids), model(ids))
    certificate = export_onnx(model, ids, tmp_path / "m.onnx", exporter="fast", real_inputs=ids)
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head_act must be one of .*'mish'"):
        tiny(head_act="mish")
