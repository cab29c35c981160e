"""CrossViT: equal to the authors' code, fusion is one query that changes the class token alone, branches else apart."""

import pytest
import torch
from torch import Tensor, nn

from gossamer import catalogue, measure
from gossamer.io import export_onnx
from gossamer.layers import Classifier
from gossamer.models import create_model, load_official
from gossamer.models.crossvit import Fusion
from gossamer.models.registry import rename, system
from gossamer.trunks import Isotropic
from official import golden, manifest, seeded_state
from pyramids import costs_are_published, equals_official, manifest_fits

SLUG = "crossvit"
TINY = {"dims": (16, 24), "heads": (2, 3), "depths": (1, 2), "blocks": 2, "mlp_ratio": 2.0, "num_classes": 7}
PLAIN = {**TINY, "img_size": 60, "patches": (12, 8)}
OFFICIAL = {
    "crossvit": (PLAIN, (2, 3, 60, 60), "blocks.0.fusion.0.attn.proj.weight"),
    # Neither branch reads this image as it is.
    "crossvit_dagger": ({**TINY, "img_size": 36, "conv_stem": True}, (2, 3, 47, 33), "patch_embed.0.proj.2.weight"),
}


def tiny() -> nn.Module:
    model = create_model(SLUG, **PLAIN)
    return load_official(model, seeded_state(golden("crossvit")["shapes"])).eval()


@pytest.mark.parametrize("name", OFFICIAL)
def test_crossvit_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, SLUG, settings, shape, key)


def test_every_official_checkpoint_fits() -> None:
    for name in manifest(SLUG):
        manifest_fits(SLUG, name)


def test_names_that_timm_gives_to_tokens_and_positions_are_read_too() -> None:
    entry = system(SLUG)
    keys = ["cls_token_0", "pos_embed_1", "cls_token.1", "pos_embed.0"]
    own = rename(dict.fromkeys(keys, torch.empty(0)), entry.rules)
    assert list(own) == ["stems.0.tokens", "stems.1.positions", "stems.1.tokens", "stems.0.positions"]


@pytest.mark.parametrize("name", [row.name for row in catalogue.find(SLUG).published])
def test_costs_are_those_published(name: str) -> None:
    costs_are_published(name, params=0.001, macs=0.01)


def test_one_query_equals_the_first_row_of_full_attention_at_a_cost_linear_in_tokens() -> None:
    fusion = Fusion(16, 24, 3)
    token, patches = torch.randn(2, 1, 16), torch.randn(2, 11, 24)
    visitor = fusion.enter(token)
    full = visitor + fusion.mixer(fusion.norm(torch.cat((visitor, patches), 1)))[:, :1]
    torch.testing.assert_close(fusion(token, patches), fusion.leave(full), atol=1e-6, rtol=1e-5)

    def macs(module: nn.Module, *inputs: Tensor) -> int:
        return measure.macs(module.to("meta").eval(), tuple(x.to("meta") for x in inputs)).total

    one, four = (macs(fusion, token, torch.empty(2, n, 24)) for n in (1000, 4000))
    assert four / one == pytest.approx(4, rel=0.02)
    one, four = (macs(fusion.mixer, torch.empty(2, n, 24)) for n in (1000, 4000))
    assert four / one > 12


def test_without_fusion_each_branch_is_a_vit_and_the_logits_are_the_mean_of_their_two() -> None:
    model = tiny()
    x = torch.randn(2, 3, 60, 60)
    logits = []
    for i, image in enumerate((x, nn.functional.interpolate(x, (56, 56), mode="bicubic"))):
        blocks = [block for stage in model.blocks for block in stage.encoders[i]]
        vit = Isotropic(model.stems[i], blocks, norm=model.heads[i].norm, head=Classifier((16, 24)[i], 7, pool="token"))
        vit.head.fc = model.heads[i].fc
        logits.append(vit(image))
    for stage in model.blocks:
        stage.forward = lambda small, large, stage=stage: (stage.encoders[0](small), stage.encoders[1](large))
    torch.testing.assert_close(model(x), (logits[0] + logits[1]) / 2, atol=1e-5, rtol=1e-5)
    assert (tiny()(x) - model(x)).abs().max() > 0.01


def test_fusion_changes_the_class_tokens_and_no_patch() -> None:
    model = tiny()
    small, large = model.stems[0](torch.randn(1, 3, 60, 60))[0], model.stems[1](torch.randn(1, 3, 56, 56))[0]
    stage = model.blocks[0]
    before, after = (stage.encoders[0](small), stage.encoders[1](large)), stage(small, large)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, 1:], b[:, 1:])
        assert (a[:, 0] - b[:, 0]).abs().max() > 0.01


def test_both_directions_read_what_the_encoders_gave() -> None:
    stage = tiny().blocks[0]
    small, large = torch.randn(1, 26, 16), torch.randn(1, 50, 24)
    after = stage(small, large)[1]
    a, b = stage.encoders[0](small), stage.encoders[1](large)
    torch.testing.assert_close(after[:, :1], stage.fusions[1](b[:, :1], a[:, 1:]))


def test_the_small_branch_speaks_to_the_large_one_only_through_the_fusion() -> None:
    model = tiny()
    large = model.stems[1](torch.randn(1, 3, 56, 56))[0]
    one, two = (model.stems[0](torch.randn(1, 3, 60, 60))[0] for _ in range(2))
    stage = model.blocks[0]
    before: list[Tensor] = []
    hook = stage.encoders[1].register_forward_hook(lambda *given: before.append(given[2]))
    after = [stage(small, large)[1] for small in (one, two)]
    hook.remove()
    # What the classifier of the large branch would say ahead of the fusion, and behind it.
    for given, differ in ((before, False), (after, True)):
        logits = [model.heads[1](x) for x in given]
        assert ((logits[0] - logits[1]).abs().max() > 1e-3) == differ
    assert torch.equal(before[0], before[1])
    assert torch.equal(after[0][:, 1:], after[1][:, 1:])
    # After one more block the news has reached every patch.
    reached = model.blocks[1](*stage(one, large))[1] - model.blocks[1](*stage(two, large))[1]
    assert bool((reached.abs().amax(-1) > 1e-6).all())


def test_a_class_token_keeps_nothing_of_its_old_self_but_what_its_visit_carried() -> None:
    fusion = tiny().blocks[0].fusions[0]
    nn.init.zeros_(fusion.enter[2].weight)
    patches = torch.randn(1, 9, 24)
    torch.testing.assert_close(fusion(torch.randn(1, 1, 16), patches), fusion(torch.randn(1, 1, 16), patches))


def test_what_is_joined_from_both_branches_is_learnt_through_the_fusion_alone() -> None:
    """The label is whether a bit only one branch sees equals a bit only the other sees."""
    loss = {}
    for fused in (True, False):
        torch.manual_seed(0)
        model = create_model(SLUG, **{**TINY, "num_classes": 2}, img_size=16, patches=(4, 8))
        if not fused:
            for stage in model.blocks:
                stage.forward = lambda a, b, stage=stage: (stage.encoders[0](a), stage.encoders[1](b))
        optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(60):
            bits = torch.randint(2, (2, 32))
            images = [torch.randn(32, 3, 16, 16) * 0.1 + (2.0 * b - 1)[:, None, None, None] for b in bits]
            branches = [stem(image)[0] for stem, image in zip(model.stems, images, strict=True)]
            for stage in model.blocks:
                branches = stage(*branches)
            logits = sum(head(x) for head, x in zip(model.heads, branches, strict=True)) / 2
            error = nn.functional.cross_entropy(logits, (bits[0] == bits[1]).long())
            optimiser.zero_grad()
            error.backward()
            optimiser.step()
        loss[fused] = error.item()
    assert loss[True] < 0.2
    assert loss[False] > 0.5


def test_other_images_are_resized_by_each_branch_for_itself() -> None:
    model = tiny()
    assert model.sizes == ((60, 60), (56, 56))
    x = torch.randn(1, 3, 31, 83)
    expected = [nn.functional.interpolate(x, size, mode="bicubic") for size in model.sizes]
    seen: list[Tensor] = []
    for stem in model.stems:
        stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    maps = model.features(x)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert [tuple(m.shape) for m in maps] == [(1, 5, 5, 16), (1, 7, 7, 24)]
    wide = create_model(SLUG, **TINY, img_size=(120, 240))
    assert wide.sizes == ((120, 240), (112, 224))
    assert [tuple(m.shape[1:3]) for m in wide.features(torch.randn(1, 3, 120, 240))] == [(10, 20), (7, 14)]
    assert create_model("crossvit_15_dagger_384", **{**TINY, "num_classes": 0}).sizes == ((408, 408), (384, 384))


def test_weights_of_another_resolution_load_with_resized_tables() -> None:
    state = seeded_state(golden("crossvit")["shapes"])
    other = load_official(create_model(SLUG, **{**PLAIN, "img_size": (72, 60)}), state)
    assert other.sizes == ((72, 60), (64, 56))
    for i, (side, grid) in enumerate(((5, (6, 5)), (7, (8, 7)))):
        table = state[f"pos_embed.{i}"]
        image = table[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)
        want = nn.functional.interpolate(image, grid, mode="bicubic").movedim(1, -1).flatten(1, 2)
        torch.testing.assert_close(other.stems[i].positions.data, torch.cat((table[:, :1], want), 1))


def test_drop_path_rates_of_a_multi_scale_block_are_its_slice_of_one_line() -> None:
    model = create_model(SLUG, **{**TINY, "depths": (1, 3), "blocks": 3}, drop_path=0.8, img_size=60)
    line = torch.linspace(0, 0.8, 9).tolist()
    for k, stage in enumerate(model.blocks):
        mine = line[3 * k : 3 * k + 3]
        rates = [[b.drop_path.rate if b.drop_path else 0.0 for b in blocks] for blocks in stage.encoders]
        assert rates == [pytest.approx(mine[:1]), pytest.approx(mine)]
        assert [f.drop_path.rate for f in stage.fusions] == pytest.approx([mine[-1]] * 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": (16, 24, 32)}, "dims must have one entry for each of the two branches"),
        ({"heads": (4,)}, "heads must have"),
        ({"heads": (5, 3)}, "heads must divide dim"),
        ({"depths": (0, 0)}, r"depths must have an encoder block .* got \(0, 0\)"),
        ({"patches": (8, 16), "conv_stem": True}, "12 or 16 pixels, got patch=8"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(SLUG, **{**TINY, **settings})
    with pytest.raises(ValueError, match=r"3 channels \(in_chans\), got 4"):
        tiny()(torch.randn(1, 4, 60, 60))


def test_without_classes_the_class_tokens_of_both_branches_come_out() -> None:
    model = create_model(SLUG, **{**PLAIN, "num_classes": 0}).eval()
    x = torch.randn(2, 3, 60, 60)
    small, large = model.encode(x)
    want = torch.cat((model.heads[0].norm(small[:, 0]), model.heads[1].norm(large[:, 0])), 1)
    torch.testing.assert_close(model(x), want)


def test_an_exported_crossvit_agrees_for_every_batch_size(tmp_path) -> None:
    certificate = export_onnx(tiny(), torch.randn(2, 3, 47, 50), tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
