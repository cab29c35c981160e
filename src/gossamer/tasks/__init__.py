"""Tasks by name; the file of a task is loaded when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.tasks.base import Task

_TASKS = {
    "image-classification": ("gossamer.tasks.image_classification", "ImageClassification"),
    "text-classification": ("gossamer.tasks.text_classification", "TextClassification"),
    "sentence-similarity": ("gossamer.tasks.sentence_similarity", "SentenceSimilarity"),
    "language-modelling": ("gossamer.tasks.language_modelling", "LanguageModelling"),
    "forecasting": ("gossamer.tasks.forecasting", "Forecasting"),
}

__all__ = ["create_task", "list_tasks"]


def list_tasks() -> list[str]:
    return list(_TASKS)


def create_task(name: str, spec: dict[str, Any], meta: dict[str, Any]) -> Task:
    """The task `name` on a data set of this `spec` and `meta`.

    Raises:
        ValueError: no such task.
    """
    if name not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(_TASKS)}; got {name!r}")
    module, cls = _TASKS[name]
    return getattr(import_module(module), cls)(spec, meta)
