# Copyright (c) 2026, the megatron-core gptoss authors.

"""run.json: the record of a run, with which its next start is compared.

It is in --run-dir (or --save) and has the command, every argument, and sizes and SHA-256 of the
files that identify data, tokenizer and initial weights. It is written after the checkpoint is
loaded, so a refused start does not change it.
"""

import json
import os
import sys
import time
from argparse import Namespace
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator, Mapping

from megatron.gpt_oss.arguments.run_spec import RunSpec
from megatron.gpt_oss.arguments.validate_data import read_prefixes
from megatron.gpt_oss.data.tokenizer_files import eos_token_of
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import read_json
from megatron.gpt_oss.outputs import MADE_BY, sha256, write_file
from megatron.gpt_oss.training.resume_rules import changes_line, check_changes
from megatron.gpt_oss.training.run_file import (
    OLD_RUN_FILE,
    RUN_FILE,
    find_run_file,
    recorded_arguments,
)

RUN = "pretrain_gpt_oss.py"
VERSION = 1
_MARK = f'{{\n "{MADE_BY}": "{RUN}"'
EOS = "eos_token"
# Compared by content, because the path of the data may change.
_TRAINING_DATA = ("data_path", "train_data_path")


class RunRecord:
    """The record of this start, and its differences from the previous start.

    Args:
        spec: this start, with validated arguments.
    """

    def __init__(self, spec: RunSpec):
        args = spec.args
        self._directory = home(args)
        values = {name: getattr(args, name, None) for name in spec.names if name != "local_rank"}
        self._record = {
            MADE_BY: RUN,
            "version": VERSION,
            "command": list(spec.words),
            "arguments": json.loads(json.dumps(values, default=str)),
        }
        self._args = args
        self._changes: list[dict] = []

    @cached_property
    def _with_files(self) -> dict[str, Any]:
        """The record with its files. Rank 0 reads them, and every rank if the run resumes."""
        args = self._args
        return self._record | {
            "data": {prefix: _dataset(prefix) for prefix in training_data(args)},
            "tokenizer": _tokenizer(args),
            "weights": _weights(args),
        }

    def compare(self, args: Namespace) -> str | None:
        """Compare with the previous start of a run that resumes from `args.load`.

        Returns:
            A line with the changes to report, None if there are none.
        Raises:
            UsageError: a change is not allowed: another model, other data of the same name, another
                tokenizer.
        """
        path = record_of_checkpoints(args.load)
        then = path and read_record(path, args.rank)
        if not then:
            return None
        self._changes = [item for item in then.get("changes", ()) if isinstance(item, dict)]
        changes = compare_records(then, self._with_files, not args.no_load_optim)
        self._changes += [{"arguments": changes}] if changes else []
        return changes_line(changes) if changes else None

    def write(self, iteration: int) -> None:
        """Write run.json, when the step of the loaded checkpoint is known."""
        if self._directory is None:
            return
        if self._changes and "step" not in self._changes[-1]:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self._changes[-1] = {"step": iteration, "time": when, **self._changes[-1]}
        text = json.dumps(self._with_files | {"changes": self._changes}, indent=1)
        write_file(self._directory / RUN_FILE, text + "\n")


def compare_records(
    then: Mapping[str, Any], now: Mapping[str, Any], loads_optimizer: bool = True
) -> dict[str, tuple[Any, Any]]:
    """The changes to report when a run resumes: argument -> (then, now).

    Args:
        then: record of the previous start.
        now: record of this start.
        loads_optimizer: whether the optimizer state of the checkpoint is loaded.
    Raises:
        UsageError: a change is not allowed: another model, other data of the same path, another
            tokenizer.
    """
    before, arguments = then["arguments"], now["arguments"]
    changes = check_changes(before, arguments, loads_optimizer)
    _check_same_data(then["data"], now["data"])
    for name in _TRAINING_DATA:
        words = before.get(name), arguments.get(name)
        contents = _by_content(words[0], then["data"]), _by_content(words[1], now["data"])
        # The same words are other data where a relative path starts in another directory.
        if contents[0] != contents[1] and (words[0] != words[1] or then["data"]):
            if words[0] == words[1]:
                words = _absolute(words[0], then["data"]), _absolute(words[1], now["data"])
            changes[name] = words
    old, new = then["tokenizer"], now["tokenizer"]
    if not _same_file(old, new):
        raise UsageError(
            f"The tokenizer {new['path']} differs from {old.get('path')}, which this run used when "
            "it was last started: token ids would change their meaning. Give the earlier "
            "tokenizer, or start a new run."
        )
    if isinstance(old, dict) and old.get(EOS, new.get(EOS)) != new.get(EOS):
        changes["tokenizer_model"] = tuple(
            f"with eos_token {entry.get(EOS)}" for entry in (old, new)
        )
    old, new = then["weights"], now["weights"]
    if not _same_file(old, new):
        raise UsageError(
            f"--load-hf {new['path']} has different weights from {old.get('path')}, from which "
            "this run started; the run resumes from its own checkpoint. Drop --load-hf (and give "
            "--tokenizer-model), or start a new run: --run-dir NEW."
        )
    if new and before.get("load_hf") is None:
        changes["load_hf"] = (None, new["path"])
    return changes


def home(args: Namespace) -> Path | None:
    """The directory of a run's record and lock: --run-dir, otherwise --save."""
    directory = args.run_dir or args.save
    return None if directory is None else Path(directory)


def check_foreign(directory: Path) -> None:
    """Refuse a directory whose run.json another program wrote.

    Raises:
        UsageError: names the file.
    """
    path = directory / RUN_FILE
    if not path.is_file():
        return
    with open(path, "rb") as stream:
        start = stream.read(len(_MARK))
    if not _MARK.encode().startswith(start):
        raise UsageError(f"{path} exists, but {RUN} did not create it. Give another directory.")


def record_of_checkpoints(load: str) -> Path | None:
    """run.json (or arguments.json of an older version) of the run that wrote the checkpoints."""
    directories = [Path(load)]
    if directories[0].resolve().name == "checkpoints":
        directories.append(directories[0].resolve().parent)
    return next(filter(None, map(find_run_file, directories)), None)


def training_data(args: Namespace) -> Iterator[str]:
    """Prefixes of the .bin and .idx files of the training data, without duplicates."""
    words = [word for dest in _TRAINING_DATA for word in read_prefixes(getattr(args, dest, None))]
    yield from dict.fromkeys(word for word in words if "://" not in word)


def read_record(path: Path, rank: int = 0) -> dict[str, Any] | None:
    """The record of the previous start; None, with a note, if it cannot be compared."""
    try:
        arguments = recorded_arguments(path)
        record = {} if path.name == OLD_RUN_FILE else read_json(path)
        if record and record.get("version") != VERSION:
            raise UsageError(f"{path} has version {record.get('version')!r}, expected {VERSION}.")
        found = {
            "arguments": arguments,
            "data": record.get("data", {}),
            "tokenizer": record.get("tokenizer"),
            "weights": record.get("weights"),
            "changes": record.get("changes", []),
        }
        for name, kind in (("data", dict), ("changes", list)):
            if not isinstance(found[name], kind):
                raise UsageError(f"{path}: {name} is damaged.")
        return found
    except UsageError as error:  # a damaged record must not prevent a resume
        if rank == 0:
            print(f"note: {error} Changes since then cannot be detected.", file=sys.stderr)
        return None


def _dataset(prefix: str) -> dict[str, Any]:
    return {
        "path": os.path.abspath(prefix),
        "idx_bytes": os.path.getsize(f"{prefix}.idx"),
        "idx_sha256": sha256(Path(f"{prefix}.idx")),
        "bin_bytes": os.path.getsize(f"{prefix}.bin"),
    }


def _content(entry: Any) -> tuple:
    if not isinstance(entry, dict):
        return ()
    return tuple(entry.get(name) for name in ("idx_bytes", "idx_sha256", "bin_bytes"))


def _check_same_data(then: Mapping, now: Mapping) -> None:
    """Refuse other data at the same path."""
    before = {
        entry.get("path"): _content(entry) for entry in then.values() if isinstance(entry, dict)
    }
    for prefix, entry in now.items():
        if before.get(entry["path"], _content(entry)) != _content(entry):
            raise UsageError(
                f"{prefix}.idx changed since this run was last started: all its samples would "
                "differ. Restore it, or write the new data to another path; the path may change "
                "when a run resumes."
            )


def _by_content(words: Any, data: Mapping) -> list:
    """Words of a blend, with the content of a dataset in place of its prefix."""
    words = map(str, words) if isinstance(words, list) else ()
    return [_content(data.get(word)) or word for word in words]


def _absolute(words: list, data: Mapping) -> list:
    """Words of a blend, with the absolute path of a dataset in place of its prefix."""
    entries = [(word, data.get(word)) for word in words]
    return [item.get("path", word) if isinstance(item, dict) else word for word, item in entries]


def _tokenizer(args: Namespace) -> dict[str, Any]:
    """Path, hash and eos_token of the tokenizer; training uses none of its other settings."""
    if args.tokenizer_type != "HuggingFaceTokenizer":
        return {"path": f"{args.tokenizer_type} of {args.vocab_size} tokens"}
    path = Path(args.tokenizer_model)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        return {"path": str(args.tokenizer_model)}  # a name on the Hugging Face Hub
    return {"path": str(path), "sha256": sha256(path), EOS: eos_token_of(path.parent)}


def _weights(args: Namespace) -> dict[str, Any] | None:
    """Hashes of the config and the index of --load-hf, and sizes of its weight files."""
    if not args.load_hf:
        return None
    directory = Path(args.load_hf)
    names = [name for name in ("config.json", "model.safetensors.index.json")]
    small = {name: sha256(directory / name) for name in names if (directory / name).is_file()}
    files = {path.name: path.stat().st_size for path in sorted(directory.glob("*.safetensors"))}
    return {"path": str(directory), "sha256": small, "bytes": files}


def _same_file(then: Any, now: Any) -> bool:
    """Whether two entries of a tokenizer or of weights have the same content, at any path.

    True if one is missing: an older version did not record it, or this start does not give it.
    """
    if not isinstance(then, dict) or not isinstance(now, dict):
        return True
    content = [
        {key: value for key, value in entry.items() if key not in ("path", EOS)}
        for entry in (then, now)
    ]
    return content[0] == content[1] and ("sha256" in now or then.get("path") == now["path"])
