# Copyright (c) 2026, the megatron-core gptoss authors.

"""gptoss tokenize with gpt-oss' vocabulary, against an independent encoder.

The bpe-openai package ships the ranks of o200k and encodes by an algorithm of its own.
"""

import json
from pathlib import Path

import pytest

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.gpt_oss.data.tokenize.files import tokenize_files
from megatron.gpt_oss.data.tokenizer_files import load_text_tokenizer
from tests.harness.o200k import write_o200k

bpe_openai = pytest.importorskip("bpe_openai")
END_OF_TEXT = 199_999


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_o200k(tmp_path_factory.mktemp("o200k"))


def texts():
    """Prose, code, other scripts, emoji, numbers, white space, special tokens as text."""
    source = Path(json.__file__).read_text(encoding="utf-8")
    return [
        source,
        *source.split("\n\n"),
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
        "Ünïcödé naïve façade, DON'T I'll we'Ve  \t\n\n   x\r\n\r\n  12345678 3.14159e-10",
        "Привет, мир! مرحبا بالعالم नमस्ते दुनिया 안녕하세요 👩‍👩‍👧‍👦🏳️‍🌈 e\u0301",
        "a <|endoftext|> b <|return|> c",
        "".join(map(chr, range(32, 1500))),
    ]


def test_tokens_of_gpt_oss(folder, tmp_path):
    """Token for token those of the other encoder, in int32, ended by <|endoftext|>."""
    documents = [text for text in texts() if text.strip()]
    lines = "\n".join(json.dumps({"text": text}) for text in documents)
    (tmp_path / "a.jsonl").write_text(lines)
    tokenizer = load_text_tokenizer(folder)
    assert tokenizer.end_id == END_OF_TEXT
    tokenize_files([tmp_path / "a.jsonl"], tmp_path / "data", tokenizer)
    dataset = IndexedDataset(str(tmp_path / "data"))
    assert len(dataset) == len(documents) and dataset.index.dtype.__name__ == "int32"
    encoder = bpe_openai.get_encoding("o200k_base")
    for text, found in zip(documents, dataset):
        expected = encoder.encode(text, disallowed_special=())
        assert found.tolist() == [*expected, END_OF_TEXT], text[:40]
    assert tokenizer.decode(dataset[0].tolist()) == documents[0]
