"""Models of Hugging Face transformers as ours: a folder with `config.json` and weights becomes the same function here.

- nothing of that library is needed to read a folder; tests hold our outputs equal to its own
- one entry an architecture: its settings from the folder's config, and the rules from its names to ours
- a Sentence-Transformers folder (`modules.json`) gives the sentence vector it was trained for
- what our models cannot express (relative positions, sliding windows, a head of another task) is refused by name
- `preprocessing` says how the folder wants its images or texts; an old vocabulary becomes a tokenizer file
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.io import load_weights, read_checkpoint, read_json
from gossamer.layers.embed import pair
from gossamer.models.registry import Rules, State, create_model, rename
from gossamer.ops.rotary import SCALINGS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
        heads: endings of the class names that our model is the same function as.
    """

    settings: Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]
    rules: Rules
    convert: Callable[[dict[str, Any], State], State]
    heads: tuple[str, ...]


def is_transformers_folder(folder: str | Path) -> bool:
    """Whether `folder` holds a saved model of Hugging Face transformers."""
    config = _home(Path(folder)) / "config.json"
    return config.is_file() and "model_type" in read_json(config)


def _home(folder: Path) -> Path:
    """Where the model itself lies: in a folder of its own, in some that Sentence-Transformers wrote."""
    if (folder / "config.json").exists() or not (folder / "modules.json").exists():
        return folder
    parts = [m for m in read_json(folder / "modules.json") if m["type"].endswith("Transformer")]
    return folder / Path(parts[0]["path"]).name if parts else folder


def read_transformers(folder: str | Path) -> nn.Module:
    """The model in a Hugging Face transformers folder, built of our parts, in eval mode.

    Raises:
        ValueError: an architecture or a setting we do not have, or weights that do not fit; the message says which.
    """
    folder = Path(folder)
    home = _home(folder)
    config = read_json(home / "config.json")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{folder}: model_type must be one of {', '.join(ARCHITECTURES)}; got {kind!r}")
    entry = ARCHITECTURES[kind]
    if strange := [a for a in config.get("architectures") or () if not a.endswith(entry.heads)]:
        raise ValueError(f"{folder}: {strange[0]} is not supported; of {kind} these are: …{', …'.join(entry.heads)}")
    try:
        name, settings = entry.settings(config)
    except KeyError as error:
        raise ValueError(f"{folder}: config.json lacks {error.args[0]}") from error
    state = _weights(home)
    if (folder / "modules.json").exists():
        settings |= _sentence_settings(folder)
    elif "num_classes" in settings and not any("classifier" in key for key in state):
        settings |= {"num_classes": 0} | ({"distilled": False, "registers": 1} if settings.get("distilled") else {})
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


def preprocessing(folder: str | Path) -> dict[str, Any]:
    """How the model in a transformers folder wants its data: what the files there say, and no guess.

    Returns:
        Of images `image_size` (height, width), `mean` and `std` of pixels scaled to 0 … 1. Of texts `tokenizer` (path
        of a `tokenizers` JSON file) and `most_tokens`. Of classifiers with named classes `classes`, in its order.

    Raises:
        ValueError: a tokenizer of a kind that cannot be read.
    """
    folder = _home(Path(folder))
    config = read_json(folder / "config.json")
    if "image_size" in config:
        wants: dict[str, Any] = {"image_size": pair(config["image_size"]), **_pixels(folder)}
    else:
        wants = {"most_tokens": _most_tokens(folder, config)}
        if (file := _tokenizer_file(folder, config)) is not None:
            wants["tokenizer"] = str(file)
    names = [str(name) for _, name in sorted((int(k), v) for k, v in config.get("id2label", {}).items())]
    if names and names != [f"LABEL_{i}" for i in range(len(names))]:
        wants["classes"] = names
    return wants


def _pixels(folder: Path) -> dict[str, Any]:
    file = folder / "preprocessor_config.json"
    if not file.exists():
        return {}
    said = read_json(file)
    demand(said, do_rescale=True)
    if abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError(f"{file}: rescale_factor must be 1/255, got {said['rescale_factor']}")
    if not said.get("do_normalize", True):
        return {"mean": [0.0], "std": [1.0]}
    return {name: [float(v) for v in said[f"image_{name}"]] for name in ("mean", "std") if f"image_{name}" in said}


def _most_tokens(folder: Path, config: Mapping[str, Any]) -> int:
    """The least of what the model's positions, its tokenizer and, for sentence vectors, its training allow."""
    kind = config.get("model_type")
    limits = []
    if kind in ARCHITECTURES:
        limits.append(ARCHITECTURES[kind].settings(config)[1]["max_len"])
    for name, key in (("tokenizer_config.json", "model_max_length"), ("sentence_bert_config.json", "max_seq_length")):
        if (folder / name).exists():
            limits.append(read_json(folder / name).get(key))
    return int(min(limit for limit in limits if limit))


def _tokenizer_file(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """The tokenizer's JSON file; one made of the vocabulary where there is only that."""
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json"
    settings = folder / "tokenizer_config.json"
    said = read_json(settings) if settings.exists() else {}
    if (folder / "vocab.txt").exists():
        coder = _word_pieces(folder / "vocab.txt", said)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        if config.get("model_type") not in ("gpt2", "roberta"):
            raise ValueError(f"{folder}: how {config.get('model_type')} cuts texts is not known; save tokenizer.json")
        coder = _byte_pairs(folder, said, framed=config.get("model_type") == "roberta")
    elif any((folder / name).exists() for name in ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model")):
        raise ValueError(f"{folder}: its tokenizer is a SentencePiece model; save it as tokenizer.json")
    else:
        return None
    made = Path(tempfile.mkdtemp(prefix="gossamer-")) / "tokenizer.json"
    made.write_text(coder.to_str(), encoding="utf-8")
    return made


def _word_pieces(vocabulary: Path, said: Mapping[str, Any]) -> Tokenizer:
    """BERT's tokenizer: words cut into the longest pieces of the vocabulary, between [CLS] and [SEP]."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    # A token a line; a token may itself be another end of lines (U+2028).
    lines = vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    words = {word: i for i, word in enumerate(lines)}
    special = {name: said.get(f"{name}_token", f"[{name.upper()}]") for name in ("cls", "sep", "unk", "pad", "mask")}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    if lacking := [special[name] for name in ("cls", "sep", "unk") if special[name] not in words]:
        raise ValueError(f"{vocabulary}: lacks {', '.join(lacking)}")
    coder = Tokenizer(models.WordPiece(words, unk_token=special["unk"], max_input_chars_per_word=100))
    coder.add_special_tokens([AddedToken(t, special=True) for t in special.values() if t in words])
    coder.normalizer = normalizers.BertNormalizer(
        lowercase=said.get("do_lower_case", True),
        strip_accents=said.get("strip_accents"),
        handle_chinese_chars=said.get("tokenize_chinese_chars", True),
    )
    coder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = special["cls"], special["sep"]
    coder.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, words[cls]), (sep, words[sep])],
    )
    coder.decoder = decoders.WordPiece()
    return coder


def _byte_pairs(folder: Path, said: Mapping[str, Any], *, framed: bool) -> Tokenizer:
    """GPT-2's tokenizer: bytes merged by rank; RoBERTa's is the same, `framed` by <s> and </s>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    coder = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    words = coder.get_vocab()
    special = [t for t in ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>") if t in words]
    coder.add_special_tokens([AddedToken(t, special=True, lstrip=t == "<mask>") for t in special])
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=said.get("add_prefix_space", False))
    coder.decoder = decoders.ByteLevel()
    if framed:
        ends = (("</s>", words["</s>"]), ("<s>", words["<s>"]))
        coder.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=said.get("add_prefix_space", False))
    return coder


def _weights(folder: Path) -> State:
    for name, read in (("model.safetensors", load_weights), ("pytorch_model.bin", read_checkpoint)):
        index = folder / f"{name}.index.json"
        if index.exists():
            said = read_json(index)
            if not isinstance(said, dict) or not isinstance(said.get("weight_map"), dict):
                raise ValueError(f"{index}: lacks weight_map, which says what lies in which file")
            # Names of shards come from outside; they must not lead out of the folder.
            shards = sorted({Path(part).name for part in said["weight_map"].values()})
            return {k: v for part in shards for k, v in read(folder / part).items()}
        if (folder / name).exists():
            return dict(read(folder / name))
    raise ValueError(f"{folder}: no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards")


def _sentence_settings(folder: Path) -> dict[str, Any]:
    modules = {module["type"].rpartition(".")[2]: module["path"] for module in read_json(folder / "modules.json")}
    unknown = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ValueError(f"{folder}: modules.json has {', '.join(unknown)}; known are Transformer, Pooling, Normalize")
    if "Pooling" not in modules:
        raise ValueError(f"{folder}: modules.json has no Pooling, which makes one vector of a text")
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


def demand(config: Mapping[str, Any], **wanted: Any) -> None:
    """Refuses settings that are not as our model has them; absent ones are.

    Raises:
        ValueError: the first that differs.
    """
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} must be {value!r}, got {config[key]!r}")


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
    demand(config, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    offset = config["pad_token_id"] + 1 if config["model_type"] in ("roberta", "xlm-roberta") else 0
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
    # With sinusoids the table is stored like a learned one.
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


def _vit(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    demand(config, hidden_act="gelu")
    dim = config["hidden_size"]
    patch = set(pair(config["patch_size"]))
    if len(patch) > 1:
        raise ValueError(f"patch_size must be square, got {config['patch_size']}")
    if config.get("head_dim", dim // config["num_attention_heads"]) * config["num_attention_heads"] != dim:
        raise ValueError(f"head_dim must be hidden_size / num_attention_heads, got {config['head_dim']}")
    settings: dict[str, Any] = {
        "dim": dim,
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "patch": patch.pop(),
        # Half a unit more, so that rounding down meets the width.
        "mlp_ratio": (config["intermediate_size"] + 0.5) / dim,
        "img_size": pair(config["image_size"]),
        "in_chans": config["num_channels"],
        "eps": config["layer_norm_eps"],
        "num_classes": classes(config),
    }
    if not config.get("qkv_bias", True):
        settings["mixer_options"] = {"qkv_bias": False}
    if config["model_type"] == "deit":
        taught = any(a.endswith("WithTeacher") for a in config.get("architectures") or ())
        # Without its own classifier the distillation token only takes part in attention.
        settings |= {"distilled": True} if taught else {"registers": 1}
    return "vit_base_patch16_224", settings


def _swin(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    demand(config, hidden_act="gelu", layer_norm_eps=1e-5)
    height, width = pair(config["image_size"])
    patch, window, stages = config["patch_size"], config["window_size"], len(config["depths"])
    multiple = patch * 2 ** (stages - 1) * window
    last = [side // (patch * 2 ** (stages - 1)) for side in (height, width)]
    if min(last) < window:
        raise ValueError(
            f"window_size must fit the last map of {last[0]}x{last[1]} tokens (image_size, patch_size), got {window}"
        )
    settings: dict[str, Any] = {
        "embed_dim": config["embed_dim"],
        "depths": tuple(config["depths"]),
        "heads": tuple(config["num_heads"]),
        "window": window,
        "patch": patch,
        "mlp_ratio": config["mlp_ratio"],
        "ape": config.get("use_absolute_embeddings", False),
        "img_size": (height, width),
        "in_chans": config["num_channels"],
        "pad": bool(height % multiple or width % multiple),
        "num_classes": classes(config),
    }
    if not config.get("qkv_bias", True):
        settings["mixer_options"] = {"qkv_bias": False}
    return "swin_t", settings


def _gpt2(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    demand(config, add_cross_attention=False, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return "gpt2", {
        "dim": config["n_embd"],
        "depth": config["n_layer"],
        "heads": config["n_head"],
        "hidden": config.get("n_inner"),
        "vocab_size": config["vocab_size"],
        "max_len": config["n_positions"],
        "pad_id": _pad_id(config),
        "act": activation(config, "activation_function"),
        "eps": config["layer_norm_epsilon"],
        "tied": config.get("tie_word_embeddings", True),
    }


def _llama(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    kind, most = config["model_type"], config["max_position_embeddings"]
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types must be full_attention, got {sorted(set(config['layer_types']))}")
    window = config.get("sliding_window") if config.get("use_sliding_window", kind == "mistral") else None
    if window is not None and window < most:
        raise ValueError(f"sliding_window must be null or at least {most} (max_position_embeddings), got {window}")
    base, scaling = _rotary(config)
    bias = config.get("attention_bias", False)
    return "llama2_7b", {
        "dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "hidden": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "max_len": most,
        "pad_id": _pad_id(config),
        "act": activation(config, "hidden_act"),
        "eps": config["rms_norm_eps"],
        "rope_base": base,
        "rope_scaling": scaling,
        "qkv_bias": bias or kind == "qwen2",
        "out_bias": bias,
        "mlp_bias": config.get("mlp_bias", False),
        "tied": config.get("tie_word_embeddings", False),
    }


def _rotary(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, which older configs write as `rope_theta` and `rope_scaling`."""
    given = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    demand({**config, **given}, partial_rotary_factor=1.0)
    base, kind = float(given.get("rope_theta", 10000.0)), given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in SCALINGS:
        raise ValueError(f"rope_type must be one of default, {', '.join(SCALINGS)}; got {kind!r}")
    return base, {"kind": kind, **{name: given[name] for name in SCALINGS[kind]}}


def _pad_id(config: Mapping[str, Any]) -> int:
    return max(0, config.get("pad_token_id") or 0)


def _convert_bert(settings: dict[str, Any], state: State) -> State:
    rows = settings["max_len"]
    positions: Tensor = state.pop("positions")
    table = positions[len(positions) - rows :]  # RoBERTa's first rows are for padding
    if "types" in state:
        table = table + state.pop("types")[0]
    state["stem.positions"] = table[None]
    return fuse_qkv(state)


def _convert_vit(settings: dict[str, Any], state: State) -> State:
    tokens = [state.pop(k) for k in ("stem.cls_token", "stem.dist_token") if k in state]
    state["stem.tokens"] = torch.cat(tokens, 1)
    return fuse_qkv(state)


def _convert_swin(settings: dict[str, Any], state: State) -> State:
    table = state.get("stem.1.table")
    if table is not None:
        grid = tuple(-(-side // settings["patch"]) for side in settings["img_size"])
        state["stem.1.table"] = table.unflatten(1, grid)
    return fuse_qkv(state)


def _convert_gpt2(settings: dict[str, Any], state: State) -> State:
    state["stem.positions"] = state.pop("stem.positions")[None]
    for key in state:
        if re.search(r"\.(qkv|proj|fc1|fc2)\.weight$", key):  # stored as inputs by outputs
            state[key] = state[key].t().contiguous()
    return _tie(settings, state)


def _convert_llama(settings: dict[str, Any], state: State) -> State:
    return _tie(settings, fuse_qkv(state))


def _tie(settings: dict[str, Any], state: State) -> State:
    if settings["tied"]:
        state["head.fc.weight"] = state["stem.words.weight"]
    return state


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

_VISION: Rules = [
    (r"^(vit|deit|swin)\.", ""),
    (r"\.attention\.(self|attention)\.(q|k|v)(uery|ey|alue)\.", r".mixer.\2."),
    (r"\.attention\.(q|k|v)_proj\.", r".mixer.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".mixer.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head.fc."),
    (r"^distillation_classifier\.", "head.distilled."),
]

_VIT_RULES: Rules = [
    *_VISION,
    (r"^embeddings\.cls_token$", "stem.cls_token"),
    (r"^embeddings\.distillation_token$", "stem.dist_token"),
    (r"^embeddings\.position_embeddings$", "stem.positions"),
    (r"^embeddings\.patch_embeddings\.projection\.", "stem.embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
]

_SWIN_RULES: Rules = [
    *_VISION,
    (r"^embeddings\.patch_embeddings\.projection\.", "stem.0.proj."),
    (r"^embeddings\.norm\.", "stem.0.norm."),
    (r"^embeddings\.position_embeddings$", "stem.1.table"),
    (r"^encoder\.layers\.(\d+)\.blocks\.", r"stages.\1."),
    (r"^encoder\.layers\.(\d+)\.downsample\.", r"merges.\1."),
    (r"\.attention\.(self|relative_position_bias)\.relative_position_bias_table$", ".mixer.bias_table"),
]

_GPT2_RULES: Rules = [
    (r"^transformer\.", ""),
    (r"^wte\.", "stem.words."),
    (r"^wpe\.weight$", "stem.positions"),
    (r"^h\.", "blocks."),
    (r"\.attn\.(bias|masked_bias)$", None),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.c_attn\.", ".mixer.qkv."),
    (r"\.attn\.c_proj\.", ".mixer.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^ln_f\.", "norm."),
    (r"^lm_head\.", "head.fc."),
]

_LLAMA_RULES: Rules = [
    (r"^model\.", ""),
    (r"^embed_tokens\.", "stem.words."),
    (r"^layers\.", "blocks."),
    (r"\.self_attn\.(q|k|v)_proj\.", r".mixer.\1."),
    (r"\.self_attn\.o_proj\.", ".mixer.proj."),
    (r"\.mlp\.gate_proj\.", ".mlp.gate."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"^lm_head\.", "head.fc."),
]

_TEXT = ("Model", "ForSequenceClassification", "ForMaskedLM", "ForPreTraining")
_IMAGE = ("Model", "ForImageClassification", "ForMaskedImageModeling")
_DECODER = ("Model", "ForCausalLM")

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(_bert, _BERT_RULES, _convert_bert, _TEXT),
    "roberta": Architecture(_bert, _BERT_RULES, _convert_bert, _TEXT),
    "xlm-roberta": Architecture(_bert, _BERT_RULES, _convert_bert, _TEXT),
    "distilbert": Architecture(_distilbert, _BERT_RULES, _convert_bert, _TEXT),
    "vit": Architecture(_vit, _VIT_RULES, _convert_vit, _IMAGE),
    "deit": Architecture(_vit, _VIT_RULES, _convert_vit, (*_IMAGE, "WithTeacher")),
    "swin": Architecture(_swin, _SWIN_RULES, _convert_swin, _IMAGE),
    "gpt2": Architecture(_gpt2, _GPT2_RULES, _convert_gpt2, _DECODER),
    "llama": Architecture(_llama, _LLAMA_RULES, _convert_llama, _DECODER),
    "mistral": Architecture(_llama, _LLAMA_RULES, _convert_llama, _DECODER),
    "qwen2": Architecture(_llama, _LLAMA_RULES, _convert_llama, _DECODER),
}
