"""A second process, here or on another machine, that works on the study of a run until its race is over."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from gossamer.data import read_dataset
from gossamer.fit.candidates import Candidate
from gossamer.fit.options import FitOptions, FitResult
from gossamer.fit.race import Race, base_settings, open_study, ranking, study_place, unit_seconds
from gossamer.io import read_json
from gossamer.tasks import create_task
from gossamer.train.clock import Clock
from gossamer.train.progress import Progress


def join(options: FitOptions) -> FitResult:
    """Trains trials of the run in `options.join`; the run itself measures, finishes and exports.

    Raises:
        ValueError: the folder is not of a run.
    """
    assert options.join is not None
    folder = Path(options.join)
    if not (folder / "run.json").exists():
        raise ValueError(f"no run to join at {folder}: it has no run.json")
    run = read_json(folder / "run.json")
    asked = FitOptions(**{k: run[k] for k in ("data", "task", "budget", "seconds", "seed", "storage", "options")})
    if (folder / "results.json").exists():
        return FitResult(read_json(folder / "results.json"), folder)
    clock_file = folder / f"clock-{socket.gethostname()}-{os.getpid()}.json"
    with Clock(asked.seconds, clock_file) as clock, Progress(clock, quiet=options.quiet) as progress:
        assert asked.data is not None
        progress.tell("reading the data")
        data = read_dataset(asked.data, task=asked.task, seed=asked.seed, **asked.options)
        task = create_task(data.task, data.spec, data.meta)
        progress.tell("waiting for the run's candidates")

        def over() -> bool:
            return clock.over(clock.raced_by) or _left_race(folder)

        # Costs are those of the run's device: it is where the model will be used.
        measured = folder / "candidates.json"
        while not measured.exists() and not over():
            time.sleep(0.2)
        study = open_study(*study_place(asked, folder), task.maximise, asked.seed)
        if measured.exists():
            candidates = [Candidate.from_dict(c) for c in read_json(measured)]
            unit = unit_seconds(asked.seconds)
            base = base_settings(data, asked.seed)
            trials = folder / "trials"
            Race(study, candidates, task, data, trials, unit_s=unit, base=base, stop=over, tell=progress.tell).run()
    best = ranking(study, task.maximise)
    note = f"{best[0].params['candidate']} {task.metric} {best[0].user_attrs['value']:.4f}" if best else "none"
    return FitResult({"joined": str(folder), "best": note, "meets_budget": True, "winner": None}, folder)


def _left_race(folder: Path) -> bool:
    """Whether the run has left its race: a finalist is begun, or all is over."""
    return (folder / "finalists").exists() or (folder / "results.json").exists()
