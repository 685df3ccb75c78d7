# Copyright (c) 2026, the megatron-core gptoss authors.

"""The data file of a run: which corpora, how much of each, and what their losses are measured on.

    corpora:
      japanese:
        path: /data/ja          # as given to gptoss tokenize --output
        weight: 0.7             # share of the training tokens
        upsample: {8k-32k: 2, 32k-up: 4}
      code:
        path: /data/code
        weight: 0.3

Without any `weight` a corpus counts by its tokens. `upsample` is for corpora that were split by
length (--split-at): how often a token of that bucket is drawn for each one of a bucket that is not
named. A weight or a factor of 0 leaves the files alone: they need not even exist. A corpus's
validation set is what gptoss tokenize --validation-share held out (PATH.valid); `validation:` names
another one, or is false.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy
import yaml

from megatron.gpt_oss.data.indexed_dataset import check_dataset
from megatron.gpt_oss.data.lengths import VALIDATION
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import brief, read_small_file

_CORPUS_KEYS = ("path", "weight", "upsample", "validation")
_BUCKET = re.compile(r"\d+k?-(\d+k?|up)")


@dataclass(frozen=True)
class Source:
    """One dataset of the blend.

    Attributes:
        name: of the corpus, with the bucket of lengths after a dot.
        prefix: path without ending.
        weight: share of the training tokens, above 0; all together are 1.
    """

    name: str
    prefix: str
    weight: float


@dataclass(frozen=True)
class Blend:
    """What a data file says.

    Attributes:
        sources: to train on.
        validation: {corpus: path without ending}; may be empty.
    """

    sources: tuple[Source, ...]
    validation: dict[str, str]


def read_blend(file: str | Path) -> Blend:
    """Read a data file and look at the datasets that it names.

    Args:
        file: YAML; relative paths in it begin at its folder, $NAME is an environment variable.
    Raises:
        UsageError: names file, corpus and what is wrong, and what to do.
    """
    file = Path(file)
    try:
        content = yaml.safe_load(read_small_file(file).decode("utf-8"))
    except OSError as error:
        raise UsageError(f"--data-blend {file}: {error.strerror}. Give a data file.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not YAML: not UTF-8 at byte {error.start}.") from error
    except RecursionError as error:
        raise UsageError(f"{file} is not YAML: nested too deeply.") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{file} is not YAML: {reason}.") from error
    corpora = content.get("corpora") if isinstance(content, dict) else None
    if not isinstance(corpora, dict) or not corpora or set(content) != {"corpora"}:
        raise UsageError(
            f"{file} must hold only the key 'corpora:', with a name and a path for each corpus."
        )
    for name, corpus in corpora.items():
        if not isinstance(name, (str, int)) or not str(name).isprintable():
            raise UsageError(f"{file}: a corpus has the name {brief(name)}. Give it a name.")
        _check_corpus(f"{file}, corpus {name}", corpus)
    weighted = [name for name, corpus in corpora.items() if corpus.get("weight") is not None]
    if weighted and len(weighted) < len(corpora):
        missing = next(name for name in corpora if name not in weighted)
        raise UsageError(
            f"{file}: {weighted[0]} has a weight and {missing} has none. Give one to every corpus, "
            "or to none to weight each by its tokens."
        )
    shares: dict[tuple[str, str], float] = {}
    validation = {}
    for name, corpus in corpora.items():
        place, prefix = f"{file}, corpus {name}", _resolve(file, corpus["path"])
        weight = corpus.get("weight")
        held_out = _validation_prefix(place, file, prefix, corpus, weight)
        if held_out:
            validation[str(name)] = held_out
        if weight == 0:
            continue
        parts = _buckets(place, prefix, corpus.get("upsample") or {})
        total = sum(parts.values())
        for bucket, part in parts.items():
            label = f"{name}.{bucket}" if bucket else str(name)
            path = f"{prefix}.{bucket}" if bucket else prefix
            shares[label, path] = part if weight is None else weight * part / total
    if not shares:
        raise UsageError(f"{file}: every weight is 0. Give one corpus a weight above 0.")
    total = sum(shares.values())
    sources = (Source(name, path, share / total) for (name, path), share in shares.items())
    return Blend(tuple(sources), validation)


def _check_corpus(place: str, corpus: object) -> None:
    if not isinstance(corpus, dict) or not isinstance(corpus.get("path"), str):
        raise UsageError(f"{place}: no path. Give the --output of gptoss tokenize.")
    for field in ("path", "validation"):
        if "\0" in str(corpus.get(field) if isinstance(corpus.get(field), str) else ""):
            raise UsageError(f"{place}: {field} is {brief(corpus[field])}. Give a path.")
    if not isinstance(corpus.get("validation"), (str, bool, type(None))):
        raise UsageError(f"{place}: validation is {brief(corpus['validation'])}. Give a path.")
    for key in corpus:
        if key not in _CORPUS_KEYS:
            raise UsageError(
                f"{place}: unknown key {brief(key)}. Known keys: {', '.join(_CORPUS_KEYS)}."
            )
    upsample = corpus.get("upsample") or {}
    if not isinstance(upsample, dict):
        raise UsageError(f"{place}: upsample is {brief(upsample)}. Give for example {{32k-up: 4}}.")
    numbers = {
        "weight": corpus.get("weight"),
        **{f"upsample {str(k)[:60]}": v for k, v in upsample.items()},
    }
    for what, number in numbers.items():
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if number is not None and not (is_number and 0 <= number < 2**1000):
            raise UsageError(f"{place}: {what} is {brief(number)}. Give a number, 0 or more.")


def _buckets(place: str, prefix: str, upsample: dict) -> dict[str, float]:
    """{bucket: tokens times its factor} of those that are read; '' where nothing is split."""
    if os.path.exists(f"{prefix}.idx") and not upsample:
        return {"": num_tokens(prefix)}
    folder, start = Path(prefix).parent, f"{Path(prefix).name}."
    found = [path.name[len(start) : -4] for path in folder.glob(f"{start}*.idx")]
    # By length: '8k-32k' after '0-8k'.
    found = sorted((name for name in found if _BUCKET.fullmatch(name)), key=_lower_edge)
    if not found and not upsample:
        raise UsageError(
            f"{place}: no file {prefix}.idx. Create the dataset with: gptoss tokenize."
        )
    for bucket, factor in upsample.items():
        if bucket not in found and factor:
            raise UsageError(
                f"{place}: upsample names {bucket}, and {prefix} has "
                f"{', '.join(found) or 'no length buckets'}. Split it with: gptoss tokenize "
                "--split-at 8k,32k."
            )
    read = [bucket for bucket in found if upsample.get(bucket, 1) != 0]
    if not read:
        raise UsageError(
            f"{place}: every bucket has the factor 0. To omit the corpus give weight: 0."
        )
    return {bucket: upsample.get(bucket, 1) * num_tokens(f"{prefix}.{bucket}") for bucket in read}


def _lower_edge(bucket: str) -> int:
    edge = bucket.split("-")[0]
    return int(edge[:-1]) * 1024 if edge.endswith("k") else int(edge)


def _validation_prefix(
    place: str, file: Path, prefix: str, corpus: dict, weight: float | None
) -> str | None:
    """The held-out documents of a corpus; of one that is not read only where they are named."""
    given = corpus.get("validation")
    if given is False or (given is None and weight == 0):
        return None
    held_out = f"{prefix}.{VALIDATION}" if given is None else _resolve(file, str(given))
    if not os.path.exists(f"{held_out}.idx"):
        if given is None:
            return None
        raise UsageError(f"{place}: validation: no file {held_out}.idx.")
    check_dataset(held_out)
    return held_out


def num_tokens(prefix: str) -> int:
    """Tokens of a dataset, which is checked.

    Raises:
        UsageError: it is damaged, or has no token.
    """
    for end in (".idx", ".bin"):
        if not os.path.isfile(prefix + end):
            raise UsageError(f"No file {prefix}{end}. Create the dataset with: gptoss tokenize.")
    header = check_dataset(prefix)
    tokens = os.path.getsize(f"{prefix}.bin") // numpy.dtype(header.dtype).itemsize
    if not tokens:
        raise UsageError(f"{prefix}.bin has no tokens. Remove it, or give it weight: 0.")
    return tokens


def _resolve(file: Path, path: str) -> str:
    path = os.path.expanduser(os.path.expandvars(path))
    return os.path.normpath(os.path.join(file.parent, path))


def without_unread(
    blend: tuple[list[str], list[float] | None] | None,
) -> tuple[list[str], list[float] | None] | None:
    """Megatron's (prefixes, weights) without the datasets of weight 0, which it would refuse.

    Raises:
        UsageError: nothing is left.
    """
    if blend is None or blend[1] is None or 0 not in blend[1]:
        return blend
    kept = [(prefix, weight) for prefix, weight in zip(*blend) if weight]
    if not kept:
        raise UsageError(
            f"Every weight of {' '.join(blend[0])} is 0. Give one dataset a weight above 0."
        )
    prefixes, weights = zip(*kept)
    return list(prefixes), list(weights)
