"""The surveys' techniques as data: every link leads somewhere, every filter answers, every rule holds."""

import importlib

import pytest

from gossamer import catalogue
from gossamer.catalogue.techniques import (
    _read,
    conflict,
    counts,
    find_techniques,
    recommend,
    techniques,
)

# What the two surveys name, by heading.
FASTER_LIGHTER = """checkpointing, reversible, data parallelism, model and pipeline, micro-batches, ALBERT, Universal
Transformer, embedding factorisation, magnitude, heads, layers, lottery ticket, LayerDrop, DistilBERT, TinyBERT,
MobileBERT, mixed precision, Q8BERT, TernaryBERT, Switch, ELECTRA, Evolved Transformer, HAT, adaptive computation time,
depth-adaptive, early exit, Transformer-XL, Compressive Transformer, Memory-augmented, Star-Transformer, Sparse
Transformer, LogSparse, Cascade, BlockBERT, Longformer, ETC, BigBird, Sinkhorn, Reformer, Routing Transformer, Clustered
attention, adaptive span, Linformer, Nystroemformer, Synthesizer, Funnel, linear transformer, Performer, random feature
attention, FNet, lightweight convolution, dynamic convolution"""
INFERENCE = """DistilBERT, MiniLM, MobileBERT, TinyBERT general, PKD, TinyBERT task, DynaBERT, logits, hidden states,
attention maps, value relations, Gram, DeiT token, TinyViT, manifold distillation, magnitude, movement, Taylor/SNIP,
optimal BERT surgeon, N:M, block, heads, FFN neurons, layers, PoWER-BERT, LTP, DynamicViT, EViT, ToMe, Fisher masks,
SparseGPT, one-shot, iterative, LayerDrop, VTP, UVC, NViT, SAViT, PTQ4ViT, FQ-ViT, RepQ-ViT, ZeroQuant, SmoothQuant,
GPTQ, Q8BERT, I-BERT, TernaryBERT, BinaryBERT/BiBERT, Q-ViT, I-ViT, Q-BERT, Hessian, LLM.int8, outlier suppression,
Evolved Transformer, Primer, HAT, NAS-BERT, AutoFormer, ViTAS, GLiT, BossNAS, TF-TAS, latency models, FlexiBERT,
Longformer, Linformer, Performer, MobileViT, EdgeViT, EfficientFormer, LeViT, NextViT, ALBERT, low-rank, token pooling,
pipelining/tiling, operator fusion, KV reuse, sparsity support, approximate softmax, systolic arrays, in-memory compute,
A3, ELSA, SpAtten, Sanger, DOTA, FTRANS, OPTIMUS, EdgeBERT, ViTCoD, HeatViT, VAQF, Auto-ViT-Acc, Energon"""


def test_every_survey_named_is_one_of_the_catalogue_and_lists_techniques():
    surveys = {s for t in techniques() for s in t.surveys}
    assert surveys == {
        "faster-lighter-survey",
        "inference-optimization-survey",
        "low-power-dl-survey",
        "token-reduction-position",
    }
    assert all(catalogue.find(s).paper for s in surveys)
    assert all(len(find_techniques(survey=s)) >= 8 for s in surveys)


@pytest.mark.parametrize(
    ("survey", "names"), [("faster-lighter-survey", FASTER_LIGHTER), ("inference-optimization-survey", INFERENCE)]
)
def test_every_name_of_the_surveys_is_listed_under_a_family(survey, names):
    listed = " | ".join(" | ".join((t.name, *t.examples)) for t in find_techniques(survey=survey)).lower()
    missing = [name for name in " ".join(names.split()).split(", ") if name.lower() not in listed]
    assert missing == []


def test_what_does_a_technique_or_a_method_exists():
    from gossamer.cli import app
    from gossamer.mixers import list_mixers
    from gossamer.shrink.base import passes

    names = {
        "pass": set(passes()),
        "mixer": set(list_mixers()),
        "model": {
            name
            for s in catalogue.systems()
            if s.status != "planned"
            for name in (s.slug.replace("-", "_"), *s.variants)
        },
        "search": {"efficientformer"},
        "step": {"fold_batch_norm"},
    }
    commands = {c.name for c in app.registered_commands} | {"int8"}
    for t in techniques():
        for by in (*t.by, *filter(None, t.examples.values())):
            kind, colon, name = by.partition(":")
            if kind == "trunk":
                importlib.import_module(f"gossamer.trunks.{name}")
            else:
                assert name in names[kind] if colon else by in commands, (t.name, by)
        assert set(filter(None, t.examples.values())) <= {*t.by}, t.name
        assert len(t.run()) == len(t.by)


def test_every_pass_of_a_paper_is_named_by_a_technique():
    from gossamer.shrink.base import passes

    named = {name for t in techniques() for name in t.passes()}
    assert set(passes()) <= named


def test_counts_tell_what_is_built_from_what_is_not():
    found = counts()
    assert found["techniques"] == len(techniques()) > found["techniques_built"] > 40
    assert found["methods"] > 180
    assert found["methods"] > found["methods_built"] > 70
    pruning = counts(find_techniques(family="structured pruning"))
    assert pruning["techniques"] == pruning["techniques_built"] >= 5
    assert pruning["methods"] > pruning["methods_built"]  # LayerDrop is listed and not built
    assert all(t.subfamily and t.complexity and t.when and t.examples for t in techniques())


def test_filters_hold_together_and_refuse_what_no_technique_has():
    found = find_techniques(family="token reduction", survey="token-reduction-position", covered=True)
    assert [t.name for t in found][:2] == ["similarity merging", "merging with adaptation"]
    assert all(t.covered for t in found)
    exact = [t for t in find_techniques(training="none") if t.exact]
    assert "Pre-LN to Pre-RMSNorm" in [t.name for t in exact]
    assert [t.name for t in find_techniques(text="reformer")] == ["learned sparse attention", "reversible layers"]
    with pytest.raises(ValueError, match="family must be one of"):
        find_techniques(family="magic")


def test_a_record_with_an_unknown_key_or_link_is_refused():
    import dataclasses

    row = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(techniques()[0]).items()}
    assert _read(row) == techniques()[0]
    with pytest.raises(ValueError, match="keys must be"):
        _read({**row, "cost": 3})
    with pytest.raises(ValueError, match="by must be one of"):
        _read({**row, "by": ["spell:abracadabra"]})
    with pytest.raises(ValueError, match="training must be one of"):
        _read({**row, "training": "endless"})
    assert len(dataclasses.fields(techniques()[0])) == len(row)


def test_quantising_and_teaching_agree_and_linformer_does_not_decode():
    by = {t.name: t for t in techniques()}
    assert not conflict(by["int8, dynamic"], by["logit distillation"])
    assert "later tokens" in conflict(by["low-rank attention"], by["key/value reuse"])
    assert "number format" in conflict(by["int8, dynamic"], by["weights below 8 bits"])
    assert "place of the attention" in conflict(by["kernel attention"], by["low-rank attention"])
    assert not conflict(by["kernel attention"], by["fewer key/value heads"])
    assert "fixed graph" in conflict(by["operator fusion and tiling"], by["early exit by saturation"])
    for a in techniques():
        assert not conflict(a, a)
        assert all(conflict(a, b) == conflict(b, a) for b in techniques())


@pytest.mark.parametrize("tokens", [1, 512, 513, 4096])
@pytest.mark.parametrize("phase", ["inference", "training"])
@pytest.mark.parametrize("retrain", ["none", "short", "full"])
def test_a_decoder_is_never_offered_what_looks_ahead_and_every_offer_can_be_run(tokens, phase, retrain):
    found = recommend(tokens=tokens, decoder=True, phase=phase, retrain=retrain)
    assert found == recommend(tokens=tokens, decoder=True, phase=phase, retrain=retrain)
    assert all(p.technique.causal and p.reason and p.run for p in found)
    assert retrain == "full" or all(p.technique.training != "full" for p in found)
    names = {p.technique.name for p in recommend(tokens=tokens, phase=phase, retrain=retrain)}
    assert {p.technique.name for p in found} <= names
    if phase == "inference" and retrain == "full":
        assert {"low-rank attention", "similarity merging"} <= names - {p.technique.name for p in found}


def test_short_texts_get_general_methods_first_and_long_ones_get_those_of_attention():
    few = [p.technique.family == "other mixing" for p in recommend(tokens=512, retrain="full")]
    many = [p.technique.family == "other mixing" for p in recommend(tokens=513, retrain="full")]
    assert any(few)
    assert few == sorted(few)
    assert many == sorted(many, reverse=True)
    last = recommend(tokens=100, retrain="full")[-1]
    assert "only 100 tokens" in last.reason


def test_where_answers_must_stay_the_same_only_exact_techniques_are_offered():
    exact = recommend(tokens=2048, exact=True, retrain="full")
    assert "key/value reuse" in {p.technique.name for p in exact}
    assert all(p.technique.exact for p in exact)
    training = {p.technique.name for p in recommend(tokens=2048, exact=True, phase="training")}
    assert training == {"gradient checkpointing", "data parallelism"}
    assert "int8, dynamic" in {p.technique.name for p in recommend(tokens=128, retrain="none")}


@pytest.mark.parametrize("wrong", [{"phase": "dreaming"}, {"retrain": "some"}, {"reduces": "boredom"}, {"tokens": 0}])
def test_an_unknown_constraint_is_refused_with_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=r"must be (one of .*(training|short|macs)|at least 1)"):
        recommend(**{"tokens": 100, **wrong})
