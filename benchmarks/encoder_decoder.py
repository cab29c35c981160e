"""Long input, short output: mu_330m beside a decoder-only model of as many parameters, token by token.

    python benchmarks/encoder_decoder.py            # about a minute and 3 GB; one thread
    python benchmarks/encoder_decoder.py --quick    # small models, seconds; writes nothing

Both read the same source and then write with a cache, weights drawn at random. Figures: time to the first token (the
source read and one token written), time of each token after it, the cache and what a token adds to it, multiply-adds.
They go to `benchmarks/results/encoder_decoder.json`, beside the published ones.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.io.files import write_json
from gossamer.measure import device_info, latency, macs, parameters
from gossamer.models import create_model
from gossamer.models.mu import decoder_twin
from gossamer.ops.attention import attention, join_heads

HERE = Path(__file__).parent
SOURCE, WRITTEN = 512, 32
SMALL = dict(encoder_depth=4, decoder_depth=2, dim=128, qkv=96, heads=6, kv_heads=3, hidden=256, vocab_size=512)
PUBLISHED = {"first_token_latency": "47 % lower", "throughput": "4.7 times on edge devices", "memory": "11-16 % less",
             "flops": "22 % fewer"}  # fmt: skip


class Alone(nn.Module):
    """The twin: `begin` reads the source into caches, `step` writes."""

    def __init__(self, twin: Any) -> None:
        super().__init__()
        self.twin = twin

    def begin(self, source: Tensor) -> list[tuple[Tensor, Tensor]]:
        x, states = self.twin.stem(source)[0], []
        for block in self.twin.blocks:
            q, k, v = block.mixer.project(block.norm1(x))
            x = x + block.mixer.proj(join_heads(attention(q, k, v, causal=True)))
            x = x + block.mlp(block.norm2(x))
            states.append((k, v))
        return states

    def step(self, ids: Tensor, states: Any) -> tuple[Tensor, Any]:
        x, grown = self.twin.stem(ids[:, None])[0][:, 0], []
        for block, state in zip(self.twin.blocks, states, strict=True):
            x, state = block.step(x, state)
            grown.append(state)
        return self.twin.head(self.twin.norm(x)[:, None])[:, 0], grown


class Pair(nn.Module):
    """The encoder-decoder in the same form."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def begin(self, source: Tensor) -> Any:
        return self.model.begin(self.model.encode(source))

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.model.step(ids, state)


class Call(nn.Module):
    """A method as a module, for the counter."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.model, self.name)(*inputs)


def kept(state: Any) -> int:
    """Bytes of keys and values in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size() if state.is_floating_point() else 0
    return sum(kept(part) for part in state) if isinstance(state, tuple | list) else 0


@torch.no_grad()
def figures(forms: dict[str, Any], source: Tensor, written: int, seconds: float) -> dict[str, dict[str, Any]]:
    """What each form pays for reading `source` and writing behind it."""
    ids = source[:, -1]
    found: dict[str, dict[str, Any]] = {}
    states: dict[str, Any] = {}
    for name, form in forms.items():
        state = form.begin(source)
        first = kept(state)
        for _ in range(written):
            _, state = form.step(ids, state)
        states[name] = state
        found[name] = {
            "parameters": parameters(form),
            "cache_bytes": kept(state),
            "cache_bytes_a_token": (kept(state) - first) // written,
            "macs_source": macs(Call(form, "begin"), source).total,
            "macs_a_token": macs(Call(form, "step"), (ids, state)).total,
        }

    def first_token(form: Any) -> None:
        form.step(ids, form.begin(source))

    for what, calls in (
        ("first_token", {name: lambda form=form: first_token(form) for name, form in forms.items()}),
        ("a_token", {name: lambda n=name, form=form: form.step(ids, states[n]) for name, form in forms.items()}),
    ):
        for name, value in latency(calls, budget_s=seconds, min_runs=3, threads=1).items():
            found[name][what] = value.to_dict()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models; writes nothing")
    quick = parser.parse_args().quick
    load = os.getloadavg()[0]
    torch.manual_seed(0)
    model: Any = create_model("mu_330m", **(SMALL if quick else {})).eval()
    forms = {"encoder_decoder": Pair(model), "decoder_only": Alone(decoder_twin(model)).eval()}
    source = torch.randint(1, model.stem.words.num_embeddings, (1, SOURCE))
    found = figures(forms, source, WRITTEN, seconds=1 if quick else 12)
    pair, alone = found["encoder_decoder"], found["decoder_only"]
    ratios = {
        "first_token": pair["first_token"]["median_ms"] / alone["first_token"]["median_ms"],
        "a_token": pair["a_token"]["median_ms"] / alone["a_token"]["median_ms"],
        **{
            key: pair[key] / alone[key]
            for key in ("parameters", "cache_bytes", "cache_bytes_a_token", "macs_source", "macs_a_token")
        },
    }
    for name, value in ratios.items():
        print(f"{name:20} {value:.3f} of the decoder alone")
    if quick:
        return
    result = {
        "device": device_info(),
        "load_before": load,
        "model": "mu_330m",
        "source_tokens": SOURCE,
        "written_tokens": WRITTEN,
        "figures": found,
        "ratios": ratios,
        "published": PUBLISHED,
        "reached": {
            "lower time a token": ratios["a_token"] < 1,
            "smaller cache a token": ratios["cache_bytes_a_token"] < 1,
        },
    }
    write_json(HERE / "results" / "encoder_decoder.json", result)


if __name__ == "__main__":
    main()
