"""Folders of Hugging Face transformers: the outputs of that library's own model, or a refusal that says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer
from gossamer.io import load_weights, save_weights
from gossamer.models.transformers import is_transformers_folder, preprocessing, read_transformers

hf = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT: dict[str, Any] = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, num_labels=3
)
IMAGE: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=45, patch_size=4, num_labels=5
)
DECODER: dict[str, Any] = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=24,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}
SWIN: dict[str, Any] = dict(
    image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
)
GPT2: dict[str, Any] = dict(vocab_size=60, n_positions=24, n_embd=32, n_layer=2, n_head=4, n_inner=40)


def saved(model: Any, folder: Path, **options: Any) -> Any:
    """A random model of theirs, every weight drawn anew (norms and biases too), in a folder."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.eval().save_pretrained(folder, **options)
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def words(pad: int = 0) -> Tensor:
    ids = torch.randint(5, 60, (3, 11))
    ids[1, 7:] = pad
    return ids


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
def test_text_classifiers_answer_as_theirs_do(kind: str, tmp_path: Path) -> None:
    names = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "vocab_size": 60, "num_labels": 3}
    config = getattr(hf, f"{kind}Config")(**(names if kind == "DistilBert" else TEXT))
    theirs = saved(getattr(hf, f"{kind}ForSequenceClassification")(config), tmp_path)
    ours, ids = read_transformers(tmp_path), words(config.pad_token_id)
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=(ids != config.pad_token_id).long()).logits
        close(ours(ids), want)
    gossamer.save(ours, tmp_path / "ours")
    assert torch.equal(gossamer.load(tmp_path / "ours")(ids), ours(ids))


def test_a_plain_encoder_becomes_the_mean_of_its_tokens_with_the_first_segments_embedding(tmp_path: Path) -> None:
    theirs = saved(hf.BertModel(hf.BertConfig(**TEXT)), tmp_path)
    ours, ids = read_transformers(tmp_path), words()
    mask = ids != 0
    with torch.no_grad():
        tokens = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        close(ours.encode(ids)[0][mask], tokens[mask])
        mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        close(ours(ids), torch.nn.functional.normalize(mean, dim=-1))


@pytest.mark.parametrize(("mode", "normalize"), [("cls_token", False), ("mean_tokens", True), ("max_tokens", False)])
def test_a_sentence_transformers_folder_gives_its_sentence_vector(mode: str, normalize: bool, tmp_path: Path) -> None:
    theirs = saved(hf.BertModel(hf.BertConfig(**TEXT)), tmp_path)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [{"type": f"sentence_transformers.models.{k}", "path": f"{i}_{k}"} for i, k in enumerate(kinds)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    ids = words()
    with torch.no_grad():
        tokens = theirs(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        valid = (ids != 0)[..., None]
        want = {
            "cls_token": tokens[:, 0],
            "mean_tokens": (tokens * valid).sum(1) / valid.sum(1),
            "max_tokens": tokens.masked_fill(~valid, -1e9).amax(1),
        }[mode]
        want = torch.nn.functional.normalize(want, dim=-1) if normalize else want
        close(read_transformers(tmp_path)(ids), want)
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"type": "x.models.Dense", "path": "3"}]))
    with pytest.raises(ValueError, match=r"modules\.json has Dense"):
        read_transformers(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin", "bin in shards"])
def test_weights_are_read_from_every_form_they_are_kept_in(form: str, tmp_path: Path) -> None:
    theirs = saved(hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    if form != "safetensors":
        state = load_weights_of(shards)
        for file in [*shards, tmp_path / "model.safetensors.index.json"]:
            file.unlink()
        if form == "bin":
            torch.save(state, tmp_path / "pytorch_model.bin")
        else:
            keys = sorted(state)
            where = {k: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, k in enumerate(keys)}
            for name in set(where.values()):
                torch.save({k: state[k] for k in keys if where[k] == name}, tmp_path / name)
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    ids = words()
    with torch.no_grad():
        close(read_transformers(tmp_path)(ids), theirs(input_ids=ids, attention_mask=(ids != 0).long()).logits)


def load_weights_of(files: list[Path]) -> dict[str, Tensor]:
    return {k: v.clone() for file in files for k, v in load_weights(file).items()}


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel", "DeiTForImageClassification", "DeiTTaught"])
def test_vision_transformers_answer_as_theirs_do(kind: str, tmp_path: Path) -> None:
    config = (hf.DeiTConfig if kind.startswith("DeiT") else hf.ViTConfig)(
        **IMAGE, image_size=[12, 20], qkv_bias=kind != "ViTForImageClassification", layer_norm_eps=1e-3
    )
    kind = kind.replace("Taught", "ForImageClassificationWithTeacher")
    theirs = saved(getattr(hf, kind)(config), tmp_path)
    ours, x = read_transformers(tmp_path), torch.randn(2, 3, 12, 20)
    with torch.no_grad():
        said = theirs(x)
        close(ours(x), said.last_hidden_state[:, 0] if kind == "ViTModel" else said.logits)
    gossamer.save(ours, tmp_path / "ours")
    assert torch.equal(gossamer.load(tmp_path / "ours")(x), ours(x))


@pytest.mark.parametrize("changes", [{}, {"use_absolute_embeddings": True}, {"image_size": 36, "qkv_bias": False}])
def test_swin_answers_as_theirs_does(changes: dict[str, Any], tmp_path: Path) -> None:
    config = hf.SwinConfig(**{**SWIN, **changes})
    theirs = saved(hf.SwinForImageClassification(config), tmp_path)
    ours, x = read_transformers(tmp_path), torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        close(ours(x), theirs(x).logits)
    gossamer.save(ours, tmp_path / "ours")
    assert torch.equal(gossamer.load(tmp_path / "ours")(x), ours(x))


DECODERS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "activation_function": "relu"}),
    "llama": ("Llama", DECODER),
    "llama biased": ("Llama", {**DECODER, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3 scaling": ("Llama", {**DECODER, "rope_parameters": LLAMA3}),
    "linear scaling": ("Llama", {**DECODER, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", {**DECODER, "head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", {**DECODER, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", DECODERS)
def test_language_models_answer_as_theirs_do(name: str, tmp_path: Path) -> None:
    kind, settings = DECODERS[name]
    config = getattr(hf, f"{kind}Config")(**settings)
    theirs = saved(getattr(hf, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config), tmp_path)
    ours, ids = read_transformers(tmp_path), torch.randint(0, 60, (2, 19))
    with torch.no_grad():
        want = theirs(input_ids=ids).logits
        assert want.abs().max() > 0.5
        torch.testing.assert_close(ours(ids), want, atol=1e-5 * float(want.abs().max()), rtol=1e-5)
    gossamer.save(ours, tmp_path / "ours")
    again = gossamer.load(tmp_path / "ours")
    assert torch.equal(again(ids), ours(ids))
    assert (again.head.fc.weight is again.stem.words.weight) == bool(config.tie_word_embeddings)


def test_older_configs_with_rope_theta_and_rope_scaling_mean_the_same(tmp_path: Path) -> None:
    theirs = saved(hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, rope_parameters=LLAMA3)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = {k: v for k, v in config.pop("rope_parameters").items() if k != "rope_theta"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 100.0, "rope_scaling": scaling}))
    ids = torch.randint(0, 60, (2, 19))
    with torch.no_grad():
        want = theirs(input_ids=ids).logits
        torch.testing.assert_close(read_transformers(tmp_path)(ids), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("bert", {"model_type": "t5"}, "model_type must be one of bert, .*'t5'"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ("bert", {"hidden_act": "mish"}, "hidden_act must be one of gelu"),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification is not supported"),
        ("bert", {"hidden_size": 36}, "weights do not fit bert_base"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification is not supp"),
        ("llama", {"model_type": "mistral", "sliding_window": 8}, "sliding_window must be null or at least 24"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type must be one of default"),
        ("llama", {"layer_types": ["sliding_attention"]}, "layer_types must be full_attention"),
    ],
)
def test_what_we_cannot_express_is_refused_by_name(
    kind: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = {
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    }[kind]()
    saved(made, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, **config}))
    with pytest.raises(ValueError, match=message):
        read_transformers(tmp_path)


def test_a_window_larger_than_the_last_map_is_refused(tmp_path: Path) -> None:
    saved(hf.SwinForImageClassification(hf.SwinConfig(**{**SWIN, "image_size": 32})), tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, "image_size": 12}))
    with pytest.raises(ValueError, match="window_size must fit the last map of 3x3"):
        read_transformers(tmp_path)


def test_a_folder_without_weights_or_with_missing_ones_says_so(tmp_path: Path) -> None:
    assert not is_transformers_folder(tmp_path)
    saved(hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), tmp_path)
    assert is_transformers_folder(tmp_path)
    state = {k: v.clone() for k, v in load_weights(tmp_path / "model.safetensors").items()}
    del state["bert.encoder.layer.1.output.dense.weight"]
    save_weights(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['blocks\.1\.mlp\.fc2\.weight'\]"):
        read_transformers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        read_transformers(tmp_path)


def test_preprocessing_of_images_is_what_the_folder_says(tmp_path: Path) -> None:
    config = hf.ViTConfig(**{**IMAGE, "num_labels": 2}, image_size=[12, 20], id2label={0: "cat", 1: "dog"})
    saved(hf.ViTForImageClassification(config), tmp_path)
    assert preprocessing(tmp_path) == {"image_size": (12, 20), "classes": ["cat", "dog"]}
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "do_normalize": True, "do_rescale": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    found = preprocessing(tmp_path)
    assert (found["mean"], found["std"]) == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    for wrong, words in (({"do_rescale": False}, "do_rescale must be True"), ({"rescale_factor": 2}, "must be 1/255")):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**said, **wrong}))
        with pytest.raises(ValueError, match=words):
            preprocessing(tmp_path)


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "##s", "good", "caf", "##e", "!", "the", "un"]
TEXTS = ["The films, a good CAFÉ!", "un good", "", "[MASK] film"]


def test_a_vocabulary_of_word_pieces_becomes_the_tokenizer_that_bert_has(tmp_path: Path) -> None:
    saved(hf.BertModel(hf.BertConfig(**TEXT)), tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 40}))
    found = preprocessing(tmp_path)
    assert found["most_tokens"] == 40
    same_tokens(found["tokenizer"], hf.BertTokenizer(str(tmp_path / "vocab.txt")))


def test_a_token_that_other_readers_end_lines_at_moves_none_behind_it(tmp_path: Path) -> None:
    saved(hf.BertModel(hf.BertConfig(**TEXT)), tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join([*PIECES[:5], "\u2028", *PIECES[5:]]) + "\n", encoding="utf-8")
    same_tokens(preprocessing(tmp_path)["tokenizer"], hf.BertTokenizer(str(tmp_path / "vocab.txt")))


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_merges_become_the_tokenizer_that_gpt2_and_roberta_have(kind: str, tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    if kind == "gpt2":
        saved(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), tmp_path)
    else:
        saved(hf.RobertaModel(hf.RobertaConfig(**TEXT, max_position_embeddings=34)), tmp_path)
    trained = ByteLevelBPETokenizer()
    special = ["<|endoftext|>"] if kind == "gpt2" else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(["a good film", "the good film"], vocab_size=290, special_tokens=special)
    trained.save_model(str(tmp_path))
    found = preprocessing(tmp_path)
    assert found["most_tokens"] == (24 if kind == "gpt2" else 32)
    theirs = hf.GPT2Tokenizer if kind == "gpt2" else hf.RobertaTokenizer
    same_tokens(found["tokenizer"], theirs.from_pretrained(tmp_path))


def same_tokens(path: str, theirs: Any) -> None:
    from tokenizers import Tokenizer

    ours = Tokenizer.from_file(path)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


def test_a_tokenizer_file_is_taken_as_it_is_and_a_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    saved(hf.BertModel(hf.BertConfig(**TEXT)), tmp_path)
    assert "tokenizer" not in preprocessing(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(ValueError, match="SentencePiece"):
        preprocessing(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert preprocessing(tmp_path)["tokenizer"] == str(tmp_path / "tokenizer.json")


def test_merges_of_a_model_that_cuts_words_in_its_own_way_are_refused(tmp_path: Path) -> None:
    saved(hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)), tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"how qwen2 cuts texts is not known; save tokenizer\.json"):
        preprocessing(tmp_path)


def test_a_sentence_folder_may_hold_its_model_in_a_folder_below(tmp_path: Path) -> None:
    theirs = saved(hf.BertModel(hf.BertConfig(**TEXT)), tmp_path / "0_Transformer")
    parts = [("Transformer", "0_Transformer"), ("Pooling", "1_Pooling")]
    modules = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in parts]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (tmp_path / "0_Transformer" / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    assert is_transformers_folder(tmp_path)
    assert preprocessing(tmp_path).keys() == {"most_tokens", "tokenizer"}
    ids = words()
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[:, 0]
        close(read_transformers(tmp_path)(ids), want)
    (tmp_path / "modules.json").write_text(json.dumps(modules[:1]))
    with pytest.raises(ValueError, match="has no Pooling"):
        read_transformers(tmp_path)


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    saved(hf.BertModel(hf.BertConfig(**TEXT)), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks weight_map"):
        read_transformers(tmp_path)
