"""Sentence pairs: columns told apart, scores scaled, both sentences tokenised alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from gossamer.data import DataError, read_dataset

Write = Callable[[str, str | bytes], Path]


def pairs(rows: int = 60) -> str:
    score = [f"{(i * 7) % 11 / 2:.1f}" for i in range(rows)]
    said = [f"the cat number {i} sleeps well,a dog of {i % 9} years barks loudly,{s}" for i, s in enumerate(score)]
    return "\n".join(["one,two,score", *said]) + "\n"


def test_two_columns_of_text_and_one_of_numbers_are_seen_to_be_pairs(write: Write) -> None:
    data = read_dataset(write("pairs.csv", pairs()))
    assert data.task == "sentence-similarity"
    assert data.meta["columns"] == ["one", "two", "score"]
    assert data.meta["range"] == [0.0, 5.0]
    every = torch.cat([split.targets for split in data.splits.values()])
    assert sorted(every.tolist()) == pytest.approx(sorted((i * 7) % 11 / 10 for i in range(60)))
    assert "num_classes" not in data.spec


def test_both_sentences_of_a_pair_stand_behind_one_another_as_the_table_has_them(write: Write) -> None:
    data = read_dataset(write("pairs.csv", pairs()))
    coder = Tokenizer.from_str(data.meta["tokenizer"])
    ids, names = data.val.inputs[0], data.val.names
    assert ids.shape == (len(data.val), 2, data.spec["max_len"])
    assert names is not None
    for row, name in zip(ids, names, strict=True):
        for sentence, text in zip(row, name.split(" | "), strict=True):
            assert sentence[sentence != data.spec["pad_id"]].tolist() == coder.encode(text).ids
    seen = {name: set(split.names or []) for name, split in data.splits.items()}
    assert not seen["train"] & seen["val"] | seen["train"] & seen["test"] | seen["val"] & seen["test"]


def test_pairs_that_share_a_sentence_are_not_parted_unless_all_hang_together(write: Write) -> None:
    rows = [f"the {i // 4} th sentence is here,and number {i} is another one,{i % 5}.0" for i in range(160)]
    data = read_dataset(write("pairs.csv", "\n".join(["one,two,score", *rows])), task="sentence-similarity")
    firsts = {name: {pair.split(" | ")[0] for pair in split.names or []} for name, split in data.splits.items()}
    assert not firsts["train"] & firsts["val"] | firsts["train"] & firsts["test"] | firsts["val"] & firsts["test"]
    assert len(data.val) < 0.3 * 160
    chain = [f"sentence number {i} stands here,sentence number {i + 1} stands here,{i % 5}.0" for i in range(160)]
    data = read_dataset(write("chain.csv", "\n".join(["one,two,score", *chain])), task="sentence-similarity")
    assert min(len(data.train), len(data.val), len(data.test)) > 8


def test_the_benchmark_is_read_with_its_dev_split_as_the_test(shared_data: Callable[[str], Path]) -> None:
    data = read_dataset(shared_data("stsb"))
    assert (data.task, len(data.test), len(data.train) + len(data.val)) == ("sentence-similarity", 1500, 5749)
    assert data.meta["range"] == [0.0, 5.0]
    assert data.test.targets.mean() == pytest.approx(2.36 / 5, abs=0.03)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pairs().replace("a dog of 3 years barks loudly", ""), "the text is empty"),
        (pairs().replace(",3.5\n", ",\n"), "the score is missing"),
        ("one,two,score\n" + "a long text here,another long text here,1.0\n" * 30, "one value only"),
        ("one,two\n" + "".join(f"a long text {i} here,another {i} long text\n" for i in range(30)), "two columns of"),
    ],
)
def test_pairs_that_cannot_be_used_say_why(write: Write, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_dataset(write("pairs.csv", content), task="sentence-similarity")
