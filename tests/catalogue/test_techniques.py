"""The surveys' techniques as data: every link leads somewhere, every filter answers."""

import pytest

from gossamer import catalogue
from gossamer.catalogue.techniques import find_techniques, techniques


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


def test_what_does_a_technique_exists():
    from gossamer.cli import app
    from gossamer.mixers import list_mixers
    from gossamer.shrink.base import passes

    names = {
        "pass": set(passes()),
        "mixer": set(list_mixers()),
        "model": {name for s in catalogue.systems() if s.status != "planned" for name in (s.slug, *s.variants)},
        "search": {"efficientformer"},
        "step": {"fold_batch_norm"},
    }
    commands = {c.name for c in app.registered_commands} | {"int8", "teaching"}
    for t in techniques():
        for by in t.by:
            kind, colon, name = by.partition(":")
            assert name in names[kind] if colon else by in commands, (t.name, by)


def test_every_pass_of_a_paper_is_named_by_a_technique():
    from gossamer.shrink.base import passes

    named = {name for t in techniques() for name in t.passes()}
    assert set(passes()) <= named


def test_filters_hold_together_and_refuse_what_no_technique_has():
    found = find_techniques(family="token reduction", survey="token-reduction-position", covered=True)
    assert [t.name for t in found][:2] == ["similarity merging", "merging with adaptation"]
    assert all(t.covered for t in found)
    exact = [t for t in find_techniques(training="none") if t.exact]
    assert "Pre-LN to Pre-RMSNorm" in [t.name for t in exact]
    with pytest.raises(ValueError, match="family must be one of"):
        find_techniques(family="magic")
