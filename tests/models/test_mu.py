"""mu: equal to the authors' code, cached writing, padding, shared heads, the language-model form, and its twin."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.io import export_onnx
from gossamer.measure import macs, parameters
from gossamer.models import create_model, load_official
from gossamer.models.mu import CrossAttention, decoder_twin, read_all
from gossamer.ops.attention import attention
from gossamer.shrink.masks import keep_members, masked, members
from official import golden, probe, seeded_state

NAME = "mu-encoder-decoder-slm"
SMALL: dict[str, Any] = {"dim": 20, "qkv": 24, "heads": 6, "kv_heads": 3, "hidden": 28, "max_len": 16, "vocab_size": 31}
OFFICIAL: dict[str, dict[str, Any]] = {
    "mu": {**SMALL, "encoder_depth": 2, "decoder_depth": 1},
    "mu_interleaved": {**SMALL, "encoder_depth": 1, "decoder_depth": 2, "interleaved": True},
    "mu_stretched": {
        **SMALL,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "qkv": 32,
        "heads": 4,
        "kv_heads": 2,
        "max_len": 8,
        "stretch": 4.0,
    },
}


def small(**changes: Any) -> Any:
    """A small model whose parameters all do something."""
    model = create_model(NAME, **{**SMALL, "encoder_depth": 2, "decoder_depth": 2, **changes}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def texts(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sources and targets without padding."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 31, (3, 13), generator=g), torch.randint(1, 31, (3, 9), generator=g)


def released(name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    saved = golden(name)
    state = seeded_state(saved["shapes"], dtype)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model = create_model(NAME, **OFFICIAL[name]).to(dtype).eval()
    return load_official(model, state), saved


def written(model: Any, source: Tensor, target: Tensor) -> Tensor:
    """Scores after each target token, step by step."""
    state, scores = model.begin(model.encode(source)), []
    for t in range(target.shape[1]):
        y, state = model.step(target[:, t], state)
        scores.append(y)
    return torch.stack(scores, 1)


# ---- the authors' code ----


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_mu_equals_official(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, saved = released(name, dtype)
    source, target = saved["source"], saved["target"]
    close = {"atol": tolerance, "rtol": tolerance, "check_dtype": False}
    y = model(source, target)
    real = target != 0
    torch.testing.assert_close(y[real], saved["output"][real], **close)
    memory = model.encode(source)
    torch.testing.assert_close(memory.tokens[memory.mask], saved["memory"][source != 0], **close)
    block = model.decoder[0]
    weights = [
        model.stem.words.weight,
        model.encoder[0].mixer.qkv.weight,
        block.cross.kv.weight,
        block.cross.proj.weight,
        block.mixer.qkv.bias,
    ]
    words, self_rows, cross_rows, cross_out, own_bias = torch.autograd.grad(probe(y[real]), weights)
    # Query heads of a file are put together by groups.
    heads, groups, width = block.cross.heads, block.cross.kv_heads, block.cross.head_dim
    order = torch.arange(heads) if model.interleaved else torch.arange(heads).view(-1, groups).t().flatten()
    rows = (order[:, None] * width + torch.arange(width)).flatten()
    torch.testing.assert_close(words, saved["grad_wte"], **close)
    torch.testing.assert_close(self_rows[: len(rows)], saved["grad_encoder_q"][rows], **close)
    torch.testing.assert_close(cross_rows[: groups * width], saved["grad_cross_k"], **close)
    torch.testing.assert_close(cross_out, saved["grad_cross_out"][:, rows], **close)
    torch.testing.assert_close(own_bias[-groups * width :], saved["grad_causal_v"], **close)


@pytest.mark.parametrize("name", OFFICIAL)
def test_cached_writing_draws_the_tokens_the_authors_draw_without_a_cache(name: str) -> None:
    model, saved = released(name, torch.float64)
    source = saved["source"]
    ids = model.generate(source, bos_id=1, eos_id=2, max_new=10)
    assert torch.equal(ids, saved["greedy"])
    torch.manual_seed(5)
    ids = model.generate(source, bos_id=1, eos_id=2, max_new=10, temperature=0.9, top_k=7)
    # Among what was drawn are padding, which is not read from then on, and ends.
    assert torch.equal(ids, saved["drawn"])


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the released mu_330m, as its class makes them."""
    shapes: dict[str, tuple[int, ...]] = {}

    def attention_of(at: str) -> None:
        for part, rows, columns in (("q", 384, 1024), ("k", 192, 1024), ("v", 192, 1024), ("out", 1024, 384)):
            shapes[f"{at}.{part}_linear.weight"], shapes[f"{at}.{part}_linear.bias"] = (rows, columns), (rows,)

    for stack, depth, norms, parts in (("e", 20, 2, ["attn"]), ("h", 10, 3, ["causal_attn", "cross_attn"])):
        for i in range(depth):
            at = f"transformer.{stack}.{i}"
            shapes |= {f"{at}.ln{k + 1}.weight": (1024,) for k in range(norms)}
            for part in parts:
                attention_of(f"{at}.{part}")
            shapes |= {f"{at}.mlp.fc1.weight": (4096, 1024), f"{at}.mlp.fc1.bias": (4096,)}
            shapes |= {f"{at}.mlp.fc2.weight": (1024, 4096), f"{at}.mlp.fc2.bias": (1024,)}
    shapes |= {"transformer.ln_e.weight": (1024,), "transformer.ln_f.weight": (1024,)}
    return shapes | {"transformer.wte.weight": (32128, 1024), "lm_head.weight": (32128, 1024)}


def test_the_released_file_fits_and_has_the_parameters_it_is_said_to_have() -> None:
    shapes = official_shapes()
    assert len(shapes) == 20 * 14 + 10 * 23 + 4
    with torch.device("meta"):
        model = create_model("mu_330m")
        load_official(model, {key: torch.empty(shape) for key, shape in shapes.items()})
        assert parameters(model) == 332_042_240
        with pytest.raises(ValueError, match="does not fit mu_330m: 1 left over"):
            load_official(
                model, {**{k: torch.empty(s) for k, s in shapes.items()}, "transformer.extra": torch.empty(1)}
            )


def test_a_file_as_the_authors_save_it_is_read(tmp_path) -> None:
    model, saved = released("mu", torch.float32)
    state = seeded_state(saved["shapes"])
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save({"model_state_dict": state, "model_config": {"n_head": 6}, "score": 0.5}, tmp_path / "model.pt")
    again = load_official(create_model(NAME, **OFFICIAL["mu"]).eval(), tmp_path / "model.pt")
    assert torch.equal(again(saved["source"], saved["target"]), model(saved["source"], saved["target"]))
    assert again.head.fc.weight is again.stem.words.weight


# ---- the mechanism ----


def test_shifting_the_positions_of_an_encoder_leaves_its_attention_as_it_was() -> None:
    mixer, x = small().encoder[0].mixer, torch.randn(2, 12, 20)
    with torch.no_grad():
        q, k, v = mixer.project(x)
        far_q, far_k, _ = mixer.project(x, start=37)
        assert not torch.allclose(q, far_q, atol=1e-2)
        torch.testing.assert_close(attention(far_q, far_k, v), attention(q, k, v), atol=1e-5, rtol=1e-5)
        # The middle token is not turned at all, and the order of tokens does matter.
        plain = mixer.qkv(x)[:, 5].view(2, 12, 4)[:, :6]
        torch.testing.assert_close(q[:, :, 5], plain)
        assert not torch.allclose(mixer(x.flip(1)).flip(1), mixer(x), atol=1e-3)


def test_cached_writing_equals_the_full_pass_and_reads_the_source_once() -> None:
    model = small()
    source, target = texts()
    source[1, 8:], target[2, 4] = 0, 0
    reads: list[int] = []
    for block in model.decoder:
        block.cross.kv.register_forward_hook(lambda m, i, y: reads.append(y.shape[1]))
    with torch.no_grad():
        steps = written(model, source, target)
        assert reads == [13, 13]
        torch.testing.assert_close(steps, model(source, target), atol=1e-5, rtol=1e-5)


def test_a_grown_base_is_that_of_each_length_in_writing_too() -> None:
    model = small(stretch=4.0, max_len=5)
    source, target = texts()
    with torch.no_grad():
        steps = written(model, source, target)
        for t in range(9):
            torch.testing.assert_close(steps[:, t], model(source, target[:, : t + 1])[:, -1], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(steps[:, 4], model(source, target)[:, 4], atol=1e-4)
    mixer, d = model.encoder[0].mixer, 4
    assert torch.equal(mixer.frequencies_for(5), mixer.frequencies)
    grown = 10000 * (4 * 13 / 5 - 3) ** (d / (d - 2))
    torch.testing.assert_close(mixer.frequencies_for(13), torch.tensor([1.0, grown**-0.5]))


def test_padding_changes_no_score() -> None:
    model = small()
    source, target = texts()
    with torch.no_grad():
        want = model(source, target)
        padded = model(nn.functional.pad(source, (0, 3)), nn.functional.pad(target, (0, 4)))
        torch.testing.assert_close(padded[:, :9], want, atol=1e-5, rtol=1e-5)
        # What stands in place of padding is read.
        other = model(nn.functional.pad(source, (0, 3), value=5), target)
        assert not torch.allclose(other, want, atol=1e-3)
        ended = model.generate(nn.functional.pad(source, (0, 3)), bos_id=1, max_new=6)
        assert torch.equal(ended, model.generate(source, bos_id=1, max_new=6))


def test_as_many_key_heads_as_query_heads_is_plain_attention_and_groups_are_repeated_keys() -> None:
    q, k, v = torch.randn(3, 2, 6, 5, 4).unbind(0)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[0, ..., 3:] = False
    torch.testing.assert_close(read_all(q, k, v, mask), attention(q, k, v, mask=mask))
    few, values = k[:, :3], v[:, :3]
    repeated = (t.repeat_interleave(2, 1) for t in (few, values))
    torch.testing.assert_close(read_all(q, few, values, mask), attention(q, *repeated, mask=mask))


def test_files_of_tiled_and_of_interleaved_heads_differ_by_a_permutation_of_heads() -> None:
    saved = golden("mu")
    state = seeded_state(saved["shapes"])
    state["lm_head.weight"] = state["transformer.wte.weight"]
    settings = OFFICIAL["mu"]
    tiled = load_official(create_model(NAME, **settings).eval(), state)
    grouped = load_official(create_model(NAME, **settings, interleaved=True).eval(), state)
    source, target = saved["source"], saved["target"]
    assert not torch.allclose(tiled(source, target), grouped(source, target), atol=1e-3)
    # Query head h reads group h % 3 of the one, and h // 2 of the other: heads 0 3, 1 4, 2 5 stand together.
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    rows = (order[:, None] * 4 + torch.arange(4)).flatten()
    moved = dict(state)
    for key, value in state.items():
        if ".q_linear." in key:
            moved[key] = value[rows]
        elif key.endswith("out_linear.weight"):
            moved[key] = value[:, rows]
    again = load_official(create_model(NAME, **settings, interleaved=True).eval(), moved)
    torch.testing.assert_close(again(source, target), tiled(source, target))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_heads": 4}, "kv_heads must divide heads; got kv_heads=4, heads=6"),
        ({"qkv": 25}, "heads must divide qkv; got heads=6, qkv=25"),
        ({"stretch": 0.5}, "stretch must be 1 or more"),
        ({"qkv": 12, "stretch": 2.0}, "heads of 4 channels"),
        ({"split": 1}, "split must be at least 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(NAME, **{**SMALL, "encoder_depth": 1, "decoder_depth": 1, **settings})
    source, _ = texts()
    with pytest.raises(ValueError, match="17 tokens long, the model takes 16"):
        small().encode(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="top_k 1 or more"):
        small().generate(source, bos_id=1, temperature=1.0, top_k=0)


def test_writing_ends_where_the_target_does_and_chance_is_the_generators() -> None:
    model = small()
    source, _ = texts()
    free = model.generate(source, bos_id=1, max_new=8, temperature=2.0, generator=torch.Generator().manual_seed(3))
    again = model.generate(source, bos_id=1, max_new=8, temperature=2.0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(free, again)
    assert free.shape == (3, 9)
    end = int(free[0, 3])
    cut = model.generate(source[:1], bos_id=1, eos_id=end, max_new=8, top_k=1, temperature=1.0)
    greedy = model.generate(source[:1], bos_id=1, max_new=8)
    assert torch.equal(cut, greedy[:, : cut.shape[1]])
    starts = torch.tensor([4, 5, 6])
    assert torch.equal(model.generate(source, bos_id=starts, max_new=2)[:, 0], starts)
    assert not model.training
    assert model.train().generate(source, bos_id=1, max_new=1).shape == (3, 2)
    assert model.training


# ---- as a language model ----


def test_no_token_of_a_plain_text_sees_a_later_one_and_the_source_reaches_all_behind_it() -> None:
    model = small(split=6)
    ids, _ = texts()
    with torch.no_grad():
        want = model(ids)
        assert want.shape == (3, 13, 31)
        for t in (2, 6, 9):
            later = ids.clone()
            later[:, t:] = later[:, t:] % 30 + 1
            torch.testing.assert_close(model(later)[:, :t], want[:, :t], atol=1e-5, rtol=1e-5)
            assert not torch.allclose(model(later)[:, t:], want[:, t:], atol=1e-2)
        # Behind the split: the decoder from the last token of the source on, reading the source.
        torch.testing.assert_close(want[:, 5:], model(ids[:, :6], ids[:, 5:]), atol=1e-5, rtol=1e-5)
        # Before it: no memory, so the encoder's weights do not matter.
        nn.init.zeros_(model.encoder_norm.weight)
        torch.testing.assert_close(model(ids)[:, :5], want[:, :5])
        assert not torch.allclose(model(ids)[:, 5:], want[:, 5:], atol=1e-2)
        torch.testing.assert_close(model(ids[:, :4]), want[:, :4], atol=1e-5, rtol=1e-5)


def test_it_learns_as_a_language_model() -> None:
    torch.manual_seed(1)
    model = create_model(NAME, **{**SMALL, "encoder_depth": 1, "decoder_depth": 1, "split": 6, "drop": 0.0})
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    half = torch.randint(1, 31, (64, 6))
    ids = torch.cat((half, half), 1)  # the second half is the first once more
    for _ in range(100):
        scores = model(ids[:, :-1])[:, 5:]
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 6:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 1.5  # chance is log 30 = 3.4


# ---- one of ours ----


def test_masked_heads_and_units_equal_sliced_ones_and_load_again(tmp_path) -> None:
    model = small()
    source, target = texts()
    axes = {axis for _, axis in members(model)}
    assert axes == {"groups", "hidden"}
    masks = {}
    for member, width in members(model).items():
        masks[member] = (torch.rand(width) < 0.6).float()
        masks[member][0] = 1
    with torch.no_grad():
        whole = model(source, target)
        with masked(model, masks):
            want = model(source, target)
        keep_members(model, masks)
        torch.testing.assert_close(model(source, target), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(written(model, source, target), want, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(whole, want, atol=1e-2)
        gossamer.save(model, tmp_path / "m")
        assert torch.equal(gossamer.load(tmp_path / "m")(source, target), model(source, target))


def test_heads_that_nothing_leaves_by_matter_least() -> None:
    cross = CrossAttention(20, heads=6, kv_heads=3, head_dim=4, drop=0.0)
    with torch.no_grad():
        cross.proj.weight[:, 8:16] = 0
    assert int(cross.importance("groups").argmin()) == 1
    with pytest.raises(ValueError, match=r"axis must be one of \['groups'\]"):
        cross.keep("heads", torch.tensor([0]))


@pytest.mark.parametrize(("form", "exporter"), [("pair", "fast"), ("text", "fast"), ("pair", "dynamo")])
def test_both_forms_export_with_a_free_batch(form: str, exporter: str, tmp_path) -> None:
    model = small(split=6, encoder_depth=1, decoder_depth=1)
    source, target = texts()
    source[1, 9:] = 0
    inputs = (source, target) if form == "pair" else (source,)
    second = tuple(x[:1].repeat(5, 1) for x in inputs)
    certificate = export_onnx(model, inputs, tmp_path / "m.onnx", exporter=exporter, second_inputs=second)
    assert certificate.passed, certificate.reason
    assert (certificate.held, certificate.exporter) == ("batch", exporter), certificate.reason


# ---- beside a decoder alone ----


class Next(nn.Module):
    """One token more: what both kinds do for each token they write."""

    def __init__(self, model: Any, states: Any) -> None:
        super().__init__()
        self.model = model
        self.states = states

    def forward(self, ids: Tensor) -> Tensor:
        if hasattr(self.model, "decoder"):
            return self.model.step(ids, self.states)[0]
        x = self.model.stem(ids[:, None])[0][:, 0]
        for block, state in zip(self.model.blocks, self.states, strict=True):
            x, _ = block.step(x, state)
        return self.model.head(self.model.norm(x)[:, None])


def test_its_twin_has_as_many_parameters_and_pays_more_for_each_token_written() -> None:
    with torch.device("meta"):
        model: Any = create_model("mu_330m")
        twin: Any = decoder_twin(model)
        assert abs(parameters(twin) / parameters(model) - 1) < 2e-4
        assert len(twin.blocks) == 30
        source, ids = torch.empty(1, 512, dtype=torch.long), torch.empty(1, dtype=torch.long)
        state = model.begin(model.encode(source))
        _, after = model.step(ids, state)
        past = [tuple(torch.empty(1, 3, 512, 64) for _ in "kv") for _ in twin.blocks]
        grown = [block.step(torch.empty(1, 1024), kept)[1] for block, kept in zip(twin.blocks, past, strict=True)]
        ours, theirs = macs(Next(model, state), ids).total, macs(Next(twin, past), ids).total

    def size(pairs: Any) -> int:
        return sum(t.numel() * 4 for pair in pairs for t in pair)

    assert ours < 0.6 * theirs
    # Bytes of cache for each token written: ten layers of keys and values against thirty; the source costs no more.
    assert size(after.own) - size(state.own) == 10 * 2 * 192 * 4
    assert size(grown) - size(past) == 30 * 2 * 192 * 4
    assert size(after.source.kept) == size(state.source.kept) == 512 * 10 * 2 * 192 * 4
    assert size(after.own) + size(after.source.kept) < size(grown) / 2
