"""Time is counted across restarts, shared out in order, and given up at the first Ctrl-C."""

import json
import os
import signal
from pathlib import Path

import pytest

from gossamer.train import clock as module
from gossamer.train.clock import Clock


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "process_age", lambda: 0.0)


def test_seconds_used_before_a_kill_still_count(tmp_path: Path) -> None:
    file = tmp_path / "clock.json"
    file.write_text('{"seconds": 42.5}')
    clock = Clock(60.0, file)
    assert clock.used >= 42.5
    assert clock.left <= 17.5
    assert clock.over(42.5)
    assert not clock.over(1e9)


def test_time_used_is_on_disk_while_the_run_lasts_and_after_it(tmp_path: Path) -> None:
    file = tmp_path / "clock.json"
    with Clock(60.0, file) as clock:
        clock.over(1.0)
        assert file.exists()
        file.unlink()
    assert json.loads(file.read_text())["seconds"] >= 0


def test_start_up_counts_as_the_users_time_and_a_long_session_before_the_call_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "process_age", lambda: 7.0)
    assert Clock(60.0, tmp_path / "a.json").used >= 7.0
    monkeypatch.undo()
    now = module.time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 3600)
    assert module.process_age() == 0.0


@pytest.mark.parametrize("total", [20.0, 25.0, 40.0, 60.0, 180.0, 600.0, 7200.0])
def test_stages_follow_each_other_however_long_the_files_will_take(tmp_path: Path, total: float) -> None:
    clock = Clock(total, tmp_path / "clock.json")
    for tail_s in (clock.tail_s, 12.0, 60.0, 1e6):
        clock.tail_s = tail_s
        assert 0 < clock.measured_by < clock.raced_by < clock.finished_by < total
        assert total - clock.finished_by == pytest.approx(min(clock.tail_s, 0.4 * total))


def test_the_first_interrupt_ends_stages_early_the_second_ends_the_process_and_the_old_handler_comes_back(
    tmp_path: Path,
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Clock(60.0, tmp_path / "clock.json") as clock:
        assert not clock.over(30.0)
        os.kill(os.getpid(), signal.SIGINT)
        assert clock.interrupted
        assert clock.over(1e9)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
