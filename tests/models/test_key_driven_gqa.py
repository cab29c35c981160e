"""Key-driven grouped queries: equal to the authors' code, shares that add up, weights from multi-head ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import measure
from gossamer.io import export_onnx
from gossamer.mixers import create_mixer
from gossamer.mixers.grouped_query import group_heads
from gossamer.mixers.key_driven import change_allocation, head_groups, key_allocation
from gossamer.models import create_model, load_official
from official import golden, manifest, probe, seeded_input, seeded_state
from pyramids import manifest_fits

TINY = {"dim": 24, "depth": 2, "heads": 6, "patch": 4, "in_chans": 1, "num_classes": 7, "img_size": 16}
OFFICIAL = {
    "key_driven_gqa": ({"kv_heads": 3, "scheme": "gqa", "img_size": (8, 20)}, 0, "k"),
    "key_driven_kdgqa": ({"kv_heads": 4, "scheme": "kdgqa", "mixer_options": {"over": "batch"}}, 1, "q"),
    "key_driven_dgqa_ema": (
        {"kv_heads": 3, "scheme": "dgqa_ema", "mixer_options": {"freeze_allocation": False}},
        1,
        "proj",
    ),
    "key_driven_dgqa_diff": (
        {"kv_heads": 3, "scheme": "dgqa_diff", "mixer_options": {"freeze_allocation": False}},
        1,
        "proj",
    ),
    "key_driven_pgqa": ({"kv_heads": 3, "scheme": "pgqa", "mixer_options": {"sampling": "fixed"}}, 1, "v"),
}


def skewed(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Seeded weights with keys of unequal size, so that shares of heads are unequal."""
    state = seeded_state(shapes, dtype)
    for key, value in state.items():
        if ".attn.k." in key:
            for rows, size in zip(value.view(-1, 4, *value.shape[1:]), (3.0, 0.2, 1.0, 2.0), strict=False):
                rows *= size
    return state


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_grouped_queries_equal_official(name: str, dtype: torch.dtype, tolerance: float) -> None:
    settings, block, product = OFFICIAL[name]
    saved = golden(name)
    model = create_model("key-driven-gqa", **{**TINY, **settings}).to(dtype).eval()
    draw = seeded_state if settings["scheme"] in ("gqa", "pgqa") else skewed
    load_official(model, draw(saved["shapes"], dtype))
    x = seeded_input(name, (2, 1, 8, 20) if settings["scheme"] == "gqa" else (2, 1, 16, 16))
    x = x.to(dtype).requires_grad_()
    torch.manual_seed(0)
    y = model(x)
    mixer = model.blocks[block].mixer
    weight = mixer.proj.weight if product == "proj" else mixer.qkv.weight
    grad_x, grad_w = torch.autograd.grad(probe(y), [x, weight])
    inner = mixer.kv_heads * 4
    rows = {"proj": slice(None), "q": slice(24), "k": slice(24, 24 + inner), "v": slice(24 + inner, None)}
    close = {"atol": tolerance, "rtol": tolerance, "check_dtype": False}
    torch.testing.assert_close(y, saved["output0"], **close)
    torch.testing.assert_close(grad_x, saved["grad_input"], **close)
    torch.testing.assert_close(grad_w[rows[product]], saved["grad_weight"], **close)
    if hasattr(mixer, "allocation"):
        assert mixer.allocation[0].tolist() != [2, 2, 2]


@pytest.mark.parametrize("kind", ["ema", "diff"])
def test_training_decides_when_and_what_the_authors_decide(kind: str) -> None:
    saved = golden("key_driven_train")
    model = create_model(
        "key-driven-gqa", **TINY, kv_heads=3, scheme=f"dgqa_{kind}", mixer_options={"window": 2}
    ).double()
    load_official(model, skewed(golden(f"key_driven_dgqa_{kind}")["shapes"], torch.float64))
    mixers = [block.mixer for block in model.blocks]
    for mixer in mixers:
        mixer.cache.zero_()
    model.train()
    torch.manual_seed(3)
    seen = []
    for step in range(6):
        with torch.no_grad():
            y = model(seeded_input(f"step{step}", (2, 1, 16, 16)).double() * (1 + step))
        seen.append([m.allocation[0].tolist() for m in mixers])
        assert seen[-1] == saved[f"{kind}_splits{step}"].tolist()
        cache = torch.stack([m.cache for m in mixers]).float()
        torch.testing.assert_close(cache, saved[f"{kind}_cache{step}"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y.float(), saved[f"{kind}_y{step}"], rtol=1e-4, atol=1e-4)
    # Windows of two: decided at steps 0, 2, 4 alone.
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[4] == seen[5]
    assert seen[0] != seen[2] or seen[2] != seen[4]
    # What training ended with stands in eval mode, whatever the batch.
    x = torch.randn(3, 1, 16, 16, dtype=torch.float64)
    model.eval()
    torch.testing.assert_close(model(x)[[2, 0, 1]], model(x[[2, 0, 1]]))
    assert [m.allocation[0].tolist() for m in mixers] == seen[-1]
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_every_official_checkpoint_of_key_driven_gqa_fits() -> None:
    for name in manifest("key-driven-gqa"):
        manifest_fits("key-driven-gqa", name)


def test_keys_and_values_take_the_share_of_their_heads() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in create_model(name).parameters()) / 1e6
            for name in ("vit_s16_mhsa", "vit_s16_gqa", "vit_b16_mhsa", "vit_b16_gqa", "vit_l16_mhsa", "vit_l_dgqa")
        }
    assert list(counts.values()) == pytest.approx([21.67, 19.90, 85.81, 75.18, 303.31, 265.53], abs=0.006)
    # Weights and biases: 2 C (C + 1) (1 - G / H) a layer.
    saved = (counts["vit_l16_mhsa"] - counts["vit_l_dgqa"]) * 1e6
    assert saved == pytest.approx(24 * 2 * 1024 * 1025 * (1 - 4 / 16))
    mixer = create_mixer("gqa", 32, heads=8, kv_heads=2, causal=True)
    _, state = mixer.step(torch.randn(3, 32), mixer.initial_state(3))
    assert [tuple(t.shape) for t in state] == [(3, 2, 1, 4)] * 2
    x = torch.randn(1, 16, 32)
    whole, grouped = (measure.macs(create_mixer("gqa", 32, heads=8, kv_heads=g), (x,)).total for g in (8, 2))
    assert whole - grouped == 16 * 2 * 32 * 32 * (1 - 2 / 8)


def written_out(mixer: torch.nn.Module, x: Tensor, shares: Sequence[int]) -> Tensor:
    q, k, v = mixer.project(x)
    parts = []
    for g, mine in enumerate(q.split(list(shares), 1)):
        weights = (mine @ k[:, g : g + 1].transpose(-2, -1) * mixer.head_dim**-0.5).softmax(-1)
        parts.append(weights @ v[:, g : g + 1])
    return mixer.proj(torch.cat(parts, 1).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["gqa", "kdgqa", "dgqa"])
def test_heads_read_the_group_they_are_given_to(name: str) -> None:
    mixer = create_mixer(name, 24, heads=6, kv_heads=3).double().eval()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    if name == "kdgqa":
        with torch.no_grad():
            mixer.qkv.weight[24:28] *= 3
        shares = mixer.allocate(mixer.project(x)[1], None)
        assert shares.sum(1).tolist() == [6, 6]
        assert bool((shares[:, 0] == shares.amax(1)).all())
        for i in range(2):
            torch.testing.assert_close(mixer(x)[i], written_out(mixer, x, shares[i].tolist())[i])
        return
    if name == "dgqa":
        mixer.allocation.copy_(torch.tensor([[0, 5, 1]]))
        torch.testing.assert_close(mixer(x), written_out(mixer, x, (0, 5, 1)))
        mixer(x).square().sum().backward()
        grad = mixer.qkv.weight.grad
        # A group that no head reads learns nothing.
        assert not bool(grad[24:28].any())
        assert bool(grad[28:32].any())
        mixer.allocation.fill_(2)
    torch.testing.assert_close(mixer(x), written_out(mixer, x, (2, 2, 2)))


@pytest.mark.parametrize("name", ["gqa", "kdgqa", "dgqa"])
def test_a_key_head_for_each_query_head_is_multi_head_attention(name: str) -> None:
    mixer = create_mixer(name, 24, heads=6, kv_heads=6).double().eval()
    whole = create_mixer("attention", 24, heads=6).double()
    whole.load_state_dict({k: v for k, v in mixer.state_dict().items() if "." in k})
    x = torch.randn(2, 4, 5, 24, dtype=torch.float64)
    if name == "kdgqa":
        mixer.allocate = lambda k, valid: torch.ones(1, 6, dtype=torch.long)
    torch.testing.assert_close(mixer(x), whole(x), atol=1e-5, rtol=1e-5)


def test_perturbed_heads_with_a_key_head_each_are_those_of_multi_head_attention_less_their_noise() -> None:
    mixer = create_mixer("pgqa", 24, heads=6, kv_heads=6, sampling="fixed").double().eval()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = mixer.project(x)
    heads = ((q @ k.mT / 2).softmax(-1) @ v).flatten(2)
    drawn = mixer.noise(heads) * heads.std(-1, keepdim=True) + heads.mean(-1, keepdim=True)
    want = (heads - drawn).view(2, 6, 5, 4).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x), mixer.proj(want), atol=1e-5, rtol=1e-5)


def test_noise_has_each_heads_mean_and_deviation_and_is_drawn_anew() -> None:
    mixer = create_mixer("pgqa", 24, heads=6, kv_heads=3).eval()
    rows = torch.randn(2, 6, 80) * 3 + 1
    noise = mixer.noise(rows)
    torch.testing.assert_close(noise.mean(-1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(noise.std(-1), torch.ones(6))
    x = torch.randn(2, 20, 24)
    assert not torch.allclose(mixer(x), mixer(x), atol=1e-4)
    # The answer has mean 0 less noise: what is subtracted carries the whole mean of a head.
    heads = torch.linalg.solve(mixer.proj.weight, (mixer(x) - mixer.proj.bias).mT).mT
    torch.testing.assert_close(heads.unflatten(-1, (6, 4)).mean((1, 3)), torch.zeros(2, 6), atol=1e-4, rtol=0)
    fixed = create_mixer("pgqa", 24, heads=6, kv_heads=3, sampling="fixed").eval()
    assert torch.equal(fixed(x), fixed(x))


def test_shares_are_whole_add_up_and_follow_the_norms() -> None:
    torch.manual_seed(0)
    norms = torch.rand(1000, 5) * torch.rand(1000, 1) * 9
    shares = key_allocation(norms, 12)
    assert bool((shares >= 0).all())
    assert bool((shares.sum(1) == 12).all())
    # One correction apart at most, more keys never get fewer heads.
    for size, given in zip(norms, shares, strict=True):
        ordered = given[size.argsort()]
        assert bool((ordered[1:] - ordered[:-1] >= -1).all())
        weight = (size - size.min()) / (size.max() - size.min())
        assert bool(((weight / weight.sum() * 12 - given).abs() <= 2.5).all())
    # Ahead of the correction shares are monotone, and the correction changes no more than it has to.
    least = norms.amin(1, keepdim=True)
    raw = ((norms - least) / (norms - least).sum(1, keepdim=True) * 12).round().long()
    assert bool((raw.gather(1, norms.argsort(1)).diff(dim=1) >= 0).all())
    assert torch.equal((shares - raw).abs().sum(1), (raw.sum(1) - 12).abs())
    assert int((raw.sum(1) == 12).sum()) > 300
    for heads, groups in ((6, 4), (12, 5), (8, 2), (4, 1)):
        even = key_allocation(torch.full((1, groups), 3.0), heads)[0]
        assert int(even.sum()) == heads
        assert int(even.max() - even.min()) <= 1
    for row in norms[:200]:
        given = change_allocation(row, 12)
        assert int(given.sum()) == 12
        assert int(given.min()) >= 0
    assert change_allocation(torch.zeros(4), 8).tolist() == [2, 2, 2, 2]
    assert head_groups(torch.tensor([[0, 3, 1], [2, 0, 2]]), 4).tolist() == [[1, 1, 1, 2], [0, 0, 2, 2]]


def test_multi_head_weights_become_grouped_ones_by_the_mean_of_each_group() -> None:
    weight = torch.randn(72, 24)
    grouped = group_heads(weight, 6, 3)
    assert torch.equal(grouped[:24], weight[:24])
    for part in (0, 1):
        heads = weight[24 * (1 + part) :][:24].view(6, 4, 24)
        for g in range(3):
            mean = (heads[2 * g] + heads[2 * g + 1]) / 2
            torch.testing.assert_close(grouped[24 + 12 * part + 4 * g :][:4], mean)
    assert torch.equal(group_heads(weight, 6, 6), weight)
    assert group_heads(weight[:, 0], 6, 2).shape == (24 + 2 * 8,)
    with pytest.raises(ValueError, match="kv_heads=4, heads=6"):
        group_heads(weight, 6, 4)


def test_a_multi_head_checkpoint_starts_a_grouped_model_which_then_recovers() -> None:
    def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        # Stripes one way or the other, squares, or nothing.
        rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        patterns = torch.stack((rows % 2, columns % 2, (rows + columns) % 2, rows * 0)).float()
        kind = torch.randint(4, (n,), generator=generator)
        return torch.randn(n, 1, 16, 16, generator=generator) + patterns[kind][:, None], kind

    def train(model: torch.nn.Module, steps: int, rate: float) -> None:
        optimizer = torch.optim.AdamW(model.train().parameters(), rate)
        x, y = data(256, 1)
        for _ in range(steps):
            picked = torch.randint(256, (64,))
            loss = F.cross_entropy(model(x[picked]), y[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def accuracy(model: torch.nn.Module) -> float:
        x, y = data(256, 2)
        with torch.no_grad():
            return float((model.eval()(x).argmax(1) == y).float().mean())

    settings = {**TINY, "num_classes": 4}
    whole = create_model("key-driven-gqa", **settings, kv_heads=6)
    train(whole, 80, 3e-3)
    # Names as a plain ViT file has them.
    names = (("stem.embed.", "patch_embed."), ("stem.tokens", "cls_token"), ("stem.positions", "pos_embed"))
    state = {key.replace(".mixer.", ".attn.").replace("head.fc", "head"): v for key, v in whole.state_dict().items()}
    for own, theirs in names:
        state = {key.replace(own, theirs): v for key, v in state.items()}
    same = load_official(create_model("key-driven-gqa", **settings, kv_heads=6), state)
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(same.eval()(x), whole.eval()(x))
    best = accuracy(whole)
    assert best > 0.8
    for scheme in ("gqa", "kdgqa", "dgqa_ema", "dgqa_diff"):
        model = load_official(create_model("key-driven-gqa", **settings, kv_heads=3, scheme=scheme), state)
        train(model, 30, 1e-3)
        assert accuracy(model) > best - 0.1, scheme
    other = create_model("key-driven-gqa", **{**settings, "num_classes": 9}, kv_heads=2)
    head = other.head.fc.weight.detach().clone()
    assert torch.equal(load_official(other, state).head.fc.weight, head)


def test_position_tables_of_another_resolution_are_resized() -> None:
    state = skewed(golden("key_driven_kdgqa")["shapes"])
    settings = {**TINY, "kv_heads": 4, "scheme": "kdgqa", "img_size": (12, 24)}
    model = load_official(create_model("key-driven-gqa", **settings), state)
    table = state["pos_embed"]
    assert torch.equal(model.stem.positions[:, :1], table[:, :1])
    image = table[:, 1:].view(1, 4, 4, 24).permute(0, 3, 1, 2)
    want = F.interpolate(image, (3, 6), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(model.stem.positions[:, 1:].data, want)


def test_numbers_that_do_not_fit_are_refused() -> None:
    for name, options, says in (
        ("gqa", {"kv_heads": 4}, "kv_heads=4, heads=6"),
        ("dgqa", {"kv_heads": 4}, "kv_heads=4, heads=6"),
        ("pgqa", {"kv_heads": 5}, "kv_heads=5, heads=6"),
        ("kdgqa", {"kv_heads": 7}, "1..6"),
        ("gqa", {"kv_heads": 0}, "kv_heads must be at least 1, got 0"),
        ("gqa", {"heads": 5}, "heads=5, dim=24"),
        ("dgqa", {"window": 0}, "window must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            create_mixer(name, 24, **{"heads": 6, **options})
    with pytest.raises(ValueError, match=r"scheme must be one of gqa, .*'mqa'"):
        create_model("key-driven-gqa", **TINY, scheme="mqa")
    with pytest.raises(ValueError, match="patch=4, img_size=17x9"):
        create_model("key-driven-gqa", **{**TINY, "img_size": (17, 9)})


@pytest.mark.parametrize("scheme", ["kdgqa", "dgqa_ema"])
def test_allocated_attention_is_exported(scheme: str, tmp_path: Path) -> None:
    model = create_model("key-driven-gqa", **{**TINY, "depth": 1}, kv_heads=3, scheme=scheme).eval()
    certificate = export_onnx(model, torch.randn(2, 1, 16, 16), tmp_path / "m.onnx", dynamic="batch", tolerance=1e-4)
    assert certificate.passed, certificate.reason
