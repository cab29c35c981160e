"""Wide attention: sizes by the identity of the paper, heads that add up, heads in groups, and what each head does."""

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import measure
from gossamer.mixers.heads import HeadMixer
from gossamer.models import create_model
from gossamer.models.registry import system
from gossamer.models.wide_attention import head_effects, head_maps

TEN = ("attention", "bigbird", "linear", "linformer", "local", "longformer", "performer", "sinkhorn", "sparse",
       "synthesizer")  # fmt: skip
TINY = {"vocab_size": 50, "max_len": 40, "num_classes": 3}
FAMILIES = {
    family: [name for name in system("wide-attention").variants if name.startswith(family)]
    for family in ("wide_imdb", "wide_listops", "wide_matching", "wide_cpu_small")
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps of a tiny model are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def texts() -> Tensor:
    ids = torch.randint(1, 50, (3, 37))
    ids[1, 20:] = 0
    return ids


def same_texts() -> Tensor:
    return torch.randint(1, 50, (3, 37), generator=torch.Generator().manual_seed(1))


def on_meta(name: str, **settings) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **settings)


def attention_size(model: nn.Module) -> int:
    return sum(p.numel() for m in model.modules() if isinstance(m, HeadMixer) for p in m.parameters())


def test_sizes_without_embeddings_and_head_are_those_of_the_card() -> None:
    sizes = {n: sum(p.numel() for p in on_meta(n).blocks.parameters()) for n in FAMILIES["wide_imdb"]}
    assert sizes["wide_imdb_6_8"] == 18_902_016
    assert sizes["wide_imdb_1_48"] == 8_393_216
    assert [sizes[n] for n in FAMILIES["wide_imdb"]] == sorted(sizes.values(), reverse=True)


@pytest.mark.parametrize("mixer", ["attention", "bigbird", "linear", "local", "performer", "sparse", "sinkhorn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_has_the_same_size_at_every_ratio(mixer: str, family: str) -> None:
    models = [on_meta(name, mixer=mixer) for name in FAMILIES[family]]
    sizes = {attention_size(m) for m in models}
    assert len(sizes) == 1
    dim, width, heads = {"wide_imdb": (512, 64, 48), "wide_listops": (512, 64, 48), "wide_matching": (128, 32, 16),
                         "wide_cpu_small": (64, 16, 8)}[family]  # fmt: skip
    if mixer != "sinkhorn":  # it has tables, of equal size for every head
        assert sizes == {4 * dim * width * heads}


def test_the_attentions_bound_to_a_length_have_the_sizes_the_paper_counts() -> None:
    for name in FAMILIES["wide_cpu_small"]:
        layers, heads = (int(part) for part in name.split("_")[-2:])
        core = 64 * 16 * 8
        assert attention_size(on_meta(name, mixer="longformer")) == 7 * core
        assert attention_size(on_meta(name, mixer="linformer")) == 4 * core + layers * 1001 * 16
        assert attention_size(on_meta(name, mixer="synthesizer")) == 4 * core + layers * heads * 1001**2


def test_macs_of_attention_do_not_depend_on_the_ratio_and_the_total_falls_with_the_layers() -> None:
    total, inside = [], []
    for name in FAMILIES["wide_cpu_small"]:
        model = on_meta(name, max_len=127)
        count = measure.macs(model, torch.ones(1, 127, dtype=torch.long), per_layer=True)
        total.append(count.total)
        inside.append(sum(v for k, v in count.by_module.items() if k.endswith(".mixer")))
    assert len(set(inside)) == 1
    assert total == sorted(total, reverse=True)
    assert total[0] > total[-1]


def test_a_ratio_that_does_not_give_the_total_is_refused() -> None:
    with pytest.raises(ValueError, match=r"total_heads=48, got 6 \* 9 = 54"):
        create_model("wide_imdb_6_8", heads=9)
    with pytest.raises(ValueError, match="mixer must be one of"):
        create_model("wide_cpu_small_1_8", mixer="wishful")


@pytest.mark.parametrize("mixer", TEN)
def test_padding_does_not_change_the_logits(mixer: str) -> None:
    model = create_model("wide_cpu_small_2_4", **TINY, mixer=mixer).eval()
    ids = texts()
    want = model(ids)
    assert want.shape == (3, 3)
    torch.testing.assert_close(model(F.pad(ids, (0, 3))), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixer", TEN)
def test_heads_in_groups_change_neither_logits_nor_gradients(mixer: str) -> None:
    whole = create_model("wide_cpu_small_1_8", **TINY, mixer=mixer, drop=0.0)
    parts = copy.deepcopy(whole)
    parts.blocks[0].head_chunk = 3
    for training in (False, True):
        outs = [model.train(training)(same_texts()) for model in (whole, parts)]
        torch.testing.assert_close(*outs, atol=2e-6, rtol=1e-5)
    for out in outs:
        out.square().sum().backward()
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_heads_in_groups_keep_less_for_the_gradient_at_a_time() -> None:
    def largest(chunk: int | None) -> int:
        model = create_model("wide_cpu_small_1_8", **TINY, mixer="synthesizer", head_chunk=chunk)
        sizes = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(same_texts())
        return max(sizes)

    assert largest(None) == 3 * 8 * 38 * 38
    assert largest(2) < largest(None) / 2


@pytest.mark.parametrize("mixer", TEN)
def test_the_effect_of_a_head_is_what_is_missing_without_it(mixer: str) -> None:
    model = create_model("wide_cpu_small_1_8", **TINY, mixer=mixer).eval()
    ids = texts()
    logits, effects = model(ids), head_effects(model, ids)
    assert effects.shape == (3, 8, 3)
    for head in (0, 5):
        without = copy.deepcopy(model)
        without.blocks[0].mixer.keep("heads", torch.tensor([h for h in range(8) if h != head]))
        torch.testing.assert_close(logits - effects[:, head], without(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", TEN)
def test_one_layer_is_its_stream_plus_the_sum_of_its_heads(mixer: str) -> None:
    model = create_model("wide_cpu_small_1_8", **TINY, mixer=mixer).eval()
    block = model.blocks[0]
    ids = texts()
    x, mask = model.stem(ids)
    total = x
    for head in range(8):
        single = copy.deepcopy(block.mixer)
        single.keep("heads", torch.tensor([head]))
        total = total + single(block.norm1(x), mask=mask)
    torch.testing.assert_close(model.norm(block.tail(total)), model.encode(ids)[0], atol=1e-5, rtol=1e-5)


def test_head_maps_say_what_the_class_token_reads_and_padding_is_not_among_it() -> None:
    ids = texts()
    for mixer in TEN:
        model = create_model("wide_cpu_small_1_8", **TINY, mixer=mixer).eval()
        maps = head_maps(model, ids)
        assert maps.shape == (3, 8, 38)
        assert maps[1, :, 21:].abs().max() == 0
        if mixer not in ("linformer", "sinkhorn"):  # their weights do not sum to one
            torch.testing.assert_close(maps.sum(-1), torch.ones(3, 8), atol=1e-4, rtol=0)


def test_inspection_needs_one_layer_and_a_class_token() -> None:
    with pytest.raises(ValueError, match="one layer"):
        head_effects(create_model("wide_cpu_small_2_4", **TINY), texts())
    with pytest.raises(ValueError, match="class token"):
        head_maps(create_model("wide_cpu_small_1_8", **TINY, pool="mean"), texts())


def test_matching_reads_both_texts_with_one_encoder() -> None:
    model = create_model("wide_matching_1_16", vocab_size=50, max_len=40).eval()
    one, two = texts(), texts()
    assert model(one, two).shape == (3, 2)
    assert not torch.allclose(model(one, two), model(two, one))
    assert not torch.allclose(model(one, two), model(one, texts()))


def test_a_mean_pooled_model_without_a_class_token_reads_words_only() -> None:
    model = create_model("wide_cpu_small_1_8", **TINY, pool="mean").eval()
    assert model.stem.token is None
    ids = texts()
    torch.testing.assert_close(model(F.pad(ids, (0, 3))), model(ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", ["xs", "s", "m", "l"])
@pytest.mark.parametrize("max_len", [16, 64, 512])
def test_every_scale_keeps_to_its_cost(size: str, max_len: int) -> None:
    spec = {"vocab_size": 300, "max_len": max_len, "num_classes": 4, "pad_id": 0}
    name, settings = system("wide-attention").scale(spec, size)
    model = on_meta(name, **settings)
    count = measure.macs(model, torch.ones(1, max_len, dtype=torch.long)).total
    assert count < {"xs": 9e6, "s": 40e6, "m": 120e6, "l": 400e6}[size]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "wide_attention.py"
    spec = importlib.util.spec_from_file_location("benchmark_wide_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sweep_gives_the_same_report_for_the_same_seed(benchmark: ModuleType, monkeypatch) -> None:
    ids, values = benchmark.listops_mini(60, seed=0)
    one = ((ids[20:], values[20:]), (ids[:20], values[:20]), dict(vocab_size=10, max_len=64, num_classes=4))
    monkeypatch.setattr(benchmark, "data_of", lambda name, seed: one)
    monkeypatch.setattr(benchmark.measure, "latency", lambda forms, budget_s: dict.fromkeys(forms, one[0][0].layout))
    monkeypatch.setattr(benchmark, "vars", lambda value: {}, raising=False)
    reports = [benchmark.sweep(mixers=["linear"], ratios=("2-4", "1-8"), seeds=1, steps=1) for _ in range(2)]
    assert reports[0] == reports[1]
    rows = reports[0]["rows"]
    assert [row["ratio"] for row in rows] == ["2-4", "1-8"]
    assert [row["macs"] for row in rows] == sorted((row["macs"] for row in rows), reverse=True)
    assert rows[0]["gain"] == 0


def test_listops_mini_is_evaluated_right(benchmark: ModuleType) -> None:
    def value(symbols: list[int]) -> int:
        """Reads one list off the front."""
        first = symbols.pop(0)
        if first <= 4:
            return first - 1
        values = []
        while symbols[0] != 9:
            values.append(value(symbols))
        symbols.pop(0)
        middle = sorted(values)[len(values) // 2] + sorted(values)[(len(values) - 1) // 2]
        return {5: min(values), 6: max(values), 7: middle // 2, 8: sum(values) % 4}[first]

    ids, values = benchmark.listops_mini(100, seed=3)
    assert ids.unique(dim=0).shape == ids.shape
    for row, want in zip(ids.tolist(), values.tolist(), strict=True):
        symbols = [symbol for symbol in row if symbol]
        assert 32 <= len(symbols) <= 64
        assert value(symbols) == want
        assert not symbols
    again, _ = benchmark.listops_mini(100, seed=3)
    assert torch.equal(again, ids)
