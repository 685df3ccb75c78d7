# Copyright (c) 2026, the megatron-core gptoss authors.

"""Every reader of files from other programs: a valid file, and the function that reads it."""

import argparse
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy
import torch
from safetensors.torch import save_file

from megatron.core.dist_checkpointing import restricted_pickle
from megatron.core.tokenizers.text.libraries.fast_tokenizer import FastTokenizer
from megatron.gpt_oss import errors
from megatron.gpt_oss.arguments.recipe import read_recipe
from megatron.gpt_oss.checkpoint.checkpoint_model import preset_of_checkpoint
from megatron.gpt_oss.checkpoint.hf.auxiliary_files import check_tokenizer
from megatron.gpt_oss.checkpoint.hf.check import open_hf
from megatron.gpt_oss.checkpoint.hf.reader import HFReader
from megatron.gpt_oss.checkpoint.hf.safetensors_file import SafetensorsFile
from megatron.gpt_oss.checkpoint.import_hf import convert_to_megatron
from megatron.gpt_oss.checkpoint.resumable_output import ResumableOutput
from megatron.gpt_oss.checkpoint.torch_dist.reader import TorchDistReader, find_iteration
from megatron.gpt_oss.data.blend import num_tokens, read_blend
from megatron.gpt_oss.data.eod import document_end_of
from megatron.gpt_oss.data.indexed_dataset import read_lengths, write_index
from megatron.gpt_oss.data.tokenize.documents import BadDocument, read_records, text_of
from megatron.gpt_oss.data.tokenize.output import ResumableDatasets
from megatron.gpt_oss.data.tokenizer_files import eos_token_of, load_text_tokenizer
from megatron.gpt_oss.diagnostics.random_checkpoint import write_tiny_hf
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.metrics.jsonl import drop_from, read_metrics
from megatron.gpt_oss.training.metrics.report import write_report
from megatron.gpt_oss.training.resume_rules import changes_line
from megatron.gpt_oss.training.run_record import RUN, check_foreign, compare_records, read_record
from megatron.training import checkpoint_integrity


@dataclass(frozen=True)
class Reader:
    """A file to damage, and the function that reads it.

    Attributes:
        path: of the file, from the directory of `good_files`.
        read: takes the directory; ends well or with a UsageError.
    """

    path: str
    read: Callable[[Path], object]


def good_files(folder: Path) -> Path:
    """A valid file for each of `READERS`, and the files that it needs."""
    write_tiny_hf(folder / "hf", seed=3)
    tensors = HFReader(folder / "hf").stored_names()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_to_megatron(folder / "hf", folder / "ckpt")
    _write_small_files(folder)
    _write_documents(folder)
    return folder


def _write_small_files(folder: Path) -> None:
    common = folder / "common"
    common.mkdir()
    arguments = {"seq_length": 4, "lr": 0.1, "path": ["a"], "dtype": torch.bfloat16}
    torch.save({"args": argparse.Namespace(**arguments), "iteration": 3}, common / "common.pt")
    metadata = folder / "ckpt" / "release" / ".metadata"
    (common / ".metadata").write_bytes(metadata.read_bytes())
    for file in metadata.parent.glob("*.distcp"):
        (common / file.name).symlink_to(file)
    safe = folder / "safe.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.uint8)}, safe)
    with open(folder / "data.idx", "wb") as stream:
        write_index(stream, numpy.array([3, 2, 4], dtype=numpy.int32), "uint16")
    numpy.arange(9, dtype=numpy.uint16).tofile(folder / "data.bin")
    manifest = folder / "manifest"
    manifest.mkdir()
    (manifest / "metadata.json").write_text("{}")
    checkpoint_integrity.finish_save(str(manifest))
    (folder / "blend.yaml").write_text(
        "corpora:\n  ja:\n    path: data\n    weight: 0.7\n    validation: false\n"
    )
    (folder / "recipe.txt").write_text('# why\n--preset 20b\n--lr "1e-3"\n')
    run = folder / "run"
    run.mkdir()
    load = {"max_expert_share": [0.3, 0.2], "load_cv": [0.5, 0.1], "router_entropy": [2.0, 1.9]}
    records = [
        {"step": 1, "loss": 4.5, "learning_rate": 1e-3, "tokens": 64, "grad_norm": 1.0},
        {"step": 2, "loss": 4.0, "experts": load, "norms": {"sinks": {"min": -1.0}}},
        {"step": 2, "set": "a", "valid_loss": 2.5},
        {"step": 2, "sample": {"prompt": "", "text": "<b>"}},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "arguments.json").write_text(json.dumps({"lr": 1e-3, "data_path": ["<&>"]}, indent=1))
    (folder / "recorded").mkdir()
    (folder / "recorded" / "run.json").write_text(json.dumps(RECORD, indent=1))
    output = ResumableDatasets(folder / "made", {"": "uint16"}, {"a": 1}, False)
    output.save({"file": 0, "record": 0, "skipped": [["a", "b"]]})
    output.close()
    work = ResumableOutput(folder / "work", {"a": 1})
    (folder / "work" / "x").write_bytes(b"abc")
    work.finish("x")
    work.wait()
    work.close()


def _write_documents(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    lines = [json.dumps({"text": f"document {i} \u00e9", "id": i}) for i in range(5)]
    text = "\n".join(lines).encode()
    (folder / "docs.jsonl").write_bytes(text)
    (folder / "docs.json").write_text(f"[{', '.join(lines)}]")
    (folder / "docs.jsonl.gz").write_bytes(gzip.compress(text))
    (folder / "docs.jsonl.zst").write_bytes(zstandard.compress(text))
    table = pyarrow.table({"text": [f"document {i} \u00e9" for i in range(5)]})
    pyarrow.parquet.write_table(table, folder / "docs.parquet", compression="none")


def _metadata(folder):
    preset_of_checkpoint(TorchDistReader(folder / "ckpt" / "release"))
    checkpoint_integrity.find_problem(str(folder / "ckpt" / "release"))


def _shard(folder):
    reader = TorchDistReader(folder / "ckpt" / "release")
    reader.global_tensor("decoder.final_layernorm.weight")
    reader.layer(("self_attention.linear_qkv.weight",), 1)


def _safetensors(folder):
    file = SafetensorsFile(folder / "safe.safetensors")
    for name in file.entries:
        file.read(name)
    file.close()


def _weights(folder):
    reader, _ = open_hf(folder / "hf")
    reader.close()


def _tokenizer(folder):
    tokenizer = load_text_tokenizer(folder / "hf")
    tokenizer.encode("abc")
    check_tokenizer(folder / "hf")
    eos_token_of(folder / "hf")
    assert tokenizer.vocab_size > 0


def _special_tokens(folder):
    eos_token_of(folder / "hf")
    try:
        FastTokenizer(str(folder / "hf"))
    except ValueError as error:
        raise errors.as_refusal(error)


def _index(folder):
    read_lengths(folder / "data")
    num_tokens(str(folder / "data"))
    document_end_of([str(folder / "data")])


def _report(folder):
    write_report(folder / "run", folder / "report.html")
    (folder / "kept").mkdir(exist_ok=True)


def _resume(folder):
    copy = folder / "copy.jsonl"
    copy.write_bytes((folder / "run" / "metrics.jsonl").read_bytes())
    drop_from(copy, 2)
    read_metrics(copy)


_DATA = {"path": "/d", "idx_bytes": 50, "idx_sha256": "ab", "bin_bytes": 9}
RECORD = {
    "made_by": RUN,
    "version": 1,
    "arguments": {"lr": 1e-3, "data_path": ["0.5", "d"], "load_hf": "h", "freeze": []},
    "data": {"d": _DATA},
    "tokenizer": {"path": "t", "sha256": "cd"},
    "weights": {"path": "h", "sha256": {"config.json": "ef"}, "bytes": {"x": 3}},
    "changes": [{"step": 2, "arguments": {"seed": [1, 2]}}],
}


def _compare(folder):
    check_foreign(folder / "recorded")
    then = read_record(folder / "recorded" / "run.json")
    if then is not None:
        changes_line(compare_records(then, RECORD))


def _documents(name):
    def read(folder):
        for record in read_records(folder / name, "text"):
            try:
                text_of(record, "text")
            except BadDocument as error:
                check_sentence(str(error))

    return read


def _journal(folder):
    journal = (folder / ".made.partial" / "journal.json").read_bytes()
    try:
        ResumableDatasets(folder / "made", {"": "uint16"}, {"a": 1}, False).close()
    finally:
        (folder / ".made.partial" / "journal.json").write_bytes(journal)


def _conversion(folder):
    work = ResumableOutput(folder / "work", {"a": 1})
    work.close()
    (folder / "work" / "x").write_bytes(b"abc")


READERS = {
    "metadata": Reader("ckpt/release/.metadata", _metadata),
    "shard": Reader("ckpt/release/__0_0_0.distcp", _shard),
    "common": Reader("common/common.pt", lambda f: TorchDistReader(f / "common").arguments()),
    "tracker": Reader(
        "ckpt/latest_checkpointed_iteration.txt", lambda f: find_iteration(f / "ckpt")
    ),
    "manifest": Reader(
        "manifest/manifest.json", lambda f: checkpoint_integrity.find_problem(str(f / "manifest"))
    ),
    "safetensors": Reader("safe.safetensors", _safetensors),
    "weights": Reader("hf/model.safetensors", _weights),
    "weight_map": Reader("hf/model.safetensors.index.json", _weights),
    "config": Reader("hf/config.json", _weights),
    "tokenizer": Reader("hf/tokenizer.json", _tokenizer),
    "tokenizer_config": Reader("hf/tokenizer_config.json", _special_tokens),
    "index": Reader("data.idx", _index),
    "metrics": Reader("run/metrics.jsonl", _report),
    "metrics_of_a_resume": Reader("run/metrics.jsonl", _resume),
    "arguments": Reader("run/arguments.json", _report),
    "run_record": Reader("recorded/run.json", _compare),
    "blend": Reader("blend.yaml", lambda f: read_blend(f / "blend.yaml")),
    "recipe": Reader("recipe.txt", lambda f: read_recipe(f / "recipe.txt")),
    "journal": Reader(".made.partial/journal.json", _journal),
    "conversion": Reader("work/conversion.jsonl", _conversion),
    "jsonl": Reader("docs.jsonl", _documents("docs.jsonl")),
    "json": Reader("docs.json", _documents("docs.json")),
    "gz": Reader("docs.jsonl.gz", _documents("docs.jsonl.gz")),
    "zst": Reader("docs.jsonl.zst", _documents("docs.jsonl.zst")),
    "parquet": Reader("docs.parquet", _documents("docs.parquet")),
}
# Raised where no command is: the commands make one sentence of them.
REFUSALS = (UsageError, restricted_pickle.RestrictedPickleError)


def read_damaged(reader: Reader, folder: Path, content: bytes) -> str | None:
    """Read a file with other content, and put the good one back: the sentence, or None."""
    file = folder / reader.path
    good = file.read_bytes()
    file.write_bytes(content)
    try:
        reader.read(folder)
    except REFUSALS as error:
        check_sentence(str(error))
        return str(error)
    finally:
        file.write_bytes(good)
    return None


def check_sentence(text: str) -> None:
    """Check that the message is one short printable line."""
    assert text and "\n" not in text and len(text) < 1200, text
    text.encode()
