# Copyright (c) 2026, the megatron-core gptoss authors.

"""Memory and time of `gptoss convert` at real size, against copying the same bytes.

    python -m benchmarks.conversion.convert --work-dir /data/bench --preset 20b --layers 8 \\
        --json benchmarks/results/convert_20b_cpu.json
    python -m benchmarks.conversion.convert --page        # docs/parity.md from the results that are there

Writes a random Hugging Face model in the MXFP4 layout of gpt-oss, converts it to Megatron and back
to BF16 and MXFP4, checks every tensor, and deletes all files. Each conversion is the command in a
separate process, including imports; memory is the resident set of its process tree, sampled 50 times
per second.

A copy is `cp` of the output, with an fsync after each file, as in the conversion. Both are measured
twice: with the input removed from the page cache (a model of 120b does not fit there), and warm,
without that. MXFP4 is written from 2.5 times its bytes; `read`, the time of `cat` of the input from
disk, is the lower bound of its conversion.

Choose --layers by the size of the disk: the benchmark needs twice the BF16 size, 1.3 times if --steps omits
`to-hf bf16`. --preset 120b --layers 1 shows one layer of the large model; the sizes of the rest
follow from `bytes_of_layer`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Iterator, Sequence

import numpy
import psutil
import torch

from benchmarks.lib import report
from megatron.gpt_oss.checkpoint.hf.config import hf_config_from_preset
from megatron.gpt_oss.checkpoint.hf.mxfp4 import dequantize, quantize
from megatron.gpt_oss.checkpoint.hf.safetensors_file import SafetensorsWriter
from megatron.gpt_oss.checkpoint.hf.writer import (
    MAX_SHARD_BYTES,
    MXFP4,
    QUANTIZATION_CONFIG,
    FilePlan,
)
from megatron.gpt_oss.data.byte_tokenizer import write_byte_tokenizer
from megatron.gpt_oss.presets import Preset, get_preset

PAGE, SECTION = report.ROOT / "docs" / "parity.md", "conversions"
RESULTS = report.ROOT / "benchmarks" / "results"
HEADER = ["model", "layers", "what", "GB read", "GB written", "s", "copy, s", "ratio"]
HEADER += ["read, s", "ratio to read", "warm, s", "warm copy, s", "warm ratio", "imports, s"]
HEADER += ["peak RSS, GiB", "load"]
STEPS = ("to-megatron", "to-hf bf16", "to-hf mxfp4")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work-dir", "--folder", type=Path, help="on the disk to measure; new")
    parser.add_argument("--preset", default="20b")
    parser.add_argument("--layers", type=int, nargs="+", default=[6])
    parser.add_argument("--ep", type=int, default=1, help="of the Megatron checkpoint")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, metavar="NAME")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--smoke", action="store_true", help="two layers of the tiny preset")
    parser.add_argument("--page", action="store_true", help="write docs/parity.md from the results")
    args = parser.parse_args()
    if args.smoke:
        args.preset, args.layers = "tiny", [2]
    if not args.work_dir and not args.page:
        parser.error("give --work-dir, --page or both")
    if STEPS[0] not in args.steps:
        parser.error(
            f"--steps {' '.join(args.steps)}: the others read what {STEPS[0]} writes. Add it"
        )
    args.steps = [name for name in STEPS if name in args.steps]
    if args.work_dir:
        facts = report.machine("torch", "numpy")
        found = {
            "bytes_of_layer": bytes_of_layer(get_preset(args.preset)),
            "encoder_gb_per_s": encoder_rates(),
            "rows": [],
        }
        for layers in args.layers:
            preset = get_preset(args.preset, layers)
            for row in measure(preset, args.work_dir, ["--ep", str(args.ep)], steps=args.steps):
                print(row, flush=True)
                found["rows"].append(row)
                if args.json:  # after every row, in case the run is interrupted
                    report.write_json(args.json, facts, **found)
        lines = [HEADER, *table(found["rows"])]
        print("\n".join("  ".join(f"{word:>13}" for word in line) for line in lines))
    if args.page:
        report.write_section(PAGE, SECTION, page_text())


def measure(
    preset: Preset,
    folder: Path,
    layout: list[str] = (),
    copies: int = 2,
    steps: Sequence[str] = STEPS,
) -> Iterator[dict]:
    """Measure the conversions of one model in a new directory, which is deleted.

    Without copies only memory is measured.
    """
    folder.mkdir(parents=True)
    try:
        source = write_random_mxfp4(preset, folder / "hf")
        load = folder / "megatron"
        commands = {
            "to-megatron": (source, ["to-megatron", "--hf", source, *layout], load),
            "to-hf bf16": (load, ["to-hf", "--load", load], folder / "bf16"),
            "to-hf mxfp4": (load, ["to-hf", "--load", load, "--dtype", MXFP4], folder / "mxfp4"),
        }
        for name in steps:
            read, words, out = commands[name]
            evict(read)
            average = os.getloadavg()[0]
            seconds, peak = run(["convert", *words, "--out", out])
            if copies:
                shutil.rmtree(out)
                warm, peak_again = run(["convert", *words, "--out", out])
                peak = max(peak, peak_again)
            row = {
                "model": preset.name,
                "layers": preset.num_layers,
                "what": name,
                "bytes_read": size_of(read),
                "bytes_written": size_of(out),
                "seconds": round(seconds, 2),
                "peak_rss_bytes": peak,
                "load_before": round(average, 2),
            }
            if copies:
                module = "import_hf" if name == "to-megatron" else "export_hf"
                row |= compare(read, out, folder / "copy", copies, module)
                row["warm_seconds"] = round(warm, 2)
                row["ratio"] = round(seconds / row["copy_seconds"], 2)
                row["warm_ratio"] = round(warm / row["warm_copy_seconds"], 2)
                row["ratio_to_read"] = round(seconds / row["read_seconds"], 2)
            # Random MXFP4 is representable, so that each is the same model as the other.
            check(source if name == "to-megatron" else out, load)
            if name != "to-hf mxfp4":  # room for the next
                shutil.rmtree(source if name == "to-megatron" else out)
            yield row
    finally:
        shutil.rmtree(folder)


def compare(read: Path, out: Path, target: Path, copies: int, module: str) -> dict:
    """Seconds of the copies that a conversion is compared with."""
    cold, warm = [], []
    # Several times, as the first may pay for memory that the machine has not touched before.
    for _ in range(copies):
        evict(out)
        cold.append(copy(out, target))
        warm.append(copy(out, target))
    evict(read)
    start = time.monotonic()
    files = [path for path in read.rglob("*") if path.is_file()]
    subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
    read_seconds = time.monotonic() - start
    start = time.monotonic()
    code = f"import megatron.gpt_oss.checkpoint.{module}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    return {
        "import_seconds": round(time.monotonic() - start, 2),
        "copy_seconds": round(sum(cold) / copies, 2),
        "warm_copy_seconds": round(sum(warm) / copies, 2),
        "read_seconds": round(read_seconds, 2),
    }


def evict(folder: Path) -> None:
    """Remove the files of a directory from the page cache."""
    for path in filter(Path.is_file, folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def size_of(folder: Path) -> int:
    """Bytes of all files of a directory."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def encoder_rates() -> dict[str, float]:
    """GB/s of bf16 input when rounding to MXFP4 in memory, by number of threads."""
    torch.set_num_threads(1)
    values = torch.randn(2880, 2880).to(torch.bfloat16)
    again = dequantize(*quantize(values))
    if not torch.equal(dequantize(*quantize(again)), again):
        raise SystemExit("what MXFP4 holds did not come back as it was")
    rates = {}
    for count in (1, 2):
        threads = [
            threading.Thread(target=lambda: [quantize(values) for _ in range(40)])
            for _ in range(count)
        ]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rates[str(count)] = round(40 * count * values.nbytes / (time.monotonic() - start) / 1e9, 2)
    return rates


def write_random_mxfp4(preset: Preset, folder: Path) -> Path:
    """Write random weights in the layout of the openai/gpt-oss files."""
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
    """Resident bytes of a process and its descendants."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the files of a directory, each synced to disk; the copy is deleted."""
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
    """Exit if a tensor differs after the round trip."""
    run(["verify", "--hf", hf, "--load", load, "--logits", "no"])


def bytes_of_layer(preset: Preset) -> dict:
    """Bytes of one layer, of the rest, and of the complete model, in BF16 and in MXFP4."""
    sizes = {}
    for dtype in ("bf16", MXFP4):
        plan = FilePlan.of(preset, dtype, MAX_SHARD_BYTES)
        layer = sum(plan.bytes_of(n) for n in plan.stored if n.startswith("model.layers.0."))
        total = plan.bytes_total()
        sizes[dtype] = {"layer": layer, "rest": total - preset.num_layers * layer, "model": total}
    return sizes


def table(rows: list[dict]) -> list[list[str]]:
    """Cells of the rows, in the order of HEADER."""
    return [
        [
            row["model"],
            str(row["layers"]),
            row["what"],
            f"{row['bytes_read'] / 1e9:.2f}",
            f"{row['bytes_written'] / 1e9:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['copy_seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['read_seconds']:.1f}",
            f"{row['ratio_to_read']:.2f}",
            f"{row['warm_seconds']:.1f}",
            f"{row['warm_copy_seconds']:.1f}",
            f"{row['warm_ratio']:.2f}",
            f"{row['import_seconds']:.1f}",
            f"{row['peak_rss_bytes'] / 2**30:.2f}",
            f"{row['load_before']:.1f}",
        ]
        for row in rows
    ]


def most_layers(one: dict) -> int:
    """The largest number of layers in a result."""
    return max(row["layers"] for row in one["rows"])


def page_text() -> str:
    """Tables of the results, and the sizes of complete models computed from them."""
    found = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("convert_*.json"))}
    if not found:
        return ""
    rows = [line for one in found.values() for line in table(one["rows"])]
    parts = [report.markdown(HEADER, rows)]
    # The last minute of the benchmark's own work is in the load of every row.
    if any(row["load_before"] > 2 for one in found.values() for row in one["rows"]):
        parts.append(
            "Rows with a load above 2 were measured while other processes used the machine, more or "
            "less from one measurement to the next: their bytes and memory are valid, their seconds "
            "and ratios are not reliable."
        )
    for path, one in found.items():
        facts = ", ".join(f"{key} {value}" for key, value in one["machine"].items())
        rates = ", ".join(f"{n} thread(s) {r} GB/s" for n, r in one["encoder_gb_per_s"].items())
        parts.append(
            f"`{path.relative_to(report.ROOT)}`: `{report.current_command(one['command'])}`, {one['date']}; {facts}"
        )
        parts[-1] += f". Rounding bf16 to MXFP4 in memory: {rates}."
    whole = []
    deepest_of = {one["rows"][0]["model"]: one for one in sorted(found.values(), key=most_layers)}
    for one in deepest_of.values():
        name = one["rows"][0]["model"]
        deepest = max(one["rows"], key=lambda row: row["layers"] * (row["what"] == "to-megatron"))
        rate = deepest["bytes_written"] / deepest["seconds"]
        for dtype, sizes in one["bytes_of_layer"].items():
            layers = (sizes["model"] - sizes["rest"]) // sizes["layer"]
            time_left = f"{sizes['model'] / rate / 60:.0f} min" if dtype == "bf16" else ""
            line = [name, dtype, str(layers), *(f"{sizes[k] / 1e9:.2f}" for k in ("layer", "rest"))]
            whole.append([*line, f"{sizes['model'] / 1e9:.2f}", time_left])
    header = ["model", "dtype", "layers", "GB a layer", "GB of the rest", "GB in all"]
    parts.append(
        "The layers that were not converted are arithmetic: each is as large as the next, and no "
        "memory grows with their number. The last column is `to-megatron` at its rate above."
    )
    parts.append(report.markdown([*header, "to-megatron"], whole))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
