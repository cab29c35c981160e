"""Token-reduction methods as data: every axis is filled, every link leads to a pass, every question has one answer."""

import json

import pytest
from typer.testing import CliRunner

from gossamer.catalogue.token_reduction import AXES, count_cells, find_reductions, read_reductions, reductions
from gossamer.cli import app

# The representative methods of the position paper's cells, by the names they have here.
NAMED = {
    "vision": "DynamicViT, IA-RED2, EViT, A-ViT, ATS, SPViT, Evo-ViT, Zero-TPrune, Cropr, ToMe, Token Pooling, PYRA, "
    "ATC, PiToMe, vid-TLDR, LookupViT, Token Compensator, ToMeSD, ToCa, AsymRnR, DiffCR, SparseDiT",
    "language": "PoWER-BERT, TR-BERT, Length-Adaptive Transformer, LTP, AdapLeR, Pyramid-BERT, Dynamic token pooling, "
    "Magic Pyramid, Gist tokens, AutoCompressor, ICAE, LLMLingua, LazyLLM, Sentinel tokens, "
    "Token-budget-aware reasoning, CoT-Valve, A*-Thought",
    "vision-language": "PuMer, TRIPS, BUS, FastV, p-MoD, TokenPacker, VASparse",
}


def test_every_method_the_cells_name_is_listed_under_its_modality():
    for modality, names in NAMED.items():
        assert set(names.split(", ")) <= {r.name for r in find_reductions(modality=modality)}
    assert all(find_reductions(modality=modality) for modality in ("state-space", "hardware"))


def test_every_link_leads_to_a_pass_and_every_such_pass_is_linked_once():
    from gossamer.shrink.token_comparison import token_passes

    linked = sorted(r.covered_by for r in reductions() if r.covered_by)
    assert linked == token_passes()


def test_every_record_has_all_axes_and_a_year_that_can_be():
    for r in reductions():
        assert all(getattr(r, axis) in allowed for axis, allowed in AXES.items()), r
        assert r.year is None or 2019 < r.year < 2027, r
        assert r.venue is None or r.year is not None, r


def test_questions_have_one_sorted_answer():
    assert [r.name for r in find_reductions(modality="vision", operation="merging", covered=True)] == ["PYRA", "ToMe"]
    assert [r.name for r in find_reductions(covered=True)] == ["BUS", "EET", "IA-RED2", "p-MoD", "PYRA", "ToMe"]
    assert [r.name for r in find_reductions(signal="RL policy")] == ["IA-RED2", "TR-BERT"]
    assert find_reductions(modality="vision") == find_reductions(modality="vision")
    for axis, allowed in AXES.items():
        parts = [find_reductions(**{axis: value}) for value in allowed]
        assert sorted((r for part in parts for r in part), key=lambda r: r.name.casefold()) == list(reductions())
    assert not set(find_reductions(covered=True)) & set(find_reductions(covered=False))


@pytest.mark.parametrize("axis", AXES)
def test_what_an_axis_does_not_have_is_refused_with_what_it_has(axis):
    with pytest.raises(ValueError, match=f"{axis} must be one of {AXES[axis][0]}, .*got 'melting'"):
        find_reductions(**{axis: "melting"})
    with pytest.raises(ValueError, match=r"axis must be one of modality, .*got 'colour'"):
        find_reductions(colour="red")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"signal": "magic"}, "method 'ToMe': signal must be one of attention"),
        ({"goal": None}, "goal must be one of efficiency"),
        ({"colour": "red"}, "keys must be"),
        ({"name": "EViT"}, "names must be unique, got EViT twice"),
    ],
)
def test_a_record_that_does_not_fit_is_not_loaded(change, says, tmp_path):
    rows = [vars(r) for r in reductions() if r.name in ("ToMe", "EViT")]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(rows))
    assert [r.name for r in read_reductions(path)] == ["EViT", "ToMe"]
    path.write_text(json.dumps([rows[0], {**rows[1], **change}]))
    with pytest.raises(ValueError, match=says):
        read_reductions(path)


def test_the_cells_hold_all_methods_and_are_printed():
    cells = count_cells(reductions())
    assert sum(count for *_, count, _ in cells) == len(reductions())
    assert ("vision", "merging", 7, 2) in cells
    assert count_cells([]) == []
    shown = CliRunner().invoke(app, ["list", "--reductions", "--text", "tome"])
    assert shown.exit_code == 0, shown.output
    assert "ToMeSD" in shown.output
    assert "PYRA" not in shown.output
    lines = [line.split() for line in CliRunner().invoke(app, ["list", "--reductions"]).output.splitlines()]
    assert ["vision", "merging", "7", "2"] in lines
    rows = json.loads(CliRunner().invoke(app, ["list", "--reductions", "--json"]).stdout)
    assert len(rows) == len(reductions())
