# Copyright (c) 2026, the megatron-core gptoss authors.

"""The file of --data-blend: the corpora of a run, their weights and their validation sets.

    corpora:
      japanese:
        path: /data/ja          # as given to gptoss tokenize --output
        weight: 0.7             # share of the training tokens
        upsample: {8k-32k: 2, 32k-up: 4}
      code:
        path: /data/code
        weight: 0.3

If no corpus has a `weight`, each is weighted by its number of tokens. `upsample` is for corpora
that were split by length (--split-at): a token of that bucket is drawn so many times as often as a
token of a bucket that is not listed. With a weight or a factor of 0 the files are not read and need
not exist. The validation set of a corpus is the part that gptoss tokenize --validation-share held
out (PATH.valid); `validation:` names another one, or is false.
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
        name: of the corpus, followed by a dot and the length bucket.
        prefix: path without extension.
        weight: share of the training tokens, above 0; the weights of a blend sum to 1.
    """

    name: str
    prefix: str
    weight: float


@dataclass(frozen=True)
class Blend:
    """The content of a data file.

    Attributes:
        sources: training datasets.
        validation: {corpus: path without extension}; may be empty.
    """

    sources: tuple[Source, ...]
    validation: dict[str, str]


def read_blend(file: str | Path) -> Blend:
    """Read a data file and check the datasets that it names.

    Args:
        file: YAML; relative paths in it start at its directory, $NAME is an environment variable.
    Raises:
        UsageError: names file, corpus, what is wrong and what to do.
    """
    file = Path(file)
    corpora = [Corpus.parse(file, name, fields) for name, fields in _read_corpora(file).items()]
    _check_weights(file, corpora)
    validation = {c.name: prefix for c in corpora if (prefix := _validation_prefix(c)) is not None}
    shares: dict[tuple[str, str], float] = {}
    for corpus in corpora:
        shares |= _shares(corpus)
    total = sum(shares.values())
    sources = (Source(name, prefix, share / total) for (name, prefix), share in shares.items())
    return Blend(tuple(sources), validation)


@dataclass(frozen=True)
class Corpus:
    """One entry of a data file.

    Attributes:
        place: file and corpus, for messages.
        name: of the corpus.
        prefix: path without extension.
        weight: None where no corpus has one.
        upsample: {bucket: factor}.
        validation: path without extension; None for the default, False for none.
    """

    place: str
    name: str
    prefix: str
    weight: float | None
    upsample: dict[str, float]
    validation: str | bool | None

    @classmethod
    def parse(cls, file: Path, name: object, fields: object) -> "Corpus":
        """Check the keys and types of an entry.

        Raises:
            UsageError: names the key and its value.
        """
        if not isinstance(name, (str, int)) or not str(name).isprintable():
            raise UsageError(f"{file}: a corpus has the name {brief(name)}. Give it a name.")
        place = f"{file}, corpus {name}"
        if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
            raise UsageError(f"{place}: no path. Give the --output of gptoss tokenize.")
        for key in fields:
            if key not in _CORPUS_KEYS:
                raise UsageError(
                    f"{place}: unknown key {brief(key)}. Known keys: {', '.join(_CORPUS_KEYS)}."
                )
        validation = fields.get("validation")
        for key, value in (("path", fields["path"]), ("validation", validation)):
            if not isinstance(value, (str, bool, type(None))) or "\0" in str(value):
                raise UsageError(f"{place}: {key} is {brief(value)}. Give a path.")
        upsample = fields.get("upsample") or {}
        if not isinstance(upsample, dict):
            raise UsageError(
                f"{place}: upsample is {brief(upsample)}. Give for example {{32k-up: 4}}."
            )
        _check_number(place, "weight", fields.get("weight"))
        for bucket, factor in upsample.items():
            _check_number(place, f"upsample {str(bucket)[:60]}", factor)
        return cls(
            place,
            str(name),
            _resolve(file, fields["path"]),
            fields.get("weight"),
            upsample,
            _resolve(file, validation) if isinstance(validation, str) else validation,
        )


def _read_corpora(file: Path) -> dict:
    """The entries of a data file, by name."""
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
    return corpora


def _check_number(place: str, what: str, number: object) -> None:
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if number is not None and not (is_number and 0 <= number < 2**1000):
        raise UsageError(f"{place}: {what} is {brief(number)}. Give a number, 0 or more.")


def _check_weights(file: Path, corpora: list[Corpus]) -> None:
    """Refuse weights for some corpora only, and weights that are all 0."""
    missing = [corpus.name for corpus in corpora if corpus.weight is None]
    weighted = [corpus.name for corpus in corpora if corpus.weight is not None]
    if missing and weighted:
        raise UsageError(
            f"{file}: {weighted[0]} has a weight and {missing[0]} has none. Give one to every "
            "corpus, or to none to weight each by its tokens."
        )
    if not missing and all(corpus.weight == 0 for corpus in corpora):
        raise UsageError(f"{file}: every weight is 0. Give one corpus a weight above 0.")


def _shares(corpus: Corpus) -> dict[tuple[str, str], float]:
    """{(name, path without extension): share} of a corpus' datasets; shares do not sum to 1."""
    if corpus.weight == 0:
        return {}
    tokens = _buckets(corpus)
    shares = tokens
    if corpus.weight is not None:
        total = sum(tokens.values())
        shares = {bucket: corpus.weight * count / total for bucket, count in tokens.items()}
    return {
        (_joined(corpus.name, bucket), _joined(corpus.prefix, bucket)): share
        for bucket, share in shares.items()
    }


def _joined(prefix: str, bucket: str) -> str:
    return f"{prefix}.{bucket}" if bucket else prefix


def _buckets(corpus: Corpus) -> dict[str, float]:
    """{length bucket: tokens times factor} of the datasets to read; '' without a split."""
    prefix, upsample = corpus.prefix, corpus.upsample
    if os.path.exists(f"{prefix}.idx") and not upsample:
        return {"": num_tokens(prefix)}
    directory, start = Path(prefix).parent, f"{Path(prefix).name}."
    found = [path.name[len(start) : -4] for path in directory.glob(f"{start}*.idx")]
    found = sorted((name for name in found if _BUCKET.fullmatch(name)), key=_lower_edge)
    if not found and not upsample:
        raise UsageError(
            f"{corpus.place}: no file {prefix}.idx. Create the dataset with: gptoss tokenize."
        )
    for bucket, factor in upsample.items():
        if bucket not in found and factor:
            raise UsageError(
                f"{corpus.place}: upsample names {bucket}, and {prefix} has "
                f"{', '.join(found) or 'no length buckets'}. Split it with: gptoss tokenize "
                "--split-at 8k,32k."
            )
    factors = {bucket: upsample.get(bucket, 1) for bucket in found}
    tokens = {
        b: factor * num_tokens(f"{prefix}.{b}") for b, factor in factors.items() if factor != 0
    }
    if not tokens:
        raise UsageError(
            f"{corpus.place}: every bucket has the factor 0. To omit the corpus give weight: 0."
        )
    return tokens


def _lower_edge(bucket: str) -> int:
    """The smallest length of a bucket; 8192 for '8k-32k'."""
    edge = bucket.split("-")[0]
    return int(edge[:-1]) * 1024 if edge.endswith("k") else int(edge)


def _validation_prefix(corpus: Corpus) -> str | None:
    """The validation set of a corpus; a corpus of weight 0 has one only if the file names it."""
    given = corpus.validation
    if given is False or (given is None and corpus.weight == 0):
        return None
    prefix = given if isinstance(given, str) else f"{corpus.prefix}.{VALIDATION}"
    if not os.path.exists(f"{prefix}.idx"):
        if given is None:
            return None
        raise UsageError(f"{corpus.place}: validation: no file {prefix}.idx.")
    check_dataset(prefix)
    return prefix


def num_tokens(prefix: str) -> int:
    """Check a dataset and return its number of tokens.

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
    """Remove the datasets of weight 0 from Megatron's (prefixes, weights); Megatron rejects them.

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
