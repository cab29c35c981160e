"""Compact Transformers: equal to the authors' code; their block and pooling; padding of a text changes nothing."""

import pytest
import torch
from torch import nn

from gossamer import catalogue, measure
from gossamer.layers import SequencePool
from gossamer.models import create_model, load_official
from gossamer.models.registry import rename, system
from official import golden, manifest, probe, seeded_input, seeded_state
from pyramids import costs_are_published

SLUG = "compact-transformers"
TINY = {"dim": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
TEXT = {**TINY, "vocab_size": 11, "num_classes": 3}
OFFICIAL = {
    "compact_cct": ("cct_2_3x2_32", {"img_size": 27}, (2, 3, 27, 27), "stem.embed.convs.0.weight"),
    "compact_cct7_sine": ("cct_7_7x2_224_sine", {"img_size": 45}, (2, 3, 45, 45), "blocks.0.mixer.proj.weight"),
    "compact_cvt": ("cvt_2_4_32", {"img_size": 20}, (2, 3, 20, 20), "stem.positions"),
    "compact_vit": ("vit_2_4_32", {"img_size": 20}, (2, 3, 20, 20), "stem.tokens"),
}
OFFICIAL_TEXT = {
    "compact_text_cct": ("text_cct_2", {"max_len": 12, "positions": None}, "blocks.0.mlp.fc1.bias"),
    "compact_text_cct_literal": (
        "text_cct_2",
        {"max_len": 10, "positions": "learned", "official": True},
        "stem.positions",
    ),
    "compact_text_cvt_literal": ("text_cvt_2", {"max_len": 8, "official": True}, "blocks.0.mlp.fc1.bias"),
    "compact_text_vit": ("text_vit_2", {"max_len": 12, "positions": None}, "stem.tokens"),
    "compact_text_transformer_literal": (
        "text_transformer_2",
        {"dim": 300, "max_len": 8, "official": True},
        "stem.tokens",
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_image_models_equal_official(name: str, dtype: torch.dtype, tolerance: float) -> None:
    variant, settings, shape, weight = OFFICIAL[name]
    saved = golden(name)
    model = create_model(variant, **TINY, num_classes=5, **settings)
    load_official(model, seeded_state(saved["shapes"], dtype)).to(dtype).eval()
    x = seeded_input(name, shape).to(dtype).requires_grad_()
    y = model(x)
    probe(y).backward()
    close = {"atol": tolerance, "rtol": tolerance, "check_dtype": False}
    torch.testing.assert_close(y, saved["output"], **close)
    torch.testing.assert_close(x.grad[..., ::7, ::7], saved["input_grad"], **close)
    torch.testing.assert_close(model.get_parameter(weight).grad, saved["weight_grad"], **close)


@pytest.mark.parametrize("name", OFFICIAL_TEXT)
def test_text_models_equal_official_where_it_runs(name: str) -> None:
    variant, settings, weight = OFFICIAL_TEXT[name]
    saved = golden(name)
    model = create_model(variant, **{**TEXT, **settings})
    load_official(model, seeded_state(saved["shapes"], torch.float64)).double().eval()
    y = model(saved["input"])
    probe(y).backward()
    close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(y, saved["output"], **close)
    torch.testing.assert_close(model.get_parameter(weight).grad, saved["weight_grad"], **close)


def test_every_official_checkpoint_fits() -> None:
    entry = system(SLUG)
    for name, record in manifest(SLUG).items():
        variant, text = name.split()[0], "(" in name
        settings = {"vocab_size": 1000, "num_classes": 4} if text else {}
        with torch.device("meta"):
            model = create_model(variant, **settings)
        state = {key: torch.empty(shape, device="meta") for key, shape in record["state_dict"]}
        state = entry.convert(model, rename(state, entry.rules))
        own = {key: value.shape for key, value in model.state_dict().items()}
        assert {key: value.shape for key, value in state.items()} == own, name
        # Text tables have no row for padding here.
        count = sum(p.numel() for p in model.parameters())
        assert count == pytest.approx(record["parameters"], abs=300 if text else 0), name


@pytest.mark.parametrize("name", [row.name for row in catalogue.find(SLUG).published])
def test_costs_are_those_published(name: str) -> None:
    costs_are_published(name, params=0.002, macs=0.011)


def test_macs_of_cct_14_with_and_without_attention_products_are_the_papers() -> None:
    with torch.device("meta"):
        model, image = create_model("cct_14_7x2_224").eval(), torch.empty(1, 3, 224, 224)
        count = measure.macs(model, (image,))
    products = 14 * 2 * 196 * 196 * 384
    assert count.total / 1e9 == pytest.approx(5.52, abs=0.01)
    assert (count.total - products) / 1e9 == pytest.approx(5.11, abs=0.01)


@pytest.mark.parametrize(
    ("name", "side", "tokens"),
    [("cct_7_3x1_32", 32, 256), ("cct_7_3x2_32", 32, 64), ("cct_7_7x2_224", 224, 196), ("cct_14_7x2_384", 384, 576)],
)
def test_token_counts(name: str, side: int, tokens: int) -> None:
    model = create_model(name, depth=1, dim=24)
    found, _ = model.stem(torch.zeros(1, 3, side, side))
    assert found.flatten(1, -2).shape[1] == tokens


def test_without_a_position_table_any_image_runs_and_with_one_no_other() -> None:
    free = create_model("cct_7_7x2_224", **TINY, positions=None)
    assert free(torch.randn(1, 3, 250, 190)).shape == (1, 102)
    assert free.features(torch.randn(1, 3, 250, 190))[0].shape == (1, 16, 12, 32)
    bound = create_model("cct_7_7x2_224", **TINY)
    with pytest.raises(ValueError, match="img_size"):
        bound(torch.randn(1, 3, 250, 250))


def test_a_block_normalises_the_stream_before_its_second_branch() -> None:
    block = create_model("cct_2_3x2_32", **TINY).eval().blocks[0]
    x = torch.randn(2, 5, 5, 32)
    attend, mlp, norm1, norm2 = block.mixer, block.mlp, block.norm1, block.norm2
    q, k, v = (norm1(x).flatten(1, 2) @ attend.qkv.weight.T).view(2, 25, 3, 2, 16).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / 4).softmax(-1)
    a = x + attend.proj((weights @ v).transpose(1, 2).flatten(2)).view(x.shape)
    b = norm2(a)
    expected = b + mlp.fc2(nn.functional.gelu(mlp.fc1(b)))
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=1e-5)
    usual = a + mlp.fc2(nn.functional.gelu(mlp.fc1(norm2(a))))
    assert (block(x) - usual).abs().max() > 0.1


def test_sequence_pooling_lies_between_the_mean_and_one_token() -> None:
    pool = SequencePool(8)
    x = torch.randn(2, 6, 8)
    nn.init.zeros_(pool.score.weight)
    torch.testing.assert_close(pool(x), x.mean(1), rtol=0, atol=1e-7)
    nn.init.constant_(pool.score.weight, 1e4)
    best = x.sum(-1).argmax(1)
    torch.testing.assert_close(pool(x), x[torch.arange(2), best])


def test_a_learned_table_is_resized_on_loading_and_kept_where_the_grid_is_the_same() -> None:
    state = seeded_state(golden("compact_cct")["shapes"])
    same = load_official(create_model("cct_2_3x2_32", **TINY, num_classes=5, img_size=27), state)
    assert torch.equal(same.stem.positions, state["classifier.positional_emb"])
    other = load_official(create_model("cct_2_3x2_32", **TINY, num_classes=5, img_size=(40, 27)), state)
    table = state["classifier.positional_emb"].view(1, 7, 7, 32).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(table, (10, 7), mode="bilinear").permute(0, 2, 3, 1).reshape(1, 70, 32)
    torch.testing.assert_close(other.stem.positions.data, expected)


def test_a_sinusoid_table_is_rebuilt_and_not_trained() -> None:
    state = seeded_state(golden("compact_cct7_sine")["shapes"])
    model = create_model("cct_7_7x2_224_sine", **TINY, num_classes=5, img_size=45)
    table = model.stem.positions.clone()
    load_official(model, state)
    assert torch.equal(model.stem.positions, table)
    assert not model.stem.positions.requires_grad


@pytest.mark.parametrize("name", ["text_cct_2", "text_cvt_2", "text_vit_2", "text_transformer_2"])
@pytest.mark.parametrize("words", [1, 4, 5, 13])
def test_padding_appended_to_a_text_changes_nothing(name: str, words: int) -> None:
    settings = {**TEXT, "max_len": 16, "positions": "learned", "pad_id": 3}
    if name == "text_transformer_2":
        settings["word_dim"] = 32
    model = create_model(name, **settings).eval()
    nn.init.normal_(model.stem.words.weight)  # the padding row too: it must not be read
    nn.init.normal_(model.head.fc.weight)
    ids = torch.randint(4, 11, (2, words))
    padded = nn.functional.pad(ids, (0, 16 - words), value=3)
    tokens, mask = model.encode(ids)
    longer, longer_mask = model.encode(padded)
    assert mask.shape == tokens.shape[:2]
    assert longer_mask.shape == longer.shape[:2]
    torch.testing.assert_close(longer[longer_mask], tokens[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(padded), model(ids), atol=1e-5, rtol=1e-5)
    assert (model(padded) - model(nn.functional.pad(ids, (0, 16 - words), value=5))).abs().max() > 1e-3


def test_the_literal_text_form_runs_only_one_token_too_long() -> None:
    literal = create_model("text_cct_2", **TEXT, max_len=10, official=True)
    with pytest.raises(ValueError, match="all 7 rows"):
        literal(torch.ones(1, 10, dtype=torch.long))
    assert literal(torch.ones(1, 12, dtype=torch.long)).shape == (1, 3)
    intended = create_model("text_cct_2", **TEXT, max_len=10)
    with pytest.raises(ValueError, match="max_len"):
        intended(torch.ones(1, 12, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cvt_2_4_32", "img_size": 30}, "kernel=4, img_size=\\(30, 30\\)"),
        ({"name": "vit_2_4_32", "img_size": (32, 33)}, "kernel"),
        ({"name": "cct_2_3x2_32", "heads": 3}, "heads must divide dim"),
        ({"name": "text_vit_2", "max_len": 30}, "max_len=30"),
        ({"name": "cct_2_3x2_32", "family": "transformer"}, "vocab_size"),
        ({"name": "cvt_2_4_32", "convs": 2}, "convs"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**settings)


@pytest.mark.parametrize("mixer", ["pool", "window", "identity"])
def test_another_mixer_takes_attentions_place(mixer: str) -> None:
    model = create_model("cct_2_3x2_32", **TINY, mixer=mixer)
    assert model.blocks[0].mixer.name == mixer
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("size", ["xs", "l"])
def test_scaled_text_models_read_any_length(size: str) -> None:
    for length in (3, 64, 301):
        spec = {"vocab_size": 50, "max_len": length, "num_classes": 2, "pad_id": 0}
        name, settings = system(SLUG).scale(spec, size)
        model = create_model(name, **settings)
        assert model(torch.randint(0, 50, (2, length))).shape == (2, 2)


def test_convolutional_tokens_learn_faster_than_patches() -> None:
    """Some steps on ten classes of oriented stripes, the same for both."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.arange(10) * torch.pi / 10
    ramp = torch.arange(32.0)
    wave = angle.cos()[:, None, None] * ramp[None, :, None] + angle.sin()[:, None, None] * ramp[None, None, :]

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(10, (count,), generator=generator)
        phase = torch.rand(count, 1, 1, generator=generator) * 6.28
        noise = 0.9 * torch.randn(count, 3, 32, 32, generator=generator)
        return (wave[y] * 0.9 + phase).sin()[:, None] + noise, y

    accuracy = {}
    for name in ("cct_2_3x2_32", "vit_2_4_32"):
        torch.manual_seed(0)
        model = create_model(name, dim=32, hidden=16)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        generator.manual_seed(1)
        for _ in range(25):
            x, y = draw(32)
            loss = nn.functional.cross_entropy(model(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        x, y = draw(300)
        with torch.no_grad():
            accuracy[name] = (model.eval()(x).argmax(1) == y).double().mean().item()
    assert accuracy["cct_2_3x2_32"] > accuracy["vit_2_4_32"] + 0.15
