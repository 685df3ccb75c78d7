# Copyright (c) 2026, the megatron-core gptoss authors.

"""run.json: what a run is, from which its next start sees what changed.

It lies in --run-dir (else in --save) and holds the command, every argument, and of data, tokenizer
and starting weights the size and SHA-256 of the files that tell them apart. It is written complete,
once a start has loaded its checkpoint, so that a start that was refused leaves no trace.
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
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import read_json
from megatron.gpt_oss.outputs import MADE_BY, sha256, write_file
from megatron.gpt_oss.training.resume_rules import check_changes, told
from megatron.gpt_oss.training.run_file import (
    OLD_RUN_FILE,
    RUN_FILE,
    find_run_file,
    recorded_arguments,
)

RUN = "pretrain_gpt_oss.py"
VERSION = 1
_MARK = f'{{\n "{MADE_BY}": "{RUN}"'
# Where the files lie is not what they are.
_TRAINING_DATA = ("data_path", "train_data_path")


class RunRecord:
    """The record of this start, and how it differs from that of the start before.

    Args:
        spec: of this start; its arguments are validated.
    """

    def __init__(self, spec: RunSpec):
        args = spec.args
        self._folder = home(args)
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
    def _whole(self) -> dict[str, Any]:
        """With the files, which are read by rank 0 and, where a run resumes, by every rank."""
        args = self._args
        return self._record | {
            "data": {prefix: _dataset(prefix) for prefix in training_data(args)},
            "tokenizer": _tokenizer(args),
            "weights": _weights(args),
        }

    def compare(self, args: Namespace) -> str | None:
        """Compare with the start before, for a run that resumes from `args.load`.

        Returns:
            The line that tells what changed, if anything has to be told.
        Raises:
            UsageError: what changed cannot: another model, other data of the same name, another
                tokenizer.
        """
        path = record_of_checkpoints(args.load)
        then = path and read_record(path, args.rank)
        if not then:
            return None
        self._changes = [item for item in then.get("changes", ()) if isinstance(item, dict)]
        changes = compare_records(then, self._whole, not args.no_load_optim)
        self._changes += [{"arguments": changes}] if changes else []
        return told(changes) if changes else None

    def write(self, iteration: int) -> None:
        """Write run.json, once it is known at which step the run stands."""
        if self._folder is None:
            return
        if self._changes and "step" not in self._changes[-1]:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self._changes[-1] = {"step": iteration, "time": when, **self._changes[-1]}
        text = json.dumps(self._whole | {"changes": self._changes}, indent=1)
        write_file(self._folder / RUN_FILE, text + "\n")


def compare_records(
    then: Mapping[str, Any], now: Mapping[str, Any], loads_optimizer: bool = True
) -> dict[str, tuple[Any, Any]]:
    """What of a run has to be told when it resumes: argument -> (then, now).

    Args:
        then: record of the start before, as read from its file.
        now: record of this start.
        loads_optimizer: whether the optimizer state of the checkpoint is read.
    Raises:
        UsageError: something changed that cannot: another model, other data of the same path,
            another tokenizer.
    """
    before, arguments = then["arguments"], now["arguments"]
    changes = check_changes(before, arguments, loads_optimizer)
    _check_same_data(then["data"], now["data"])
    for name in _TRAINING_DATA:
        words = before.get(name), arguments.get(name)
        contents = _by_content(words[0], then["data"]), _by_content(words[1], now["data"])
        if words[0] != words[1] and contents[0] != contents[1]:
            changes[name] = words
    old, new = then["tokenizer"], now["tokenizer"]
    if not _same_file(old, new):
        raise UsageError(
            f"The tokenizer {new['path']} differs from {old.get('path')}, which this run used when "
            "it was last started: token ids would change their meaning. Give the earlier "
            "tokenizer, or start a new run."
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
    """The folder of a run's record and lock: --run-dir, or --save without it."""
    folder = args.run_dir or args.save
    return None if folder is None else Path(folder)


def check_foreign(folder: Path) -> None:
    """Refuse a folder whose run.json somebody else made.

    Raises:
        UsageError: names the file.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return
    with open(path, "rb") as stream:
        start = stream.read(len(_MARK))
    if not _MARK.encode().startswith(start):
        raise UsageError(f"{path} exists, but {RUN} did not create it. Give another directory.")


def record_of_checkpoints(load: str) -> Path | None:
    """run.json, or arguments.json of an older version, of the run that wrote checkpoints."""
    folders = [Path(load)]
    if folders[0].resolve().name == "checkpoints":
        folders.append(folders[0].resolve().parent)
    return next(filter(None, map(find_run_file, folders)), None)


def training_data(args: Namespace) -> Iterator[str]:
    """Prefixes of the .bin and .idx files that a run trains on, each once."""
    words = [word for dest in _TRAINING_DATA for word in read_prefixes(getattr(args, dest, None))]
    yield from dict.fromkeys(word for word in words if "://" not in word)


def read_record(path: Path, rank: int = 0) -> dict[str, Any] | None:
    """The record of the start before; None where it cannot be compared, which is reported."""
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
    except UsageError as error:  # the checkpoints are what counts
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
    """The same path holds the same data."""
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
    """Words of a blend, prefixes by what they hold."""
    words = map(str, words) if isinstance(words, list) else ()
    return [_content(data.get(word)) or word for word in words]


def _tokenizer(args: Namespace) -> dict[str, Any]:
    if args.tokenizer_type != "HuggingFaceTokenizer":
        return {"path": f"{args.tokenizer_type} of {args.vocab_size} tokens"}
    path = Path(args.tokenizer_model)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        return {"path": str(args.tokenizer_model)}  # a name of the hub
    return {"path": str(path), "sha256": sha256(path)}


def _weights(args: Namespace) -> dict[str, Any] | None:
    """Of --load-hf: its configuration and which file holds what, and how many bytes they are."""
    if not args.load_hf:
        return None
    folder = Path(args.load_hf)
    names = [name for name in ("config.json", "model.safetensors.index.json")]
    small = {name: sha256(folder / name) for name in names if (folder / name).is_file()}
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    return {"path": str(folder), "sha256": small, "bytes": files}


def _same_file(then: Any, now: Any) -> bool:
    """Whether two entries of a tokenizer or of weights are the same, wherever they lie.

    True where one is missing: an older version recorded none, or this start is given none.
    """
    if not isinstance(then, dict) or not isinstance(now, dict):
        return True
    return {**then, "path": ""} == {**now, "path": ""} and (
        "sha256" in now or then.get("path") == now["path"]
    )
