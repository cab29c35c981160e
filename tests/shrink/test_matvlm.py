"""MaTVLM: what the new layers start from, the authors' losses, what is trained, and decoders that are turned."""

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.data.base import Dataset, Split
from gossamer.data.language import NOTHING
from gossamer.io import export_onnx
from gossamer.mixers.mamba2 import Mamba2
from gossamer.models import create_model, load_official
from gossamer.shrink.base import Calibration, Unsupported, run_pass
from gossamer.shrink.passes.matvlm import _Objective, _watched, answer_loss, attention_layers, spaced, trained
from gossamer.tasks import create_task
from models.test_matvlm import GOLDEN, prompts
from official import golden, seeded_input, seeded_state
from shrink.loading import same_after_loading
from shrink.toys import digits, encoder, learned, texts, vision

WORDS, LENGTH = 16, 20
SIZES = {"dim": 24, "depth": 4, "heads": 4, "hidden": 48, "vocab_size": WORDS, "max_len": LENGTH}


def sayings(seconds: float = float("inf")) -> Calibration:
    """Texts in which the words of the first half come again in the second."""
    torch.manual_seed(0)
    splits = []
    for count in (192, 32, 32):
        half = torch.randint(1, WORDS, (count, LENGTH // 2))
        ids = torch.cat((half, half, half[:, :1]), 1)
        splits.append(Split((ids[:, :-1],), ids[:, 1:]))
    spec = {"vocab_size": WORDS, "max_len": LENGTH, "pad_id": 0}
    data = Dataset("language-modelling", *splits, spec, {})
    return Calibration(create_task(data.task, spec, data.meta), data, seconds)


def decoder(name: str = "llama", seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    own = {"gpt2": {"drop": 0.0}, "llama": {"kv_heads": 2}, "tinyllava_phi2_siglip": {"drop": 0.0, "kv_heads": 2}}[name]
    if name == "tinyllava_phi2_siglip":
        own = {**{k: v for k, v in GOLDEN.items() if k.startswith(("img", "patch", "vision"))}, **own}
    model = create_model(name, **{**SIZES, **own, **changes})
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "tinyllava_phi2_siglip"])
def test_new_layers_start_from_v_k_q_and_the_output_product(name: str, bias: bool) -> None:
    model = decoder(name)
    turned, (step,) = run_pass("matvlm", model, sayings(), layers=[1, 3], bias=bias, steps=0)
    assert step["parts"] == ["blocks.1", "blocks.3"]
    for i, block in enumerate(turned.blocks):
        old = model.blocks[i].mixer
        if i not in (1, 3):
            assert type(block.mixer) is type(old)
            continue
        new = block.mixer
        e, xb = old.heads * old.head_dim, getattr(old, "kv_heads", old.heads) * old.head_dim
        q, k, v = old.qkv.weight.split((e, xb, xb))
        assert torch.equal(new.in_proj.weight[e : e + xb], v)
        assert torch.equal(new.in_proj.weight[e + xb : e + 2 * xb], k)
        assert torch.equal(new.in_proj.weight[e + 2 * xb : 2 * e + 2 * xb], q)
        assert torch.equal(new.proj.weight, old.proj.weight)
        assert (new.in_proj.bias is not None) == bias
        if bias and old.qkv.bias is not None:
            assert torch.equal(new.in_proj.bias[e : e + xb], old.qkv.bias[-xb:])
            assert torch.equal(new.proj.bias, old.proj.bias)
        for part, mine in block.named_parameters():
            if not part.startswith("mixer."):
                assert torch.equal(mine, model.blocks[i].get_parameter(part))


def test_a_new_layer_without_decay_gate_and_convolution_is_linear_attention_of_the_old_ones_products() -> None:
    model = decoder()
    turned, _ = run_pass("matvlm", model, sayings(), layers=[0], steps=0)
    old, new = model.blocks[0].mixer, turned.blocks[0].mixer
    from gossamer.ops.ssd import ssd

    x = torch.randn(2, 70, 24)
    q, k, v = (t.transpose(1, 2) for t in super(type(old), old).project(x))
    _, u, _ = new._project(x)
    values, b, c = new._split(u)
    y = ssd(values, torch.ones(2, 70, 4), torch.zeros(4), b, c)
    k, v = (t.detach().repeat_interleave(2, 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    want = torch.einsum("bhij,bjhd->bihd", scores, v)
    torch.testing.assert_close(y, want, atol=1e-5 * float(want.detach().abs().max()), rtol=1e-5)
    torch.testing.assert_close(new.proj(y.flatten(2)), old.proj(want.flatten(2)), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("depth", "keep", "layers"), [(32, 0.75, range(0, 32, 4)), (32, 0.5, range(0, 32, 2))])
def test_layers_are_spaced_as_the_paper_has_them(depth: int, keep: float, layers: range) -> None:
    assert spaced(depth, keep) == list(layers)
    assert spaced(4, 1.0) == []
    assert spaced(3, 0.01) == [0, 1, 2]


def test_answer_losses_equal_the_authors() -> None:
    saved = golden("matvlm")
    student, teacher = saved["student"], saved["teacher"]
    for match in ("kl", "reverse", "ce", "l2"):
        for temperature in (1, 2):
            found = answer_loss(student, teacher, match, temperature)
            torch.testing.assert_close(found, saved[f"{match}_{temperature}"], atol=1e-4, rtol=1e-4)


def test_divergences_of_equal_answers_are_0_and_jensen_shannon_is_symmetric_and_bounded() -> None:
    one, two = torch.randn(2, 3, 1, 9) * 20
    for match in ("kl", "reverse", "jsd", "l2"):
        assert float(answer_loss(one, one, match)) == pytest.approx(0, abs=1e-6)
        assert float(answer_loss(one, two, match)) > 0.1
    there, back = answer_loss(one, two, "jsd"), answer_loss(two, one, "jsd")
    torch.testing.assert_close(there, back)
    assert 0.1 < float(there) <= math.log(2) + 1e-6
    far = answer_loss(torch.tensor([[60.0, 0.0]]), torch.tensor([[0.0, 60.0]]), "jsd")
    assert float(far) == pytest.approx(math.log(2), abs=1e-4)
    assert not torch.allclose(answer_loss(one, two, "kl"), answer_loss(two, one, "kl"))


def student_and_teacher() -> tuple[nn.Module, nn.Module]:
    shapes = golden("matvlm")["shapes"]
    student = load_official(create_model("matvlm_0.25", **GOLDEN, ssm_layers=(0, 2)), seeded_state(shapes)).eval()
    plain = {k: v for k, v in shapes.items() if ".mamba." not in k}
    for i in (0, 2):
        for name, rows in (("q_proj", 40), ("k_proj", 20), ("v_proj", 20), ("dense", 40)):
            plain[f"language_model.model.layers.{i}.self_attn.{name}.weight"] = (rows, 40)
            plain[f"language_model.model.layers.{i}.self_attn.{name}.bias"] = (rows,)
    teacher = load_official(create_model("tinyllava_phi2_siglip", **GOLDEN), seeded_state(plain)).eval()
    return student, teacher


def test_the_whole_loss_and_its_gradients_equal_the_authors() -> None:
    saved = golden("matvlm")
    student, teacher = student_and_teacher()
    parts = ["blocks.0", "blocks.2"]
    given = (saved["ids"], seeded_input("matvlm_images", (3, 3, 15, 15)))
    target = torch.zeros(0)
    weights = [student.blocks[0].mixer.in_proj.weight, student.stem.connector[0].weight]
    hidden = _Objective(student, teacher, parts, sayings(), "kl", 1.0, (0.0, 1.0, 0.0))(student, given, target)
    torch.testing.assert_close(hidden, saved["tl"], atol=1e-3, rtol=1e-5)
    loss = _Objective(student, teacher, parts, sayings(), "kl", 1.0, (1.0, 1.0, 0.0))(student, given, target)
    torch.testing.assert_close(loss, saved["tl"] + saved["kl_1"], atol=1e-3, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(loss, weights), ("in_proj", "connector"), strict=True):
        torch.testing.assert_close(mine, saved[theirs], atol=1e-3, rtol=1e-3)


def test_both_losses_are_0_where_nothing_is_replaced() -> None:
    model, calibration = decoder(), sayings()
    same = copy.deepcopy(model)
    inputs, target = next(calibration.batches(8))
    for parts in ([], ["blocks.0", "blocks.3"]):
        for weights in ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0)) if parts else ((1.0, 0.0, 0.0),):
            found = _Objective(same, model, parts, calibration, "kl", 1.0, weights)(same, inputs, target)
            assert float(found) == pytest.approx(0, abs=1e-4)
    with _watched([]) as seen:
        model(*inputs)
    assert seen == {}


def test_only_mamba_layers_and_the_connector_are_trained() -> None:
    calibration = sayings()
    for connector in (True, False):
        model = decoder("tinyllava_phi2_siglip")
        turned, _ = run_pass("matvlm", model, calibration, layers=[0, 2], steps=0)
        names = set(trained(turned, connector=connector))
        mamba = {f"blocks.{i}.mixer.{n}" for i in (0, 2) for n, _ in turned.blocks[i].mixer.named_parameters()}
        assert names - mamba == (
            {f"stem.connector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")} if connector else set()
        )
        assert mamba <= names
    model = decoder()
    started, _ = run_pass("matvlm", model, calibration, layers=[1], steps=0)
    taught, _ = run_pass("matvlm", model, calibration, layers=[1], steps=3)
    changed = {n for n, p in taught.named_parameters() if not torch.equal(p, started.get_parameter(n))}
    assert changed == {n for n, _ in taught.named_parameters() if n.startswith("blocks.1.mixer.")}
    assert all(p.requires_grad for p in taught.parameters())


def test_teaching_brings_the_answers_nearer_to_a_trained_teachers() -> None:
    calibration = sayings()
    model = learned(decoder(depth=2), calibration, steps=40, lr=1e-2)
    inputs, _ = next(calibration.batches(32, split="val"))
    losses = []
    for steps in (0, 30):
        turned, _ = run_pass("matvlm", model, calibration, keep=0.5, steps=steps, lr=5e-3)
        with torch.no_grad():
            losses.append(float(answer_loss(turned(*inputs), model(*inputs))))
    assert losses[1] < 0.75 * losses[0], losses


KEYS, VALUES, SAID, ASKED = 24, 4, 20, 4


def recall() -> Calibration:
    """Associative recall: tokens are a key with its value; at the end keys alone are asked for their values."""
    generator = torch.Generator().manual_seed(0)
    splits = []
    for count in (4096, 64, 64):
        keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :SAID]
        values = torch.randint(0, VALUES, keys.shape, generator=generator)
        asked = torch.randint(0, SAID, (count, ASKED), generator=generator)
        ids = torch.cat((1 + keys * VALUES + values, 1 + KEYS * VALUES + keys.gather(1, asked)), 1)
        target = torch.cat((torch.full_like(keys, NOTHING), 1 + values.gather(1, asked)), 1)
        splits.append(Split((ids,), target))
    spec = {"vocab_size": 1 + KEYS * (VALUES + 1), "max_len": SAID + ASKED, "pad_id": 0}
    data = Dataset("language-modelling", *splits, spec, {})
    return Calibration(create_task(data.task, spec, data.meta), data)


def test_where_a_layer_looks_up_by_content_attention_is_the_better_start_once_that_is_learned() -> None:
    calibration = recall()
    torch.manual_seed(0)
    model = create_model("gpt2", dim=64, depth=2, heads=2, hidden=64, drop=0.0, **calibration.data.spec)
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    calibration.trainer(model, lr=3e-3, ema=0.0, warmup=20, batch_size=64).train(steps=120)
    inputs, target = next(calibration.batches(64, batch_size=64, split="val"))
    with torch.no_grad():
        taught = model.eval()(*inputs)
    assert float((taught.argmax(-1) == target)[:, SAID:].float().mean()) > 0.9
    far = {}
    for start in ("attention", "random"):
        # The paper's rate of 2e-4 is for 2560 channels; a narrow model learns as fast at a higher one.
        settings = {"keep": 0.5, "steps": 400, "lr": 8e-3, "batch_size": 16}
        student, _ = run_pass("matvlm", model, calibration, start=start, **settings)
        with torch.no_grad():
            far[start] = float(answer_loss(student(*inputs), taught))
    # Nearer by 18 to 26 % with each of five seeds.
    assert far["attention"] < 0.92 * far["random"], far


@pytest.mark.parametrize("name", ["gpt2", "llama", "tinyllava_phi2_siglip"])
def test_a_decoder_is_turned_decodes_step_by_step_and_is_the_same_when_loaded(name: str, tmp_path) -> None:
    model = decoder(name)
    turned, _ = run_pass("matvlm", model, sayings(), keep=0.5, steps=2)
    assert [isinstance(block.mixer, Mamba2) for block in turned.blocks] == [True, False, True, False]
    inputs = prompts() if name.startswith("tiny") else (torch.randint(1, WORDS, (2, 11)),)
    if name.startswith("tiny"):
        inputs = (inputs[0].where(inputs[0] < 0, inputs[0] % WORDS), inputs[1])
    with torch.no_grad():
        full = turned(*inputs)
        tokens = turned.stem.see(*inputs)[0] if len(inputs) > 1 else turned.stem(*inputs)[0]
        states = [block.initial_state(2) for block in turned.blocks]
        for t in range(tokens.shape[1]):
            x = tokens[:, t]
            for i, block in enumerate(turned.blocks):
                x, states[i] = block.step(x, states[i])
            torch.testing.assert_close(turned.head(turned.norm(x)[:, None])[:, 0], full[:, t], atol=1e-4, rtol=1e-4)
    same_after_loading(turned, inputs, tmp_path)


def test_a_turned_decoder_exports_with_a_free_batch(tmp_path) -> None:
    turned, _ = run_pass("matvlm", decoder(), sayings(), keep=0.5, steps=0)
    found = export_onnx(turned, torch.randint(1, WORDS, (1, LENGTH)), tmp_path / "m.onnx", exporter="fast")
    assert found.passed, found.reason
    assert found.held == "batch", found.reason


@pytest.mark.parametrize(
    ("make", "calibration", "says"),
    [
        (encoder, texts, r"blocks\.0\.mixer \(Attention\) looks both ways"),
        (vision, digits, r"blocks\.0\.mixer \(Attention\) looks both ways"),
        (lambda: vision(mixer="pool"), digits, r"blocks\.0\.mixer \(Pool\) has no q, k and v"),
        (lambda: decoder("gpt2", mixer="linear"), sayings, r"blocks\.0\.mixer \(\w+\) has no q, k and v"),
        (lambda: nn.Linear(2, 2), sayings, "Linear has no residual blocks"),
    ],
)
def test_what_has_no_causal_attention_is_refused_and_left_as_it_was(make, calibration, says: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Unsupported, match=says):
        run_pass("matvlm", model, calibration())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not getattr(model, "recipe", [])


def test_a_product_that_cannot_be_read_off_is_named_before_anything_is_changed() -> None:
    model = decoder()
    model.blocks[2].mixer.qkv = nn.Sequential(nn.Linear(24, 4), nn.Linear(4, 48))
    copied = copy.deepcopy(model)
    from gossamer.shrink.passes.matvlm import matvlm

    with pytest.raises(Unsupported, match=r"blocks\.2\.mixer\.qkv \(Sequential\) is no plain product"):
        matvlm(model, sayings(), layers=[0, 2])
    assert model.state_dict().keys() == copied.state_dict().keys()
    turned, _ = run_pass("matvlm", model, sayings(), layers=[0], steps=0)
    assert list(attention_layers(turned)) == ["blocks.1", "blocks.2", "blocks.3"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": [0, 4]}, r"layers must be different numbers in 0\.\.3, got \[0, 4\]"),
        ({"layers": [1, 1]}, r"layers must be different numbers in 0\.\.3, got \[1, 1\]"),
        ({"keep": 0.0}, "keep must be in"),
        ({"match": "cosine"}, "match must be one of kl, reverse, jsd, l2, ce; got 'cosine'"),
        ({"start": "zero"}, "start must be one of attention, random"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"weights": (1.0, -1.0, 0.0)}, "weights must be three numbers of at least 0"),
        ({"steps": -1}, "steps must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run_pass("matvlm", decoder(), sayings(), **settings)


def test_keeping_all_layers_changes_nothing_and_no_time_leaves_the_start() -> None:
    model = decoder()
    whole, steps = run_pass("matvlm", model, sayings(), keep=1.0)
    ids = torch.randint(1, WORDS, (2, 9))
    assert steps == []
    assert torch.equal(whole(ids), model(ids))
    one, _ = run_pass("matvlm", model, sayings(), steps=0)
    two, _ = run_pass("matvlm", model, sayings(seconds=0.0))
    assert torch.equal(one(ids), two(ids))
