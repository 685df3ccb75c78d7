# Copyright (c) 2026, the megatron-core gptoss authors.

"""Text to indexed dataset, read with Megatron's IndexedDataset."""

import gzip
import json
import os
import signal
import sys
import time

import numpy
import psutil
import pytest

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.gpt_oss.data.byte_tokenizer import build_byte_tokenizer, write_byte_tokenizer
from megatron.gpt_oss.data.lengths import Histogram, bucket_names, parse_lengths
from megatron.gpt_oss.data.tokenize import files as tokenize
from megatron.gpt_oss.data.tokenize.files import tokenize_files
from megatron.gpt_oss.data.tokenize.find_files import find_files
from megatron.gpt_oss.data.tokenizer_files import TextTokenizer, load_text_tokenizer
from megatron.gpt_oss.errors import UsageError
from tests.harness import commands

END = 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return load_text_tokenizer(folder)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    texts = {
        "b.txt": "zweite, größer\n",
        "a.txt": "first <|endoftext|> still first",
        "sub/c.py": 'x = "日本"\r\n',
        "sub/d.md": "\ufeff# with a byte order mark",
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_bytes(b" \n")
    (folder / "binary.bin").write_bytes(bytes(range(256)))
    lines = [json.dumps({"text": "one\u2028line", "id": 1}), "", json.dumps({"text": "two"})]
    (folder / "z.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _documents(prefix):
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_documents_and_summary(corpus, tokenizer, tmp_path):
    summary = tokenize_files([corpus], tmp_path / "out" / "data", tokenizer)
    expected = [
        "first <|endoftext|> still first",
        "zweite, größer\n",
        'x = "日本"\r\n',
        "# with a byte order mark",
        "one\u2028line",
        "two",
    ]
    expected = [[*text.encode(), END] for text in expected]
    assert _documents(tmp_path / "out" / "data") == expected
    assert summary.documents == 6 and summary.files == 5
    assert summary.tokens == sum(map(len, expected))
    skipped = [(os.path.basename(path), reason) for path, reason in summary.skipped]
    assert skipped == [("bad.txt", "not UTF-8"), ("empty.txt", "empty")]
    assert "6 documents" in str(summary) and "2 skipped" in str(summary)
    written = ["data.bin", "data.idx", "data.json", "data.skipped.txt"]
    assert sorted(os.listdir(tmp_path / "out")) == written
    assert summary.datasets == {str(tmp_path / "out" / "data"): (6, summary.tokens)}
    skipped = (tmp_path / "out" / "data.skipped.txt").read_text().splitlines()
    assert skipped == [f"{corpus}/bad.txt: not UTF-8", f"{corpus}/empty.txt: empty"]
    assert IndexedDataset(str(tmp_path / "out" / "data")).index.dtype == numpy.uint16


def test_batches_keep_the_order(corpus, tokenizer, tmp_path, monkeypatch):
    tokenize_files([corpus], tmp_path / "one", tokenizer)
    monkeypatch.setattr(tokenize, "BATCH_BYTES", 1)
    tokenize_files([corpus], tmp_path / "many", tokenizer)
    assert _documents(tmp_path / "one") == _documents(tmp_path / "many")


def test_inputs(corpus):
    names = lambda *args: [str(p.relative_to(corpus)) for p in find_files(*args)]
    assert names([f"{corpus}/**/*.py", corpus / "b.txt"], ["*.txt"]) == ["b.txt", "sub/c.py"]
    assert names([corpus], ["*.md", "c.*"]) == ["sub/c.py", "sub/d.md"]
    assert names([corpus], ["*.txt", "*.py"], ["*/sub/*", "*/b*"]) == ["a.txt", "empty.txt"]
    assert names([corpus / "b.txt", corpus / "b.txt"], []) == ["b.txt"]
    with pytest.raises(UsageError, match=r"nothing\.txt: no file"):
        find_files([corpus / "nothing.txt"], ["*.txt"])
    with pytest.raises(UsageError, match=r"\*\.rs.*--pattern"):
        find_files([corpus], ["*.rs"])


def test_existing_dataset_stays(corpus, tokenizer, tmp_path):
    tokenize_files([corpus / "a.txt"], tmp_path / "data", tokenizer)
    with pytest.raises(UsageError, match="data.bin exists.*--overwrite"):
        tokenize_files([corpus / "b.txt"], tmp_path / "data", tokenizer)
    assert len(_documents(tmp_path / "data")[0]) == 32
    tokenize_files([corpus / "b.txt"], tmp_path / "data", tokenizer, overwrite=True)
    assert len(_documents(tmp_path / "data")[0]) == 18


def test_nothing_stays_of_a_failure(corpus, tokenizer, tmp_path):
    out = tmp_path / "out"
    for bad, line in (
        ('{"text": "x"}\n{"txet": 1}\n', 2),
        ('{"text": 5}', 1),
        ("[1]", 1),
        ("{", 1),
        ('{"text": "\\ud800"}', 1),
    ):
        (corpus / "bad.jsonl").write_text(bad)
        with pytest.raises(UsageError, match=f"bad.jsonl, line {line}: .*--bad-lines skip"):
            tokenize_files([corpus], out / "data", tokenizer)
        assert os.listdir(out) == []
    with pytest.raises(UsageError, match="The input files contain no document.*bad.txt: not UTF-8"):
        tokenize_files([corpus / "bad.txt"], out / "data", tokenizer)
    assert os.listdir(out) == []


def test_bad_lines_are_told_and_left_out(corpus, tokenizer, tmp_path):
    lines = ['{"text": "good"}', '{"text": 5}', '{"text": "", "x": 1}', "x", '{"text": "fine"}']
    (corpus / "z.jsonl").write_text("\n".join(lines))
    summary = tokenize_files([corpus / "z.jsonl"], tmp_path / "data", tokenizer, bad="skip")
    assert _documents(tmp_path / "data") == [[*b"good", END], [*b"fine", END]]
    assert [place for place, _ in summary.skipped] == [
        f"{corpus}/z.jsonl, line {n}" for n in (2, 4)
    ]
    assert "'text' is not a string" in summary.skipped[0][1]
    assert len((tmp_path / "data.skipped.txt").read_text().splitlines()) == 2


def _mixed_corpus(folder, documents=300):
    """Lengths from 1 to 3000 in files of several kinds; returns the texts in the order of files."""
    folder.mkdir()
    generator = numpy.random.default_rng(3)
    texts = []
    for i in range(documents // 10):  # many small files, some of them empty
        text = f"small {i}" if i % 7 else ""
        (folder / f"_{i:03}.txt").write_text(text)
        texts += [text] if text else []
    for name in ("a.jsonl", "b.jsonl.gz", "c.json"):
        some = [
            f"{name} {i} " + "wörd " * int(length)
            for i, length in enumerate(generator.integers(0, 600, documents // 3))
        ]
        texts += some
        values = [{"text": text} for text in some]
        content = json.dumps(values) if name == "c.json" else "\n".join(map(json.dumps, values))
        (gzip.open if name.endswith("gz") else open)(folder / name, "wb").write(content.encode())
    return texts


def test_processes_lengths_and_validation(tokenizer, tmp_path, monkeypatch):
    """Every document is in exactly one dataset, complete and in order, for any number of processes."""
    texts = _mixed_corpus(tmp_path / "corpus")
    arguments = dict(split_at=(1024, 2048), validation_share=0.2)
    for workers, batch in ((1, 2_000_000), (3, 5_000)):
        monkeypatch.setattr(tokenize, "BATCH_BYTES", batch)
        out = tmp_path / str(workers) / "data"
        tokenize_files([tmp_path / "corpus"], out, tokenizer, workers=workers, **arguments)
    names = sorted(os.listdir(tmp_path / "1"))
    assert names == sorted(
        f"data.{name}"
        for name in ("json", "skipped.txt", *(f"{part}.{end}" for part in _PARTS for end in _ENDS))
    )
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name
    found = {part: _documents(tmp_path / "1" / f"data.{part}") for part in _PARTS}
    expected = [[*text.encode(), END] for text in texts]
    held_out = found.pop("valid")
    assert 0.1 < len(held_out) / len(texts) < 0.3
    kept = [document for document in expected if document not in held_out]
    assert len(kept) + len(held_out) == len(texts)
    assert found == {
        "0-1k": [d for d in kept if len(d) < 1024],
        "1k-2k": [d for d in kept if 1024 <= len(d) < 2048],
        "2k-up": [d for d in kept if len(d) >= 2048],
    }
    record = json.loads((tmp_path / "1" / "data.json").read_text())
    assert record["datasets"]["valid"] == {
        "documents": len(held_out),
        "tokens": sum(map(len, held_out)),
    }
    assert record["tokens"] == sum(map(len, expected)) == sum(record["lengths"]["tokens"])
    empty = [i for i in range(30) if i % 7 == 0]
    assert record["files"] == 33 - len(empty) and record["num_skipped"] == len(empty)


_PARTS = ("0-1k", "1k-2k", "2k-up", "valid")
_ENDS = ("bin", "idx")


def test_copies_of_a_document_stay_together(tokenizer, tmp_path):
    texts = [f"text {i}" for i in range(50)]
    for name, some in (("a", texts), ("b", texts[::-1])):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in some)
        )
    tokenize_files([tmp_path], tmp_path / "data", tokenizer, validation_share=0.3)
    kept = {bytes(d[:-1]) for d in _documents(tmp_path / "data")}
    held_out = {bytes(d[:-1]) for d in _documents(tmp_path / "data.valid")}
    assert kept and held_out and not kept & held_out


_KILLED = """
import sys
from megatron.gpt_oss.data.tokenize import files as tokenize
from megatron.gpt_oss.data.tokenizer_files import load_text_tokenizer

if __name__ == "__main__":
    tokenize.SAVE_SECONDS, tokenize.BATCH_BYTES = 0.0, 2000
    corpus, out, tokenizer, workers = sys.argv[1:]
    tokenize.tokenize_files(
        [corpus], out, load_text_tokenizer(tokenizer), workers=int(workers), bad="skip",
        split_at=(1024,), validation_share=0.1,
    )
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_goes_on_after_a_kill_with_the_same_bytes(tmp_path, workers):
    write_byte_tokenizer(tmp_path / "tokenizer")
    _mixed_corpus(tmp_path / "corpus", 900)
    with open(tmp_path / "corpus" / "a.jsonl", "a") as file:
        file.write("\nbad line\n" + json.dumps({"text": "after"}))
    script = tmp_path / "script.py"
    script.write_text(_KILLED)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}

    def start(out):
        words = [sys.executable, script, tmp_path / "corpus", out / "data", tmp_path / "tokenizer"]
        return commands.Popen([*map(str, words), str(workers)], env=environ)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(120) == 0
    journal = killed / ".data.partial" / "journal.json"
    places = []
    # The later the run is killed, the further it has come: twice on the way, in other files.
    for file, record in ((90, 100), (91, 50)):
        process = start(killed)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            state = json.loads(journal.read_text())["state"] if journal.exists() else {}
            if (state.get("file", 0), state.get("record", 0)) >= (file, record):
                break
            time.sleep(0.001)
        others = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(others) >= (workers if workers > 1 else 0)
        assert not psutil.wait_procs(others, timeout=20)[1], "processes outlive a killed parent"
        assert not (killed / "data.json").exists(), "it was through before it was killed"
        places.append((state["file"], state["record"]))
    assert places[0] < places[1]
    tokenizer = load_text_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UsageError, match="unfinished dataset with different --split-at. Finish it"):
        tokenize_files([tmp_path / "corpus"], killed / "data", tokenizer, validation_share=0.1)
    assert start(killed).wait(120) == 0
    assert sorted(os.listdir(killed)) == sorted(os.listdir(whole))
    for name in os.listdir(whole):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_killed_while_files_get_their_names(tokenizer, tmp_path, monkeypatch):
    """Every document is encoded, some files have their names: the rest is done, nothing twice."""
    _mixed_corpus(tmp_path / "corpus", 30)
    arguments = dict(split_at=(1024,))
    tokenize_files([tmp_path / "corpus"], tmp_path / "whole" / "data", tokenizer, **arguments)
    replace = os.replace

    for stop in ("data.0-1k.bin", "data.0-1k.idx", "data.1k-up.bin", "data.json"):
        out = tmp_path / stop

        def die(source, target):
            replace(source, target)
            if os.path.basename(target) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            tokenize_files([tmp_path / "corpus"], out / "data", tokenizer, **arguments)
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(tokenize._Run, "encode", None)
        summary = tokenize_files([tmp_path / "corpus"], out / "data", tokenizer, **arguments)
        assert summary.tokens_per_second == 0
        monkeypatch.undo()
        for name in os.listdir(tmp_path / "whole"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_overwrite_leaves_no_other_bucket(corpus, tokenizer, tmp_path):
    tokenize_files([corpus], tmp_path / "data", tokenizer, split_at=(10, 20))
    assert (tmp_path / "data.10-20.idx").exists()
    cache = tmp_path / "data" / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)  # of samples that a run cut from an earlier dataset of that name
    tokenize_files([corpus], tmp_path / "data", tokenizer, overwrite=True)
    assert not cache.exists()
    assert not list(tmp_path.glob("data.*-*"))
    assert len(_documents(tmp_path / "data")) == 6


def test_two_at_one_output(corpus, tokenizer, tmp_path):
    from megatron.gpt_oss.data.tokenize.output import ResumableDatasets

    other = ResumableDatasets(tmp_path / "data", {"": "uint16"}, {}, False)
    with pytest.raises(UsageError, match="Another process is writing .*data"):
        tokenize_files([corpus], tmp_path / "data", tokenizer)
    other.remove()


def test_lengths():
    assert parse_lengths("8k, 32K,100000") == (8192, 32768, 100000)
    assert bucket_names((8192, 32768)) == ["0-8k", "8k-32k", "32k-up"] and bucket_names(()) == []
    for wrong in ("8k,8k", "0,5", "long", "8k,", "-1"):
        with pytest.raises(UsageError, match="--split-at"):
            parse_lengths(wrong)


def test_histogram():
    """A document of exactly 32k is not over it; sums are exact where floats are not."""
    lengths = numpy.array([1, 2, 3, 4, 32768, 32769, 2**31 - 1], dtype=numpy.int32)
    histogram = Histogram.of(lengths)
    assert histogram.documents[:3] == (1, 2, 1) and histogram.documents[15] == 2
    assert histogram.tokens[1] == 5 and histogram.tokens[15] == 65537
    assert sum(histogram.tokens) == int(lengths.astype(object).sum())
    assert histogram.long_tokens == 32769 + 2**31 - 1
    assert len(histogram.edges) == len(histogram.documents) + 1


@pytest.mark.parametrize(
    "arguments, words",
    [({"workers": 0}, "--workers 0"), ({"validation_share": 1.0}, "--validation-share 1.0")],
)
def test_arguments(corpus, tokenizer, tmp_path, arguments, words):
    with pytest.raises(UsageError, match=words):
        tokenize_files([corpus], tmp_path / "data", tokenizer, **arguments)


def test_other_field_and_end_token(corpus, tmp_path):
    (corpus / "other.jsonl").write_text('{"body": "hi"}')
    folder = tmp_path / "tokenizer"
    write_byte_tokenizer(folder)
    tokenizer = load_text_tokenizer(folder, end_token="a")
    tokenize_files([corpus / "other.jsonl"], tmp_path / "data", tokenizer, json_key="body")
    assert _documents(tmp_path / "data") == [[104, 105, 97]]


def test_large_vocabulary_is_int32(corpus, tmp_path):
    tokenizer = build_byte_tokenizer()
    tokenizer.add_tokens([f"token{i}" for i in range(70_000)])
    text = TextTokenizer(tokenizer, "token69999", tokenizer.token_to_id("token69999"))
    (corpus / "a.txt").write_text("atoken12b")
    tokenize_files([corpus / "a.txt"], tmp_path / "data", text)
    assert IndexedDataset(str(tmp_path / "data")).index.dtype == numpy.int32
    assert _documents(tmp_path / "data") == [[97, 257 + 12, 98, 257 + 69_999]]


def test_bad_tokenizers(tmp_path):
    with pytest.raises(UsageError, match="No tokenizer at"):
        load_text_tokenizer(tmp_path)
    write_byte_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="no token '<|nope|>'"):
        load_text_tokenizer(tmp_path, "<|nope|>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "b"}}')
    assert load_text_tokenizer(tmp_path).end_id == END  # the end of a document, not of an answer
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace("<|endoftext|>", "<|eod|>"))
    assert load_text_tokenizer(tmp_path).end_id == ord("b")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="names no eos_token.*--end-token"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a tokenizer"):
        load_text_tokenizer(tmp_path, "a")
