# Copyright (c) 2026, the megatron-core gptoss authors.

"""The end-of-document token of a dataset, and a tokenizer that returns it.

Megatron uses the tokenizer's eos_token as end of document and its pad_token as padding. In gpt-oss
these are <|return|>, which ends an answer, and <|endoftext|>, which ends a document. With them,
<|endoftext|> in a dataset would be replaced by token 0 and not be learned, and --eod-mask-loss
would find no end of a document.
"""

from os.path import getsize
from typing import Sequence

import numpy

from megatron.gpt_oss.data.indexed_dataset import check_dataset, read_lengths
from megatron.gpt_oss.errors import UsageError

_LOOKED_AT = 16  # documents
NO_PADDING = -1


def document_end_of(prefixes: Sequence[str]) -> int | None:
    """Find the end-of-document token from the first documents of each dataset.

    Args:
        prefixes: paths without extension.
    Returns:
        Its id; None if documents of a dataset end with different tokens.
    Raises:
        UsageError: two datasets have different end-of-document tokens.
    """
    found: dict[int, str] = {}
    for prefix in prefixes:
        ends = _last_tokens(prefix)
        if len(ends) > 1:
            return None
        found.update(dict.fromkeys(ends, prefix))
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise UsageError(
            f"{first} ends its documents with token {one}, {second} with token {other}. Tokenize "
            "both with the same tokenizer and --end-token."
        )
    return next(iter(found), None)


def _last_tokens(prefix: str) -> set[int]:
    dtype = numpy.dtype(check_dataset(prefix).dtype)
    lengths = read_lengths(prefix)[:_LOOKED_AT]
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    if len(ends) and (lengths.min() < 0 or ends[-1] * dtype.itemsize > getsize(f"{prefix}.bin")):
        raise UsageError(
            f"{prefix}.idx is damaged: its first sequences have {lengths.tolist()} tokens, but "
            f"{prefix}.bin is shorter. Copy both files again, or recreate them."
        )
    if not len(ends) or not ends[-1]:
        return set()
    tokens = numpy.fromfile(f"{prefix}.bin", dtype=dtype, count=int(ends[-1]))
    return {int(tokens[end - 1]) for end in ends if end}


class DatasetTokenizer:
    """A tokenizer for Megatron's datasets with the end-of-document token of the data.

    Args:
        tokenizer: has all other attributes.
        end_id: see `document_end_of`; None for the tokenizer's own.
    """

    pad = NO_PADDING  # datasets are not padded

    def __init__(self, tokenizer: object, end_id: int | None):
        self._tokenizer, self._end_id = tokenizer, end_id

    @property
    def eod(self) -> int:
        """Id of the token that ends a document."""
        return self._tokenizer.eod if self._end_id is None else self._end_id

    def __getattr__(self, name: str):
        if name.startswith("_"):  # during unpickling
            raise AttributeError(name)
        return getattr(self._tokenizer, name)
