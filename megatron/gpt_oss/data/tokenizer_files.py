# Copyright (c) 2026, the megatron-core gptoss authors.

"""Load the fast tokenizer of a Hugging Face folder with the `tokenizers` package alone."""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from megatron.gpt_oss.data.byte_tokenizer import (
    END_OF_TEXT,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
)
from megatron.gpt_oss.errors import UsageError


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the id that ends a document."""

    tokenizer: Tokenizer
    end_token: str
    end_id: int

    @property
    def vocab_size(self) -> int:
        """Smallest vocabulary that holds every token."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens are left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_text_tokenizer(path: str | Path, end_token: str | None = None) -> TextTokenizer:
    """Load tokenizer.json (and tokenizer_config.json beside it).

    Args:
        path: the folder, or its tokenizer.json.
        end_token: ends a document; by default <|endoftext|> where the tokenizer has it, else its
            eos_token. (gpt-oss' eos_token is <|return|>, the end of an answer.)
    Raises:
        UsageError: no such file, not a tokenizer, or it does not know the end token.
    """
    path = Path(path)
    file = path / TOKENIZER_NAME if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"No tokenizer at {path}. Give a folder with {TOKENIZER_NAME}.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust code raises plain Exception
        raise UsageError(
            f"{file} is not a tokenizer of the tokenizers package ({error})."
        ) from error
    if end_token is None and tokenizer.token_to_id(END_OF_TEXT) is not None:
        end_token = END_OF_TEXT
    end_token = end_token or eos_token_of(file.parent)
    if end_token is None:
        raise UsageError(
            f"{file} has no {END_OF_TEXT}, {TOKENIZER_CONFIG_NAME} names no eos_token. Say which token ends a "
            "document with --end-token."
        )
    end_id = tokenizer.token_to_id(end_token)
    if end_id is None:
        raise UsageError(f"{file} has no token '{end_token}'. Choose another with --end-token.")
    return TextTokenizer(tokenizer, end_token, end_id)


def eos_token_of(folder: Path) -> str | None:
    """eos_token of a folder's tokenizer_config.json, or None."""
    file = folder / TOKENIZER_CONFIG_NAME
    if not file.is_file():
        return None
    token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token
