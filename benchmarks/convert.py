# Copyright (c) 2026, the megatron-core gptoss authors.

"""Memory and time of `gptoss convert` at real size, against copying the same bytes.

    python benchmarks/convert.py --folder /data/bench --preset 20b --layers 24 --json convert.json

Writes a random Hugging Face folder in the true MXFP4 layout, converts it to Megatron and back to
BF16 and MXFP4, checks every tensor, and deletes all of it. Each conversion is the command in a
process of its own; memory is the resident set of its whole process tree, looked at 50 times a
second. Copying is `cp` of what was written followed by fsync, as the conversion does; both read
what was written a moment before. Give --layers as many as the disk holds: it takes twice the
BF16 size. --preset 120b --layers 1 shows one layer of the large model; the sizes of the rest follow
from `bytes_of_layer`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy
import psutil
import torch

from megatron.gpt_oss.checkpoint.hf_config import hf_config_from_preset
from megatron.gpt_oss.checkpoint.hf_writer import (
    MAX_SHARD_BYTES,
    MXFP4,
    QUANTIZATION_CONFIG,
    FilePlan,
)
from megatron.gpt_oss.checkpoint.safetensors_file import SafetensorsWriter
from megatron.gpt_oss.data.byte_tokenizer import write_byte_tokenizer
from megatron.gpt_oss.presets import Preset, get_preset


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; new")
    parser.add_argument("--preset", default="20b")
    parser.add_argument("--layers", type=int, nargs="+", default=[6])
    parser.add_argument("--ep", type=int, default=1, help="of the Megatron checkpoint")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    rows = []
    for layers in args.layers:
        preset = get_preset(args.preset, layers)
        rows += measure(preset, args.folder, ["--ep", str(args.ep)])
    machine = {
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "bytes_of_layer": bytes_of_layer(get_preset(args.preset)),
    }
    print(json.dumps(machine))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def measure(preset: Preset, folder: Path, layout: list[str] = (), copies: int = 2) -> list[dict]:
    """Rows for one model; `folder` is made and deleted. Without copies, no ratio to them."""
    folder.mkdir(parents=True)
    try:
        source = write_random_mxfp4(preset, folder / "hf")
        steps = (
            ("to-megatron", ["to-megatron", "--hf", source, *layout], "megatron"),
            ("to-hf bf16", ["to-hf", "--load", folder / "megatron"], "bf16"),
            ("to-hf mxfp4", ["to-hf", "--load", folder / "megatron", "--dtype", MXFP4], "mxfp4"),
        )
        rows = []
        for name, words, out in steps:
            load = os.getloadavg()[0]
            seconds, peak = run(["convert", *words, "--out", folder / out])
            size = sum(path.stat().st_size for path in (folder / out).rglob("*") if path.is_file())
            # Twice, as the first pays for memory that the machine has not touched before.
            times = [copy(folder / out, folder / "copy") for _ in range(copies)]
            copy_seconds = sum(times) / copies if copies else float("nan")
            rows.append(
                {
                    "model": preset.name,
                    "layers": preset.num_layers,
                    "what": name,
                    "bytes_written": size,
                    "seconds": round(seconds, 2),
                    "copy_seconds": round(copy_seconds, 2),
                    "ratio": round(seconds / copy_seconds, 2),
                    "peak_rss_bytes": peak,
                    "load_before": round(load, 2),
                }
            )
            print(rows[-1], flush=True)
            # Random MXFP4 is representable, so that each is the same model as the other.
            check(source if name == "to-megatron" else folder / out, folder / "megatron")
            if name != "to-hf mxfp4":  # room for the next
                shutil.rmtree(source if name == "to-megatron" else folder / out)
        return rows
    finally:
        shutil.rmtree(folder)


def write_random_mxfp4(preset: Preset, folder: Path) -> Path:
    """A random folder in the layout of openai/gpt-oss files."""
    folder.mkdir(parents=True)
    random = numpy.random.default_rng(0)
    plan = FilePlan.of(preset, MXFP4, MAX_SHARD_BYTES)
    weight_map = {}
    for file in plan.files:
        tensors = plan.header(file)
        weight_map.update(dict.fromkeys((name for name, _, _ in tensors), file))
        with SafetensorsWriter(folder / file, tensors) as writer:
            for name, dtype, shape in tensors:
                for row in range(shape[0]) if len(shape) > 2 else (None,):
                    part = torch.Size(shape if row is None else shape[1:])
                    values = torch.from_numpy(random.integers(0, 256, part.numel(), numpy.uint8))
                    if name.endswith("_scales"):
                        values = 110 + values % 16
                    elif dtype != torch.uint8:
                        values = ((values.float() - 127.5) / 4096).to(dtype)
                    writer.write(name, values.view(part).contiguous(), row or 0)
    index = {"metadata": {"total_size": plan.bytes_total()}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = hf_config_from_preset(preset, quantization_config=QUANTIZATION_CONFIG)
    (folder / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(folder)
    return folder


def run(words: list) -> tuple[float, int]:
    """Seconds and peak resident bytes of the process tree of a `gptoss` command."""
    command = [sys.executable, "-m", "megatron.gpt_oss.cli", *map(str, words)]
    start = time.monotonic()
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_rss(process))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stdout.read().decode()}")
    return time.monotonic() - start, peak


def tree_rss(process: psutil.Process) -> int:
    """Resident bytes of a process and all below it."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files, each to disk before the next; a copy is deleted at once."""
    seconds = 0.0
    for path in filter(Path.is_file, source.rglob("*")):
        start = time.monotonic()
        subprocess.run(["cp", path, target], check=True)
        handle = os.open(target, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        seconds += time.monotonic() - start
        target.unlink()
    return seconds


def check(hf: Path, load: Path) -> None:
    """Stop if a tensor is not what it was: a fast wrong conversion is worth nothing."""
    run(["verify", "--hf", hf, "--load", load, "--logits", "no"])


def bytes_of_layer(preset: Preset) -> dict:
    """Bytes of one layer, of the rest, and of the whole model, as BF16 and as MXFP4."""
    sizes = {}
    for dtype in ("bf16", MXFP4):
        plan = FilePlan.of(preset, dtype, MAX_SHARD_BYTES)
        layer = sum(plan.bytes_of(n) for n in plan.stored if n.startswith("model.layers.0."))
        total = plan.bytes_total()
        sizes[dtype] = {"layer": layer, "rest": total - preset.num_layers * layer, "model": total}
    return sizes


def table(rows: list[dict]) -> str:
    """The rows for the reader."""
    lines = ["model  layers  what          GB written      s   copy s  ratio  peak RSS GiB  load"]
    for row in rows:
        lines.append(
            f"{row['model']:6} {row['layers']:6}  {row['what']:12} {row['bytes_written'] / 1e9:11.2f} "
            f"{row['seconds']:6.1f} {row['copy_seconds']:8.1f} {row['ratio']:6.2f} "
            f"{row['peak_rss_bytes'] / 2**30:13.2f} {row['load_before']:5.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
