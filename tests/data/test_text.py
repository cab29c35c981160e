"""Tables of texts and labels: columns, splits, tokens, faults."""

import hashlib
import json
import subprocess
import sys

import pandas as pd
import pytest
import torch

from gossamer.data import DataError, read_dataset
from gossamer.data.text import encode, load_tokenizer, train_tokenizer


def test_a_table_of_texts_and_labels_is_text_classification(write, reviews) -> None:
    data = read_dataset(write("r.csv", reviews(60)))
    assert data.task == "text-classification"
    assert data.meta["classes"] == ["neg", "pos"]
    assert (data.meta["text"], data.meta["label"]) == ("text", "label")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 38, "val": 10, "test": 12}
    for split in data.splits.values():
        for text, target in zip(split.names, split.targets.tolist(), strict=True):
            assert ("good" in text) == (data.meta["classes"][target] == "pos")


def test_ids_decode_to_the_text_and_padding_is_zero(write, reviews) -> None:
    from tokenizers import Tokenizer

    data = read_dataset(write("r.csv", reviews(60)))
    coder = Tokenizer.from_str(data.meta["tokenizer"])
    assert coder.get_vocab_size() == data.spec["vocab_size"]
    ids = data.train.inputs[0][0]
    assert ids.shape == (data.spec["max_len"],) == (8,)
    assert ids[ids != 0].tolist() == coder.encode(data.train.names[0]).ids[:8]
    assert coder.token_to_id("[PAD]") == data.spec["pad_id"] == 0


def test_a_day_that_recurs_is_no_label(write) -> None:
    rows = [f"{i},{('good', 'bad')[i % 2]},2024-01-{1 + i % 28:02},words of number {i} here" for i in range(90)]
    data = read_dataset(write("x.csv", "\n".join(["id,verdict,when,body", *rows])), task="text-classification")
    assert (data.meta["text"], data.meta["label"]) == ("body", "verdict")


def test_the_tokenizer_knows_only_the_training_split(write, reviews) -> None:
    write("d/train.csv", reviews(40))
    write("d/val.csv", "text,label\nxylophone heard here,pos\nxylophone not heard,neg\n")
    path = write("d/test.csv", "text,label\nxylophone heard there,pos\nxylophone xylophone heard,neg\n")
    vocabulary = json.loads(read_dataset(path.parent).meta["tokenizer"])["model"]["vocab"]
    assert any("film" in word for word in vocabulary)
    assert not any("xylo" in word for word in vocabulary)


def test_whole_words_give_way_to_pieces_where_too_many_would_be_unknown() -> None:
    texts = [f"stem{a}ing the {b}ness of words" for a in "abcdefgh" for b in "abcdefgh"]
    assert "WordLevel" in train_tokenizer(texts, texts).to_str()
    pieces = train_tokenizer(texts, ["unstemmed wordless hears", "newness"])
    assert '"BPE"' in pieces.to_str()
    unknown = pieces.token_to_id("[UNK]")
    assert unknown not in pieces.encode("stemness").ids


def test_a_pieces_tokenizer_is_the_same_in_every_process() -> None:
    code = (
        "from gossamer.data.text import train_tokenizer as t;"
        "texts=[f'stem{a}ing the {b}ness of w{a}{b}' for a in 'abcdefgh' for b in 'abcdefgh'];"
        "import hashlib;print(hashlib.sha256(t(texts, ['unheard newer things']).to_str().encode()).hexdigest())"
    )
    texts = [f"stem{a}ing the {b}ness of w{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    here = {train_tokenizer(texts, ["unheard newer things"]).to_str() for _ in range(4)}
    assert len(here) == 1
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256(here.pop().encode()).hexdigest()


def test_a_tokenizer_file_is_used_as_given(write, reviews, tmp_path) -> None:
    coder = train_tokenizer(["only these words are known"] * 2, ["only these words"])
    coder.save(str(tmp_path / "mine.json"))
    data = read_dataset(write("r.csv", reviews(60)), tokenizer=str(tmp_path / "mine.json"))
    assert data.spec["vocab_size"] == coder.get_vocab_size()
    with pytest.raises(DataError, match=r"none\.json"):
        load_tokenizer(tmp_path / "none.json")


def test_a_text_without_tokens_becomes_one_unknown_token() -> None:
    coder = train_tokenizer(["some words here"] * 3, ["some"])
    assert encode(coder, ["\u200b"], 4, 0).tolist() == [[1, 0, 0, 0]]


def test_length_covers_nearly_all_texts_and_longer_ones_are_cut_and_counted(write) -> None:
    rows = [f"{'word ' * (i % 10 + 1)}n{i},{i % 2}" for i in range(300)] + [f"{'word ' * 400}end,0"]
    data = read_dataset(write("x.csv", "text,label\n" + "\n".join(rows)))
    assert data.spec["max_len"] == 16
    if any(len(name) > 500 for name in data.train.names):
        assert any("longer than 16 tokens" in line for line in data.problems)


def test_dev_without_test_becomes_the_test_split(write, reviews) -> None:
    write("sst/train.tsv", reviews(60, mark="\t", head=False))
    path = write("sst/dev.tsv", reviews(10, mark="\t", head=False, start=100))
    data = read_dataset(path.parent)
    assert len(data.test) == 10
    assert all(f"number {i} " in data.test.names[i - 100] for i in range(100, 110))
    assert len(data.train) + len(data.val) == 60
    assert "validation split is the test split" in data.meta["split"]["how"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_tables_of_every_kind_read_alike(write, reviews, tmp_path, kind) -> None:
    first = read_dataset(write("r.csv", reviews(60)))
    frame = pd.read_csv(tmp_path / "r.csv")
    path = tmp_path / f"other.{kind}"
    {
        "csv": lambda: frame.to_csv(path, index=False, sep=";"),
        "parquet": lambda: frame.to_parquet(path),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
    }[kind]()
    again = read_dataset(path)
    assert torch.equal(first.train.inputs[0], again.train.inputs[0])
    assert first.meta["split"] == again.meta["split"]


def test_an_empty_text_is_told_with_row_and_column(write, reviews) -> None:
    path = write("r.csv", reviews(10) + '"  ",pos\n')
    with pytest.raises(DataError, match=r"r\.csv: row 11 \(line 12\), column 'text': the text is empty"):
        read_dataset(path)


def test_a_missing_label_is_told_with_row_and_column(write, reviews) -> None:
    with pytest.raises(DataError, match=r"row 11 \(line 12\), column 'label': the label is missing"):
        read_dataset(write("r.csv", reviews(10) + "a fine film,\n"))


def test_a_label_never_seen_in_training_is_told_with_its_place(write, reviews) -> None:
    write("d/train.csv", reviews(40))
    path = write("d/test.csv", reviews(4, start=50) + "a fair film indeed,mixed\n")
    with pytest.raises(DataError, match=r"test\.csv: row 5 .*'mixed' is never seen in training; known are neg, pos"):
        read_dataset(path.parent)


def test_one_class_only_is_told(write) -> None:
    rows = "".join(f"some text number {i},same\n" for i in range(20))
    with pytest.raises(DataError, match="one class only, 'same'"):
        read_dataset(write("x.csv", "text,label\n" + rows), task="text-classification")


def test_a_column_asked_for_and_absent_is_told_with_those_there(write, reviews) -> None:
    path = write("r.csv", reviews(10))
    with pytest.raises(DataError, match="no column 'verdict'; the columns are text, label"):
        read_dataset(path, label="verdict")


def test_a_label_that_is_no_class_is_told(write) -> None:
    rows = "".join(f"sentence number {i} here,{i / 7:.3f}\n" for i in range(60))
    with pytest.raises(DataError, match="too many to be classes"):
        read_dataset(write("x.csv", "text,score\n" + rows), text="text", label="score")


def test_sst2_is_read_from_its_two_files(shared_data) -> None:
    data = read_dataset(shared_data("sst2"))
    assert data.task == "text-classification"
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 6228, "val": 692, "test": 872}
    assert data.meta["classes"] == ["0", "1"]
    assert torch.bincount(data.test.targets).tolist() == [428, 444]
