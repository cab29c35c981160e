"""What `gossamer predict` says of answers that are no classes."""

from typer.testing import CliRunner

import gossamer.fit
from gossamer.cli import app


def test_vectors_are_spoken_of_by_their_likeness(monkeypatch, tmp_path):
    rows = [{"input": "a", "vector": [1.0]}, {"input": "b", "cosine_with_previous": 0.5, "vector": [1.0]}]
    monkeypatch.setattr(gossamer.fit, "predict", lambda run, inputs: rows)
    answer = CliRunner().invoke(app, ["predict", str(tmp_path), "a", "b"])
    assert answer.stdout.splitlines() == ["a: a vector (see --json)", "b: cosine with previous 0.5"]
