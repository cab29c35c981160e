"""The catalogue lists every paper, answers by every name, and agrees with the files it points to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer import catalogue
from gossamer.catalogue import read_system

SOURCE = Path(catalogue.__file__).parents[2]


def test_every_one_of_the_144_papers_is_listed() -> None:
    papers = [s for s in catalogue.systems() if s.paper]
    assert len(papers) == 144
    assert len({s.id for s in papers}) == 144
    assert len({s.arxiv for s in papers}) == 144


def test_papers_have_the_facts_a_reader_needs() -> None:
    for s in catalogue.systems():
        assert s.title, s.slug
        assert s.task, s.slug
        assert s.licence, s.slug
        assert 2015 < s.year < 2027, s.slug
        assert s.evidence in ("code", "docs", "memory"), s.slug


def test_no_two_systems_answer_to_one_name() -> None:
    names = [name for s in catalogue.systems() for name in {s.slug, *s.variants}]
    assert len(names) == len(set(names))
    published = [row.name for s in catalogue.systems() for row in s.published]
    assert len(published) == len(set(published))


def test_what_is_built_names_a_module_that_exists_and_variants() -> None:
    for s in catalogue.systems():
        if s.status != "planned":
            assert s.module is not None, s.slug
            assert SOURCE.joinpath(*s.module.split(".")).with_suffix(".py").exists(), s.slug
            assert s.variants or s.mixers or s.passes or s.kind == "survey", s.slug


def test_published_figures_are_plausible() -> None:
    for s in catalogue.systems():
        for row in s.published:
            assert row.params_m is None or 0 <= row.params_m < 1e6, row
            assert row.macs_g is None or 0 < row.macs_g < 1e6, row
            assert row.input is None or row.input, row


def test_a_system_is_found_by_slug_in_either_spelling_and_by_variant() -> None:
    assert catalogue.find("compact-transformers") is catalogue.find("compact_transformers")
    assert catalogue.find("swin_t").slug == "swin"


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    with pytest.raises(ValueError, match=r"'swinn_t'.*swin_t"):
        catalogue.find("swinn_t")
    with pytest.raises(ValueError, match="gossamer list"):
        catalogue.find("qqqqqqqqqqq")


def test_published_figures_of_swin_t_are_those_of_its_paper() -> None:
    row = catalogue.published("swin_t")
    assert row is not None
    assert (row.params_m, row.macs_g, row.input) == (28.29, 4.49, [3, 224, 224])
    assert catalogue.published("swin") is None


def test_search_holds_every_filter_at_once() -> None:
    found = catalogue.search(kind="backbone", text="window")
    assert "swin" in [s.slug for s in found]
    assert all(s.kind == "backbone" for s in found)
    assert len(found) < len(catalogue.search(kind="backbone"))


def test_search_takes_either_spelling_of_a_task() -> None:
    slugs = {s.slug for s in catalogue.search(task="language-modelling")}
    assert slugs == {s.slug for s in catalogue.search(task="Language modeling")}
    assert "gam" in slugs


def test_search_refuses_a_kind_or_status_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*backbone.*'backbones'"):
        catalogue.search(kind="backbones")
    with pytest.raises(ValueError, match=r"status must be one of planned, built, reconstruction; got 'done'"):
        catalogue.search(status="done")


def test_a_file_with_a_wrong_key_is_named(tmp_path: Path) -> None:
    good = json.loads((Path(catalogue.__file__).parent / "systems" / "swin.json").read_text())
    path = tmp_path / "swin.json"
    for change, says in (
        ({"flops": 1}, "unknown keys \\['flops'\\]"),
        ({"slug": "swim"}, "slug is 'swim'"),
        ({"status": "done"}, "status must be one of"),
        ({"published": [{"name": "x"}]}, "published:"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=says):
            read_system(path)


def test_the_catalogue_needs_the_standard_library_only() -> None:
    code = (
        "import sys, gossamer.catalogue as c; c.systems(); "
        "print(*sorted({'torch', 'numpy', 'yaml', 'typer', 'rich', 'pandas'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []
