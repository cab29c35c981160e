"""Plain text: every token foretold once, splits by position, byte-level tokenizers that lose nothing."""

from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from gossamer.data import DataError, Dataset, read_dataset
from gossamer.data.language import NOTHING, token_stream, train_byte_pairs, windows

Write = Callable[[str, str | bytes], Path]


def lines(start: int, stop: int) -> str:
    return "".join(f"Line {i}: the fox no. {i % 7} jumps — naïvely — over {i * i} dogs.\n" for i in range(start, stop))


def text_of(data: Dataset, name: str) -> str:
    """The text a split was made of, from its first input and all targets."""
    split = data.splits[name]
    targets = split.targets[split.targets != NOTHING].tolist()
    coder = Tokenizer.from_str(data.meta["tokenizer"])
    return coder.decode([int(split.inputs[0][0, 0]), *targets])


def test_windows_foretell_each_token_once_and_shift_by_one() -> None:
    ids = torch.arange(5, 16).numpy()
    inputs, targets = windows(ids, 4, 0)
    assert inputs.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 0, 0]]
    assert targets.tolist() == [[6, 7, 8, 9], [10, 11, 12, 13], [14, 15, NOTHING, NOTHING]]


def test_a_text_file_is_seen_to_be_language_modelling_and_split_by_position(write: Write) -> None:
    text = lines(0, 400)
    data = read_dataset(write("book.txt", text))
    assert data.task == "language-modelling"
    assert set(data.spec) == {"vocab_size", "max_len", "pad_id"}
    parts = [text_of(data, name) for name in ("train", "val", "test")]
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts)
    assert [round(len(part) / len(text), 1) for part in parts] == [0.8, 0.1, 0.1]
    assert data.spec["vocab_size"] == Tokenizer.from_str(data.meta["tokenizer"]).get_vocab_size()
    assert int(data.train.inputs[0].max()) < data.spec["vocab_size"]
    assert data.meta["split"]["sizes"] == {name: len(split) for name, split in data.splits.items()}
    assert read_dataset(write("book.txt", text)).meta["split"] == data.meta["split"]


def test_files_that_name_their_split_are_used_so(write: Write) -> None:
    for name, part in (("train", lines(0, 300)), ("valid", lines(300, 350)), ("test", lines(350, 400))):
        folder = write(f"wiki/wiki.{name}.txt", part).parent
    data = read_dataset(folder)
    assert [text_of(data, name) for name in ("train", "val", "test")] == [
        lines(0, 300),
        lines(300, 350),
        lines(350, 400),
    ]
    (folder / "wiki.test.txt").unlink()
    data = read_dataset(folder)
    assert text_of(data, "test") == lines(300, 350)
    assert text_of(data, "train") + text_of(data, "val") == lines(0, 300)
    assert "the given validation text is the test" in data.meta["split"]["how"]


def test_a_folder_or_archive_of_texts_is_read_in_order(write: Write, tmp_path: Path) -> None:
    for i in range(4):
        folder = write(f"books/{i}.txt", lines(100 * i, 100 * i + 100)).parent
    data = read_dataset(folder, vocab_size=300, max_len=32)
    assert "".join(text_of(data, n) for n in ("train", "val", "test")).split() == lines(0, 400).split()
    assert (data.spec["vocab_size"], data.spec["max_len"]) == (300, 32)
    with ZipFile(tmp_path / "books.zip", "w") as archive:
        for path in sorted(folder.glob("*.txt")):
            archive.write(path, f"books/{path.name}")
    packed = read_dataset(tmp_path / "books.zip", vocab_size=300, max_len=32)
    assert torch.equal(packed.train.inputs[0], data.train.inputs[0])


def test_bytes_never_seen_in_training_are_still_written(write: Write) -> None:
    coder = train_byte_pairs("only plain letters here\n" * 50)
    strange = "ни одной 文字\t\x00 🦊\n"
    assert coder.decode(token_stream(coder, strange).tolist()) == strange
    assert len(token_stream(coder, "only plain letters")) < 6
    assert coder.token_to_id("[PAD]") == 0


def test_long_texts_are_cut_at_line_ends_only_to_be_tokenised() -> None:
    text = lines(0, 3000)
    coder = train_byte_pairs(text[:20000], 400)
    assert len(text) > 2**17
    assert coder.decode(token_stream(coder, text).tolist()) == text


def test_a_given_tokenizer_is_used_without_the_tokens_it_puts_around_texts(write: Write, tmp_path: Path) -> None:
    words = {"[UNK]": 0, "<s>": 1, "fox": 2, "dog": 3, "[PAD]": 4}
    coder = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    coder.pre_tokenizer = pre_tokenizers.Whitespace()
    coder.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    coder.save(str(tmp_path / "t.json"))
    data = read_dataset(write("a.txt", "fox dog\n" * 200), tokenizer=tmp_path / "t.json", max_len=16)
    assert set(data.train.inputs[0].unique().tolist()) <= {2, 3, 4}
    assert data.spec == {"vocab_size": 5, "max_len": 16, "pad_id": 4}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "the file is empty"),
        ("a b", {}, "too little text to split"),
        (b"\xff\xfe\xfd\x00abc", {"encoding": "utf-8"}, "is not utf-8 text"),
        ("word " * 500, {"task": "forecasting"}, "plain text is for language-modelling"),
        ("word " * 500, {"max_len": 1}, "max_len must be at least 2"),
        ("word " * 500, {"vocab_size": 200}, "vocab_size must be at least 257"),
        ("word " * 500, {"label": "x"}, "language-modelling has no option 'label'"),
    ],
)
def test_what_cannot_be_read_says_why(write: Write, content: str | bytes, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_dataset(write("a.txt", content), **options)


def test_a_folder_without_text_is_refused_where_text_is_wanted(write: Write) -> None:
    with pytest.raises(DataError, match=r"no \.txt files"):
        read_dataset(write("t/train.csv", "a,b\n1,2\n").parent, task="language-modelling")
