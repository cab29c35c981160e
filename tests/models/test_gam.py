"""GAM: equal to the authors' code, causal, linear in tokens, and blind beyond its convolutions."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import catalogue, measure
from gossamer.models import create_model, load_official
from gossamer.models.registry import rename, system
from official import golden, manifest, probe, seeded_state

TINY = {"dim": 24, "depth": 2, "slots": 11, "drop": 0.0, "vocab_size": 31, "max_len": 17}
SPEC = {"vocab_size": 120, "max_len": 24, "num_classes": 3, "pad_id": 0}


def official_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    state = seeded_state({k: v for k, v in shapes.items() if not k.endswith(".attn.bias")})
    state["head.weight"] = state["token_embedding.weight"]
    return state | {k: torch.ones(v).tril() for k, v in shapes.items() if k.endswith(".attn.bias")}


@pytest.mark.parametrize(
    ("name", "variant", "settings", "key"),
    [
        ("gam", "gam_base", {}, "blocks.0.mixer.bank"),
        ("gam_kernel4", "gam_base", {"kernel": 4}, "blocks.0.mixer.conv.weight"),
        ("gam_transformer", "transformer_baseline", {"heads": 3}, "blocks.1.mixer.qkv.weight"),
    ],
)
def test_logits_loss_and_gradients_equal_the_authors_code(name: str, variant: str, settings: dict, key: str) -> None:
    want = golden(name)
    model = create_model(variant, **{**TINY, **settings}).eval()
    load_official(model, official_state(want["shapes"]))
    assert (model(want["ids"]) - want["logits"]).abs().max() < 1e-4
    model.double()
    logits = model(want["ids"])
    torch.testing.assert_close(logits, want["logits"].double(), atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), want["ids"].roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(want["loss"].item(), rel=1e-5)
    probe(logits).backward()
    own = dict(model.named_parameters())
    for got, expected in (
        (own["stem.words.weight"].grad, want["words_grad"]),
        (own["stem.positions"].grad[0], want["positions_grad"]),
        (own[key].grad, want["weight_grad"]),
    ):
        torch.testing.assert_close(got, expected.double(), atol=1e-4, rtol=1e-5)


def test_the_official_checkpoint_fits_name_for_name() -> None:
    with torch.device("meta"):
        model = create_model("gam_base")
    for variant in manifest("gam").values():
        state = {k: torch.empty(v, device="meta") for k, v in variant["state_dict"]}
        entry = system("gam")
        got = entry.convert(model, rename(state, entry.rules))
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_checkpoint_whose_head_is_not_its_table_is_refused() -> None:
    state = official_state(golden("gam")["shapes"])
    with pytest.raises(ValueError, match=r"head\.weight and token_embedding\.weight"):
        load_official(create_model("gam_base", **TINY), state | {"head.weight": state["head.weight"] + 1})


def test_every_variant_has_its_published_size_and_the_base_its_exact_count() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in create_model(name).parameters()) for name in system("gam").variants}
    assert sizes["gam_base"] == 22_599_680
    for name, size in sizes.items():
        assert size / 1e6 == pytest.approx(catalogue.published(name).params_m, rel=0.01), name


def test_changing_a_token_leaves_the_logits_before_it_unchanged() -> None:
    model = create_model("gam_base", **TINY).eval()
    ids = torch.randint(0, 31, (2, 17))
    before = model(ids)
    ids[:, 9] = (ids[:, 9] + 1) % 31
    after = model(ids)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:11], after[:, 9:11])


def test_a_logit_sees_depth_times_kernel_minus_one_tokens_back_and_no_further() -> None:
    model = create_model("gam_base", **{**TINY, "depth": 3}).eval()
    seen = {}
    model.stem.register_forward_hook(
        lambda _, __, out: seen.update(x=out[0].detach().requires_grad_()) or (seen["x"], None)
    )
    model(torch.randint(0, 31, (1, 17)))[0, 15].sum().backward()
    reach = seen["x"].grad[0].abs().amax(-1)
    assert (reach[:9] == 0).all()
    assert (reach[9:16] > 0).all()
    assert reach[16] == 0


def test_the_table_starts_as_a_linear_layer_so_the_first_loss_is_near_uniform() -> None:
    model = create_model("gam_base", dim=64, depth=2, slots=32, vocab_size=500).eval()
    assert model.stem.words.weight.abs().max() <= 64**-0.5
    ids = torch.randint(0, 500, (4, 64))
    loss = F.cross_entropy(model(ids).flatten(0, 1), torch.randint(0, 500, (256,)))
    assert loss.item() == pytest.approx(torch.tensor(500.0).log().item(), abs=0.6)


def test_a_text_beyond_max_len_is_refused() -> None:
    for settings in (TINY, TINY | {"num_classes": 2}):
        with pytest.raises(ValueError, match="18 tokens long"):
            create_model("gam_base", **settings)(torch.ones(1, 18, dtype=torch.long))


def test_a_language_model_needs_a_causal_mixer() -> None:
    with pytest.raises(ValueError, match="causal form"):
        create_model("gam_base", **TINY, mixer="local")


def test_macs_grow_linearly_with_tokens_and_those_of_attention_do_not() -> None:
    def ratio(name: str) -> float:
        with torch.device("meta"):
            model = create_model(name, dim=32, depth=1, slots=16, heads=4, vocab_size=16, max_len=2048)
        counts = [measure.macs(model, torch.zeros(1, n, dtype=torch.long)).total for n in (1024, 2048)]
        return counts[1] / counts[0]

    assert ratio("gam_base") == pytest.approx(2.0, abs=0.01)
    assert ratio("transformer_baseline") > 2.5


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Steps of a tiny model are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_full_model_learns_characters_better_than_the_memory_alone() -> None:
    text = "the quick brown fox jumps over the lazy dog and runs away from the hound. " * 40
    letters = sorted(set(text))
    data = torch.tensor([letters.index(c) for c in text])

    def loss_of(variant: str) -> float:
        torch.manual_seed(0)
        model = create_model(variant, dim=24, depth=1, slots=12, drop=0.0, vocab_size=len(letters), max_len=32)
        nn.init.zeros_(model.stem.positions)  # the text has no beginning; the paper's N(0, 1) only slows this down
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-2)
        for _ in range(60):
            start = torch.randint(0, len(data) - 33, (8,))
            batch = torch.stack([data[s : s + 33] for s in start.tolist()])
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return loss.item()

    assert loss_of("gam_base") < 0.5 * loss_of("gam_global_only")


def test_the_classifier_ignores_padding_and_the_order_of_far_words_but_not_of_neighbours() -> None:
    model = create_model("gam_base", **TINY, num_classes=3).eval()
    ids = torch.randint(1, 31, (2, 9))
    logits = model(ids)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(model(F.pad(ids, (0, 8))), logits)
    nn.init.zeros_(model.stem.positions)
    swapped = ids.clone()
    swapped[:, 3], swapped[:, 4] = ids[:, 4], ids[:, 3]
    assert not torch.allclose(model(swapped), model(ids), atol=1e-4)


@pytest.mark.parametrize("size", ["xs", "s", "m", "l"])
def test_every_scale_builds_and_costs_more_than_the_one_below(size: str) -> None:
    name, settings = system("gam").scale(SPEC, size)
    with torch.device("meta"):
        model = create_model(name, **settings)
    assert model(torch.ones(2, 24, dtype=torch.long, device="meta")).shape == (2, 3)
