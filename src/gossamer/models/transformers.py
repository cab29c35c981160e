"""Models of Hugging Face transformers as ours: a folder with `config.json` and weights becomes the same function here.

- nothing of that library is needed to read a folder; tests hold our outputs equal to its own
- one entry an architecture: its settings from the folder's config, and the rules from its names to ours
- a Sentence-Transformers folder (`modules.json`) gives the sentence vector it was trained for
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.io import load_weights, read_checkpoint, read_json
from gossamer.models.registry import Rules, State, create_model, rename

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` is read.

    Args:
        settings: config to our name and keywords; it refuses with a ValueError what our model cannot express.
        rules: their names to ours, see `gossamer.models.registry.rename`.
        convert: changes tensors (fuse, transpose, cut) after renaming.
    """

    settings: Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]
    rules: Rules
    convert: Callable[[dict[str, Any], State], State]


def is_transformers_folder(folder: str | Path) -> bool:
    """Whether `folder` holds a saved model of Hugging Face transformers."""
    config = Path(folder) / "config.json"
    return config.is_file() and "model_type" in read_json(config)


def read_transformers(folder: str | Path) -> nn.Module:
    """The model in a Hugging Face transformers folder, built of our parts, in eval mode.

    Raises:
        ValueError: an architecture or a setting we do not have, or weights that do not fit; the message says which.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{folder}: model_type must be one of {', '.join(ARCHITECTURES)}; got {kind!r}")
    entry = ARCHITECTURES[kind]
    name, settings = entry.settings(config)
    state = _weights(folder)
    if (folder / "modules.json").exists():
        settings |= _sentence_settings(folder)
    elif "num_classes" in settings and not any("classifier" in key for key in state):
        settings["num_classes"] = 0
    model = create_model(name, **settings)
    state = entry.convert(settings, rename(state, entry.rules))
    own = model.state_dict()
    # A folder may hold parts that only training needs (a pooler, a head of another task).
    missing = sorted(set(own) - set(state))
    wrong = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or wrong:
        raise ValueError(f"{folder}: weights do not fit {name}: missing {missing[:5]}, of another shape {wrong[:5]}")
    model.load_state_dict({k: state[k] for k in own})
    return model.eval()


def _weights(folder: Path) -> State:
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return {k: v for file in files for k, v in load_weights(file).items()}
    file = folder / "pytorch_model.bin"
    if not file.exists():
        raise ValueError(f"{folder}: no weights: neither *.safetensors nor pytorch_model.bin")
    return dict(read_checkpoint(file))


def _sentence_settings(folder: Path) -> dict[str, Any]:
    modules = {module["type"].rpartition(".")[2]: module["path"] for module in read_json(folder / "modules.json")}
    unknown = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ValueError(f"{folder}: modules.json has {', '.join(unknown)}; known are Transformer, Pooling, Normalize")
    pooling = read_json(folder / modules["Pooling"] / "config.json")
    kinds = {"cls_token": "token", "mean_tokens": "mean", "max_tokens": "max"}
    chosen = [ours for theirs, ours in kinds.items() if pooling.get(f"pooling_mode_{theirs}")]
    if len(chosen) != 1:
        raise ValueError(f"{folder}: pooling must be one of {', '.join(kinds)}; got {chosen or pooling}")
    return {"num_classes": 0, "pool": chosen[0], "normalize": "Normalize" in modules}


def activation(config: Mapping[str, Any], key: str) -> str:
    """Our name of an activation.

    Raises:
        ValueError: one we do not have.
    """
    if config[key] not in ACTIVATIONS:
        raise ValueError(f"{key} must be one of {', '.join(ACTIVATIONS)}; got {config[key]!r}")
    return ACTIVATIONS[config[key]]


def classes(config: Mapping[str, Any]) -> int:
    """Number of classes a config names; transformers writes two where none are named."""
    return len(config["id2label"]) if "id2label" in config else int(config.get("num_labels", 2))


def fuse_qkv(state: State) -> State:
    """`….mixer.{q,k,v}.*` joined to `….mixer.qkv.*`, in this order."""
    for key in [k for k in state if ".mixer.q." in k]:
        parts = [state.pop(key.replace(".q.", f".{letter}.")) for letter in "qkv"]
        state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return state


def _bert(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"position_embedding_type must be absolute, got {config['position_embedding_type']!r}")
    offset = config["pad_token_id"] + 1 if config["model_type"] in ("roberta", "xlm-roberta", "camembert") else 0
    return "bert_base", {
        "dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "max_len": config["max_position_embeddings"] - offset,
        "pad_id": config["pad_token_id"],
        "act": activation(config, "hidden_act"),
        "eps": config["layer_norm_eps"],
        "num_classes": classes(config),
    }


def _distilbert(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return "bert_base", {
        "dim": config["dim"],
        "depth": config["n_layers"],
        "heads": config["n_heads"],
        "hidden": config["hidden_dim"],
        "vocab_size": config["vocab_size"],
        "max_len": config["max_position_embeddings"],
        "pad_id": config.get("pad_token_id", 0),
        "act": activation(config, "activation"),
        "num_classes": classes(config),
        "head_act": "relu",
    }


def _convert_bert(settings: dict[str, Any], state: State) -> State:
    rows = settings["max_len"]
    positions: Tensor = state.pop("positions")
    table = positions[len(positions) - rows :]  # RoBERTa's first rows are for padding
    if "types" in state:
        table = table + state.pop("types")[0]
    state["stem.positions"] = table[None]
    return fuse_qkv(state)


_BERT_RULES: Rules = [
    (r"^(bert|roberta|distilbert)\.", ""),
    (r"^embeddings\.word_embeddings\.", "stem.words."),
    (r"^embeddings\.position_embeddings\.weight$", "positions"),
    (r"^embeddings\.token_type_embeddings\.weight$", "types"),
    (r"^embeddings\.LayerNorm\.", "stem.norm."),
    (r"^(encoder|transformer)\.layer\.", "blocks."),
    (r"\.attention\.self\.(q|k|v)(uery|ey|alue)\.", r".mixer.\1."),
    (r"\.attention\.output\.dense\.", ".mixer.proj."),
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"(blocks\.\d+)\.output\.LayerNorm\.", r"\1.norm2."),
    # DistilBERT
    (r"\.attention\.(q|k|v)_lin\.", r".mixer.\1."),
    (r"\.attention\.out_lin\.", ".mixer.proj."),
    (r"\.sa_layer_norm\.", ".norm1."),
    (r"\.output_layer_norm\.", ".norm2."),
    (r"\.ffn\.lin([12])\.", r".mlp.fc\1."),
    (r"^pre_classifier\.", "head.dense."),
    # classifiers
    (r"^pooler\.dense\.", "head.dense."),
    (r"^classifier\.dense\.", "head.dense."),
    (r"^classifier\.out_proj\.", "head.fc."),
    (r"^classifier\.", "head.fc."),
]

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(_bert, _BERT_RULES, _convert_bert),
    "roberta": Architecture(_bert, _BERT_RULES, _convert_bert),
    "xlm-roberta": Architecture(_bert, _BERT_RULES, _convert_bert),
    "distilbert": Architecture(_distilbert, _BERT_RULES, _convert_bert),
}
