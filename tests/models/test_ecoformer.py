"""EcoFormer: equal to the authors' code, codes are what they claim to be, the hash learns whom to attend to."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor

from gossamer import measure
from gossamer.io import export_onnx
from gossamer.mixers import create_mixer
from gossamer.mixers.hashed_linear import code_attention, sign
from gossamer.models import create_model, load_official
from gossamer.models.ecoformer import energy, operations
from gossamer.models.registry import rename, system
from gossamer.ops.attention import split_heads
from official import golden, manifest, probe, seeded_input, seeded_state
from pyramids import manifest_fits

TINY: dict[str, Any] = {
    "dims": (8, 16, 24, 32),
    "heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
    "depths": (1, 1, 1, 1),
    "bits": 6,
    "anchors": 5,
    "top": 3,
    "num_classes": 7,
}
OFFICIAL = {
    "ecoformer": ((2, 3, 32, 32), "block1.0.attn.to_qk.weight", "stages.0.0.mixer.qk.weight"),
    "ecoformer_odd": ((1, 3, 45, 37), "block2.0.attn.to_v.weight", "stages.1.0.mixer.v.weight"),
}


def state_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights by rule; anchors as long as tokens and the kernel's mean near its values, so that codes differ."""
    state = seeded_state(golden(name)["shapes"], dtype)
    for key, value in state.items():
        if key.endswith("ksh.anchor"):
            state[key] = value * (value.shape[1] * value.shape[2]) ** 0.5
        elif key.endswith("ksh.mvec"):
            state[key] = 0.6 + 0.1 * value
    return state


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_ecoformer_equals_official(name: str, dtype: torch.dtype, tolerance: float) -> None:
    shape, _, own = OFFICIAL[name]
    saved = golden(name)
    model = load_official(create_model("ecoformer", **TINY, bias="official").to(dtype), state_of(name, dtype)).eval()
    x = seeded_input(name, shape).to(dtype).requires_grad_()
    y = model(x)
    gradients = torch.autograd.grad(probe(y), [x, model.get_parameter(own)])
    for ours, theirs in zip((y, *gradients), ("output0", "grad_input", "grad_weight"), strict=True):
        torch.testing.assert_close(ours, saved[theirs].to(dtype), rtol=tolerance, atol=tolerance)
    codes = model.stages[0][0].mixer.codes(F.normalize(torch.randn(1, 1, 50, 8, dtype=dtype), dim=-1))
    assert len(codes.flatten(0, 2).unique(dim=0)) > 5


@pytest.mark.parametrize("name", system("ecoformer").variants)
def test_every_official_checkpoint_of_ecoformer_fits(name: str) -> None:
    assert set(system("ecoformer").variants) == set(manifest("ecoformer"))
    manifest_fits("ecoformer", name)


def tokens(*shape: int, groups: int = 4) -> Tensor:
    """Normalised tokens that fall into groups, as those of real images do."""
    centres = torch.randn(*shape[:2], groups, shape[3])
    members = torch.arange(shape[2]) % groups
    return F.normalize(centres[:, :, members] + 0.4 * torch.randn(shape), dim=-1)


def test_the_hash_is_trained_as_by_the_authors() -> None:
    saved = golden("ecoformer_hash")
    mixer = create_mixer("hashed_linear", 8, heads=2, bits=6, anchors=5, top=3).double()
    start = seeded_state({"A": (2, 6, 5)}, torch.float64)["A"] * 0.05
    mixer.weights = start.clone()
    qk = F.normalize(seeded_input("ecoformer_hash", (2, 2, 30, 4)).double(), dim=-1)
    mixer.train_hash(qk, qk[:1, :, 2:7])
    torch.testing.assert_close(mixer.weights, saved["weights"], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(mixer.means, saved["means"], atol=1e-9, rtol=1e-9)
    assert torch.equal(mixer.codes(qk), saved["codes"].double())
    moved = (mixer.weights - start).abs().amax((0, 2)) > 0
    assert 0 < int(moved.sum()) < 6  # some bits were kept as they were


def photograph(heads: int, width: int) -> Tensor:
    """Normalised tokens of four pieces of a photograph: patches of 8x8 pixels under random products."""
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1) / 255
    corners = ((100, 100), (200, 300), (300, 100), (150, 450))
    pieces = torch.stack([image[:, y : y + 64, x : x + 64] for y, x in corners])
    patches = F.unfold(pieces, 8, stride=8).mT
    patches = patches - patches.mean((0, 1))
    return F.normalize(split_heads(patches @ torch.randn(192, heads * width), heads), dim=-1)


def agreement(pairs: Tensor, codes: Tensor) -> float:
    """How much nearer the codes of the ten strongest pairs are than those of the ten weakest."""
    similar = codes @ codes.mT
    strong, weak = pairs.topk(10).indices, pairs.topk(10, largest=False).indices
    return float(similar.gather(-1, strong).mean() - similar.gather(-1, weak).mean())


def recall(pairs: Tensor, codes: Tensor) -> float:
    """Share of the ten strongest pairs of each token among the ten nearest codes."""
    found = (codes @ codes.mT).topk(10).indices
    return float(torch.zeros_like(pairs).scatter(-1, pairs.topk(10).indices, 1).gather(-1, found).mean())


@pytest.mark.parametrize("real", [False, True])
def test_training_the_hash_never_makes_a_bit_worse_and_beats_random_bits(real: bool) -> None:
    qk = photograph(2, 16) if real else tokens(4, 2, 64, 8, groups=6)
    width = qk.shape[-1]
    mixer = create_mixer("hashed_linear", 2 * width, heads=2, bits=16, anchors=25, top=10)
    report = mixer.train_hash(qk)
    assert all(after <= before for before, after in report)
    assert sum(after < before for before, after in report) > len(report) // 2
    pairs, codes = qk @ qk.mT, mixer.codes(qk)

    def objective(codes: Tensor) -> float:
        """`y^T S y`, of all bits."""
        target = torch.zeros_like(pairs).scatter(-1, pairs.topk(10).indices, 1)
        target = target.scatter(-1, pairs.topk(10, largest=False).indices, -1)
        return float((codes * (target @ codes)).sum())

    assert objective(codes) > objective(torch.randn_like(codes).sign())
    fresh = create_mixer("hashed_linear", 2 * width, heads=2)
    fresh.anchors, fresh.means = mixer.anchors, mixer.means
    planes = [(qk @ torch.randn(2, width, 16)).sign() for _ in range(5)]
    assert agreement(pairs, codes) > max(agreement(pairs, p) for p in planes)
    assert objective(codes) > objective(fresh.codes(qk))
    if real:
        assert recall(pairs, codes) > sum(recall(pairs, p) for p in planes) / 5 + 0.02


def test_the_product_of_codes_is_the_bits_less_twice_the_hamming_distance() -> None:
    qk = tokens(2, 2, 30, 4)
    mixer = create_mixer("hashed_linear", 8, heads=2, anchors=20, top=5)
    mixer.train_hash(qk)
    codes = mixer.codes(qk)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    distance = (codes[:, :, :, None] != codes[:, :, None]).sum(-1)
    torch.testing.assert_close(codes @ codes.mT, 16.0 - 2 * distance)


def test_linear_form_equals_the_explicit_matrix_whose_rows_sum_to_one() -> None:
    codes, v = torch.randn(2, 3, 20, 6).double().sign(), torch.randn(2, 3, 20, 4).double()
    phi = codes @ codes.mT + 7
    assert phi.min() >= 1
    weights = phi / phi.sum(-1, keepdim=True)
    torch.testing.assert_close(code_attention(codes, v), weights @ v, atol=1e-9, rtol=1e-9)
    ones = code_attention(codes, torch.ones_like(v))
    torch.testing.assert_close(ones, torch.ones_like(ones))
    # The authors' numerator has the constant for the token itself alone: no convex combination.
    own = code_attention(codes, v, own=True)
    want = ((codes @ codes.mT) @ v + 7 * v) / phi.sum(-1, keepdim=True)
    torch.testing.assert_close(own, want, atol=1e-9, rtol=1e-9)
    assert (own - weights @ v).abs().max() > 0.01


def test_the_gradient_of_the_sign_is_one_inside_and_zero_outside() -> None:
    x = torch.tensor([-1.5, -1.0, -0.9, 0.2, 0.99, 1.0, 3.0], requires_grad=True)
    y = sign(x)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    (slope,) = torch.autograd.grad((y * 2).sum(), x)
    assert slope.tolist() == [0, 0, 2, 2, 2, 0, 0]


def test_the_first_training_step_trains_the_hash_and_loaded_ones_are_left_alone() -> None:
    mixer = create_mixer("hashed_linear", 8, heads=2, bits=4, anchors=6, top=3, samples=2)
    x = torch.randn(3, 5, 5, 8)
    mixer.eval()(x)
    assert not mixer.trained()
    mixer.train()(x)
    assert mixer.trained()
    before = mixer.anchors.clone()
    mixer(torch.randn_like(x))
    other = create_mixer("hashed_linear", 8, heads=2, bits=4, anchors=6, top=3)
    other.load_state_dict(mixer.state_dict())
    other(torch.randn_like(x))
    assert torch.equal(mixer.anchors, before)
    assert torch.equal(other.anchors, before)
    mixer.retrain()
    mixer(torch.randn_like(x))
    assert not torch.equal(mixer.anchors, before)


def test_hashing_wants_enough_tokens_and_bits() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        create_mixer("hashed_linear", 8, heads=2, bits=0)
    with pytest.raises(ValueError, match=r"at most 16 \(tokens\), got 25"):
        create_mixer("hashed_linear", 8, heads=2)(torch.randn(1, 4, 4, 8))
    with pytest.raises(ValueError, match="got 4 and 20"):
        create_mixer("hashed_linear", 8, heads=2, anchors=4)(torch.randn(1, 4, 4, 8))


def test_cost_and_memory_of_hashed_attention_are_linear_in_tokens() -> None:
    counts = []
    with torch.device("meta"):
        for side in (16, 32, 64):
            mixer = create_mixer("hashed_linear", 16, heads=2).eval()
            counts.append(measure.macs(mixer, (torch.empty(1, side, side, 16),)).total)
    assert counts[1] / counts[0] == pytest.approx(4, rel=1e-3)
    assert counts[2] / counts[1] == pytest.approx(4, rel=1e-3)
    mixer = create_mixer("hashed_linear", 16, heads=2, anchors=8).eval()
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    with torch.no_grad(), Watch():
        mixer(torch.randn(1, 20, 20, 16))
    assert max(sizes) < 400 * 400 / 4


def test_operations_of_the_smallest_model_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        model = create_model("pvtv2_b0_ecoformer").eval()
        multiplications, additions = operations(model, torch.empty(1, 3, 224, 224))
    assert multiplications / 1e9 == pytest.approx(0.54, rel=0.05)
    assert additions / 1e9 == pytest.approx(0.56, rel=0.05)
    assert energy(multiplications, additions) == pytest.approx(2.5, rel=0.05)
    mixer = create_mixer("hashed_linear", 64, heads=2)
    few, many = mixer.operations(3136)
    assert many > 2 * few
    # Softmax attention on the same map: 2 n^2 c multiplications.
    assert few * 20 < 2 * 3136**2 * 64


def test_weights_of_a_pvt_become_those_of_an_ecoformer() -> None:
    settings = {k: v for k, v in TINY.items() if k not in ("bits", "anchors", "top")}
    pvt = create_model("pvt", **settings, v2=True)
    names = {"mixer.conv.": "attn.sr.", "mixer.": "attn.", "mlp.dw.": "mlp.dwconv.dwconv.", "head.fc.": "head."}
    official = {}
    for key, value in pvt.state_dict().items():
        for ours, theirs in names.items():
            if ours in key:
                key = key.replace(ours, theirs)
                break
        parts = key.split(".")
        if parts[0] == "stages":
            last = int(parts[2]) == len(pvt.stages[int(parts[1])]) - 1
            i = int(parts[1]) + 1
            key = ".".join([f"norm{i}", *parts[3:]] if last else [f"block{i}", *parts[2:]])
        elif parts[0] in ("stem", "merges"):
            i = 1 if parts[0] == "stem" else int(parts[1]) + 2
            key = ".".join([f"patch_embed{i}", "proj" if parts[-2] in ("conv", "proj") else "norm", parts[-1]])
        official[key] = value
    assert rename(official, system("pvt").rules)
    model = load_official(create_model("ecoformer", **TINY), official)
    attn, eco = pvt.stages[1][0].mixer, model.stages[1][0].mixer
    assert torch.equal(eco.qk.weight, attn.q.weight)
    assert torch.equal(eco.v.weight, attn.kv.weight[16:])
    assert not eco.trained()
    assert torch.equal(
        model.stages[3][0].mixer.qkv.bias, torch.cat([pvt.stages[3][0].mixer.q.bias, pvt.stages[3][0].mixer.kv.bias])
    )


def test_an_exported_ecoformer_agrees_for_every_batch_size(tmp_path) -> None:
    model = load_official(create_model("ecoformer", **TINY), state_of("ecoformer"))
    certificate = export_onnx(model, torch.randn(2, 3, 32, 32), tmp_path / "model.onnx", dynamic="batch")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
