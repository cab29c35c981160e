"""Whole runs of the command on the toys, as a user starts, kills and joins them.

No time is asserted but that the seconds a run reports are near those it was given, and that only on an idle machine.
"""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

import gossamer
from gossamer.data import Dataset, read_dataset
from gossamer.data.builtin import toy_table
from gossamer.measure import parameters
from gossamer.tasks import create_task

pytestmark = [pytest.mark.flight, pytest.mark.timeout(600)]
PATIENCE = 300.0  # seconds after which something that should have happened has not
SECONDS = 25.0
SEED = 3
BUDGET = {"latency": 100.0, "size": 8.0}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs measured by one run are known to the next, and nothing is left on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def start(*words: str, folder: Path) -> subprocess.Popen[str]:
    """The command in a process of its own; what it says goes to `folder/said.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "said.txt", "a", encoding="utf-8") as said:
        return subprocess.Popen([sys.executable, "-m", "gossamer", *words], stdout=said, stderr=said, text=True)


def ended(process: subprocess.Popen[str], folder: Path, code: int = 0) -> str:
    """What the command said; it must have ended with `code`."""
    assert process.wait(timeout=PATIENCE) == code, (folder / "said.txt").read_text()
    return (folder / "said.txt").read_text()


def until(done: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits until `done()`; the process must still be at work then."""
    limit = time.monotonic() + PATIENCE
    while not done():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert process.poll() is None


def trials(run: Path) -> list[FrozenTrial]:
    """All trials of a run's study; none while there is no study yet.

    Reads a copy, as opening a study makes its tables. `mode=rw` makes none, but can undo what a killed run left half
    written, which a reader must before it may read.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not (run / "study.db").exists():
        return []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "study.db"
        with (
            closing(sqlite3.connect(f"file:{run / 'study.db'}?mode=rw", uri=True, timeout=PATIENCE)) as theirs,
            closing(sqlite3.connect(copy)) as ours,
        ):
            theirs.backup(ours)
        storage = optuna.storages.RDBStorage(f"sqlite:///{copy}")
        try:
            studies = storage.get_all_studies()
            return storage.get_all_trials(studies[0]._study_id) if studies else []
        finally:
            storage.remove_session()
            storage.engine.dispose()


def content(run: Path, name: str = "results.json") -> Any:
    return json.loads((run / name).read_text())


@dataclass
class Flight:
    """A finished run and the data it was on."""

    kind: str
    run: Path
    data: Dataset
    results: dict[str, Any]
    idle: bool  # whether the machine had nothing else to do when it began

    @property
    def winner(self) -> dict[str, Any]:
        return self.results["winner"]

    def answers(self, file: Path, split: Any) -> tuple[np.ndarray, np.ndarray]:
        """Outputs of an ONNX file and targets over a split, by plain ONNX Runtime."""
        task = create_task(self.data.task, self.data.spec, self.data.meta)
        inputs, target = task.batch(split, torch.arange(len(split)))
        return self.outputs(file, inputs), target.numpy()

    @staticmethod
    def outputs(file: Path, inputs: tuple[torch.Tensor, ...]) -> np.ndarray:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        feeds = {f"input_{i}": x.numpy() for i, x in enumerate(inputs)}
        parts = []
        for begin in range(0, len(inputs[0]), 256):
            feed = {name: np.ascontiguousarray(feeds[name][begin : begin + 256]) for name in names}
            parts.append(session.run(None, feed)[0])
        return np.concatenate(parts)

    def score(self, file: Path, split: Any) -> float:
        """The run's metric, computed here."""
        output, target = self.answers(file, split)
        if self.results["metric"] == "accuracy":
            return float((output.argmax(1) == target).mean())
        return float(((output - target) ** 2).mean())


@pytest.fixture(scope="module", params=["toy-images", "toy-text", "toy-series"])
def flight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Flight:
    idle = os.getloadavg()[0] < 0.5 * len(os.sched_getaffinity(0))
    run = tmp_path_factory.mktemp(request.param) / "run"
    words = ["fit", request.param, "--time", f"{SECONDS:g}s", "--seed", str(SEED), "--out", str(run)]
    process = start(*words, "--budget", "latency=100ms,size=8MB", folder=run.parent)
    said = ended(process, run.parent)
    assert f"report   {run / 'report.html'}" in said
    return Flight(request.param, run, read_dataset(request.param, seed=SEED), content(run), idle)


def test_a_run_ends_with_a_winner_within_its_budget(flight: Flight) -> None:
    results = flight.results
    assert results["meets_budget"]
    assert results["budget"] == BUDGET
    assert all(flight.winner["cost"][name] <= limit for name, limit in BUDGET.items())
    assert [p["status"] for p in results["points"]].count("winner") == 1
    assert not results["interrupted"]
    if not flight.idle:
        pytest.skip("the machine was busy: the time of the run says nothing")
    assert results["seconds"] <= 1.5 * SECONDS


def test_the_exported_file_is_the_winner_and_costs_and_scores_what_the_results_say(flight: Flight) -> None:
    file, winner = flight.run / "model.onnx", flight.winner
    (point,) = [p for p in flight.results["points"] if p["status"] == "winner"]
    assert file.read_bytes() == Path(point["file"]).read_bytes()
    assert winner["cost"]["size"] == file.stat().st_size / 1e6
    assert winner["cost"]["params"] == parameters(gossamer.load(flight.run))
    metric = flight.results["metric"]
    assert winner["val"] == pytest.approx(flight.score(file, flight.data.val), rel=1e-4)
    assert winner["test"][metric] == pytest.approx(flight.score(file, flight.data.test), rel=1e-4)


def test_the_weights_load_in_one_call_and_answer_as_the_float_file(flight: Flight) -> None:
    (point,) = [p for p in flight.results["points"] if p["name"] == flight.winner["name"] and p["form"] == "float32"]
    task = create_task(flight.data.task, flight.data.spec, flight.data.meta)
    inputs, _ = task.batch(flight.data.test, torch.arange(13))
    with torch.no_grad():
        expected = gossamer.load(flight.run)(*inputs).numpy()
    there = flight.outputs(Path(point["file"]), inputs)
    assert np.ptp(expected) > 0
    assert np.abs(there - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
    assert point["certificate"]["passed"]
    assert point["certificate"]["held"] == "batch"


def test_the_seed_fixes_the_split(flight: Flight) -> None:
    kept = content(flight.run, "task.json")["meta"].get("split")
    assert kept == json.loads(json.dumps(flight.data.meta.get("split")))
    again, other = read_dataset(flight.kind, seed=SEED), read_dataset(flight.kind, seed=SEED + 1)
    assert torch.equal(again.test.inputs[0], flight.data.test.inputs[0])
    if flight.kind != "toy-series":  # time is never shuffled
        assert not torch.equal(other.test.inputs[0], flight.data.test.inputs[0])


def test_the_test_split_was_read_by_the_winner_alone(flight: Flight) -> None:
    others = {key: value for key, value in flight.results.items() if key not in ("winner", "data")}
    assert '"test"' not in json.dumps(others)


def test_the_report_says_what_the_results_say_and_opens_in_a_browser(
    flight: Flight, chromium: Callable[[Path], tuple[list[str], list[str]]]
) -> None:
    html = (flight.run / "report.html").read_text(encoding="utf-8")
    words = re.sub(r"\s+", " ", re.sub(r"<svg.*?</svg>|<style.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL))
    score = flight.winner["test"][flight.results["metric"]]
    shown = f"{100 * score:.2f} %" if flight.results["maximise"] else f"{score:.4g}"
    for text in (shown, flight.winner["name"], f"{flight.winner['cost']['latency']:.3g} ms", "The front"):
        assert text in words
    for candidate in flight.results["candidates"]:
        assert candidate["name"] in words
    assert html.count("<svg") >= 3
    assert chromium(flight.run / "report.html") == ([], [])


def predicted(run: Path, *inputs: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", "predict", str(run), *inputs, "--json"],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_predict_answers_new_inputs_as_the_exported_file_does(flight: Flight, tmp_path: Path) -> None:
    data, file = flight.data, flight.run / "model.onnx"
    if flight.kind == "toy-series":
        columns = data.meta["columns"]
        table = toy_table(seed=8, rows=data.spec["seq_len"] + data.spec["pred_len"])
        table.iloc[: data.spec["seq_len"]].to_csv(tmp_path / "past.csv", index=False)
        (row,) = predicted(flight.run, str(tmp_path / "past.csv"))
        assert [step["date"] for step in row["forecast"]] == [
            stamp.isoformat() for stamp in table["date"].iloc[data.spec["seq_len"] :]
        ]
        mean, std = np.array(data.meta["mean"]), np.array(data.meta["std"])
        past = (table[columns].to_numpy()[: data.spec["seq_len"]] - mean) / std
        told = np.array([[step[name] for name in columns] for step in row["forecast"]])
        task = create_task(data.task, data.spec, data.meta)
        _, marks = task.read([str(tmp_path / "past.csv")])
        expected = flight.outputs(file, (torch.from_numpy(past).float()[None], marks))[0] * std + mean
        assert np.allclose(told, expected, rtol=1e-3, atol=1e-3)
        return
    if flight.kind == "toy-images":
        from PIL import Image

        inputs = []
        for i in range(5):
            inputs.append(str(tmp_path / f"{i}.png"))
            Image.fromarray(data.test.inputs[0][i].permute(1, 2, 0).numpy()).save(inputs[-1])
    else:
        assert data.test.names is not None
        inputs = data.test.names[:5]
    rows = predicted(flight.run, *inputs)
    # The same five together: an int8 file that scales as it goes answers a little differently in another batch.
    five, _ = create_task(data.task, data.spec, data.meta).batch(data.test, torch.arange(5))
    output = flight.outputs(file, five)
    classes = [data.meta["classes"][k] for k in output.argmax(1)]
    assert [row["class"] for row in rows] == classes
    assert [row["input"] for row in rows] == inputs
    chances = torch.from_numpy(output).softmax(1).max(1).values.tolist()
    assert [row["probability"] for row in rows] == pytest.approx(chances, abs=1e-5)


def test_predict_refuses_what_is_no_run_and_what_it_cannot_read(flight: Flight, tmp_path: Path) -> None:
    for run, word in ((tmp_path, "x"), (flight.run, str(tmp_path / "none.csv"))):
        done = subprocess.run(
            [sys.executable, "-m", "gossamer", "predict", str(run), word], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stdout
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_the_same_call_on_a_finished_run_answers_at_once_and_another_is_refused(flight: Flight) -> None:
    before = (flight.run / "results.json").read_bytes()
    words = ["fit", flight.kind, "--time", f"{SECONDS:g}s", "--seed", str(SEED), "--out", str(flight.run)]
    said = ended(start(*words, "--budget", "latency=100ms,size=8MB", folder=flight.run.parent), flight.run.parent)
    assert "winner" in said
    said = ended(start(*words, "--budget", "latency=50ms", folder=flight.run.parent), flight.run.parent, code=2)
    assert "another budget" in said.splitlines()[-1]
    assert (flight.run / "results.json").read_bytes() == before


def test_a_budget_nothing_can_meet_has_a_code_of_its_own_and_names_the_closest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("fit", "toy-text", "--time", "30s", "--budget", "params=10", "--out", str(run), folder=tmp_path)
    said = ended(process, tmp_path, code=3)
    results = content(run)
    closest = results["closest"]
    assert not results["meets_budget"]
    assert results["winner"] is None
    assert f"nothing meets the budget; the closest is {closest['name']}: params" in said
    measured = [c for c in results["candidates"] if c["cost"]]
    assert closest["name"] == min(measured, key=lambda c: c["cost"]["params"])["name"]
    assert "Nothing meets the budget" in (run / "report.html").read_text()
    assert not (run / "model.onnx").exists()


def test_a_run_killed_in_the_race_and_again_in_the_finish_goes_on_and_loses_no_finished_trial(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["fit", "toy-text", "--time", "40s", "--budget", "latency=50ms", "--out", str(run)]

    def finished() -> dict[int, tuple[Any, ...]]:
        over = (TrialState.COMPLETE, TrialState.PRUNED)
        return {
            t.number: (t.state, t.value, t.params, t.user_attrs["value"], t.user_attrs["curve"])
            for t in trials(run)
            if t.state in over and "value" in t.user_attrs
        }

    process = start(*words, folder=tmp_path)
    until(finished, process)
    process.kill()
    process.wait()
    first = finished()
    clock = content(run, "clock.json")["seconds"]
    candidates = (run / "candidates.json").read_bytes()

    process = start(*words, folder=tmp_path)
    until(lambda: list(run.glob("finalists/*/way.json")), process)
    process.kill()
    process.wait()
    second = finished()
    assert first.items() <= second.items()
    assert not (run / "results.json").exists()

    ended(start(*words, folder=tmp_path), tmp_path)
    results = content(run)
    assert finished() == second  # the race was over: nothing is raced again
    assert (run / "candidates.json").read_bytes() == candidates  # nor measured
    kept = {t["number"]: t["value"] for t in results["trials"] if t.get("value") is not None}
    assert kept == {number: values[3] for number, values in second.items()}
    assert results["seconds"] > clock
    assert results["finalists"][0]["trial"] in kept
    assert (run / "model.onnx").exists()


def test_a_second_process_joins_the_study_and_ctrl_c_finishes_with_what_is_there(tmp_path: Path) -> None:
    run, asked = tmp_path / "run", 180
    host = start("fit", "toy-text", "--time", f"{asked}s", "--out", str(run), folder=tmp_path)
    until(lambda: trials(run), host)
    guest = start("fit", "--join", str(run), folder=tmp_path / "guest")

    def workers() -> set[int]:
        return {int(t.user_attrs["worker"].rpartition(":")[2]) for t in trials(run) if "curve" in t.user_attrs}

    until(lambda: workers() >= {host.pid, guest.pid}, host)
    host.send_signal(signal.SIGINT)
    ended(host, tmp_path)
    ended(guest, tmp_path / "guest")
    results = content(run)
    assert results["interrupted"]
    assert results["meets_budget"]
    assert results["seconds"] < asked
    assert {int(t["worker"].rpartition(":")[2]) for t in results["trials"] if "worker" in t} >= {host.pid, guest.pid}
    assert "ended early by the user" in (run / "report.html").read_text()
    assert trials(run)[-1].number == len(trials(run)) - 1
    assert not [t for t in trials(run) if t.state == TrialState.RUNNING]


def test_a_run_in_a_folder_that_was_moved_is_still_used(flight: Flight, tmp_path: Path) -> None:
    moved = shutil.copytree(flight.run, tmp_path / "moved", ignore=shutil.ignore_patterns("files", "trials"))
    assert parameters(gossamer.load(moved)) == flight.winner["cost"]["params"]
    assert (moved / "model.onnx").exists()
