# Copyright (c) 2026, the megatron-core gptoss authors.

"""gptoss tokenize with gpt-oss' vocabulary, against an independent encoder.

The bpe-openai package ships the ranks of o200k and encodes by an algorithm of its own; here they
become a directory with tokenizer.json, as Hugging Face's gpt-oss directories have one.
"""

import base64
import gzip
import json
from importlib import resources
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.gpt_oss.data.byte_tokenizer import _byte_symbols
from megatron.gpt_oss.data.tokenize.files import tokenize_files
from megatron.gpt_oss.data.tokenizer_files import load_text_tokenizer

bpe_openai = pytest.importorskip("bpe_openai")
END_OF_TEXT, RETURN = 199_999, 200_002

# o200k's pattern, as published with tiktoken.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def read_ranks():
    """{bytes of a token: its id}"""
    packed = resources.files("bpe_openai.data").joinpath("o200k_base.tiktoken.gz").read_bytes()
    lines = (line.split() for line in gzip.decompress(packed).splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def merges_of(ranks):
    """The pair that each token is merged from last, in the order of the merges."""
    merges = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append((rank, *parts))
    return [(left, right) for _, left, right in sorted(merges)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tokenizer.json and tokenizer_config.json, with gpt-oss' special tokens."""
    folder = tmp_path_factory.mktemp("o200k")
    ranks, symbols = read_ranks(), _byte_symbols()
    written = lambda token: "".join(symbols[byte] for byte in token)
    vocab = {written(token): rank for token, rank in ranks.items()}
    merges = [(written(left), written(right)) for left, right in merges_of(ranks)]
    for name, number in (("<|startoftext|>", 199_998), ("<|endoftext|>", END_OF_TEXT)):
        vocab[name] = number
    vocab.update({f"<|reserved_{n}|>": n for n in (200_000, 200_001)}, **{"<|return|>": RETURN})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<|endoftext|>", "<|return|>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


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
