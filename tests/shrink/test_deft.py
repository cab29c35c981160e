"""DEFT: the loss of the authors' code, parts that start as nothing and merge exactly, and activations that thin out."""

import copy

import pytest
import torch
from torch import nn

from gossamer.io import export_onnx
from gossamer.layers.adapters import Adapted, LoraLinear, PromptHead, PromptStem
from gossamer.models import create_model
from gossamer.shrink.base import run_pass
from gossamer.shrink.passes import deft as passes_deft
from gossamer.shrink.passes.deft import (
    activation_density,
    active_product,
    density_loss,
    density_terms,
    find_activations,
    recorded,
    soft_count,
)
from official import golden
from shrink.loading import same_after_loading
from shrink.refusals import refuses
from shrink.toys import digits, encoder, learned, texts, vision


@pytest.fixture(scope="module")
def trained():
    calibration = texts()
    return calibration, learned(encoder(act="relu"), calibration, steps=80)


@pytest.mark.parametrize("eps", [1e-7, 20.0])
def test_loss_counts_and_gradients_are_the_official_ones(eps):
    want = golden("deft")
    activations = [want[f"a{k}"].requires_grad_() for k in range(3)]
    counts = torch.stack([soft_count(a, eps) for a in activations], 1)
    torch.testing.assert_close(counts, want[f"count_{eps:g}"], atol=1e-7, rtol=1e-6)
    loss = density_loss(activations, eps)
    torch.testing.assert_close(loss, want[f"loss_{eps:g}"], atol=1e-7, rtol=1e-6)
    for k, gradient in enumerate(torch.autograd.grad(loss, activations)):
        torch.testing.assert_close(gradient, want[f"grad{k}_{eps:g}"], atol=1e-7, rtol=1e-5)


class Given(nn.Module):
    """A model whose one MLP gives the activations it is made of."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.ParameterList([nn.Parameter(a) for a in outputs])
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.ModuleDict({"act": nn.Identity()})}) for _ in outputs)

    def forward(self, x):
        for a, layer in zip(self.outputs, self.layers, strict=True):
            layer["mlp"]["act"](a)
        return x


def test_the_density_metric_is_the_official_one():
    want = golden("deft")
    model = Given([want[f"a{k}"] for k in range(3)])
    found = activation_density(model, [((torch.zeros(3),), torch.zeros(3))])
    assert found[""] == pytest.approx(float(want["density"].mean()), abs=1e-6)
    for k in range(3):
        assert found[f"layers.{k}.mlp.act"] == pytest.approx(float(want["density"][:, k].mean()), abs=1e-6)


def test_nothing_counts_zero_and_the_large_count_one_and_the_gradient_is_the_closed_form():
    assert soft_count(torch.zeros(2, 3, 4)).tolist() == [0, 0]
    torch.testing.assert_close(soft_count(torch.full((2, 3, 4), -2.0)), torch.ones(2), atol=1e-6, rtol=0)
    a = torch.randn(1, 5, 7, dtype=torch.double).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_count(a, 1e-2).sum(), a)
    torch.testing.assert_close(gradient, 2 * a * 1e-2 / (a.square() + 1e-2) ** 2 / 35)
    with pytest.raises(ValueError, match="eps must be above 0"):
        soft_count(a, 0.0)


def test_encoder_and_decoder_have_a_term_each():
    torch.manual_seed(0)
    sizes = dict(channels=2, seq_len=12, label_len=6, pred_len=4, d_model=16, d_ff=32, n_heads=2, freq="h")
    model = create_model("informer", **sizes)
    with recorded(model) as records:
        model(torch.randn(2, 12, 2), torch.randn(2, 16, 4))
    terms = density_terms(records)
    assert set(terms) == {"encoder", "decoder"}
    for side, term in terms.items():
        torch.testing.assert_close(term, density_loss([r.output for r in records if side in r.name]))


@pytest.mark.parametrize("kind", ["lora", "adapter", "prefix", "prompt"])
def test_only_added_parts_and_the_head_learn_and_density_falls_at_no_loss(kind, trained, tmp_path, monkeypatch):
    calibration, model = trained
    seen = {}
    merge = passes_deft._merge

    def look(net):
        seen.update({name: p.detach().clone() for name, p in net.named_parameters()})
        merge(net)

    monkeypatch.setattr(passes_deft, "_merge", look)
    settings = {"size": 4} if kind != "lora" else {}
    # Gradients are steep only where a is near sqrt(eps): a wider one thins out within few steps.
    shrunk, steps = run_pass("deft", model, calibration, kind=kind, eps=1e-2, steps=60, lr=1e-2, **settings)
    report = shrunk.shrink_report["deft"]
    assert report["after"]["density"] < report["before"]["density"]
    assert calibration.score(shrunk) > calibration.score(model) - 0.02
    own = dict(model.named_parameters())
    changed = [name for name, p in seen.items() if _old(name) not in own or not torch.equal(p, own[_old(name)])]
    kept = [name for name, p in own.items() if not name.startswith("head.")]
    added = {"lora": (".a", ".b."), "adapter": (".down.", ".up."), "prefix": ("prefix_",), "prompt": ("prompts",)}[kind]
    assert changed
    assert all(any(part in name for part in added) or name.startswith("head.") for name in changed)
    assert any(any(part in name for part in added) for name in changed)
    assert all(any(torch.equal(p, own[name]) for n, p in seen.items() if _old(n) == name) for name in kept)
    assert all(p.requires_grad for p in shrunk.parameters())
    assert [step["step"] for step in steps] == ([] if kind == "lora" else [f"deft.{kind}"])
    x = calibration.example(3)
    if kind == "lora":
        assert {n: p.shape for n, p in shrunk.named_parameters()} == {n: p.shape for n, p in own.items()}
    else:
        same_after_loading(shrunk, x, tmp_path)
        certificate = export_onnx(shrunk, x, tmp_path / "m.onnx", exporter="fast")
        assert certificate.passed
        assert certificate.held == "batch"


def _old(name):
    """The name a parameter had before parts were put around it."""
    return name.replace(".mlp.inner.", ".mlp.").replace("stem.inner.", "stem.").replace("head.inner.", "head.")


def test_density_falls_by_a_third_where_plain_fine_tuning_leaves_it(trained):
    calibration, model = trained
    common = {"kind": "adapter", "size": 8, "steps": 120, "lr": 1e-2, "eps": 1e-2}
    plain, _ = run_pass("deft", model, calibration, weight=0.0, **common)
    thin, _ = run_pass("deft", model, calibration, weight=1.0, **common)
    density = [m.shrink_report["deft"]["after"]["density"] for m in (plain, thin)]
    assert density[1] < 0.7 * density[0]
    assert calibration.score(thin) > calibration.score(plain) - 0.01


def test_without_weight_it_is_plain_lora(trained):
    calibration, model = trained
    ours, _ = run_pass("deft", model, calibration, weight=0.0, steps=5)
    theirs = copy.deepcopy(model)
    for p in theirs.parameters():
        p.requires_grad_(False)
    torch.manual_seed(calibration.seed)
    for block in theirs.blocks:
        block.mixer.qkv = LoraLinear(block.mixer.qkv, 8, rows=[(0, 32), (64, 96)], drop=0.1)
    for p in theirs.head.parameters():
        p.requires_grad_(True)
    calibration.trainer(theirs, lr=3e-4, ema=0.0, weight_decay=0.0).train(steps=5, schedule="linear")
    for block in theirs.blocks:
        block.mixer.qkv = block.mixer.qkv.merged()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_lora_starts_as_the_layer_and_merges_exactly():
    layer = nn.Linear(6, 12)
    x = torch.randn(5, 3, 6)
    lora = LoraLinear(layer, 2, alpha=4.0, rows=[(0, 4), (8, 12)])
    torch.testing.assert_close(lora(x), layer(x))
    with torch.no_grad():
        for b in lora.b:
            b.normal_()
    change = torch.zeros(12, 6)
    change[:4] = 2 * lora.b[0] @ lora.a[0]
    change[8:] = 2 * lora.b[1] @ lora.a[1]
    want = nn.functional.linear(x, layer.weight + change, layer.bias)
    torch.testing.assert_close(lora(x), want)
    plain = lora.merged()
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), lora(x), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="rows must be rising runs"):
        LoraLinear(layer, 2, rows=[(8, 13)])
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LoraLinear(layer, 0)


def test_a_prompt_is_read_by_all_tokens_and_gone_before_the_head():
    model = encoder().eval()
    ids = texts().example(3)[0]
    shapes = []
    model.head.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    before = model(ids)
    model.stem, model.head = PromptStem(model.stem, 32, 5), PromptHead(model.head, 5)
    nn.init.normal_(model.stem.prompts)
    after = model(ids)
    assert shapes[0] == shapes[1]
    assert not torch.allclose(before, after, atol=1e-5)
    (gradient,) = torch.autograd.grad(after.sum(), model.stem.prompts)
    assert bool((gradient.abs().sum(-1) > 0).all())
    assert model.stem.pad_id == 0
    for part, wrong in ((PromptStem, (model.stem, 32, 0)), (Adapted, (nn.Identity(), 8, 0))):
        with pytest.raises(ValueError, match="must be at least 1"):
            part(*wrong)


def test_padding_changes_the_density_and_can_be_left_out(trained):
    calibration, model = trained
    batches = list(calibration.batches(64))
    with_padding = activation_density(model, batches)[""]
    without = activation_density(model, batches, padding=False)[""]
    assert abs(with_padding - without) > 1e-3
    # By hand, for the first block.
    alive = whole = 0
    with torch.no_grad():
        for (ids,), _ in batches:
            x, mask = model.stem(ids)
            block = model.blocks[0]
            hidden = block.mlp.act(block.mlp.fc1(block.norm1(x + block.mixer(x, mask=mask))))
            alive, whole = alive + (hidden != 0)[mask].sum().item(), whole + hidden[mask].numel()
    assert activation_density(model, batches, padding=False)["blocks.0.mlp.act"] == pytest.approx(alive / whole)


def test_active_neurons_alone_give_the_product_for_their_share_of_the_macs(trained):
    calibration, model = trained
    ((ids,), _) = next(calibration.batches(32))
    with recorded(model) as records, torch.no_grad():
        model(ids)
    for record, block in zip(records, model.blocks, strict=True):
        a, layer = record.output, block.mlp.fc2
        y, count = active_product(a, layer.weight, layer.bias)
        torch.testing.assert_close(y, layer(a), atol=1e-5, rtol=1e-5)
        share = (a != 0).float().mean().item()
        assert count / (a.numel() * layer.out_features) == pytest.approx(share, abs=1e-6)
        assert share < 0.9


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_vision_models_and_pyramids_take_lora_and_adapters(kind):
    calibration = digits()
    torch.manual_seed(0)
    sizes = {"img_size": (8, 8), "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depths": (1, 2), "heads": (2, 4)}
    for model in (vision(), create_model("swin_t", **sizes, patch=1, window=4)):
        shrunk, _ = run_pass("deft", model, calibration, kind=kind, steps=3)
        report = shrunk.shrink_report["deft"]
        assert 0 < report["after"]["above_0.001"] <= report["after"]["density"] <= 1
        assert shrunk(*calibration.example(2)).shape == (2, 10)


SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1,), "heads": (2,), "window": 4}
GPT = {"dim": 16, "depth": 1, "heads": 2}


@pytest.mark.parametrize(
    ("name", "settings", "kind", "message", "shape"),
    [
        ("swin_t", SWIN, "prefix", r"stages\.0\.0\.mixer \(WindowAttention\) takes no prefix", (2, 3, 32, 32)),
        ("swin_t", SWIN, "prompt", "Pyramid is no sequence from end to end", (2, 3, 32, 32)),
        ("poolformer_s12", {"img_size": 32}, "lora", r"mixer \(Pool\) has no fused query", (2, 3, 32, 32)),
        ("gpt2", GPT, "prompt", r"blocks\.0\.mixer \(Attention\) takes no prompts", None),
        ("linear_forecaster", {"channels": 1, "seq_len": 8, "pred_len": 4}, "lora", "no activation of", (2, 8, 1)),
    ],
)  # fmt: skip
def test_what_takes_no_parts_is_refused_untouched(name, settings, kind, message, shape):
    inputs = (torch.ones(2, 8, dtype=torch.long),) if shape is None else (torch.randn(shape),)
    refuses("deft", create_model(name, **settings), texts(), message, inputs, kind=kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "qlora"}, "kind must be one of lora"),
        ({"weight": -1.0}, "weight must be at least 0"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"size": 0}, "size must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message, trained):
    calibration, model = trained
    with pytest.raises(ValueError, match=message):
        run_pass("deft", model, calibration, **settings)
    with pytest.raises(ValueError, match="no activation of Isotropic matches"):
        find_activations(model, "no such")
