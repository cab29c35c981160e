"""The page shows what `results.json` says, in every case a run can end in, and asks nothing of any other place."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gossamer.fit.report import write_report
from gossamer.tasks.base import Figure


def results() -> dict[str, Any]:
    """A finished run with figures that occur nowhere else."""
    certificate = {"opset": 20, "held": "batch", "max_abs": 3.37e-7, "quantised": "int8, dynamic, per channel"}

    def cost(latency: float) -> dict[str, float]:
        return {"latency": latency, "memory": 7.89, "size": 1.357, "params": 123456.0, "macs": 8.765e6}

    def candidate(name: str, latency: float, status: str = "ready", why: str = "") -> dict[str, Any]:
        return {"name": name, "cost": cost(latency) if latency else {}, "status": status, "why": why}

    def trial(number: int, name: str, value: float | None, **other: Any) -> dict[str, Any]:
        curve = [] if value is None else [{"seconds": 1.5, "value": value - 0.1}, {"seconds": 3.0, "value": value}]
        params = {"candidate": name, "lr": 1e-3, "strength": 0.5}
        return {"number": number, "state": "complete", "params": params, "value": value, "curve": curve, **other}

    winner_cost, slow_cost = cost(0.6543), cost(2.109)
    return {
        "gossamer": "0.1.0",
        "data": {"source": "shapes.zip", "spec": {}, "train": 4321, "val": 543, "test": 654, "problems": ["a.png"]},
        "task": "image-classification",
        "metric": "accuracy",
        "maximise": True,
        "budget": {"latency": 2.5, "size": 4.0},
        "asked_seconds": 180.0,
        "seconds": 171.8,
        "seed": 11,
        "interrupted": False,
        "device": {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0"},
        "candidates": [
            candidate("swin-s", 2.109),
            candidate("gam-xs", 0.987),
            candidate("vit-l", 31.0, "left out", "latency 31ms > 2.5ms"),
            candidate("slow-m", 0.0, "not measured", "the time for measuring was over"),
            candidate("other-s", 1.111),
            candidate("untried-s", 1.212),
        ],
        "trials": [
            trial(0, "swin-s", 0.8642),
            trial(1, "gam-xs", 0.7531, why="weaker than others after 3 s of training"),
            trial(2, "other-s", None, why="the loss is nan"),
        ],
        "finalists": [
            {
                "name": "swin-s",
                "trial": 0,
                "val": 0.9135,
                "lr": 0.00234,
                "strength": 0.432,
                "precision": "bfloat16",
                "taught": "",
                "curve": [{"seconds": 9.0, "value": 0.9}, {"seconds": 12.0, "value": 0.9135}],
            }
        ],
        "points": [
            {"name": "swin-s", "form": "float32", "val": 0.9135, "cost": slow_cost, "interval": [2.05, 2.16],
             "status": "front", "why": ""},
            {"name": "swin-s", "form": "int8", "val": 0.9124, "cost": winner_cost, "interval": [0.6321, 0.6678],
             "status": "winner", "why": "int8 is 3.22 times faster"},
            {"name": "swin-s", "form": "shrunk int8", "val": 0.8899, "cost": cost(0.7007), "interval": [0.69, 0.71],
             "status": "rolled back", "why": "int8 is slower"},
        ],
        "noise": 0.012,
        "meets_budget": True,
        "closest": None,
        "winner": {
            "name": "swin-s",
            "form": "int8",
            "val": 0.9124,
            "test": {"accuracy": 0.9046, "macro_f1": 0.8975, "nll": 0.3141},
            "cost": winner_cost,
            "interval": [0.6321, 0.6678],
            "certificate": certificate,
            "why": "int8 is 3.22 times faster",
        },
    }  # fmt: skip


SVG = Figure("Confusion matrix", b'<svg xmlns="http://www.w3.org/2000/svg"><text>disc</text></svg>', "Counts.")
PNG = Figure("Told wrong", b"\x89PNG\r\n\x1a\n", "The surest errors first.", kind="png")


class Page(HTMLParser):
    """Words outside style and pictures; every tag; every place an attribute or a style points to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.places = [a or b for a, b in re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", html)]
        self.handlers: list[str] = []
        self.words: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name.rpartition(":")[2] in ("src", "href", "srcset", "action", "data", "poster", "background"):
                self.places.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
        if tag in ("style", "svg", "title", "pre"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(content: dict[str, Any], tmp_path: Path, figures: tuple[Figure, ...] = (SVG, PNG)) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    write_report(content, list(figures), path)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for one in value.values():
            yield from leaves(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def written(content: dict[str, Any]) -> set[str]:
    """Every way the page may write a number of `content`."""
    forms = set()
    for value in leaves(content):
        if isinstance(value, str):
            forms |= set(re.findall(NUMBER, value))
        elif isinstance(value, int | float):
            forms |= {f"{value:.3g}", f"{value:.4g}", f"{value:.4f}", f"{value:,.0f}", f"{value:g}", str(round(value))}
            forms |= {f"{value / 1e6:.3g}", f"{100 * value:.2f}", str(value)}
    return forms


NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"


def test_every_number_on_the_page_is_in_the_results(tmp_path: Path) -> None:
    content = results()
    _, page = page_of(content, tmp_path)
    # The page's own words: "95 % interval", "batch 1"; and how often a candidate was tried.
    known = written(content) | {"95", "1"}
    shown = re.findall(rf"(?<![\w.-]){NUMBER}", page.text)
    assert len(shown) > 60
    assert [number for number in shown if number.rstrip(",") not in known] == []


def test_the_page_tells_winner_figures_fates_and_faults(tmp_path: Path) -> None:
    _, page = page_of(results(), tmp_path)
    for words in (
        "swin-s (int8)",
        "90.46 %",
        "0.654 ms",
        "budget 2.5 ms",
        "The exported file meets the budget",
        "4,321 training, 543 validation, 654 test items",
        "rolled back: int8 is slower",
        "weaker than others after 3 s of training",
        "latency 31ms > 2.5ms",
        "tried, nothing learnt",
        "the time for measuring was over",
        "fits; there was no time to try it",
        "finished: accuracy 0.9135 on validation",
        "a.png",
        "Some CPU",
        "Confusion matrix.",
        "The surest errors first.",
    ):
        assert words in page.text, words


def test_the_front_shows_every_file_and_every_raced_candidate(tmp_path: Path) -> None:
    html, _ = page_of(results(), tmp_path, ())
    front = html[html.index("<svg") : html.index("</svg>")]
    for label in ("swin-s float32", "swin-s int8 (winner)", "swin-s shrunk int8", "gam-xs", "budget 2.5 ms"):
        assert f">{label}<" in front
    assert "vit-l" not in front


def test_a_run_that_meets_no_budget_says_so_and_names_the_closest(tmp_path: Path) -> None:
    content = results()
    content["meets_budget"] = False
    _, page = page_of(content, tmp_path)
    assert "No file meets the whole budget; this is the closest." in page.text
    empty = content | {"winner": None, "points": [], "trials": [], "finalists": []}
    empty["closest"] = {"name": "gam-xs", "cost": content["winner"]["cost"], "why": "latency 0.654ms > 0.1ms"}
    _, page = page_of(empty, tmp_path, ())
    assert "Nothing meets the budget" in page.text
    assert "The closest candidate is gam-xs: latency 0.654ms > 0.1ms." in page.text
    _, page = page_of(empty | {"closest": None, "candidates": []}, tmp_path, ())
    assert "No candidate could be measured." in page.text


def test_a_run_without_budget_trials_or_values_still_has_its_page(tmp_path: Path) -> None:
    content = results() | {"budget": {}, "trials": [], "interrupted": True}
    content["points"] = content["points"][:1]
    content["finalists"][0]["curve"] = []
    _, page = page_of(content, tmp_path)
    assert "(none was given)" in page.text
    assert "ended early by the user" in page.text
    content["trials"] = [{"number": 0, "state": "fail", "params": {}}]
    page_of(content, tmp_path)


def test_results_read_back_from_disk_give_the_same_page(tmp_path: Path) -> None:
    html, _ = page_of(results(), tmp_path)
    again, _ = page_of(json.loads(json.dumps(results())), tmp_path)
    assert again == html


def spoilt(value: Any, poison: str) -> Any:
    """`value` with `poison` at the end of every text in it that is not one of the program's own words."""
    own = {"accuracy", "image-classification", "float32", "int8", "shrunk int8", "winner", "front", "rolled back"}
    own |= {"ready", "left out", "not measured", "complete"}
    if isinstance(value, dict):
        return {k: spoilt(v, poison) for k, v in value.items()}
    if isinstance(value, list):
        return [spoilt(v, poison) for v in value]
    return value + poison if isinstance(value, str) and value not in own else value


@pytest.mark.parametrize(
    "poison",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></style><iframe>", "$x^", "&amp;"],
)
def test_names_and_texts_of_others_stay_text(tmp_path: Path, poison: str) -> None:
    html, page = page_of(spoilt(results(), poison), tmp_path)
    assert not page.tags & {"script", "iframe", "object", "embed"}
    assert page.handlers == []
    assert "<script" not in html
    assert "onerror=alert(1)>" not in html.replace("&gt;", "")
    assert f"shapes.zip{poison}" in page.text


def test_the_page_points_nowhere_and_runs_nothing(tmp_path: Path) -> None:
    html, page = page_of(results(), tmp_path)
    assert "script" not in page.tags
    assert page.handlers == []
    assert len(page.places) > 3
    assert [place for place in page.places if not place.startswith(("#", "data:"))] == []
    # Names of XML vocabularies are the only addresses in it.
    vocabularies = {"www.w3.org", "creativecommons.org", "purl.org"}
    hosts = set(re.findall(r"https?://([^/\"'\s<]+)", html))
    assert hosts - vocabularies <= {"matplotlib.org"}


def test_the_page_opens_in_chromium_without_a_word_on_the_console_or_a_request(
    tmp_path: Path, chromium: Callable[[Path], tuple[list[str], list[str]]]
) -> None:
    page_of(results(), tmp_path)
    assert chromium(tmp_path / "report.html") == ([], [])


def test_the_results_are_not_changed_by_writing_the_page(tmp_path: Path) -> None:
    content = results()
    before = copy.deepcopy(content)
    page_of(content, tmp_path)
    assert content == before
