# Copyright (c) 2026, the megatron-core gptoss authors.

"""A byte-level tokenizer that needs no download: token i is byte i, then <|endoftext|>."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
BYTE_VOCAB_SIZE = 257


def build_byte_tokenizer() -> Tokenizer:
    """The tokenizer: 256 bytes with their value as id, <|endoftext|> with id 256."""
    vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # use_regex=False: no splitting into words, which only affects merges.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def write_byte_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, as transformers loads them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    build_byte_tokenizer().save(str(directory / TOKENIZER_NAME))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    text = json.dumps(config, indent=2) + "\n"
    (directory / TOKENIZER_CONFIG_NAME).write_text(text, encoding="utf-8")


def byte_symbols() -> list[str]:
    """The printable character of each byte in GPT-2's byte-level vocabulary.

    A printable Latin-1 byte is itself; the others map to U+0100 and the following characters.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
