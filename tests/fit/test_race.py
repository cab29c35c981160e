"""Who goes on in the race, what is tried next, and what becomes of trials whose worker died. Nothing is trained."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from gossamer.data.builtin import toy_images, toy_series
from gossamer.fit import race as module
from gossamer.fit.candidates import Candidate
from gossamer.fit.finish import overfits
from gossamer.fit.race import DEFAULT_LR, LR, Race, base_settings, by_family, ranking, state_file, system_lr
from gossamer.models.registry import SystemEntry
from gossamer.tasks import create_task

NAMES = ("convnext-s", "metaformer-s", "swin-s", "gam-s")
IMAGES = LR["image-classification"]
OPEN = {
    "candidate": CategoricalDistribution(NAMES),
    "lr": FloatDistribution(*IMAGES, log=True),
    "strength": FloatDistribution(0.0, 1.0),
}


def candidate(name: str, status: str = "ready") -> Candidate:
    return Candidate(name, name.rpartition("-")[0], name, status=status)


def add(
    study: optuna.Study,
    rungs: list[float],
    *,
    name: str = "gam-s",
    state: TrialState = TrialState.COMPLETE,
    **attrs: Any,
) -> int:
    """A trial that reached `rungs` with these values; its number."""
    value = rungs[-1] if state == TrialState.COMPLETE else None
    kept = {"value": rungs[-1]} if rungs and state in (TrialState.COMPLETE, TrialState.PRUNED) else {}
    params = {"candidate": name, "lr": 1e-3, "strength": 0.5}
    study.add_trial(
        create_trial(
            state=state,
            value=value,
            params=params,
            distributions=OPEN,
            user_attrs={**kept, **attrs},
            intermediate_values=dict(enumerate(rungs)),
        )
    )
    return len(study.trials) - 1


@pytest.fixture
def study() -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    study.set_user_attr("candidates", list(NAMES))
    return study


def race(study: optuna.Study, folder: Path, *, series: bool = False, names: tuple[str, ...] = NAMES) -> Race:
    data = toy_series(rows=900) if series else toy_images(rows=1000)
    task = create_task(data.task, data.spec, data.meta)
    return Race(
        study,
        [candidate(name) for name in names],
        task,
        data,
        folder,
        unit_s=1.0,
        base=base_settings(data, 0),
        stop=lambda: True,
    )


def test_the_first_of_a_rung_goes_on(study: optuna.Study, tmp_path: Path) -> None:
    assert not race(study, tmp_path)._weak(0, 0, 0.1)


def test_the_best_third_of_a_rung_goes_on_and_the_rest_stops(study: optuna.Study, tmp_path: Path) -> None:
    for value in (0.9, 0.7, 0.5, 0.3, 0.2):
        add(study, [value])
    here = race(study, tmp_path)
    assert not here._weak(99, 0, 0.75)  # second of six
    assert here._weak(99, 0, 0.65)  # third of six
    assert here._weak(99, 0, 0.1)


def test_what_cannot_be_told_from_the_best_goes_on_whatever_its_place(study: optuna.Study, tmp_path: Path) -> None:
    for value in (0.900, 0.899, 0.898, 0.897, 0.896):
        add(study, [value])
    here = race(study, tmp_path)
    noise = here.noise(0.9)
    assert 0.01 < noise < 0.05
    assert not here._weak(99, 0, 0.9 - 0.9 * noise)
    assert here._weak(99, 0, 0.9 - 1.1 * noise)


def test_only_those_that_reached_the_same_rung_are_compared(study: optuna.Study, tmp_path: Path) -> None:
    for value in (0.9, 0.8, 0.7):
        add(study, [value])
    here = race(study, tmp_path)
    assert not here._weak(99, 1, 0.3)
    add(study, [0.9, 0.95, 0.99])
    assert here._weak(99, 1, 0.3)


def test_a_trial_is_not_compared_with_itself(study: optuna.Study, tmp_path: Path) -> None:
    number = add(study, [0.2])
    assert not race(study, tmp_path)._weak(number, 0, 0.2)


def test_of_errors_the_smallest_third_goes_on(tmp_path: Path) -> None:
    study = optuna.create_study(direction="minimize")
    for value in (0.2, 0.4, 0.6, 0.8, 1.0):
        add(study, [value])
    here = race(study, tmp_path, series=True)
    assert not here._weak(99, 0, 0.3)
    assert here._weak(99, 0, 0.5)
    assert not here._weak(99, 0, 0.1)


def test_the_ranking_is_by_value_and_leaves_out_trials_without_one(study: optuna.Study) -> None:
    early = add(study, [0.95], state=TrialState.PRUNED)
    second = add(study, [0.5, 0.6, 0.7])
    best = add(study, [0.4, 0.6, 0.8])
    late = add(study, [0.96], state=TrialState.PRUNED)
    add(study, [], state=TrialState.FAIL)
    add(study, [0.99], state=TrialState.RUNNING)
    assert [t.number for t in ranking(study, True)] == [late, early, best, second]
    assert [t.number for t in ranking(study, False)] == [second, best, early, late]


def test_every_family_is_tried_before_a_second_size_of_any() -> None:
    order = by_family([candidate(n) for n in ("gam-s", "gam-xs", "swin-s", "gam-m", "swin-xs", "deit-s")])
    assert [c.name for c in order] == ["gam-s", "swin-s", "deit-s", "gam-xs", "swin-xs", "gam-m"]


def test_a_trial_that_got_worse_is_known_to_overfit(study: optuna.Study) -> None:
    numbers = [add(study, rungs) for rungs in ([0.5, 0.7, 0.6], [0.5, 0.6, 0.7])]
    worse, better = (study.trials[n] for n in numbers)
    worse.set_user_attr("best_seconds", 2.0)
    worse.set_user_attr("curve", [{"seconds": 2.0}, {"seconds": 4.0}])
    better.set_user_attr("best_seconds", 4.0)
    better.set_user_attr("curve", [{"seconds": 2.0}, {"seconds": 4.0}])
    assert overfits(worse)
    assert not overfits(better)


def test_every_candidate_is_tried_once_in_its_order_before_any_is_tried_again(
    study: optuna.Study, tmp_path: Path
) -> None:
    order = ("swin-s", "gam-s", "convnext-s", "metaformer-s")
    here = race(study, tmp_path, names=order)
    tried = []
    for _ in order:
        params = here._next()
        assert params is not None
        assert IMAGES[0] <= params["lr"] <= IMAGES[1]
        assert params["lr"] == pytest.approx(system_lr(candidate(params["candidate"]), "image-classification"))
        assert params["strength"] == here.base.strength
        tried.append(params["candidate"])
        add(study, [0.5 + 0.1 * len(tried)], name=params["candidate"])
    assert tuple(tried) == order
    assert here._next() == {"candidate": "metaformer-s"}  # the leader, with settings for the sampler to choose


def test_the_leader_is_tried_again_most_often_and_the_next_two_in_between(study: optuna.Study, tmp_path: Path) -> None:
    for name, value in zip(NAMES, (0.9, 0.8, 0.7, 0.6), strict=True):
        add(study, [value], name=name)
    here, again = race(study, tmp_path), []
    for _ in range(8):
        params = here._next()
        assert params is not None
        assert set(params) == {"candidate"}
        again.append(params["candidate"])
        add(study, [0.1], name=params["candidate"], state=TrialState.PRUNED)
    assert {name: again.count(name) for name in NAMES} == dict(zip(NAMES, (4, 2, 2, 0), strict=True))


def test_what_waits_in_the_study_is_taken_before_anything_new(study: optuna.Study, tmp_path: Path) -> None:
    study.enqueue_trial({"candidate": "swin-s", "lr": 1e-3, "strength": 0.5})
    assert race(study, tmp_path)._next() is None


def test_candidates_that_do_not_fit_are_never_tried(study: optuna.Study, tmp_path: Path) -> None:
    here = race(study, tmp_path, names=())
    data, task = here.data, here.task
    given = [
        candidate("gam-s", "left out"),
        candidate("swin-s", "int8"),
        candidate("convnext-s", "not measured"),
    ]
    some = Race(study, given, task, data, tmp_path, unit_s=1.0, base=here.base, stop=lambda: True)
    assert list(some.candidates) == ["swin-s"]


def test_a_systems_own_learning_rate_comes_before_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SystemEntry("swin", torch.nn.Identity, {}, training={"lr": 9e-9})
    monkeypatch.setattr(module, "system", lambda slug: entry)
    assert system_lr(candidate("swin-s"), "image-classification") == DEFAULT_LR["image-classification"]
    monkeypatch.setattr(module, "system", lambda slug: replace(entry, training={"fit_lr": 4e-3}))
    assert system_lr(candidate("swin-s"), "image-classification") == 4e-3


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_killed_trial_is_taken_up_from_its_state_and_those_of_the_living_and_of_others_are_left(
    study: optuna.Study, tmp_path: Path
) -> None:
    host = socket.gethostname()
    alive = add(study, [0.5], state=TrialState.RUNNING, worker=f"{host}:{os.getppid()}")
    elsewhere = add(study, [0.5], state=TrialState.RUNNING, worker=f"other-{host}:{dead_pid()}")
    killed = add(study, [0.5], name="swin-s", state=TrialState.RUNNING, worker=f"{host}:{dead_pid()}")
    fresh = add(study, [], name="convnext-s", state=TrialState.RUNNING, worker=f"{host}:{dead_pid()}")
    done = add(study, [0.7, 0.8, 0.9])
    state = state_file(tmp_path, killed)
    state.parent.mkdir(parents=True)
    state.touch()
    race(study, tmp_path)._take_up_killed()
    states = {t.number: t.state for t in study.trials}
    assert states[alive] == states[elsewhere] == TrialState.RUNNING
    assert states[killed] == states[fresh] == TrialState.FAIL
    assert states[done] == TrialState.COMPLETE
    queued = [t for t in study.trials if t.state == TrialState.WAITING]
    assert [t.system_attrs["fixed_params"]["candidate"] for t in queued] == ["swin-s", "convnext-s"]
    assert [t.user_attrs.get("continues") for t in queued] == [killed, None]


def test_a_trial_killed_twice_still_goes_on_from_the_last_state_there_is(study: optuna.Study, tmp_path: Path) -> None:
    worker = f"{socket.gethostname()}:{dead_pid()}"
    add(study, [0.5], state=TrialState.FAIL)
    state = state_file(tmp_path, 0)
    state.parent.mkdir(parents=True)
    state.touch()
    add(study, [], state=TrialState.RUNNING, worker=worker, continues=0)
    race(study, tmp_path)._take_up_killed()
    (queued,) = [t for t in study.trials if t.state == TrialState.WAITING]
    assert queued.user_attrs["continues"] == 0
