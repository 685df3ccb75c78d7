# Copyright (c) 2026, the megatron-core gptoss authors.

"""What `gptoss tokenize --chat` prints: tokens by role and channel, and conversations in colour."""

from typing import Iterator, Mapping, Sequence

import numpy

from megatron.gpt_oss.data.chat.encode import COMPARED, DIFFERENT, DROPPED
from megatron.gpt_oss.data.indexed_dataset import LOSS, check_dataset, read_lengths
from megatron.gpt_oss.data.tokenizer_files import TextTokenizer
from megatron.gpt_oss.text_table import aligned

_GREY, _GREEN, _PLAIN = "\x1b[90m", "\x1b[32m", "\x1b[0m"
_MAX_DIFFERENCES = 3


def chat_summary(counts: Mapping[str, int], differences: Sequence[tuple[str, str]]) -> str:
    """A table of tokens by role and channel, and the agreement with the chat template.

    Args:
        counts: see `Encoded.counts`.
        differences: (place, difference) of conversations.
    """
    tokens = {name[7:]: count for name, count in counts.items() if name.startswith("tokens ")}
    losses = {name: counts.get(f"loss {name}", 0) for name in tokens}
    tokens["total"], losses["total"] = sum(tokens.values()), sum(losses.values())
    rows = [
        [name, f"{count:,}", f"{losses[name]:,}", f"{100 * losses[name] / max(1, count):.1f}"]
        for name, count in tokens.items()
    ]
    lines = [aligned([["role/channel", "tokens", "with loss", "%"], *rows])]
    if dropped := counts.get(DROPPED, 0):
        lines.append(
            f"{dropped:,} reasoning messages of earlier turns are left out, as at inference."
        )
    if compared := counts.get(COMPARED, 0):
        different = counts.get(DIFFERENT, 0)
        lines.append(
            f"The model's chat template renders {compared - different:,} of {compared:,} "
            "conversations to the same tokens."
        )
        for place, difference in differences[:_MAX_DIFFERENCES]:
            lines.append(f"  {place}: {difference}")
    return "\n".join(lines)


def shown_conversations(prefix: str, tokenizer: TextTokenizer, count: int) -> Iterator[str]:
    """The first conversations of a dataset: tokens with loss in green, the others in grey.

    Args:
        prefix: path of the dataset, without extension.
    """
    lengths = read_lengths(prefix)[:count]
    size, start = int(lengths.sum()), 0
    dtype = check_dataset(prefix).dtype
    ids = numpy.fromfile(f"{prefix}.bin", dtype=dtype, count=size)
    weights = numpy.fromfile(f"{prefix}.{LOSS}.bin", dtype=numpy.float32, count=size)
    for length in lengths:
        part = slice(start, start + length)
        yield _coloured(ids[part], weights[part] > 0, tokenizer)
        start += length


def _coloured(ids: numpy.ndarray, has_loss: numpy.ndarray, tokenizer: TextTokenizer) -> str:
    edges = numpy.flatnonzero(numpy.diff(has_loss)) + 1
    parts = zip(numpy.split(ids, edges), numpy.split(has_loss, edges))
    return "".join(
        f"{_GREEN if loss[0] else _GREY}"
        f"{tokenizer.tokenizer.decode(part.tolist(), skip_special_tokens=False)}{_PLAIN}"
        for part, loss in parts
    )
