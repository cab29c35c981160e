"""Teaching an encoder-decoder by a decoder: scores at the right places, and what it is worth."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.models import create_model
from gossamer.train.on_policy import distil_from_decoder, divergence, on_policy_divergence, teacher_scores
from official import GOLDEN, golden, seeded_state

WORDS, LENGTH, BOS = 12, 4, 1


def student(**changes: Any) -> Any:
    sizes = dict(dim=32, qkv=32, heads=2, kv_heads=1, hidden=64, encoder_depth=1, decoder_depth=1, drop=0.0)
    model = create_model("mu-encoder-decoder-slm", **{**sizes, "vocab_size": WORDS, "max_len": 16, **changes})
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_teacher_is_asked_at_the_last_token_of_each_source_and_behind(name: str) -> None:
    sizes: dict[str, Any] = dict(dim=16, depth=2, heads=2, hidden=24, vocab_size=WORDS, max_len=16)
    teacher = create_model(name, **sizes).eval()
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.3)
    source, target = torch.randint(1, WORDS, (3, 6)), torch.randint(0, WORDS, (3, 5))
    source[0, 4:], source[2, 1:] = 0, 0
    with torch.no_grad():
        got = teacher_scores(teacher, source, target, 0)
        for row, count in enumerate((4, 6, 1)):
            text = torch.cat((source[row, :count], target[row]))[None]
            want = teacher(text)[0, count - 1 : count + 4]
            torch.testing.assert_close(got[row], want, atol=1e-5, rtol=1e-5)


def test_the_divergence_is_that_of_the_distributions_over_the_words_both_have() -> None:
    own, soft = torch.randn(2, 3, 7), torch.randn(2, 3, 9)
    p, q = soft[..., :7].softmax(-1), own.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(own, soft), each.mean())
    counts = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(divergence(own, soft, counts), each[counts].mean())
    assert float(divergence(own, own)) == pytest.approx(0, abs=1e-6)


class Sums(nn.Module):
    """A teacher whose scores follow from the sum of all ids so far; ids of 0 are not seen."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids.cumsum(1) % len(self.table)]


def test_the_loss_of_a_batch_equals_the_authors() -> None:
    saved = golden("mu_distil")
    state = seeded_state(saved["shapes"])
    state["lm_head.weight"] = state["transformer.wte.weight"]
    from gossamer.models import load_official

    sizes = dict(dim=20, qkv=24, heads=6, kv_heads=3, hidden=28, max_len=16, vocab_size=31)
    model: Any = load_official(
        create_model("mu-encoder-decoder-slm", **sizes, encoder_depth=2, decoder_depth=1).eval(), state
    )
    source, drawn, gold = saved["source"], saved["drawn"], saved["gold"]
    teacher = Sums(saved["table"])
    taught = divergence(model(source, drawn[:, :-1]), teacher_scores(teacher, source, drawn[:, 1:], 0))
    torch.testing.assert_close(taught, saved["kd_loss"], atol=1e-4, rtol=1e-4)
    # Drawn anew with the authors' settings, and the whole loss of both parts.
    model.generate = lambda *a, **k: drawn
    loss = distil_from_decoder(model, teacher, source, gold, bos_id=1)
    torch.testing.assert_close(loss, saved["loss"], atol=1e-4, rtol=1e-4)
    assert (GOLDEN / "mu_distil.npz").stat().st_size < 50_000


def test_the_target_is_the_students_own_and_counts_up_to_its_end() -> None:
    torch.manual_seed(0)
    model = student().eval()
    source = torch.randint(2, WORDS, (6, 5))
    teacher = Sums(torch.randn(WORDS, WORDS))
    torch.manual_seed(4)
    got = on_policy_divergence(model, teacher, source, bos_id=BOS, eos_id=3, length=5, temperature=2.0, top_k=None)
    torch.manual_seed(4)
    drawn = model.generate(source, bos_id=BOS, eos_id=3, max_new=5, temperature=2.0)
    total, count = 0.0, 0
    with torch.no_grad():
        for row, text in zip(source, drawn, strict=True):
            for t in range(1, drawn.shape[1]):
                p = teacher(torch.cat((row, text[1:t]))[None])[0, -1].softmax(-1)
                q = model(row[None], text[None, :t])[0, -1].softmax(-1)
                total, count = total + float((p * (p / q).log()).sum()), count + 1
                if int(text[t]) == 3:
                    break
    assert count < 30  # some ended early
    assert got.item() == pytest.approx(total / count, rel=1e-4)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        distil_from_decoder(model, teacher, source, source, bos_id=BOS, alpha=2)


class Copier(nn.Module):
    """The decoder that knows: behind a source of `LENGTH` words it repeats them, each with chance 0.6."""

    def forward(self, ids: Tensor) -> Tensor:
        chance = torch.full((*ids.shape, WORDS), 0.4 / WORDS)
        at = LENGTH - 1
        said = F.one_hot(ids[:, : min(LENGTH, ids.shape[1] - at)], WORDS) * 0.6
        chance[:, at : at + said.shape[1]] += said
        return chance.log()


def test_the_teacher_beats_the_text_alone_at_equal_steps() -> None:
    teacher, wins, far = Copier(), 0, []
    for seed in range(3):
        divergences = []
        for alpha in (0.0, 0.9):
            torch.manual_seed(seed)
            model = student()
            optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
            generator = torch.Generator().manual_seed(seed)
            sources = torch.randint(2, WORDS, (256, LENGTH), generator=generator)
            spoilt = torch.rand(sources.shape, generator=generator) < 0.4
            targets = torch.where(spoilt, torch.randint(0, WORDS, sources.shape, generator=generator), sources)
            for step in range(120):
                index = torch.arange(step * 32, step * 32 + 32) % 256
                loss = distil_from_decoder(model, teacher, sources[index], targets[index], bos_id=BOS, alpha=alpha)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            fresh = torch.randint(2, WORDS, (128, LENGTH), generator=torch.Generator().manual_seed(99))
            with torch.no_grad():
                inputs = torch.cat((torch.full((128, 1), BOS), fresh[:, :-1]), 1)
                divergences.append(divergence(model.eval()(fresh, inputs), teacher_scores(teacher, fresh, fresh, 0)))
        plain, taught = (float(x) for x in divergences)
        wins += taught < plain
        far.append(taught)
    assert wins >= 2
    assert max(far) < 1.0  # a student that knows nothing of the source is 1.3 away
