"""Deep Compression: shared numbers are the nearest, learn by summed gradients, and the file is ten times smaller."""

import numpy as np
import pytest
import torch
from torch import nn

import gossamer
from gossamer.io import export_onnx, load_weights
from gossamer.io.huffman import entropy
from gossamer.layers.coded import announce_coded, coded_parameters, keep_coded
from gossamer.layers.shared_weights import Codebook, Shared, k_means, nearest
from gossamer.models import create_model
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.passes.deep_compression import deep_compression, matrices
from gossamer.shrink.recipe import replay
from shrink.loading import same_after_loading
from shrink.toys import digits, encoder, learned, texts, vision


def cnn(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip


def test_k_means_ends_where_no_value_and_no_centre_would_move():
    torch.manual_seed(0)
    values = torch.cat((torch.randn(400) * 0.1 - 1, torch.randn(300) * 0.2 + 2, torch.tensor([5.0])))
    centres = k_means(values, 4, rounds=200)
    assert torch.equal(centres, centres.sort().values)
    codes = nearest(values, centres)
    distance = (values[:, None] - centres).abs()
    torch.testing.assert_close(distance.gather(1, codes[:, None]).squeeze(1), distance.min(1).values)
    for i, centre in enumerate(centres):
        if (codes == i).any():
            torch.testing.assert_close(centre, values[codes == i].mean())
    # The linear start keeps the one large value, which starts from densities would lose.
    assert float(centres[-1]) == pytest.approx(5.0)
    torch.testing.assert_close(k_means(values, 2, rounds=0), torch.stack((values.min(), values.max())))


def test_a_shared_number_learns_by_the_sum_of_its_weights_gradients_and_zeros_stay():
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    weight[weight.abs() < 0.5] = 0
    book = Codebook(weight, 4)
    used = book(weight)
    assert torch.equal(used == 0, weight == 0)
    pull = torch.randn(6, 5)
    (used * pull).sum().backward()
    for i in range(4):
        members = book.codes == i + 1
        torch.testing.assert_close(book.centres.grad[i], pull[members].sum())


@pytest.mark.parametrize("keep", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 3, 31, 255])
def test_stored_bytes_give_the_weight_back_and_lie_near_the_entropy(keep, count):
    torch.manual_seed(count)
    weight = torch.randn(40, 300)
    weight[torch.rand_like(weight) > keep] = 0
    weight = Codebook(weight, count)(weight).detach()
    parts = Shared().parts(weight)
    assert torch.equal(Shared().value(parts, weight.shape), weight)
    numbers = np.unique(weight.numpy(), return_inverse=True)[1].astype(np.uint8)
    size = parts["shared"].numel() - 4 * (count + 1)
    # A code by single numbers takes a bit at least; one by gaps takes less where most are zero.
    assert 8 * size < (max(1.0, entropy(numbers.reshape(-1))) + 0.25) * weight.numel() + 8 * 400
    if keep == 0.02:
        assert 8 * size < 0.5 * weight.numel()
    with pytest.raises(ValueError, match=r"stream|hold no codebook"):
        Shared().value({"shared": parts["shared"][:-9]}, weight.shape)
    with pytest.raises(ValueError, match="do not make"):
        Shared().value(parts, torch.Size((1, 2)))


def test_long_rows_of_zeros_are_passed_over():
    for zeros in (254, 255, 256, 257, 511, 512, 5000):
        weight = torch.zeros(1, zeros + 6)
        weight[0, 0], weight[0, zeros + 1], weight[0, zeros + 2] = 0.5, -1.0, 0.5
        assert torch.equal(Shared().value(Shared().parts(weight), weight.shape), weight)
    assert Shared().parts(torch.zeros(30, 30))["shared"].numel() < 200
    with pytest.raises(ValueError, match="at most 255 distinct"):
        Shared().parts(torch.randn(20, 20))


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_a_trained_network_is_ten_times_smaller_on_disk_for_less_than_two_points(kind, tmp_path):
    calibration = digits()
    if kind == "cnn":
        net = learned(cnn(), calibration, steps=120)
        net.recipe = []
    else:
        net = learned(vision(dim=64, depth=4), calibration, steps=350, lr=1.5e-3)
    before = calibration.score(net)
    assert before > 0.85
    small, _ = run_pass("deep_compression", net, calibration, keep=0.2, steps=240, lr=1e-3)
    assert calibration.score(small) > before - 0.02
    report = small.shrink_report["deep_compression"]
    assert report["coded_bits"] < report["shared_bits"] < report["pruned_bits"] < 32
    gossamer.save(net, tmp_path / "large")
    gossamer.save(small, tmp_path / "small")
    large, less = ((tmp_path / f / "model.safetensors").stat().st_size for f in ("large", "small"))
    print(kind, before, calibration.score(small), large, less, large / less, report)
    assert large > 10 * less
    if kind == "cnn":
        again = gossamer.load(tmp_path / "small", model=cnn())
        x = calibration.example(5)
        with torch.no_grad():
            assert torch.equal(again(*x), small(*x))
    # Products between stem and head are sparse; every matrix has few numbers.
    coded = coded_parameters(small)
    numel = 0
    for name in coded:
        part, _, parameter = name.rpartition(".")
        weight = getattr(small.get_submodule(part), parameter)
        assert len(weight.unique()) <= 33
        numel += weight.numel()
    assert sum(kept.stored_bits() for kept in coded.values()) < 3 * numel
    middle = small[3].weight if kind == "cnn" else small.blocks[1].mlp.fc1.weight
    assert 0.05 < float((middle != 0).float().mean()) < 0.4


def test_training_the_shared_numbers_brings_back_what_sharing_lost():
    calibration = digits()
    net = learned(vision(), calibration, steps=150)
    x = calibration.example(128)

    def error(settings):
        small, _ = run_pass("deep_compression", net, calibration, keep=1.0, bits=3, **settings)
        with torch.no_grad():
            return float((small(*x) - net(*x)).square().mean())

    assert error({"steps": 80, "lr": 1e-3}) < 0.7 * error({"steps": 0})


@pytest.mark.parametrize("kind", ["vit", "swin", "bert", "gpt2"])
def test_compressed_models_load_in_a_fresh_process_and_export(kind, tmp_path):
    calibration = texts() if kind in ("bert", "gpt2") else digits()
    if kind == "bert":
        net = encoder()
    elif kind == "vit":
        net = vision()
    elif kind == "gpt2":
        torch.manual_seed(0)
        net = create_model("gpt2", dim=32, depth=1, heads=4, vocab_size=24, max_len=12)
    else:
        sizes = {"embed_dim": 16, "depths": (1, 1), "heads": (2, 4), "patch": 2, "window": 2}
        net = create_model("swin_t", **sizes, **calibration.data.spec)
    small, steps = run_pass("deep_compression", net.eval(), calibration, keep=0.5, steps=0 if kind == "gpt2" else 3)
    assert len(steps) == sum(len(held) for held in matrices(net).values())
    x = calibration.example(3)
    same_after_loading(small, x, tmp_path)
    state = load_weights(tmp_path / "m" / "model.safetensors")
    assert {k for k in state if k.endswith("_shared")} == {f"{s['part']}.{s['name']}_shared".lstrip(".") for s in steps}
    if kind == "gpt2":
        # Embedding and head are one weight, which is stored once.
        tied = {id(v) for k, v in state.items() if k.endswith("_shared")}
        assert len(tied) == len(steps) - 1
    else:
        assert export_onnx(small, x, tmp_path / "m.onnx", exporter="fast", input_names=["x"]).passed


def test_what_cannot_be_compressed_is_said_and_left_as_it_was():
    calibration = digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(Unsupported, match="no trained matrix of 256"):
        deep_compression(net, calibration)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for wrong, word in (
        ({"keep": 0.0}, "keep must be in"),
        ({"bits": 9}, "bits must be in 2"),
        ({"rounds": 0}, "rounds"),
    ):
        with pytest.raises(ValueError, match=word):
            deep_compression(vision(), calibration, **wrong)
    done, steps = run_pass("deep_compression", vision().eval(), calibration, steps=0)
    with pytest.raises(Unsupported, match="no trained matrix"):
        run_pass("deep_compression", done, calibration, steps=0)
    damaged = done.state_dict()
    damaged["blocks.0.mlp.fc1.weight_shared"] = damaged["blocks.0.mlp.fc1.weight_shared"][:50]
    with pytest.raises(RuntimeError, match=r"blocks.0.mlp.fc1.weight cannot be decoded"):
        replay(vision(), steps).load_state_dict(damaged)
    other = vision()
    announce_coded(other, "blocks.0.mlp.fc1", "weight", Shared())
    with pytest.raises(ValueError, match="at most 255 distinct"):
        keep_coded(other, "blocks.0.mlp.fc2", "weight", Shared())
