# Copyright (c) 2026, the megatron-core gptoss authors.

"""--data-blend: shares against hand-computed values, and errors."""

import json

import numpy
import pytest

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.gpt_oss.data.blend import Source, read_blend, without_unread
from megatron.gpt_oss.data.byte_tokenizer import END_OF_TEXT, build_byte_tokenizer
from megatron.gpt_oss.data.tokenize.files import tokenize_files
from megatron.gpt_oss.data.tokenizer_files import TextTokenizer
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.corpus_usage import corpus_uses

# Tokens of the documents, the end of each included; 'ja' is split at 10 and 20.
LENGTHS = {"ja": [4, 5, 10, 15, 15, 20, 31], "code": [50, 50]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    for name, lengths in LENGTHS.items():
        write_corpus(folder / name, lengths, (10, 20) if name == "ja" else ())
    write_corpus(folder / "ja.valid", [7])
    write_corpus(folder / "elsewhere", [8])
    return folder


def write_corpus(prefix, lengths, split_at=()):
    lines = prefix.with_suffix(".jsonl")
    texts = ["x" * (length - 1) for length in lengths]
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = build_byte_tokenizer()
    tokenizer = TextTokenizer(tokenizer, END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))
    tokenize_files([lines], prefix, tokenizer, split_at=split_at)


def blend_of(folder, text):
    (folder / "data.yaml").write_text(f"corpora:\n{text}")
    return read_blend(folder / "data.yaml")


def test_shares(folder, monkeypatch):
    """A corpus has its weight; within it a bucket counts by its tokens times its factor."""
    text = """
  ja: {path: ja, weight: 3, upsample: {10-20: 2, 20-up: 4}}
  code: {path: $WHERE/code, weight: 1}
  gone: {path: nowhere, weight: 0}
"""
    monkeypatch.setenv("WHERE", str(folder))
    blend = blend_of(folder, text)
    drawn = [9, 40 * 2, 51 * 4]
    shares = [0.75 * part / sum(drawn) for part in drawn] + [0.25]
    names = ["ja.0-10", "ja.10-20", "ja.20-up", "code"]
    expected = [
        Source(name, f"{folder}/{name}", pytest.approx(share)) for name, share in zip(names, shares)
    ]
    assert list(blend.sources) == expected
    assert blend.validation == {"ja": f"{folder}/ja.valid"}


def test_without_weights_each_counts_by_its_tokens(folder):
    blend = blend_of(folder, "  ja: {path: ja, upsample: {0-10: 0}}\n  code: {path: code}\n")
    assert {s.name: s.weight for s in blend.sources} == {
        "ja.10-20": pytest.approx(40 / 191),
        "ja.20-up": pytest.approx(51 / 191),
        "code": pytest.approx(100 / 191),
    }


def test_validation_sets(folder):
    """A corpus with weight 0 has a validation set only if the file names one."""
    text = """
  a: {path: ja, weight: 1, validation: false}
  b: {path: ja, weight: 0}
  c: {path: nowhere, weight: 0, validation: ja.valid}
  d: {path: code, weight: 1, validation: elsewhere}
  e: {path: code, weight: 1}
"""
    assert blend_of(folder, text).validation == {
        "c": f"{folder}/ja.valid",
        "d": f"{folder}/elsewhere",
    }


@pytest.mark.parametrize(
    "text, words",
    [
        ("  a: {weight: 1}", "corpus a: no path"),
        ("  a: ja", "corpus a: no path"),
        ("  a: {path: ja, wieght: 1}", "unknown key 'wieght'. Known keys: path, weight"),
        ("  a: {path: ja, weight: -1}", "weight is -1. Give a number"),
        ("  a: {path: ja, weight: yes}", "weight is True"),
        ("  a: {path: ja, upsample: {20-up: x}}", "upsample 20-up is 'x'"),
        ("  a: {path: ja, upsample: 3}", "upsample is 3. Give"),
        ("  a: {path: ja, upsample: {32k-up: 4}}", "names 32k-up, and .*ja has 0-10, 10-20, 20-up"),
        ("  a: {path: code, upsample: {32k-up: 4}}", "code has no length buckets. Split it"),
        (
            "  a: {path: ja, upsample: {0-10: 0, 10-20: 0, 20-up: 0}}",
            "every bucket has the factor 0",
        ),
        ("  a: {path: ja, weight: 1}\n  b: {path: code}", "a has a weight and b has none"),
        ("  a: {path: ja, weight: 0}", "every weight is 0"),
        ("  a: {path: nowhere}", "no file .*nowhere.idx. Create the dataset with: gptoss tokenize"),
        ("  a: {path: ja, validation: nowhere}", "validation: no file .*nowhere.idx"),
        ("  {", "is not YAML"),
        ("", "must hold only the key 'corpora:'"),
        ("  a: {path: ja}\nmore: 1", "must hold only"),
    ],
)
def test_mistakes(folder, text, words):
    with pytest.raises(UsageError, match=words) as error:
        blend_of(folder, text)
    assert "\n" not in str(error.value) and "data.yaml" in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match="--data-blend .*none.yaml: No such file"):
        read_blend(tmp_path / "none.yaml")


def test_damaged_index(tmp_path):
    write_corpus(tmp_path / "a", [5, 6])
    index = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(index[:-1])
    with pytest.raises(UsageError, match="a.idx has .* bytes; .* gptoss tokenize"):
        blend_of(tmp_path, "  a: {path: a}")
    (tmp_path / "a.valid.idx").write_bytes(b"no index")
    (tmp_path / "a.valid.bin").write_bytes(b"")
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(UsageError, match="a.valid.idx begins with"):
        blend_of(tmp_path, "  a: {path: a}")


def test_without_unread():
    assert without_unread((["a", "b", "c"], [1.0, 0.0, 2.0])) == (["a", "c"], [1.0, 2.0])
    for kept in (None, (["a"], None), (["a", "b"], [1.0, 2.0])):
        assert without_unread(kept) is kept
    with pytest.raises(UsageError, match="Every weight of a b is 0"):
        without_unread((["a", "b"], [0.0, 0.0]))


def test_long_documents_are_counted(folder):
    """Four of the seven documents are longer than 14 tokens."""

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 257, 256, 300, {"class": "test"}

    prefix = str(folder / "whole")
    write_corpus(folder / "whole", LENGTHS["ja"])
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=14,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    indices = numpy.arange(7, dtype=numpy.int32)
    dataset = GPTDataset(low_level, prefix, indices, None, Split.train, config)
    (use,) = corpus_uses(dataset, 14)
    assert (use.documents, use.tokens, use.share) == (7, 100, 1.0)
    assert (use.long_documents, use.long_tokens) == (4, 15 + 15 + 20 + 31)
    # Counted by hand: where each sample of 14 tokens begins in the shuffled row of documents.
    ends = numpy.cumsum([LENGTHS["ja"][i] for i in dataset.document_index])
    starts = [14 * i for i in range(len(dataset))]
    cut = [start not in (0, *ends) for start in starts]
    assert use.cut_samples == pytest.approx(sum(cut) / len(cut))
    assert use.epochs == pytest.approx(len(dataset) * 14 / 100)
    line = use.line("ja", 14)
    assert "4 documents (81.0 % of the tokens) exceed the sequence length of 14" in line
    assert corpus_uses(None, 14) == []
