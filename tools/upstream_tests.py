#!/usr/bin/env python3
# Copyright (c) 2026, the megatron-core gptoss authors.
"""Upstream's own unit tests, on the release as it is and with the series applied.

run --checkout MEGATRON_LM --out FILE   run them; MEGATRON_LM is a checkout near the pinned release
run ... --only REGEX --out FILE         run some files; what FILE says of the others stays
build --checkout MEGATRON_LM DIR        write both trees, for a machine that gets no more than them
run --trees DIR --out FILE              run those
report FILE ...                         write docs/upstream_tests.md from the results of machines
again FILE                              a section of that page about files that were run again

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
from patch_queue.upstream import VERSION

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "upstream_tests.md"
TREES = ("unpatched", "patched")
TESTS = "tests/unit_tests"
# Of tests/unit_tests/: what the series touches, and its neighbours.
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

# What to say of tests that the series changes on purpose.
NOTES = {
    "training/models/test_dist_utils.py": (
        "`test_dist_utils.py` replaces `torch.cuda` by a mock and counts calls that the patched code "
        "makes only where there is a CUDA device. Told that there is one (`device_utils.device_type`), it passes "
        "them all."
    ),
    "unit_tests/test_checkpointing.py": (
        "`test_checkpointing.py` saves with arguments that lack `check_for_nan_in_loss_and_grad`, which a "
        "patch read without a default. It has one since (`features/refuse_to_save_non_finite`)."
    ),
    "test_mlp_glu.py": (
        "`test_torch_dist.py` and `test_serialization.py` use a folder that a process of another file beside "
        "them removed (each process has its own since); `test_mlp_glu.py` was stopped at 120 s."
    ),
}


def files_of(checkout: Path) -> dict[str, list[str]]:
    """Topic -> test files below tests/unit_tests of the checkout, none twice."""
    seen: set[str] = set()
    found = {}
    for topic, patterns in TOPICS.items():
        paths = sorted(p for pattern in patterns for p in (checkout / TESTS).glob(pattern))
        names = [path.relative_to(checkout / TESTS).as_posix() for path in paths]
        found[topic] = [name for name in dict.fromkeys(names) if name not in seen]
        seen.update(found[topic])
    return found


def write_tree(folder: Path, tree: Tree, checkout: Path) -> None:
    """A tree to test: upstream's files, the checkout's tests and what else it has beside."""
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
    """folder/unpatched and folder/patched."""
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


def run_files(folder: Path, files: list[str], gpu: int | None, timeout: float, args) -> dict:
    """Test id -> [outcome, reason] of one process."""
    with tempfile.TemporaryDirectory() as tmp:
        report, output = Path(tmp) / "report", Path(tmp) / "output"
        report.touch()
        paths = [str(folder), str(ROOT / "tools"), *args.site]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths), REPORT: str(report)}
        environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        environ |= {"MASTER_ADDR": "localhost"}
        environ |= {"MASTER_PORT": str(random.SystemRandom().randrange(15000, 32000))}
        if gpu is not None:
            environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "patch_queue.reporter", "--continue-on-collection-errors"]
        # Two levels down: upstream's checkpoint tests write into the parent of pytest's folder, and
        # each process empties that place and removes it at its end.
        command += ["--basetemp", str(Path(tmp) / "pytest" / "base")]
        (Path(tmp) / "pytest").mkdir()
        command += [f"{TESTS}/{file}" for file in files]
        with open(output, "w") as stream:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
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


def run(args) -> None:
    """Run both trees, file by file, so that an interrupted run still compares the same tests."""
    import torch

    gpus, start = torch.cuda.device_count(), time.monotonic()
    device = torch.cuda.get_device_name(0) if gpus else "CPU"
    topics = files_of(args.trees / TREES[0] if args.trees else args.checkout)
    files = [f for names in topics.values() for f in names if re.search(args.only, f)]
    if not files:
        sys.exit(f"upstream_tests.py: --only {args.only!r} matches none of the test files.")
    chunks = [files[i : i + args.chunk] for i in range(0, len(files), args.chunk)]
    results = {"machine": f"{device}, torch {torch.__version__}", "topics": topics}
    before = known_results(args.out, results["machine"], files)
    done: dict[int, dict] = {}

    def write() -> None:
        whole = [found for found in list(done.values()) if len(found) == len(TREES)]
        for tree in TREES:
            results[tree] = dict(before[tree])
            for found in whole:
                results[tree] |= found[tree]
        args.out.write_text(json.dumps(results, indent=0))

    with tempfile.TemporaryDirectory() as tmp:
        folder = args.trees or Path(tmp)
        if not args.trees:
            write_trees(folder, args.checkout)

        def one(task):
            number, tree = task
            left = args.total - (time.monotonic() - start)
            if left < 1:
                return
            gpu = number % gpus if gpus else None
            timeout = min(args.timeout, left)
            found = run_files(folder / tree, chunks[number], gpu, timeout, args)
            done.setdefault(number, {})[tree] = found
            print(
                f"{time.monotonic() - start:5.0f} s  {tree}  {' '.join(chunks[number])}", flush=True
            )

        tasks = [(number, tree) for number in range(len(chunks)) for tree in TREES]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for _ in concurrent.futures.as_completed([pool.submit(one, task) for task in tasks]):
                write()
    for number, chunk in enumerate(chunks):
        if len(done.get(number, ())) < len(TREES):
            print("no time was left for:", *chunk)
    for test in worse(results):
        print("passes unpatched only:", test, results["patched"].get(test))


def known_results(path: Path, machine: str, files: list[str]) -> dict:
    """What an earlier run on such a machine said of other files: tree -> test id -> found."""
    if not path.is_file():
        return {tree: {} for tree in TREES}
    known = json.loads(path.read_text())
    if known["machine"] != machine:
        sys.exit(f"upstream_tests.py: {path} is from {known['machine']}; this is {machine}.")
    anew = {f"{TESTS}/{file}" for file in files}
    return {
        tree: {
            test: found for test, found in known[tree].items() if test.split("::")[0] not in anew
        }
        for tree in TREES
    }


def worse(results: dict) -> list[str]:
    """The tests that pass on the release and do not once it is patched."""
    passed = [test for test, found in results["unpatched"].items() if found[0] == "passed"]
    return [t for t in passed if results["patched"].get(t, ["missing"])[0] != "passed"]


def render(machines: list[dict]) -> str:
    """docs/upstream_tests.md."""
    lines = [
        "# Upstream's own tests",
        "",
        f"Unit tests of Megatron-LM run on Megatron-Core {VERSION} as released and on the same with all patches. They are "
        "not in this repository:",
        "`tools/upstream_tests.py` reads them from a checkout (branch `core_r0.19.0` at f8837c04ef, the one nearest to the "
        "release), runs both",
        "trees and writes this page. World size 1; tests that need more ranks, TransformerEngine or another package skip or "
        "fail on both.",
        "",
    ]
    for results in machines:
        counts = {
            tree: {o: sum(f[0] == o for f in results[tree].values()) for o in _OUTCOMES}
            for tree in TREES
        }
        bad = worse(results)
        better = [
            test
            for test, found in results["patched"].items()
            if found[0] == "passed" and results["unpatched"].get(test, [""])[0] != "passed"
        ]
        lines += [
            f"## {results['machine']}",
            "",
            "| tree | passed | failed | skipped |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {t} | " + " | ".join(str(counts[t][o]) for o in _OUTCOMES) + " |" for t in TREES
        ]
        lines += [
            "",
            f"Pass unpatched and not patched: {len(bad)}. Pass patched alone: {len(better)}.",
            "",
        ]
        lines += [
            f"- `{test}`: {' '.join(results['patched'].get(test, ['missing']))}" for test in bad
        ]
        known = {note for name, note in NOTES.items() if any(name in test for test in bad)}
        lines += ["", *sorted(known), ""] if known else [""] * bool(bad)
        reasons: dict[str, int] = {}
        for outcome, reason in results["patched"].values():
            if outcome != "passed":
                key = f"{outcome}: {reason.removeprefix('Skipped: ')[:90]}"
                reasons[key] = reasons.get(key, 0) + 1
        device = sum(
            any(word in r for word in _NEED_DEVICE)
            for o, r in results["patched"].values()
            if o != "passed"
        )
        lines += [
            f"Of the tests that do not pass on the patched tree, {device} ask for a CUDA device or for several.",
            "",
        ]
        common = sorted(reasons.items(), key=lambda item: -item[1])[:8]
        lines += ["The most frequent reasons:", ""]
        lines += [f"- {count}: {reason}" for reason, count in common] + [""]
    lines += ["## What was run", ""]
    head = " | ".join(results["machine"].split(",")[0] for results in machines)
    lines += [
        f"| file below tests/unit_tests: passed of all, patched | {head} |",
        "|---" * (len(machines) + 1) + "|",
    ]
    ran = {test.split("::")[0].removeprefix(f"{TESTS}/") for r in machines for test in r["patched"]}
    for topic, names in machines[0]["topics"].items():
        files = [name for name in names if name in ran]
        if not files:
            continue
        lines.append(f"| **{topic}** |" + " |" * len(machines))
        lines += [
            f"| {file} | " + " | ".join(_passed(r, file) for r in machines) + " |" for file in files
        ]
    return "\n".join(lines) + "\n"


# "integer modulo by zero": upstream's tests divide the rank by the number of devices.
_NEED_DEVICE = (
    "integer modulo by zero",
    "CUDA",
    "cuda",
    "NCCL",
    "world size",
    "world_size",
    "ranks",
)
_OUTCOMES = ("passed", "failed", "skipped")


def _passed(results: dict, file: str, tree: str = "patched") -> str:
    found = [f for t, f in results[tree].items() if t.split("::")[0] == f"{TESTS}/{file}"]
    return f"{sum(f[0] == 'passed' for f in found)} / {len(found)}"


def report(args) -> None:
    """Write the page."""
    PAGE.write_text(render([json.loads(path.read_text()) for path in args.results]))
    print(PAGE)


def render_again(results: dict) -> str:
    """A section about some files, for a page whose whole results are not at hand."""
    bad = worse(results)
    ran = dict.fromkeys(
        test.split("::")[0].removeprefix(f"{TESTS}/") for test in results["patched"]
    )
    lines = [
        f"## Run again on {results['machine']}",
        "",
        "These files count here, not above.",
        "",
        "| file below tests/unit_tests: passed of all | " + " | ".join(TREES) + " |",
        "|---" * (len(TREES) + 1) + "|",
    ]
    lines += [
        f"| {file} | " + " | ".join(_passed(results, file, tree) for tree in TREES) + " |"
        for names in results["topics"].values()
        for file in names
        if file in ran
    ]
    lines += ["", f"Pass unpatched and not patched: {len(bad)}.", ""]
    lines += [f"- `{t}`: {' '.join(results['patched'].get(t, ['missing']))}" for t in bad]
    return "\n".join(lines + [""] * bool(bad)) + "\n"


def with_section(page: str, section: str) -> str:
    """The page with a section in the place of the one of the same heading, or before the last."""
    heading = section.splitlines()[0]
    parts = re.split(r"^(?=## )", page, flags=re.M)
    parts = [part for part in parts if part.splitlines()[:1] != [heading]]
    return "".join([*parts[:-1], section, parts[-1]])


def again(args) -> None:
    """Put a section about files that were run again into the page."""
    section = render_again(json.loads(args.results.read_text()))
    PAGE.write_text(with_section(PAGE.read_text(), section))
    print(PAGE)


def build(args) -> None:
    """Write both trees into a folder."""
    write_trees(args.folder, args.checkout)


def main() -> None:
    """Parse and go."""
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
    sub.add_argument("--site", action="append", default=[], help="one more folder of packages")
    sub = commands.add_parser("build", help=build.__doc__)
    sub.set_defaults(function=build)
    sub.add_argument("--checkout", type=Path, required=True)
    sub.add_argument("folder", type=Path)
    sub = commands.add_parser("again", help=again.__doc__)
    sub.set_defaults(function=again)
    sub.add_argument("results", type=Path)
    sub = commands.add_parser("report", help=report.__doc__)
    sub.set_defaults(function=report)
    sub.add_argument("results", type=Path, nargs="+")
    args = top.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
