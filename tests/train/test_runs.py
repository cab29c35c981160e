"""Runs as folders: two processes follow one, a kill loses nothing, another run is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import gossamer
from gossamer.train import train_model

TINY = {"dim": 16, "depth": 1, "heads": 2, "patch": 4}
ARGS = dict(
    epochs=3,
    batch_size=64,
    lr=2e-3,
    settings={"precision": "float32", "strength": 0.3, "warmup": 5},
    model_options=TINY,
    quiet=True,
)
SCRIPT = """
import json, os, sys
from gossamer.train import train_model
out, args = sys.argv[1], json.loads(sys.argv[2])
assert os.environ.get("WORLD_SIZE", "1") == sys.argv[3]
train_model("vit_tiny_patch16_224", "digits", out=out, **args)
"""


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def launch(tmp_path, out, processes):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    # `--cpu` starts one process whatever the number, unless there is an MPI.
    how = "--cpu" if processes == 1 else "--multi_gpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", how, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(script), str(out), json.dumps(ARGS), str(processes)], env=env, start_new_session=True
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    result = train_model("vit_tiny_patch16_224", "digits", out=out, **ARGS)
    return out, result


def test_a_run_leaves_all_that_is_needed_to_repeat_and_to_use_it(alone):
    out, result = alone
    run = json.loads((out / "run.json").read_text())
    assert run["model"] == "vit_tiny_patch16_224"
    assert run["settings"]["lr"] == 2e-3
    assert result["test"]["accuracy"] > 0.15
    assert [r["epoch"] for r in rows(out) if "val" in r] == [1, 2, 3]
    model = gossamer.load(out)
    assert not model.training
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_the_same_call_gives_the_finished_result_and_another_is_refused(alone):
    out, result = alone
    assert train_model("vit_tiny_patch16_224", "digits", out=out, **ARGS) == result
    with pytest.raises(ValueError, match="another epochs"):
        train_model("vit_tiny_patch16_224", "digits", out=out, **{**ARGS, "epochs": 4})


def test_two_processes_follow_the_loss_curve_of_one(alone, tmp_path):
    out = tmp_path / "two"
    assert launch(tmp_path, out, 2).wait(timeout=200) == 0
    one, two = rows(alone[0]), rows(out)
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(alone, tmp_path):
    out = tmp_path / "killed"
    process = launch(tmp_path, out, 1)
    checkpoint = out / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    result = train_model("vit_tiny_patch16_224", "digits", out=out, **ARGS)
    assert result["steps"] == alone[1]["steps"]
    assert result["test"]["nll"] == pytest.approx(alone[1]["test"]["nll"], rel=1e-3)
    steps = [r["step"] for r in rows(out) if "loss" in r]
    assert steps == sorted(set(steps))
