"""Pre-LN, Pre-RMSNorm and Pre-CRMSNorm models are one function."""

import copy
import itertools

import pytest
import torch
from torch import nn

from gossamer.io import export_onnx
from gossamer.measure import parameters
from gossamer.models import create_model
from gossamer.shrink.base import Unsupported
from gossamer.shrink.passes.pre_rmsnorm import PlainRMSNorm, UncentredNorm, pre_rmsnorm
from shrink.loading import same_after_loading

VIT = {"img_size": 16, "patch": 4, "dim": 24, "depth": 3, "heads": 4, "num_classes": 5}
MODELS = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "deit3": ("deit3_small_patch16_224", {**VIT, "layer_scale": 0.3}),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "gpt2": ("gpt2", {"dim": 24, "depth": 2, "heads": 3, "vocab_size": 40, "max_len": 12, "drop": 0.0}),
}


def built(kind, dtype=torch.float64):
    name, settings = MODELS[kind]
    torch.manual_seed(0)
    net = create_model(name, **settings)
    for p in net.parameters():  # affine norms and biases that do something
        nn.init.normal_(p, std=0.3)
    x = torch.randint(0, 40, (2, 9)) if kind == "gpt2" else torch.randn(2, 3, 16, 16, dtype=dtype)
    return net.to(dtype).eval(), x


@pytest.mark.parametrize("form", ["rms", "crms"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_converted_model_is_the_same_function(kind, form):
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        net, x = built(kind, dtype)
        with torch.no_grad():
            before = net(x)
            steps = pre_rmsnorm(net, form=form)
            torch.testing.assert_close(net(x), before, atol=close, rtol=close)
        assert steps == [{"step": "pre_rmsnorm", "form": form}]
        assert not any(isinstance(m, nn.LayerNorm) for m in net.modules())


def with_layer_norms(net):
    """`net` with its root-mean-square norms replaced by layer norms."""
    for parent in list(net.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, PlainRMSNorm):
                norm = nn.LayerNorm(part.dim, part.eps, elementwise_affine=False)
                setattr(parent, name, norm)
    return net


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_pre_ln_centred_pre_ln_pre_rms_and_pre_crms_agree_pairwise(kind):
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        net, x = built(kind, dtype)
        nets = {"ln": net}
        for form in ("rms", "crms", "training"):
            nets[form] = copy.deepcopy(net)
            pre_rmsnorm(nets[form], form=form)
        nets["centred ln"] = with_layer_norms(copy.deepcopy(nets["rms"]))
        with torch.no_grad():
            answers = {name: one(x) for name, one in nets.items()}
        for one, other in itertools.combinations(answers, 2):
            torch.testing.assert_close(answers[one], answers[other], atol=close, rtol=close)
        # The norms alone do not do it: without the centring of what they read the answers are others.
        uncentred = copy.deepcopy(net)
        for part in uncentred.modules():
            if type(part) is nn.LayerNorm:
                part.__class__ = UncentredNorm
        assert (uncentred(x) - answers["ln"]).abs().max() > 1e-2


def means(net, x):
    """The largest mean of a token of the stream, as it leaves the stem and each block."""
    seen = []
    hooks = [net.stem.register_forward_hook(lambda _m, _i, y: seen.append(y[0].mean(-1).abs().max().item()))]
    hooks += [b.register_forward_hook(lambda _m, _i, y: seen.append(y.mean(-1).abs().max().item())) for b in net.blocks]
    net(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("form", ["rms", "training"])
@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_the_stream_has_mean_zero_at_every_layer(kind, form):
    net, x = built(kind)
    before = means(net, x)
    pre_rmsnorm(net, form=form)
    after = means(net, x)
    assert len(before) == len(after) == len(net.blocks) + 1
    assert min(before) > 1e-2
    assert max(after) < 1e-6


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_in_its_training_form_it_learns_as_the_pre_norm_model_does_step_by_step(kind, optimiser):
    net, x = built(kind)
    twins = {"ln": net, "training": copy.deepcopy(net), "rms": copy.deepcopy(net)}
    for form in ("training", "rms"):
        pre_rmsnorm(twins[form], form=form)
    torch.manual_seed(1)
    pull = torch.randn_like(net(x))
    answers, weights = {}, {}
    for name, one in twins.items():
        make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimiser]
        learner = make(one.train().parameters(), lr=1e-2)
        for _ in range(6):
            learner.zero_grad()
            (one(x) - pull).square().mean().backward()
            learner.step()
        with torch.no_grad():
            answers[name] = one.eval()(x)
        weights[name] = dict(one.named_parameters())
    assert (answers["ln"] - built(kind)[0](x)).abs().max() > 1e-2
    torch.testing.assert_close(answers["training"], answers["ln"], atol=1e-8, rtol=1e-8)
    assert weights["training"].keys() == weights["ln"].keys()
    for key, value in weights["ln"].items():
        torch.testing.assert_close(weights["training"][key], value, atol=1e-8, rtol=1e-8)
    # Where parameters were joined the same steps lead elsewhere.
    assert (answers["rms"] - answers["ln"]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_what_has_learned_in_its_training_form_is_narrowed_afterwards(kind, tmp_path):
    net, x = built(kind, torch.float32)
    pre_rmsnorm(net, form="training")
    assert list(net.state_dict()) == list(built(kind)[0].state_dict())
    same_after_loading(net, (x,), tmp_path / "training")
    assert export_onnx(net, x, tmp_path / "m.onnx", exporter="fast").passed
    with torch.no_grad():
        before = net(x)
    for form in ("rms", "crms"):
        made = copy.deepcopy(net)
        pre_rmsnorm(made, form=form)
        with torch.no_grad():
            torch.testing.assert_close(made(x), before, atol=1e-4, rtol=1e-4)
        kinds = {type(part).__name__ for part in made.modules()}
        assert not [kind for kind in kinds if "entred" in kind], kinds
    if kind == "gpt2":
        same_after_loading(made, (x,), tmp_path / "crms")
    with pytest.raises(Unsupported, match="is a CentredLinear, not linear"):
        pre_rmsnorm(net, form="training")
    with pytest.raises(Unsupported, match=r"blocks\.0\.scale1 is learned behind"):
        pre_rmsnorm(built("deit3")[0], form="training")


def test_crms_is_the_layer_norm_of_a_centred_vector_without_its_last_channel():
    torch.manual_seed(0)
    x = torch.randn(4, 7, 9, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    want = nn.functional.layer_norm(x, (9,))[..., :-1]
    torch.testing.assert_close(PlainRMSNorm(9, 1e-5, dropped=True)(x[..., :-1]), want, atol=1e-14, rtol=0)


def test_dropping_a_channel_takes_one_row_or_column_of_every_product():
    net, _ = built("vit")
    whole = parameters(net)
    pre_rmsnorm(net, form="rms")
    plain = parameters(net)
    dim, hidden, depth = 24, 96, 3
    assert whole - plain == (2 * depth + 1) * 2 * dim  # the norms' own
    pre_rmsnorm_again, _ = built("vit")
    pre_rmsnorm(pre_rmsnorm_again, form="crms")
    # patches, token, 17 positions; each block: qkv and fc1 columns, proj and fc2 rows with their biases; the head
    stem = 3 * 4 * 4 + 1 + 1 + 17
    block = 3 * dim + hidden + (dim + 1) + (hidden + 1)
    assert plain - parameters(pre_rmsnorm_again) == stem + depth * block + 5


def test_what_is_not_pre_norm_is_refused_and_left_alone():
    for name, settings, word in (
        ("bert_base", {"dim": 16, "depth": 1, "heads": 2, "vocab_size": 20, "max_len": 8}, "post-norm"),
        ("swin_t", {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "heads": (2, 2), "pad": True}, "no isotropic"),
        ("vit_tiny_patch16_224", {**VIT, "norm": nn.BatchNorm1d}, "not a LayerNorm"),
    ):
        net = create_model(name, **settings)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(Unsupported, match=word):
            pre_rmsnorm(net)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="form must be"):
        pre_rmsnorm(built("vit")[0], form="rmsx")


def test_dropout_is_warned_of():
    net = create_model("vit_tiny_patch16_224", **VIT, drop=0.1)
    with pytest.warns(UserWarning, match="mean of the stream"):
        pre_rmsnorm(net)


@pytest.mark.parametrize("form", ["rms", "crms"])
def test_it_loads_in_a_fresh_process_and_exports(tmp_path, form):
    net, x = built("vit", torch.float32)
    pre_rmsnorm(net, form=form)
    same_after_loading(net, (x,), tmp_path)
    assert export_onnx(net, x, tmp_path / "m.onnx", exporter="fast").passed
