# Copyright (c) 2026, the megatron-core gptoss authors.

"""Documents of each file format, against Python's readers."""

import builtins
import gzip
import json
import random

import pytest

from megatron.gpt_oss.data.tokenize import documents
from megatron.gpt_oss.data.tokenize.documents import BadDocument, place_of, read_records, text_of
from megatron.gpt_oss.errors import UsageError

TEXTS = ["one", 'zwei "ü"\n', "日本語\u2028x", "", '[{"text": "not an element"}]', "x" * 3000, "\\"]


def read(path, key="text"):
    """[(number, text or message of BadDocument)]"""
    found = []
    for record in read_records(path, key):
        try:
            found.append((record.number, text_of(record, key)))
        except BadDocument as error:
            found.append((record.number, f"bad: {error}"))
        assert record.position <= path.stat().st_size
    return found


def texts(path, key="text"):
    return [text for _, text in read(path, key)]


def write(path, content):
    """Write bytes, packed as the name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames, as parallel compressors write
        packed = [zstandard.compress(part) for part in (content[:half], content[half:])]
        content = b"".join(packed)
    path.write_bytes(content)
    return path


CONTENTS = {
    "lines.jsonl": "\n".join(json.dumps({"text": t, "id": i}) for i, t in enumerate(TEXTS)),
    "lines.json": "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in TEXTS),
    "array.json": json.dumps([{"id": [1, {"a": 2}], "text": text} for text in TEXTS]),
    "pretty.json": json.dumps([{"text": text} for text in TEXTS], indent=2, ensure_ascii=False),
    "strings.json": json.dumps(TEXTS),
}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json(tmp_path, monkeypatch, name, packed, chunk):
    """Elements are found wherever a chunk ends, also within a character."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", chunk)
    path = write(tmp_path / (name + packed), CONTENTS[name].encode())
    assert texts(path) == TEXTS


def test_one_object_over_several_lines(tmp_path):
    path = write(tmp_path / "one.json", json.dumps({"text": "a\nb", "x": 1}, indent=1).encode())
    assert read(path) == [(1, "a\nb")]
    assert texts(write(tmp_path / "empty.json", b"")) == [""]
    assert texts(write(tmp_path / "none.json", b" [ ] ")) == []
    bom = write(tmp_path / "bom.json", b'\xef\xbb\xbf[{"text": "x"}]')
    assert texts(bom) == ["x"]


def test_lines_of_array_elements(tmp_path):
    content = '[\n{"text": "a\\n"},\n\n{"text":\n 5},\n {"b": 1}, 7,\n{"text": "c"}, oops\n, {"text": "d"}]'
    found = read(write(tmp_path / "a.json", content.encode()))
    assert [number for number, _ in found] == [2, 4, 6, 6, 7, 7]
    assert [text for _, text in found if not text.startswith("bad")] == ["a\n", "c"]
    assert "rest of the array cannot be read" in found[-1][1]
    cut = read(write(tmp_path / "cut.json", b'[{"text": "a"},\n'))
    assert cut == [(1, "a"), (2, "bad: the array ends here, without a ']'")]


def test_array_that_is_not_utf8(tmp_path):
    """Invalid bytes are reported, not replaced."""
    path = write(tmp_path / "a.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]')
    assert read(path)[-1] == (0, "bad: not UTF-8; the rest is skipped")
    assert not any("\ufffd" in text for _, text in read(path))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_cut_short(tmp_path, packed):
    """Complete documents come first, then the error about the truncation."""
    generator = random.Random(1)
    lines = "\n".join(json.dumps({"text": str(generator.random())}) for _ in range(40_000))
    path = write(tmp_path / f"a.jsonl{packed}", lines.encode())
    whole = texts(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found = read(path)
    assert found[-1][1].startswith("bad: incomplete, or not ")
    assert len(found) < len(whole) and [text for _, text in found[:-1]] == whole[: len(found) - 1]
    other = write(tmp_path / "x.txt", b"plain").rename(tmp_path / f"x.txt{packed}")
    assert read(other)[0][1].startswith("bad: incomplete, or not " + packed[1:])


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    values = [*TEXTS, None] * 100
    table = pyarrow.table({"id": range(800), "body": values})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=70)
    found = read(path, "body")
    assert [number for number, _ in found] == list(range(1, 801))
    assert [text for _, text in found if not text.startswith("bad")] == TEXTS * 100
    assert found[7] == (8, "bad: 'body' is not a string") and place_of(path, 8).endswith(", row 8")
    with pytest.raises(UsageError, match="no column 'text'; it has id, body\. .*--json-key"):
        read(path)
    path.write_bytes(path.read_bytes()[:500])
    assert read(path, "body")[0][1].startswith("bad: not a complete parquet file")


@pytest.mark.parametrize("name, package", [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_missing_package(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    found = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return found(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=rf"{name}: .* needs {package}.*megatron-core\[data\]"):
        read(tmp_path / name)
