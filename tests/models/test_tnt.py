"""TNT: equal to the authors' code, patches see each other as sentences alone, words add little and see fine texture."""

import pytest
import torch
from torch import Tensor, nn

from gossamer import catalogue, measure
from gossamer.io import export_onnx
from gossamer.layers import Classifier
from gossamer.models import create_model, load_official
from gossamer.models.registry import rename, system
from gossamer.models.tnt import WordEmbed
from gossamer.trunks import Isotropic
from official import golden, manifest, seeded_state
from pyramids import costs_are_published, equals_official

SLUG = "tnt"
TINY = {"inner_dim": 8, "outer_dim": 24, "depth": 2, "inner_heads": 2, "outer_heads": 3, "num_classes": 7}
PLAIN = {**TINY, "img_size": (16, 24), "patch": 8, "stride": 2}
OFFICIAL = {
    "tnt": (PLAIN, (2, 3, 16, 24), "blocks.1.proj.weight"),
    "tnt_odd": (
        {**TINY, "img_size": (18, 27), "patch": 9, "stride": 3, "in_chans": 4},
        (2, 4, 18, 27),
        "patch_embed.proj.weight",
    ),
}


def tiny() -> nn.Module:
    return load_official(create_model(SLUG, **PLAIN), seeded_state(golden("tnt")["shapes"])).eval()


@pytest.mark.parametrize("name", OFFICIAL)
def test_tnt_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, SLUG, settings, shape, key)


def test_every_official_checkpoint_fits() -> None:
    entry = system(SLUG)
    for name, record in manifest(SLUG).items():
        with torch.device("meta"):
            model = create_model(name)
        shapes = dict(record["state_dict"])
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        state = entry.convert(model, rename(state, entry.rules))
        own = {key: value.shape for key, value in model.state_dict().items()}
        assert {key: value.shape for key, value in state.items()} == own
        unread = torch.Size(shapes["outer_tokens"]).numel()
        assert sum(p.numel() for p in model.parameters()) + unread == record["parameters"]


@pytest.mark.parametrize("name", [row.name for row in catalogue.find(SLUG).published])
def test_costs_are_those_published(name: str) -> None:
    costs_are_published(name, params=0.01, macs=0.02)


def test_words_are_those_of_a_patch_alone_in_zeros_and_a_plain_convolution_differs_at_its_borders() -> None:
    embed = WordEmbed(3, 8, 16, 4)
    image = torch.randn(2, 3, 48, 32)
    words = embed(image)
    assert words.shape == (2 * 6, 16, 8)
    # The patch in row 1, column 1, of the second image.
    alone = torch.zeros(1, 3, 48, 32)
    alone[..., 16:32, 16:32] = image[1:, :, 16:32, 16:32]
    place = (0, slice(None), slice(4, 8), slice(4, 8))
    want = embed.proj(alone)[place].flatten(1).T
    torch.testing.assert_close(words[6 + 3], want)
    plain = embed.proj(image[1:])[place].flatten(1).T
    apart = (words[6 + 3] - plain).abs().amax(1).view(4, 4)
    # With stride 4 only the words of the first row and column look out of their patch.
    assert apart[1:, 1:].max() < 1e-5
    assert apart[0].min() > 1e-3
    assert apart[:, 0].min() > 1e-3


def test_silent_words_leave_a_plain_vit() -> None:
    model = tiny()
    x = torch.randn(2, 3, 16, 24)
    for block in model.blocks:
        nn.init.zeros_(block.join.proj.weight)
        nn.init.zeros_(block.join.norm2.bias)

    class Stem(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, None]:
            sentences = model.join(model.embed(image) + model.inner_positions).unflatten(0, (2, 6))
            return torch.cat((model.token.expand(2, -1, -1), sentences), 1) + model.outer_positions, None

    vit = Isotropic(
        Stem(), [block.outer for block in model.blocks], norm=model.head.norm, head=Classifier(24, 7, pool="token")
    )
    vit.head.fc = model.head.fc
    torch.testing.assert_close(model(x), vit(x), atol=1e-5, rtol=1e-5)
    nn.init.normal_(model.blocks[0].inner.mlp.fc2.weight)
    torch.testing.assert_close(model(x), vit(x), atol=1e-5, rtol=1e-5)
    assert (tiny()(x) - vit(x)).abs().max() > 0.01


def test_patches_permuted_with_their_positions_permute_the_sentences() -> None:
    model, other = tiny(), tiny()
    x = torch.randn(1, 3, 16, 24)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    patches = x.unflatten(3, (3, 8)).unflatten(2, (2, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    moved = patches.unflatten(1, (2, 3)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    with torch.no_grad():
        other.outer_positions[:, 1:] = model.outer_positions[:, 1:][:, order]
    one, two = model.encode(x), other.encode(moved)
    torch.testing.assert_close(two[:, 1:], one[:, 1:][:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(two[:, 0], one[:, 0], atol=1e-5, rtol=1e-5)


def test_words_of_one_patch_never_read_those_of_another_and_never_write_the_class_token() -> None:
    block = tiny().blocks[0]
    sentences, words = torch.randn(2, 7, 24), torch.randn(2 * 6, 16, 8, requires_grad=True)
    block.outer = nn.Identity()
    after, told = block(sentences, words)
    assert torch.equal(after[:, 0], sentences[:, 0])
    reach = torch.autograd.grad(told[4].sum(), words, retain_graph=True)[0].abs().sum((1, 2)) > 0
    assert reach.nonzero().flatten().tolist() == [4]
    reach = torch.autograd.grad(after[1, 3].sum() + after[:, 0].sum(), words)[0].abs().sum((1, 2)) > 0
    # Sentence 3 of the second image is its third patch.
    assert reach.nonzero().flatten().tolist() == [6 + 2]


def macs(model: nn.Module, *shape: int) -> int:
    return measure.macs(model.to("meta").eval(), (torch.empty(shape, device="meta"),)).total


def test_words_cost_little_and_linearly_with_patches() -> None:
    with torch.device("meta"):
        words = create_model("tnt_s").blocks[0].inner
        assert macs(words, 4 * 196, 16, 24) == 4 * macs(words, 196, 16, 24)
        whole, sentences = create_model("tnt_s"), create_model("vit_small_patch16_224")
        share = 1 - macs(sentences, 1, 3, 224, 224) / macs(whole, 1, 3, 224, 224)
    assert 0.05 < share < 0.15


def test_drop_path_falls_on_words_by_patch_and_never_on_what_they_tell() -> None:
    torch.manual_seed(0)
    block = create_model(SLUG, **PLAIN, drop_path=0.9).train().blocks[1]
    sentences, words = torch.randn(40, 7, 24), torch.randn(40 * 6, 16, 8)
    after, told = block(sentences, words)
    kept = (told == words).flatten(1).all(1).view(40, 6)
    # Both branches of a patch's words are dropped with probability 0.81, each patch for itself.
    assert 0.7 < kept.double().mean().item() < 0.9
    assert bool((kept.any(1) & ~kept.all(1)).any())
    untouched = sentences[:, 1:] + block.join(told).unflatten(0, (40, -1))
    dropped = (after[:, 1:] == untouched).flatten(1).all(1)
    assert 0.6 < dropped.double().mean().item() < 0.95


def striped(count: int) -> tuple[Tensor, Tensor]:
    """Images of 64 cells of 4x4 pixels, stripes lying or standing, light or dark first; whether more of them lie."""
    label = torch.randint(0, 2, (count,))
    share = 0.5 + (2 * label - 1) * (0.05 + 0.3 * torch.rand(count))
    lying = torch.rand(count, 8, 8) < share[:, None, None]
    stripe = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(4, 4)
    cells = torch.where(lying[..., None, None], stripe, stripe.T) * (2 * torch.randint(0, 2, (count, 8, 8, 1, 1)) - 1)
    image = cells.movedim(3, 2).reshape(count, 1, 32, 32)
    return image + 0.5 * torch.randn_like(image), label


def learns_stripes(name: str, **settings: int) -> tuple[float, nn.Module]:
    """Accuracy on new images after 200 steps on 1,000 images, and the model."""
    torch.manual_seed(0)
    (images, labels), (new, truth) = striped(1000), striped(1000)
    model = create_model(name, depth=2, patch=16, img_size=32, in_chans=1, num_classes=2, **settings)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1, (step + 1) / 20))
    for _ in range(200):
        some = torch.randint(0, len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[some]), labels[some])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        warm.step()
    model.eval()
    with torch.no_grad():
        return (model(new).argmax(1) == truth).double().mean().item(), model


def test_texture_finer_than_a_patch_is_learnt_sooner_than_by_a_vit_of_equal_parameters_or_of_more_cost() -> None:
    words, model = learns_stripes("tnt", inner_dim=12, outer_dim=48, inner_heads=2, outer_heads=3)
    plain, equal = learns_stripes("vit_tiny_patch16_224", dim=56, heads=4)
    wide, costly = learns_stripes("vit_tiny_patch16_224", dim=96, heads=4)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, equal)]
    assert sizes[0] <= sizes[1] <= 1.1 * sizes[0]
    assert macs(costly, 1, 1, 32, 32) > macs(model, 1, 1, 32, 32)
    assert words > 0.9
    assert max(plain, wide) < words - 0.06


def test_weights_of_another_resolution_load_with_a_resized_table() -> None:
    model = create_model(SLUG, **{**PLAIN, "img_size": (40, 24)})
    square = create_model(SLUG, **{**PLAIN, "img_size": 24})
    official = seeded_state({**golden("tnt")["shapes"], "outer_pos": [1, 10, 24], "outer_tokens": [1, 9, 24]})
    load_official(square, official)
    load_official(model, official)
    assert torch.equal(model.inner_positions, official["inner_pos"])
    assert torch.equal(square.outer_positions, official["outer_pos"])
    image = official["outer_pos"][:, 1:].unflatten(1, (3, 3)).movedim(-1, 1)
    want = nn.functional.interpolate(image, (5, 3), mode="bicubic").movedim(1, -1).flatten(1, 2)
    torch.testing.assert_close(model.outer_positions.data, torch.cat((official["outer_pos"][:, :1], want), 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": 60}, "patch=8, img_size=60x60"),
        ({"stride": 3}, "stride must divide patch; got stride=3, patch=8"),
        ({"inner_heads": 3}, "heads must divide dim"),
        ({"outer_heads": 5}, "heads must divide dim"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(SLUG, **{**PLAIN, **settings})
    with pytest.raises(ValueError, match=r"16x24 images, got 24x24"):
        tiny()(torch.randn(1, 3, 24, 24))


def test_padding_adds_zeros_below_and_to_the_right() -> None:
    model = create_model(SLUG, **{**PLAIN, "img_size": (13, 23)}, pad=True).eval()
    x = torch.randn(1, 3, 13, 23)
    whole = create_model(SLUG, **PLAIN).eval()
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), whole(nn.functional.pad(x, (0, 1, 0, 3))))
    assert model.features(x)[0].shape == (1, 2, 3, 24)


def test_an_exported_tnt_agrees_for_every_batch_size(tmp_path) -> None:
    certificate = export_onnx(tiny(), torch.randn(2, 3, 16, 24), tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
