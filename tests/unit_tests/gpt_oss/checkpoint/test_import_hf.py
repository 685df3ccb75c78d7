# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss convert to-megatron`: shards of every layout, loading, restart, errors.

The reference for the weights is a model that `load_hf` filled (test_parity.py shows that right) and
Megatron's own `dist_checkpointing.load`.
"""

import collections
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.gpt_oss import cli
from megatron.gpt_oss.checkpoint import resumable_output
from megatron.gpt_oss.checkpoint.export_hf import export_hf
from megatron.gpt_oss.checkpoint.hf.reader import HFReader
from megatron.gpt_oss.checkpoint.import_hf import Job, convert_to_megatron
from megatron.gpt_oss.checkpoint.load_hf import load_hf, sharded_tensors
from megatron.gpt_oss.checkpoint.mapping import hf_names, megatron_to_hf
from megatron.gpt_oss.checkpoint.torch_dist.layout import (
    ParallelSizes,
    check_layout,
    checkpoint_files,
)
from megatron.gpt_oss.checkpoint.torch_dist.reader import TorchDistReader, find_iteration
from megatron.gpt_oss.errors import CheckpointError, UsageError
from megatron.training import checkpoint_integrity
from tests.harness import commands
from tests.harness.models import (
    TINY,
    build_model,
    count_differing,
    mxfp4_tensors,
    trained_tensors,
    write_hf,
    write_mxfp4,
)

pytestmark = pytest.mark.ranks(4)

ROOT = Path(__file__).resolve().parents[4]
PRESET = dataclasses.replace(TINY, vocab_size=269)  # odd: two ranks cannot share it evenly
METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}

LAYOUTS = {
    "1": ParallelSizes(),
    "tp2": ParallelSizes(tp=2),
    "pp2": ParallelSizes(pp=2),
    "pp2-vpp2": ParallelSizes(pp=2, vpp=2),
    "ep2": ParallelSizes(ep=2),
    "ep2-pp2": ParallelSizes(ep=2, pp=2),
    "tp2-ep2-etp1": ParallelSizes(tp=2, ep=2, etp=1),
    "tp2-pp2": ParallelSizes(tp=2, pp=2),
}


def _world(layout):
    return layout.pp * layout.stage_ranks


def _build(layout, preset):
    """This rank's chunks of the model."""
    virtual = layout.vpp if layout.vpp > 1 else None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=virtual,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
    )
    per_stage = preset.num_layers // (layout.pp * layout.vpp)
    model = build_model(
        preset,
        bf16=True,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        num_layers_per_virtual_pipeline_stage=per_stage if virtual else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        padded_vocab_size=preset.vocab_size + preset.vocab_size % layout.tp,
    )
    return [chunk.bfloat16() for chunk in (model if isinstance(model, list) else [model])]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("hf") / "hf", PRESET, trained_tensors(PRESET))


def _model_pieces(preset, layout):
    pieces = []
    for chunk in _build(layout, preset):
        state = chunk.sharded_state_dict(metadata=METADATA)
        for part in sharded_tensors(state):
            pieces.append((part.key, part.global_shape, part.global_offset, part.local_shape))
        objects = [v.unique_key for v in state.values() if isinstance(v, ShardedObject)]
        pieces += [(key,) for key in objects]
    return pieces


@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_are_those_of_the_model(ranks, name):
    layout = LAYOUTS[name]
    preset = dataclasses.replace(TINY, vocab_size=272)
    of_ranks = ranks.run(_model_pieces, preset, layout, world_size=_world(layout))
    expected = {piece for pieces in of_ranks for piece in pieces}
    ours = collections.Counter()
    for file in checkpoint_files(preset, layout):
        owner = int(file.prefix.split("_")[2])
        for part in file.parts:
            piece = (part.key, part.global_shape, part.offset, part.shape)
            ours[piece] += 1
            assert piece in of_ranks[owner], (owner, piece)
        for key in file.objects:
            ours[(key,)] += 1
    assert set(ours) == expected
    assert set(ours.values()) == {1}


def _load_and_compare(hf, checkpoint, layout, preset):
    """Number of parameter elements that agree with `load_hf` at this layout."""
    chunks = _build(layout, preset)
    load_hf(chunks, hf)
    expected = [{n: p.detach().clone() for n, p in chunk.named_parameters()} for chunk in chunks]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    metadata = dist_checkpointing.load_content_metadata(checkpoint)
    wanted = {
        f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)
    }
    state = dist_checkpointing.load(wanted, checkpoint)
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{i}"])
        for name, parameter in chunk.named_parameters():
            assert torch.equal(parameter, expected[i][name]), name
    return sum(p.numel() for chunk in chunks for p in chunk.parameters())


# Written at one layout, read at another: each of both once, and the axes mixed.
@pytest.mark.parametrize(
    "written, read",
    [
        ("1", "tp2"),
        ("tp2", "pp2"),
        ("pp2", "ep2"),
        ("ep2", "ep2-pp2"),
        ("ep2-pp2", "1"),
        ("tp2-pp2", "tp2-ep2-etp1"),
        ("tp2-ep2-etp1", "pp2-vpp2"),
        ("pp2-vpp2", "tp2-pp2"),
    ],
)
def test_any_layout_loads_any(ranks, hf, tmp_path, record_property, written, read):
    out = convert_to_megatron(hf, tmp_path / "out", LAYOUTS[written])
    assert checkpoint_integrity.choose(str(out)) == (0, True, [])
    shards = {path.name for path in out.rglob("*.distcp")}
    assert {path.stem for path in out.rglob("*.xxh3")} == shards and shards
    counts = ranks.run(
        _load_and_compare,
        str(hf),
        str(find_iteration(out)),
        LAYOUTS[read],
        PRESET,
        world_size=_world(LAYOUTS[read]),
    )
    assert sum(counts) >= sum(tensor.numel() for tensor in trained_tensors(PRESET).values())
    differing = count_differing(hf, export_hf(out, tmp_path / "back"))
    what = "re-sharding BF16: differing bytes, loaded and exported"
    record_property("parity", (what, f"written {written}, loaded {read}", differing, 0))
    assert differing == 0


def test_mxfp4_source_is_what_transformers_dequantises(tmp_path, record_property):
    """And config, tokenizer and all else come back from what stands next to the checkpoint."""
    transformers = pytest.importorskip("transformers")
    source = write_mxfp4(tmp_path / "hf", TINY, mxfp4_tensors(trained_tensors(TINY)))
    out = convert_to_megatron(source, tmp_path / "out", ParallelSizes(ep=2))
    back = export_hf(out, tmp_path / "back")
    reference = transformers.GptOssForCausalLM.from_pretrained(
        source, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    reader, differing = HFReader(back), 0
    for name, tensor in reference.state_dict().items():
        differing += int((reader.read(name) != tensor).sum())
    what = "MXFP4 to BF16 against transformers' expansion: differing values"
    record_property("parity", (what, "to-megatron, to-hf", differing, 0))
    assert differing == 0
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


@pytest.mark.parametrize("name", ["1", "tp2", "tp2-pp2"])
def test_reader_reads_runs_and_the_rest(hf, tmp_path, monkeypatch, name):
    """Straight from the file where a piece is one run; what TP cut along columns by PyTorch.

    Either way the values are those of PyTorch's reader alone.
    """
    out = find_iteration(convert_to_megatron(hf, tmp_path / "out", LAYOUTS[name]))
    ours, theirs = TorchDistReader(out), TorchDistReader(out)
    monkeypatch.setattr(theirs, "_read_contiguous", lambda *args: False)
    by_runs, read_runs = [], ours._read_contiguous

    def counted(*args):
        by_runs.append(read_runs(*args))
        return by_runs[-1]

    monkeypatch.setattr(ours, "_read_contiguous", counted)
    for tensor in hf_names(PRESET):
        one, other = (megatron_to_hf(tensor, PRESET, reader) for reader in (ours, theirs))
        assert torch.equal(one, other), tensor
    rows = slice(100, 260)
    one, other = (r.global_tensor("output_layer.weight", rows) for r in (ours, theirs))
    assert torch.equal(one, other) and len(one) == 160
    cut_by_columns = by_runs.count(False)
    assert (cut_by_columns > 0) == (name != "1") and by_runs.count(True) > 60


def test_fp32_stays_fp32(tmp_path):
    source = write_hf(tmp_path / "hf", TINY, trained_tensors(TINY), dtype=torch.float32)
    convert_to_megatron(source, tmp_path / "out")
    back = HFReader(export_hf(tmp_path / "out", tmp_path / "back", dtype="fp32"))
    for name in back.names():
        assert torch.equal(back.read(name), HFReader(source).read(name)), name


TRAIN = """
import sys
from megatron.gpt_oss.import_warnings import silence_import_notices
silence_import_notices()
from megatron.gpt_oss.training.pretrain import main
main(sys.argv[1:])
"""


def test_training_starts_from_it(tmp_path):
    """--load of the converted directory trains as --load-hf of its source does."""
    from megatron.gpt_oss.diagnostics.random_checkpoint import write_tiny_hf

    source = write_tiny_hf(tmp_path / "hf", seed=3)
    words = ["tokenize", str(Path(__file__).parents[1]), "--pattern", "test_p*.py"]
    cli.main([*words, "--output", str(tmp_path / "data")])
    convert_to_megatron(source, tmp_path / "start", ParallelSizes(tp=2, ep=2))
    losses = []
    for flags in (["--load-hf", source], ["--load", tmp_path / "start"]):
        run = tmp_path / f"run{len(losses)}"
        words = ["--preset", "tiny", "--tokenizer-model", source, "--data-path", tmp_path / "data"]
        words += ["--run-dir", run, "--train-iters", 2, "--lr", 1e-3, "--global-batch-size", 2]
        words += ["--seq-length", 64, "--save-interval", 2, "--eval-iters", 0, "--split", "1,0,0"]
        words += ["--bf16", "--num-workers", 0, *flags]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", TRAIN, *map(str, words)]
        result = commands.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr[-3000:]
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    saved = checkpoint_integrity.choose(str(tmp_path / "run1" / "checkpoints"))
    assert saved.iteration == 2


KILLED = """
import os, signal, sys, time
from megatron.gpt_oss.import_warnings import silence_import_notices
silence_import_notices()
from megatron.gpt_oss.checkpoint import export_hf as export, import_hf as to_megatron
from megatron.gpt_oss.checkpoint.hf import writer as hf_writer
from megatron.gpt_oss.checkpoint.torch_dist.layout import ParallelSizes
direction, source, out, calls = sys.argv[1:]
owner, name = (to_megatron.Job, 'read') if direction == 'to-megatron' else (hf_writer, '_values')
original, count = getattr(owner, name), 0

def counted(*args, **kwargs):
    global count
    count += 1
    if count > int(calls):
        time.sleep(1)  # what has been written until now comes to disk meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, counted)
if direction == 'to-megatron':
    to_megatron.convert_to_megatron(source, out, ParallelSizes(pp=2))
else:
    export.export_hf(source, out, max_shard_bytes=200_000)
print(count)
"""


def run_until_killed(direction, source, out, calls):
    """Convert in a process of its own that is killed after some tensors; how many it read."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, direction, str(source), str(out), str(calls)]
    return commands.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)


def test_a_killed_conversion_goes_on(hf, tmp_path):
    whole = convert_to_megatron(hf, tmp_path / "whole", ParallelSizes(pp=2))
    total = sum(len(file.parts) for file in checkpoint_files(PRESET, ParallelSizes(pp=2)))
    out = tmp_path / "out"
    killed = run_until_killed("to-megatron", hf, out, total // 2)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    # Nothing that --load might take for a checkpoint: no tracker, no manifest, no metadata.
    partial = tmp_path / ".out.partial"
    assert not list(partial.rglob(".metadata")) and not list(partial.rglob("manifest.json"))
    with pytest.raises(CheckpointError, match="not a complete torch_dist checkpoint"):
        find_iteration(partial)
    with pytest.raises(UsageError, match="unfinished conversion with another layout"):
        convert_to_megatron(hf, out, ParallelSizes(tp=2))
    finished = run_until_killed("to-megatron", hf, out, 10**6)
    assert finished.returncode == 0, finished.stderr
    assert 0 < int(finished.stdout) < 0.75 * total
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    for path in whole.rglob("*"):
        other = out / path.relative_to(whole)
        assert other.is_file() == path.is_file()
        if path.suffix == ".distcp":
            assert other.read_bytes() == path.read_bytes(), path
    assert checkpoint_integrity.find_problem(str(out / "release")) is None
    first, second = (HFReader(export_hf(f, tmp_path / f"{f.name}-hf")) for f in (whole, out))
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names())


def test_two_at_once_are_refused(hf, tmp_path):
    with resumable_output.open_output(tmp_path / "out", Job(hf).task(), 1000):
        with pytest.raises(UsageError, match="Another process is writing"):
            convert_to_megatron(hf, tmp_path / "out")


def test_command(hf, tmp_path, capsys):
    words = ["convert", "to-megatron", "--hf", hf, "--out", tmp_path / "m", "--tp", 2, "--pp", 2]
    cli.main([str(word) for word in words])
    printed = capsys.readouterr().out
    bytes_total = sum(tensor.numel() for tensor in trained_tensors(PRESET).values()) * 2
    assert f"needs {bytes_total / 1e9:.2f} GB" in printed and "GB are free" in printed
    assert f"{tmp_path}/m: written" in printed
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "release"


@pytest.mark.parametrize(
    "layout, words",
    [
        (ParallelSizes(tp=4), "--tp 4 does not divide the model's 2 query groups"),
        (ParallelSizes(pp=3), "--pp 3 does not divide the model's 4 layers"),
        (ParallelSizes(pp=2, vpp=4), "--pp times --vpp 8 does not divide the model's 4 layers"),
        (ParallelSizes(ep=3), "--ep 3 does not divide the model's 8 experts"),
        (ParallelSizes(etp=5), "--etp 5 does not divide the model's 96 rows of an expert"),
        (ParallelSizes(tp=0), "--tp 0 does not divide"),
        (ParallelSizes(vpp=2), "--vpp 2 needs pipeline stages"),
    ],
)
def test_layouts_that_do_not_fit(layout, words):
    with pytest.raises(UsageError) as error:
        check_layout(layout, TINY)
    assert words in str(error.value)
    check_layout(ParallelSizes(tp=2, pp=2, ep=8, etp=3, vpp=2), TINY)


def test_no_room_is_said_before(hf, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(resumable_output.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match=r"out needs 0.07 GB on disk, 0.00 GB are free"):
        convert_to_megatron(hf, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_room_on_the_way(hf, tmp_path, monkeypatch):
    """The disk fills up: finished files are kept, and the same command resumes."""
    read, count = Job.read, 0

    def read_until_full(self, part):
        nonlocal count
        count += 1
        if count == 60:
            raise OSError(28, "No space left on device")
        return read(self, part)

    monkeypatch.setattr(Job, "read", read_until_full)
    with pytest.raises(UsageError, match=r"No space left.*free disk space and rerun"):
        convert_to_megatron(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert_to_megatron(hf, tmp_path / "out")
    total = sum(len(file.parts) for file in checkpoint_files(PRESET, ParallelSizes()))
    assert count < total + 60
    assert checkpoint_integrity.find_problem(str(tmp_path / "out" / "release")) is None


def test_full_device(hf, tmp_path, monkeypatch):
    """A real ENOSPC through PyTorch's writer, of a file that is the full device."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    first = next(iter(checkpoint_files(PRESET, ParallelSizes())))
    write_files = Job.write_files

    def write_to_full_device(self, work, bar):
        (work.directory / "kept").write_text("x")
        work.finish("kept")
        work.wait()
        (work.directory / "release" / f"{first.prefix}0.distcp").symlink_to("/dev/full")
        return write_files(self, work, bar)

    monkeypatch.setattr(Job, "write_files", write_to_full_device)
    with pytest.raises(UsageError, match="No space left on the disk of .*out after 1 files"):
        convert_to_megatron(hf, tmp_path / "out")
