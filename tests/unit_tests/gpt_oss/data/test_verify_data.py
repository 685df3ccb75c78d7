# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss verify-data`, and the check of every index at the start of a run."""

import json
import os
import struct

import numpy
import pytest

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.gpt_oss import cli
from megatron.gpt_oss.data.indexed_dataset import check_dataset
from megatron.gpt_oss.errors import UsageError

TEXTS = ["hello", "wide world", "x" * 40]


@pytest.fixture
def corpus(tmp_path):
    """A corpus in two parts, with a validation set and a list of what was left out."""
    lines = [json.dumps({"text": text}) for text in TEXTS * 10 + [f"text {i}" for i in range(99)]]
    (tmp_path / "text.jsonl").write_text("\n".join(lines + ["bad line"]))
    words = ["tokenize", tmp_path / "text.jsonl", "--output", tmp_path / "data", "--workers", 1]
    words += ["--split-at", 16, "--validation-share", 0.3, "--bad-lines", "skip"]
    cli.main([str(word) for word in words])
    return tmp_path


def verify(capsys, *prefixes):
    """(exit status, what was printed)"""
    capsys.readouterr()
    try:
        cli.main(["verify-data", *map(str, prefixes)])
    except SystemExit as stop:
        printed = capsys.readouterr()
        return stop.code, printed.out + printed.err
    return 0, capsys.readouterr().out


def test_sound(corpus, capsys):
    code, printed = verify(capsys, corpus / "data")
    lines = printed.splitlines()
    assert code == 0 and len(lines) == 3
    assert all("unchanged (SHA-256)" in line for line in lines)
    assert verify(capsys, corpus / "data.valid")[1] == lines[-1] + "\n"
    for path in corpus.glob("data*"):  # all of it under another name
        path.rename(corpus / path.name.replace("data", "other"))
    assert verify(capsys, corpus / "other")[0] == 0


def test_of_others(tmp_path, capsys):
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=numpy.int32)
    for length in (3, 0, 2):  # an empty document is allowed
        builder.add_document(numpy.arange(length), [length] if length else [])
    builder.finalize(str(tmp_path / "x.idx"))
    code, printed = verify(capsys, tmp_path / "x")
    assert code == 0 and "3 documents, 5 tokens, consistent; no" in printed


def _change(name, change):
    def damage(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def _flip(at, bit=0):
    def change(content):
        content = bytearray(content)
        content[at] ^= 1 << bit
        return bytes(content)

    return change


PART = "data.0-16"
DAMAGES = {
    "bit-of-a-token": (_change(f"{PART}.bin", _flip(0)), f"{PART}.bin has different contents"),
    "token-too-large": (_change(f"{PART}.bin", _flip(1, 7)), "the vocabulary has 0 to 256"),
    "bin-cut": (_change(f"{PART}.bin", lambda c: c[:-2]), "do not belong together"),
    "bin-longer": (_change(f"{PART}.bin", lambda c: c + b"xx"), "do not belong together"),
    "bin-gone": (lambda f: (f / f"{PART}.bin").unlink(), f"{PART}.bin does not exist"),
    "idx-gone": (lambda f: (f / f"{PART}.idx").unlink(), f"{PART}.idx does not exist"),
    "idx-directory": (
        lambda f: ((f / f"{PART}.idx").unlink(), (f / f"{PART}.idx").mkdir()),
        f"{PART}.idx is a directory",
    ),
    "idx-length": (_change(f"{PART}.idx", _flip(34)), "is damaged: sequence 1 begins at byte"),
    "idx-pointer": (_change(f"{PART}.idx", _flip(-3)), "is damaged"),
    "idx-document": (_change(f"{PART}.idx", _flip(-16)), f"{PART}.idx has different contents"),
    "skipped-changed": (_change("data.skipped.txt", lambda c: b"X" + c[1:]), "different contents"),
    "skipped-gone": (lambda f: (f / "data.skipped.txt").unlink(), "is missing"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(case, corpus, capsys):
    damage, words = DAMAGES[case]
    damage(corpus)
    code, printed = verify(capsys, corpus / "data")
    assert code == 1 and words in printed, printed
    sound = len(printed.splitlines()) - 1
    assert printed.count("unchanged (SHA-256)") == sound == (2 if "skipped" not in case else 3)


@pytest.mark.parametrize(
    "prefix, words",
    [
        ("none", "No dataset"),
        ("data.0-16.bin", "Give the path without its extension"),
        ("data.nothing", "No dataset"),
        ("pipe", "pipe.json is not a record of gptoss tokenize"),
        ("config", "config.json is not a record of gptoss tokenize"),
    ],
)
def test_no_dataset(prefix, words, corpus, capsys):
    (corpus / "config.json").write_text("{}")
    os.mkfifo(corpus / "pipe.json")
    code, printed = verify(capsys, corpus / prefix)
    assert code == 2 and words in printed and printed.count("\n") == 1


def test_two_corpora_of_one_record(corpus, capsys):
    """A part that another one was copied over has the wrong hash, though it is consistent; no."""
    for end in (".bin", ".idx"):
        (corpus / f"{PART}{end}").write_bytes((corpus / f"data.valid{end}").read_bytes())
    code, printed = verify(capsys, corpus / "data")
    assert code == 1 and f"{PART}.bin has" in printed


LENGTHS = [3, 1, 700, 2, 5]


def _index(lengths=LENGTHS, pointers=None, documents=None, code=4, counts=None):
    """An .idx with what is given in place of what belongs there."""
    ends = numpy.cumsum([0, *LENGTHS]) * 4
    pointers = ends[:-1] if pointers is None else pointers
    documents = range(len(LENGTHS) + 1) if documents is None else documents
    counts = counts or (len(lengths), len(documents))
    return (
        struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, *counts)
        + numpy.array(lengths, "<i4").tobytes()
        + numpy.array(pointers, "<i8").tobytes()
        + numpy.array(documents, "<i8").tobytes()
    )


WRONG = {
    "length-in-the-middle": (_index([3, 2, 700, 2, 5]), "sequence 2 begins at byte 16"),
    "negative-length": (_index([3, -1, 702, 2, 5]), "sequence 1 has -1 tokens"),
    "pointer": (_index(pointers=[0, 12, 17, 2816, 2824]), "sequence 2 begins at byte 17"),
    "first-pointer": (_index(pointers=[4, 12, 16, 2816, 2824]), "sequence 0 begins at byte 4"),
    "negative-pointer": (_index(pointers=[0, -12, 16, 2816, 2824]), "begins at byte -12"),
    "swapped": (_index([1, 3, 700, 2, 5]), "sequence 1 begins at byte 12"),
    "documents-fall": (_index(documents=[0, 1, 3, 2, 4, 5]), "document 3 begins at sequence 2"),
    "documents-beyond": (_index(documents=[0, 1, 9, 3, 4, 5]), "document 2 begins at sequence 9"),
    "documents-negative": (_index(documents=[0, -1, 2, 3, 4, 5]), "begins at sequence -1"),
    "documents-begin-late": (_index(documents=[1, 1, 2, 3, 4, 5]), "document 0 begins at"),
    "documents-overflow": (
        _index(documents=[0, 1, 2**63 - 1, 3, 4, 5]),
        "document 2 begins at sequence 9,?2",
    ),
    "no-documents": (_index(documents=[]), "documents end at sequence 0 of 5"),
    "floats": (_index(code=7), "float32 values"),
    "sequences-overflow": (_index(counts=(2**63, 6)), "it must have"),
    "pointers-overflow": (_index(pointers=[0, 12, 2**63 - 1, 2816, 2824]), "sequence 2 begins"),
}


@pytest.mark.parametrize("at_a_time", [2, 2**20])
@pytest.mark.parametrize("case", WRONG)
def test_every_entry_of_an_index(case, at_a_time, tmp_path, monkeypatch):
    """Entries are read in pieces; a fault at an edge of two is one, too."""
    monkeypatch.setattr("megatron.gpt_oss.data.indexed_dataset._CHUNK", at_a_time)
    content, words = WRONG[case]
    (tmp_path / "x.bin").write_bytes(bytes(sum(LENGTHS) * 4))
    (tmp_path / "x.idx").write_bytes(_index())
    check_dataset(tmp_path / "x")
    (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(UsageError, match=words) as error:
        check_dataset(tmp_path / "x")
    assert "x.idx" in str(error.value) and "\n" not in str(error.value)
