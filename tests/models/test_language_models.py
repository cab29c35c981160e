"""GPT-2 and Llama as systems of ours: sizes, causality, decoding, pruning, saving and export."""

from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.io import export_onnx
from gossamer.layers.language import GatedMlp, RMSNorm
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.ops.rotary import rotary_frequencies, rotate
from gossamer.shrink.masks import keep_members, masked, members

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"dim": 32, "depth": 2, "heads": 4, "hidden": 48, "vocab_size": 40, "max_len": 12},
    "llama": {"dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 48, "vocab_size": 40, "max_len": 12},
}


def tiny(name: str, **changes: Any) -> nn.Module:
    model = create_model(name, **{**TINY[name], **changes}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
        ("distilgpt2", 81_912_576),
        ("llama2_7b", 6_738_415_616),
        ("llama2_13b", 13_015_864_320),
        ("llama3_8b", 8_030_261_248),
        ("tinyllama_1_1b", 1_100_048_384),
        ("smollm_135m", 134_515_008),
        ("mistral_7b", 7_241_732_096),
        ("qwen2_0_5b", 494_032_768),
    ],
)
def test_released_models_have_as_many_parameters_as_published(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", TINY)
def test_scores_of_a_token_do_not_depend_on_later_ones(name: str) -> None:
    model, ids = tiny(name), torch.randint(0, 40, (2, 12))
    later = ids.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 40
    with torch.no_grad():
        torch.testing.assert_close(model(later)[:, :7], model(ids)[:, :7], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(later)[:, 7:], model(ids)[:, 7:], atol=1e-2)
    with pytest.raises(ValueError, match="13 tokens long, the model takes 12"):
        model(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("name", TINY)
def test_blocks_decode_step_by_step_to_the_full_pass(name: str) -> None:
    model, ids = tiny(name), torch.randint(0, 40, (2, 12))
    with torch.no_grad():
        full = model(ids)
        tokens, _ = model.stem(ids)
        states = [block.initial_state(2) for block in model.blocks]
        for t in range(12):
            x = tokens[:, t]
            for i, block in enumerate(model.blocks):
                x, states[i] = block.step(x, states[i])
            torch.testing.assert_close(model.head(model.norm(x)[:, None])[:, 0], full[:, t], atol=1e-4, rtol=1e-4)


def test_rotation_is_complex_multiplication_and_only_distance_reaches_the_product() -> None:
    f = rotary_frequencies(8, 100.0)
    torch.testing.assert_close(f, torch.tensor([1.0, 100**-0.25, 0.1, 100**-0.75]))
    q, k = torch.randn(2, 1, 1, 1, 8).unbind(0)
    at = torch.tensor([5.0])
    turned = rotate(q, at, f)
    expected = torch.view_as_complex(torch.stack(q.chunk(2, -1), -1)) * torch.polar(torch.ones(4), 5 * f)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1))
    near = (turned * rotate(k, at - 3, f)).sum()
    far = (rotate(q, at + 20, f) * rotate(k, at + 17, f)).sum()
    torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(near, (q * k).sum(), atol=1e-3)


def test_scaled_frequencies_keep_fast_turns_and_slow_down_slow_ones() -> None:
    plain = rotary_frequencies(64, 10000.0)
    scaling = {
        "kind": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    scaled, waves = rotary_frequencies(64, 10000.0, scaling), 2 * torch.pi / plain
    assert torch.equal(scaled[waves < 128], plain[waves < 128])
    torch.testing.assert_close(scaled[waves > 512], plain[waves > 512] / 8)
    between = (waves > 128) & (waves < 512)
    assert bool(between.any())
    assert bool(((scaled < plain) & (scaled > plain / 8))[between].all())
    torch.testing.assert_close(rotary_frequencies(64, 10000.0, {"kind": "linear", "factor": 2}), plain / 2)
    refused = (({"kind": "yarn"}, "kind must be one of linear, llama3"), ({"kind": "linear"}, "lacks factor"))
    for bad, message in refused:
        with pytest.raises(ValueError, match=message):
            rotary_frequencies(64, 10000.0, bad)
    with pytest.raises(ValueError, match="even head width, got 7"):
        rotary_frequencies(7)


def test_grouped_rotary_attention_is_rotary_attention_with_keys_and_values_repeated() -> None:
    grouped = create_mixer("rotary_gqa", 32, heads=4, kv_heads=2, head_dim=6, causal=True)
    whole = create_mixer("rotary_gqa", 32, heads=4, kv_heads=4, head_dim=6, causal=True)
    q, k, v = grouped.qkv.weight.detach().split((24, 12, 12))
    repeated = [t.view(2, 1, 6, 32).expand(2, 2, 6, 32).reshape(24, 32) for t in (k, v)]
    whole.load_state_dict({"qkv.weight": torch.cat((q, *repeated)), "proj.weight": grouped.proj.weight.detach()})
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(grouped(x), whole(x), atol=1e-5, rtol=1e-5)


def test_the_norm_divides_by_the_root_mean_square() -> None:
    norm, x = RMSNorm(16, eps=1e-2), torch.randn(2, 3, 16) * 0.1 + 1
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt())
    torch.testing.assert_close(torch.jit.trace(norm, x)(x), norm(x))


def test_the_gated_mlp_is_its_formula_and_keeps_what_it_is_told_to() -> None:
    mlp, x = GatedMlp(8, 12, bias=True), torch.randn(3, 8)
    gate = x @ mlp.gate.weight.T + mlp.gate.bias
    inner = gate * gate.sigmoid() * (x @ mlp.fc1.weight.T + mlp.fc1.bias)
    torch.testing.assert_close(mlp(x), inner @ mlp.fc2.weight.T + mlp.fc2.bias)
    index = torch.tensor([1, 4, 5])
    want = inner[:, index] @ mlp.fc2.weight[:, index].T + mlp.fc2.bias
    with torch.no_grad():
        mlp.gate.weight[7] = 0
    assert int(mlp.importance("hidden").argmin()) == 7
    mlp.keep("hidden", index)
    torch.testing.assert_close(mlp(x), want)
    assert mlp.widths() == {"hidden": 3}


@pytest.mark.parametrize("name", TINY)
def test_a_masked_language_model_equals_the_sliced_one_and_loads_again(name: str, tmp_path) -> None:
    model, ids = tiny(name), torch.randint(0, 40, (2, 12))
    axes = {axis for _, axis in members(model)}
    assert axes == ({"heads", "hidden"} if name == "gpt2" else {"groups", "hidden"})
    masks = {}
    for member, width in members(model).items():
        masks[member] = (torch.rand(width) < 0.6).float()
        masks[member][0] = 1
    with torch.no_grad():
        whole = model(ids)
        with masked(model, masks):
            want = model(ids)
        keep_members(model, masks)
        torch.testing.assert_close(model(ids), want, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(whole, want, atol=1e-2)
        gossamer.save(model, tmp_path / "m")
        assert torch.equal(gossamer.load(tmp_path / "m")(ids), model(ids))


def test_tied_words_stay_one_tensor_through_saving(tmp_path) -> None:
    gossamer.save(tiny("gpt2"), tmp_path / "m")
    model = gossamer.load(tmp_path / "m")
    assert model.head.fc.weight is model.stem.words.weight
    free = tiny("gpt2", tied=False)
    assert free.head.fc.weight is not free.stem.words.weight


@pytest.mark.parametrize("exporter", ["fast", "dynamo"])
@pytest.mark.parametrize("name", TINY)
def test_language_models_export_with_a_free_batch(name: str, exporter: str, tmp_path) -> None:
    model, ids = tiny(name), torch.randint(0, 40, (2, 12))
    certificate = export_onnx(model, ids, tmp_path / "m.onnx", exporter=exporter, second_inputs=ids[:1].repeat(3, 1))
    assert certificate.passed, certificate.reason
    assert (certificate.held, certificate.exporter) == ("batch", exporter), certificate.reason


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gpt2", {"act": "mish"}, "act must be one of"),
        ("gpt2", {"mixer": "pool"}, "no option 'heads'|no option 'causal'"),
        ("llama", {"kv_heads": 3}, "kv_heads must divide heads"),
        ("llama", {"dim": 30}, "heads must divide dim"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **{**TINY[name], **settings})
