# Copyright (c) 2026, the megatron-core gptoss authors.

"""Load the fast tokenizer of a Hugging Face directory with the `tokenizers` package."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from megatron.gpt_oss.data.byte_tokenizer import (
    END_OF_TEXT,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
)
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import brief, read_json

_LARGEST_ID = 2**31 - 1  # token ids are stored as int32


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the id that ends a document.

    Attributes:
        shows_special: `decode` writes special tokens.
    """

    tokenizer: Tokenizer
    end_token: str
    end_id: int
    shows_special: bool = False

    @property
    def vocab_size(self) -> int:
        """Highest token id plus 1."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without added special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=not self.shows_special)


def read_tokenizer(
    file: Path, error: type[UsageError] = UsageError, hint: str = "Download the file again."
) -> Tokenizer:
    """Load a tokenizer.json, and check that it encodes a few characters.

    Raises:
        UsageError: of the class `error`; names the file and what is wrong with it.
    """
    if not Path(file).is_file():  # nobody may write to a named pipe
        raise error(f"{file} is not a file. {hint}")
    try:
        tokenizer = Tokenizer.from_str(Path(file).read_text(encoding="utf-8"))
        tokenizer.encode("a B\n\u00e9\u65e5", add_special_tokens=False)
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
    except BaseException as cause:  # the Rust code raises plain Exception, and panics
        if isinstance(cause, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = cause.strerror if isinstance(cause, OSError) else " ".join(str(cause).split())
        if isinstance(cause, UnicodeDecodeError):
            reason = f"not UTF-8 at byte {cause.start}"
        raise error(
            f"{file} is not a tokenizer that the tokenizers package can load ({reason[:200]}). "
            f"{hint}"
        ) from cause
    if not ids or max(ids) > _LARGEST_ID:
        found = f"the id {max(ids)}" if ids else "no tokens"
        raise error(f"{file} has {found}. {hint}")
    return tokenizer


def load_text_tokenizer(path: str | Path, end_token: str | None = None) -> TextTokenizer:
    """Load tokenizer.json, and tokenizer_config.json from the same directory.

    Args:
        path: the directory, or its tokenizer.json.
        end_token: end-of-document token; by default <|endoftext|> if the tokenizer has it, else its
            eos_token. (In gpt-oss, eos_token is <|return|>, the end of an answer.)
    Raises:
        UsageError: the file is missing or invalid, or has no such end token.
    """
    path = Path(path)
    file = path / TOKENIZER_NAME if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"No tokenizer at {path}. Give a directory with {TOKENIZER_NAME}.")
    tokenizer = read_tokenizer(file)
    if end_token is None and tokenizer.token_to_id(END_OF_TEXT) is not None:
        end_token = END_OF_TEXT
    end_token = end_token or eos_token_of(file.parent)
    if end_token is None:
        raise UsageError(
            f"{file} has no {END_OF_TEXT}, {TOKENIZER_CONFIG_NAME} names no eos_token. "
            "Give the token that ends a document with --end-token."
        )
    end_id = tokenizer.token_to_id(end_token)
    if end_id is None:
        raise UsageError(f"{file} has no token '{end_token}'. Choose another with --end-token.")
    return TextTokenizer(tokenizer, end_token, end_id)


def eos_token_of(directory: Path) -> str | None:
    """The eos_token of tokenizer_config.json in a directory, or None."""
    file = directory / TOKENIZER_CONFIG_NAME
    if not file.is_file():
        return None
    token = read_json(file, hint="Download it again.").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{file} has eos_token = {brief(token)}, which is not a token string.")
    return text
