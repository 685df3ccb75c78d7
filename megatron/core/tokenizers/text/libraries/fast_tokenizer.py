# Copyright (c) 2026, the megatron-core gptoss authors.

"""Hugging Face tokenizer.json with the `tokenizers` package, without transformers."""

import json
import os
from typing import Dict, List, Optional, Union

from tokenizers import AddedToken, Tokenizer

from .abstract_tokenizer import MegatronTokenizerTextAbstract


class FastTokenizer(MegatronTokenizerTextAbstract):
    """Replaces HuggingFaceTokenizer for a local directory with a fast tokenizer.

    Takes the same arguments. vocab_file, merges_file and trust_remote_code have no effect, because
    tokenizer.json is the complete tokenizer.

    Args:
        tokenizer_path: directory with tokenizer.json (and tokenizer_config.json, which names the
            special tokens), or the file.
        additional_special_tokens: added to the vocabulary if they are not in it.
        use_fast: must be true.
        include_special_tokens: text_to_ids adds the special tokens of the post-processor;
            ids_to_text keeps special tokens.
        chat_template: overrides that of tokenizer_config.json.
    Raises:
        ValueError: the file does not exist or is not a tokenizer, or use_fast is false.
    """

    def __init__(
        self,
        tokenizer_path: str,
        vocab_file: Optional[str] = None,
        merges_file: Optional[str] = None,
        additional_special_tokens: Optional[List[str]] = None,
        use_fast: Optional[bool] = True,
        trust_remote_code: Optional[bool] = False,
        include_special_tokens: bool = True,
        chat_template: Optional[str] = None,
    ):
        del vocab_file, merges_file, trust_remote_code
        if not use_fast:
            raise ValueError("Without transformers only fast tokenizers (tokenizer.json) can load.")
        directory, name = tokenizer_path, "tokenizer.json"
        if os.path.isfile(tokenizer_path):
            directory, name = os.path.split(tokenizer_path)
        file = os.path.join(directory, name)
        if not os.path.isfile(file):
            raise ValueError(
                f"No {name} in {tokenizer_path}. Give a local directory that has one: names of the "
                "Hugging Face hub need the transformers package."
            )
        self.tokenizer = _read_tokenizer(file)
        config = _read_json(os.path.join(directory, "tokenizer_config.json"))
        self.chat_template = chat_template or config.get("chat_template")
        self.include_special_tokens = include_special_tokens
        self._special = {
            role: _token_text(config.get(f"{role}_token"), f"{role}_token")
            for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
        }
        self._additional_special_tokens = list(additional_special_tokens or [])
        self.add_special_tokens(self._additional_special_tokens)

    def text_to_tokens(self, text: str) -> List[str]:
        """Converts text to tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).tokens

    def tokens_to_text(self, tokens: List[str]) -> str:
        """Converts tokens to text."""
        return self.tokenizer.decode(self.tokens_to_ids(tokens), skip_special_tokens=False)

    def tokens_to_ids(self, tokens: Union[str, List[str]]) -> List[int]:
        """Converts tokens to ids; None for a token that is not in the vocabulary."""
        tokens = [tokens] if isinstance(tokens, str) else tokens
        return [self.tokenizer.token_to_id(token) for token in tokens]

    def ids_to_tokens(self, ids: Union[int, List[int]]) -> List[str]:
        """Converts ids to tokens."""
        ids = [ids] if isinstance(ids, int) else ids
        return [self.tokenizer.id_to_token(int(i)) for i in ids]

    def text_to_ids(self, text: str) -> List[int]:
        """Converts text to ids."""
        return self.tokenizer.encode(text, add_special_tokens=self.include_special_tokens).ids

    def ids_to_text(self, ids: List[int], remove_special_tokens: Optional[bool] = None) -> str:
        """Converts ids to text."""
        if remove_special_tokens is None:
            remove_special_tokens = not self.include_special_tokens
        return self.tokenizer.decode(list(ids), skip_special_tokens=remove_special_tokens)

    def add_special_tokens(self, special_tokens: Union[List[str], Dict]) -> int:
        """Adds special tokens; a dictionary is keyed as in transformers ('eos_token', ...)."""
        tokens = list(special_tokens)
        if isinstance(special_tokens, dict):
            tokens = list(special_tokens.get("additional_special_tokens", ()))
            for role in self._special:
                if f"{role}_token" in special_tokens:
                    self._special[role] = special_tokens[f"{role}_token"]
                    tokens.append(self._special[role])
        added = [AddedToken(token, special=True, normalized=False) for token in tokens]
        return self.tokenizer.add_special_tokens(added)

    @property
    def additional_special_tokens_ids(self) -> List[int]:
        """Ids of the additional special tokens."""
        return self.tokens_to_ids(self._additional_special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab(self) -> List[str]:
        """Tokens in the order of their ids."""
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        return sorted(vocab, key=vocab.get)

    @property
    def inv_vocab(self) -> Dict[int, str]:
        """Tokens by id."""
        return {i: t for t, i in self.tokenizer.get_vocab(with_added_tokens=True).items()}

    def _id(self, role: str) -> Optional[int]:
        token = self._special[role]
        return None if token is None else self.tokenizer.token_to_id(token)

    @property
    def pad_id(self) -> Optional[int]:
        """Id of the padding token."""
        return self._id("pad")

    @property
    def bos_id(self) -> Optional[int]:
        """Id of the beginning-of-sequence token."""
        return self._id("bos")

    @property
    def eos_id(self) -> Optional[int]:
        """Id of the end-of-sequence token."""
        return self._id("eos")

    @property
    def eod(self) -> Optional[int]:
        """Id of the end-of-document token: eos, as in HuggingFaceTokenizer."""
        return self._id("eos")

    @property
    def sep_id(self) -> Optional[int]:
        """Id of the separator token."""
        return self._id("sep")

    @property
    def cls_id(self) -> Optional[int]:
        """Id of the classification token."""
        return self._id("cls")

    @property
    def unk_id(self) -> Optional[int]:
        """Id of the unknown token."""
        return self._id("unk")

    @property
    def mask_id(self) -> Optional[int]:
        """Id of the mask token."""
        return self._id("mask")


def _read_tokenizer(path: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(path)
    except BaseException as error:  # The Rust code raises Exception, and panics.
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a tokenizer of the tokenizers package ({reason}).") from (
            error
        )


def _read_json(path: str) -> dict:
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return config


def _token_text(token: Union[str, dict, None], role: str) -> Optional[str]:
    """The text of a token, which transformers writes as a string or as {'content': text}."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"tokenizer_config.json: {role} is not the text of a token.")
    return text
