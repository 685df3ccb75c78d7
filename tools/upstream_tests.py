#!/usr/bin/env python3
# Copyright (c) 2026, the megatron-core gptoss authors.
"""Upstream's own unit tests, on the release as it is and with the series applied.

run --checkout MEGATRON_LM --out FILE   run them; MEGATRON_LM is a checkout near the pinned release
run ... --only REGEX --out FILE         run some files; FILE keeps its results of the others
build --checkout MEGATRON_LM DIR        write both trees, for another machine
run --trees DIR --out FILE              run those
report FILE ...                         write docs/upstream_tests.md from the results of machines
rerun FILE                              a section of that page about files that were rerun

The tests are not in upstream's package and not in this repository: they are read from the checkout.
On a machine with GPUs each process has one (world size 1); without, most tests cannot run.
"""

import argparse
import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from patch_queue.materialise import Workspace
from patch_queue.reporter import REPORT
from patch_queue.tree import Tree
from upstream_tests_page import (
    TESTS,
    TREES,
    regressions,
    render,
    render_rerun,
    with_section,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "upstream_tests.md"
# Files below tests/unit_tests/ that test what the series changes, by topic.
TOPICS = {
    "RoPE, YaRN": ["transformer/test_rope.py", "fusions/test_mla_yarn_rope_apply.py"],
    "attention, softmax": [
        "transformer/test_*attention*.py",
        "transformer/test_thd_correctness.py",
        "fusions/test_torch_softmax.py",
    ],
    "MoE layer, router, experts, dispatcher": ["transformer/moe/test_*.py"],
    "transformer": [
        "transformer/test_m[lou]*.py",
        "transformer/test_[qs]*.py",
        "transformer/test_transformer_[bcl]*.py",
        "transformer/test_utils.py",
        "models/test_gpt_model.py",
        "models/test_base_embedding.py",
        "models/test_heterogeneous_gpt_model.py",
    ],
    "fusions": ["fusions/test_[brsw]*.py"],
    "cross entropy, tensor parallel": ["tensor_parallel/test_*.py"],
    "distributed checkpoints": [
        "dist_checkpointing/test_*.py",
        "dist_checkpointing/models/test_gpt_model.py",
        "dist_checkpointing/models/test_m[lo]*.py",
        "test_checkpointing.py",
    ],
    "parallel state": ["test_parallel_state.py", "test_process_groups_config.py"],
    "arguments, training": [
        "test_argument_utils.py",
        "test_training.py",
        "training/**/test_*.py",
    ],
    "optimizer, data parallel, pipeline": [
        "optimizer/test_[cop]*.py",
        "test_optimizer.py",
        "test_optimizer_param_scheduler.py",
        "distributed/test_[dfgp]*.py",
        "pipeline_parallel/test_[hps]*.py",
    ],
    "data, tokenizers": [
        "data/test_[bg]*.py",
        "data/test_prepare_cache.py",
        "tokenizers/test_*.py",
    ],
    "others": ["test_*.py", "utils/test_*.py"],
}


def files_of(checkout: Path) -> dict[str, list[str]]:
    """Topic -> test files below tests/unit_tests of the checkout, each once."""
    seen: set[str] = set()
    found = {}
    for topic, patterns in TOPICS.items():
        paths = sorted(p for pattern in patterns for p in (checkout / TESTS).glob(pattern))
        names = [path.relative_to(checkout / TESTS).as_posix() for path in paths]
        found[topic] = [name for name in dict.fromkeys(names) if name not in seen]
        seen.update(found[topic])
    return found


def write_tree(folder: Path, tree: Tree, checkout: Path) -> None:
    """A tree to test: upstream's files, and the checkout's tests and other files."""
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    skip = shutil.ignore_patterns("__pycache__", ".git", "megatron", "setup.py")
    shutil.copytree(checkout, folder, ignore=skip, dirs_exist_ok=True)
    for package in (checkout / "megatron").iterdir():
        if not (folder / "megatron" / package.name).exists() and package.is_dir():
            shutil.copytree(package, folder / "megatron" / package.name)
    for built in (ROOT / "megatron/core/datasets").glob("*.so"):
        shutil.copy2(built, folder / "megatron/core/datasets")


def write_trees(folder: Path, checkout: Path) -> None:
    """Write the directories `unpatched` and `patched`."""
    workspace = Workspace(ROOT)
    trees = {"unpatched": workspace.pristine(), "patched": workspace.expected()}
    for name, tree in trees.items():
        write_tree(folder / name, tree, checkout)
    own = subprocess.run(
        ["git", "ls-files", "megatron"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in own.stdout.split():
        target = folder / "patched" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)


def run_files(folder: Path, files: list[str], gpu: int | None, timeout: float, site) -> dict:
    """Run some test files in one process, which is killed at the timeout.

    Args:
        folder: one of the two trees.
        gpu: index of the only visible device; None: all.
        timeout: in seconds.
        site: directories of additional packages.
    Returns:
        Test id -> [outcome, reason]; files that gave no result count as failed.
    """
    with tempfile.TemporaryDirectory() as tmp:
        report, output = Path(tmp) / "report", Path(tmp) / "output"
        report.touch()
        # Two levels down: upstream's checkpoint tests write into the parent of pytest's directory,
        # and each process empties that directory and removes it at its end.
        (Path(tmp) / "pytest").mkdir()
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "patch_queue.reporter", "--continue-on-collection-errors"]
        command += ["--basetemp", str(Path(tmp) / "pytest" / "base")]
        command += [f"{TESTS}/{file}" for file in files]
        with open(output, "w") as stream:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=_environment([folder, ROOT / "tools", *site], report, gpu),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        found = {line["test"]: [line["outcome"], line["reason"][:200]] for line in lines}
        if not found or process.returncode < 0:
            reason = output.read_text().strip()[-200:]
            found |= {f"{TESTS}/{file}": ["failed", reason] for file in files}
    return found


def _environment(path: list, report: Path, gpu: int | None) -> dict[str, str]:
    """Of one process of world size 1, with a port of its own."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), REPORT: str(report)}
    environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    environ |= {"MASTER_ADDR": "localhost"}
    environ |= {"MASTER_PORT": str(random.SystemRandom().randrange(15000, 32000))}
    return environ if gpu is None else environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}


class Results:
    """Results of both trees, written after each chunk, so that an interrupted run compares the
    same tests of both.

    Args:
        path: the JSON file; its results of other files on the same machine are kept.
        chunks: the test files, by process.
    """

    def __init__(self, path: Path, machine: str, topics: dict, chunks: list[list[str]]):
        self.path, self.chunks = path, chunks
        self.results = {"machine": machine, "topics": topics}
        files = [file for chunk in chunks for file in chunk]
        self.results |= known_results(path, machine, files)
        self.done: dict[int, dict] = {}  # chunk -> tree -> test id -> [outcome, reason]

    def add(self, number: int, tree: str, found: dict) -> None:
        """Add one tree's results of a chunk; write the file once both trees have run it."""
        trees = self.done.setdefault(number, {})
        trees[tree] = found
        if len(trees) == len(TREES):
            for tree, tests in trees.items():
                self.results[tree] |= tests

    def write(self) -> None:
        self.path.write_text(json.dumps(self.results, indent=0))

    def not_run(self) -> list[list[str]]:
        """The chunks that did not run on both trees."""
        numbers = range(len(self.chunks))
        return [self.chunks[n] for n in numbers if len(self.done.get(n, ())) < len(TREES)]


def run(args) -> None:
    """Run the tests on both trees and write the results."""
    import torch

    gpus = torch.cuda.device_count()
    device = torch.cuda.get_device_name(0) if gpus else "CPU"
    topics = files_of(args.trees / TREES[0] if args.trees else args.checkout)
    files = [f for names in topics.values() for f in names if re.search(args.only, f)]
    if not files:
        sys.exit(f"upstream_tests.py: --only {args.only!r} matches none of the test files.")
    chunks = [files[i : i + args.chunk] for i in range(0, len(files), args.chunk)]
    results = Results(args.out, f"{device}, torch {torch.__version__}", topics, chunks)
    with tempfile.TemporaryDirectory() as tmp:
        if not args.trees:
            write_trees(Path(tmp), args.checkout)
        _run_chunks(results, args.trees or Path(tmp), gpus, args)
    for chunk in results.not_run():
        print("no time left for:", *chunk)
    for test in regressions(results.results):
        print("passes unpatched only:", test, results.results["patched"].get(test))


def _run_chunks(results: Results, folder: Path, gpus: int, args) -> None:
    """Run every chunk on both trees with ``args.jobs`` processes, within ``args.total`` seconds."""
    start = time.monotonic()

    def run_one(number: int, tree: str) -> None:
        left = args.total - (time.monotonic() - start)
        if left < 1:
            return
        gpu = number % gpus if gpus else None
        timeout = min(args.timeout, left)
        found = run_files(folder / tree, results.chunks[number], gpu, timeout, args.site)
        results.add(number, tree, found)
        shown = " ".join(results.chunks[number])
        print(f"{time.monotonic() - start:5.0f} s  {tree}  {shown}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        tasks = [
            pool.submit(run_one, number, tree)
            for number in range(len(results.chunks))
            for tree in TREES
        ]
        for task in concurrent.futures.as_completed(tasks):
            task.result()
            results.write()


def known_results(path: Path, machine: str, files: list[str]) -> dict:
    """Results of an earlier run on the same kind of machine, without those of some files.

    Returns:
        Tree -> test id -> [outcome, reason].
    Raises:
        SystemExit: the results are from another machine.
    """
    if not path.is_file():
        return {tree: {} for tree in TREES}
    known = json.loads(path.read_text())
    if known["machine"] != machine:
        sys.exit(f"upstream_tests.py: {path} is from {known['machine']}; this is {machine}.")
    replaced = {f"{TESTS}/{file}" for file in files}
    return {
        tree: {
            test: found
            for test, found in known[tree].items()
            if test.split("::")[0] not in replaced
        }
        for tree in TREES
    }


def report(args) -> None:
    """Write the page."""
    PAGE.write_text(render([json.loads(path.read_text()) for path in args.results]))
    print(PAGE)


def rerun(args) -> None:
    """Write a section about files that were rerun into the page."""
    section = render_rerun(json.loads(args.results.read_text()))
    PAGE.write_text(with_section(PAGE.read_text(), section))
    print(PAGE)


def build(args) -> None:
    """Write both trees into a directory."""
    write_trees(args.folder, args.checkout)


def main() -> None:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True)
    sub = commands.add_parser("run", help=run.__doc__)
    sub.set_defaults(function=run)
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkout", type=Path)
    source.add_argument("--trees", type=Path, metavar="DIR", help="what `build` wrote")
    sub.add_argument(
        "--only", default="", metavar="REGEX", help="of tests/unit_tests/: these files"
    )
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--jobs", type=int, default=1)
    sub.add_argument("--chunk", type=int, default=1, help="files a process")
    sub.add_argument("--timeout", type=float, default=300, help="seconds a process")
    sub.add_argument("--total", type=float, default=float("inf"), help="seconds for all of it")
    sub.add_argument("--site", action="append", default=[], help="one more directory of packages")
    sub = commands.add_parser("build", help=build.__doc__)
    sub.set_defaults(function=build)
    sub.add_argument("--checkout", type=Path, required=True)
    sub.add_argument("folder", type=Path)
    sub = commands.add_parser("rerun", aliases=["again"], help=rerun.__doc__)
    sub.set_defaults(function=rerun)
    sub.add_argument("results", type=Path)
    sub = commands.add_parser("report", help=report.__doc__)
    sub.set_defaults(function=report)
    sub.add_argument("results", type=Path, nargs="+")
    args = top.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
