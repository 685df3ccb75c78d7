# Copyright (c) 2026, the megatron-core gptoss authors.

"""A directory with gpt-oss' tokenizer, from the ranks that the bpe-openai package ships."""

import base64
import gzip
import json
from importlib import resources
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from megatron.gpt_oss.data.byte_tokenizer import byte_symbols
from megatron.gpt_oss.data.chat.harmony import SPECIAL_TOKENS

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


def write_o200k(directory: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json, with gpt-oss' special tokens."""
    ranks, symbols = read_ranks(), byte_symbols()
    written = lambda token: "".join(symbols[byte] for byte in token)
    vocab = {written(token): rank for token, rank in ranks.items()}
    merges = [(written(left), written(right)) for left, right in merges_of(ranks)]
    vocab["<|startoftext|>"] = 199_998
    vocab |= {f"<|reserved_{n}|>": n for n in range(200_000, 200_013)}
    for name, number in SPECIAL_TOKENS.items():
        vocab.pop(f"<|reserved_{number}|>", None)
        vocab[name] = number
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
