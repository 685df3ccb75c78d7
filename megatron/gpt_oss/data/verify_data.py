# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss verify-data`: check all bytes of datasets.

Checks that .idx is valid and fits .bin (see `check_dataset`), that all tokens are in the
vocabulary, and that sizes and SHA-256 are those of PREFIX.json.
"""

import glob
import hashlib
import os
from pathlib import Path
from typing import Iterable

import numpy
from tqdm import tqdm

from megatron.gpt_oss.data.corpus_record import (
    DATASET,
    SKIPPED,
    SUMMARY,
    dataset_prefix,
    ending,
    loss_name,
    output_of,
    owner_of,
)
from megatron.gpt_oss.data.indexed_dataset import (
    LOSS,
    check_dataset,
    check_loss_weights,
    has_loss_weights,
)
from megatron.gpt_oss.errors import UsageError, as_os_sentence
from megatron.gpt_oss.outputs import naming, sha256
from megatron.gpt_oss.progress import advance, progress_bar

_BYTES_AT_A_TIME = 8 * 2**20


def verify_data(prefixes: Iterable[str | Path], progress: bool = False) -> bool:
    """Check datasets completely and print one line for each.

    Args:
        prefixes: paths without extension; the --output of a split corpus stands for all its parts.
        progress: show a bar on stderr.
    Returns:
        Whether all are valid.
    Raises:
        UsageError: a path has no dataset.
    """
    found = [(Path(prefix), _datasets(Path(prefix))) for prefix in prefixes]
    sizes = [_size(dataset_prefix(p, name)) for p, names in found for name in names]
    valid = True
    with progress_bar(sum(sizes), enabled=progress) as bar:
        lines = []
        for prefix, names in found:
            for name in names:
                problem, line = _verify(prefix, name, bar)
                valid = valid and problem is None
                lines.append(problem or line)
            valid = _verify_skipped(prefix, lines) and valid
    print("\n".join(lines))
    return valid


def _datasets(prefix: Path) -> list[str]:
    """Names of the datasets at a path."""
    owner = owner_of(prefix)
    if owner is not None and owner[0] == prefix:
        return sorted(owner[1]["datasets"]) or [""]
    if any(output_of(prefix, end).exists() for end in DATASET) or owner is not None:
        return [""]
    hint = ""
    if (found := output_of(prefix, SUMMARY)).exists():
        hint = f" {found} is not a record of gptoss tokenize."
    if prefix.name.endswith(DATASET):
        hint = f" Give the path without its extension: {str(prefix)[:-4]}."
    elif parts := glob.glob(f"{glob.escape(str(prefix))}.*.idx"):
        hint = f" Did you mean {sorted(parts)[0][:-4]}?"
    raise UsageError(
        f"No dataset {prefix}: neither its record {prefix}{SUMMARY} nor {prefix}.idx.{hint}"
    )


def _size(target: Path) -> int:
    path = output_of(target, ".bin")
    return path.stat().st_size if path.is_file() else 0


def _verify(prefix: Path, name: str, bar: tqdm) -> tuple[str | None, str]:
    """(problem, "") or (None, result) of one dataset."""
    target = dataset_prefix(prefix, name)
    owner = owner_of(prefix if name else target)
    try:
        header = check_dataset(target)
        record = {} if owner is None else owner[1]
        name = name or ("" if owner is None else owner[2])
        vocab_size = record.get("vocab_size")
        highest, lowest, tokens, digest = _read_tokens(target, header.dtype, bar)
        if tokens and (lowest < 0 or (isinstance(vocab_size, int) and highest >= vocab_size)):
            wrong = lowest if lowest < 0 else highest
            known = f"0 to {vocab_size - 1}" if isinstance(vocab_size, int) else "0 or more"
            return f"{target}.bin holds token {wrong}; the vocabulary has {known}. {_REMEDY}", ""
        digests = {".bin": digest, ".idx": sha256(output_of(target, ".idx"))}
        for end, found in digests.items():
            expected = record.get("outputs", {}).get(ending(name, end), {}) if record else {}
            problem = _compare(output_of(target, end), expected, found)
            if record and problem:
                return problem, ""
        if (problem := _verify_loss(target, name, record)) is not None:
            return problem, ""
        counts = record.get("datasets", {}).get(name)
        documents = header.documents - 1
        if counts is not None and counts != {"documents": documents, "tokens": tokens}:
            return (
                f"{target} has {documents:,} documents and {tokens:,} tokens, its record "
                f"{counts}. {_REMEDY}"
            ), ""
    except UsageError as error:
        return str(error), ""
    except OSError as error:
        return as_os_sentence(error, target) or f"{target}: {error}", ""
    state = "unchanged (SHA-256)" if record else f"consistent; no {prefix}{SUMMARY} to compare with"
    return None, f"{target}: {documents:,} documents, {tokens:,} tokens, {state}"


def _verify_loss(target: Path, name: str, record: dict) -> str | None:
    """What is wrong with the loss weights of a dataset of conversations; None for other datasets."""
    if not has_loss_weights(target) and "chat" not in record:
        return None
    check_loss_weights(target)
    loss = dataset_prefix(target, LOSS)
    weights = numpy.memmap(output_of(loss, ".bin"), numpy.float32, "r")
    if not (numpy.isfinite(weights).all() and (weights >= 0).all()):
        return f"{loss}.bin holds a weight that is negative or not finite. {_REMEDY}"
    for end in DATASET if record else ():
        path = output_of(loss, end)
        expected = record.get("outputs", {}).get(ending(loss_name(name), end), {})
        if problem := _compare(path, expected, sha256(path)):
            return problem
    return None


_REMEDY = "Copy both files again, or recreate them: gptoss tokenize ... --overwrite."


def _compare(path: Path, expected: dict, digest: str) -> str | None:
    if not expected:
        return f"{path} is not in its record. {_REMEDY}"
    size = path.stat().st_size
    if size != expected.get("size"):
        return f"{path} has {size:,} bytes, expected {expected.get('size')}. {_REMEDY}"
    if digest != expected.get("sha256"):
        return f"{path} has different contents than when it was written (SHA-256). {_REMEDY}"
    return None


def _read_tokens(target: Path, dtype: str, bar: tqdm) -> tuple[int, int, int, str]:
    """(highest id, lowest id, number of tokens, SHA-256) of a .bin."""
    path = output_of(target, ".bin")
    digest = hashlib.sha256()
    highest, lowest, tokens = 0, 0, 0
    with naming(path), open(path, "rb") as file:
        while piece := file.read(_BYTES_AT_A_TIME):
            digest.update(piece)
            ids = numpy.frombuffer(piece, dtype=dtype)
            highest, lowest = max(highest, int(ids.max())), min(lowest, int(ids.min()))
            tokens += len(ids)
            advance(bar, len(piece), os.path.basename(path))
    return highest, lowest, tokens, digest.hexdigest()


def _verify_skipped(prefix: Path, lines: list[str]) -> bool:
    """Check PREFIX.skipped.txt, if it is recorded."""
    owner = owner_of(prefix)
    expected = (
        owner[1]["outputs"].get(SKIPPED) if owner is not None and owner[0] == prefix else None
    )
    path = output_of(prefix, SKIPPED)
    if expected is None:
        return True
    problem = (
        f"{path} is missing." if not path.is_file() else _compare(path, expected, sha256(path))
    )
    if problem:
        lines.append(problem)
    return not problem
