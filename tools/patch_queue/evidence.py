# Copyright (c) 2026, the megatron-core gptoss authors.
"""The test of each patch, run on a tree before and after it is patched."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .materialise import PACKAGE, Workspace
from .reporter import LIST, REPORT
from .resolve import APPLIES, PRESENT, VARIANT, Plan
from .series import Patch
from .tree import Tree

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
# All tests take minutes; on another version one may hang, and ends the process.
_TIMEOUT_S = 1500


@dataclass(frozen=True)
class Result:
    """The outcome of one test, and the first line of the reason."""

    outcome: str
    reason: str = ""


def tests_of(patch: Patch) -> list[str]:
    """The ids in the patch's ``Test:`` field."""
    return re.findall(r"tests/\S+", patch.fields.get("Test", ""))


def testable(plan: Plan) -> list[Patch]:
    """The patches whose change is on the patched tree."""
    return [outcome.patch for outcome in plan.with_status(APPLIES, VARIANT, PRESENT)]


def run_tests(
    workspace: Workspace, tree: Tree, ids: list[str], timeout: float = _TIMEOUT_S
) -> dict[str, Result]:
    """Run tests of this checkout against the files of ``tree``.

    One process runs all of them, except those of directories with their own conftest.py: if that
    cannot be imported, pytest runs nothing.

    Args:
        tree: every file under ``megatron/`` that is upstream's; our own modules are added where
            the tree has no file of the same name.
        timeout: of a process, in seconds; tests that have not run by then count as failed.
    """
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        copy_checkout(workspace, tree, folder)
        groups: dict[tuple[Path, ...], list[str]] = {}
        for test in dict.fromkeys(ids):
            above = (folder / test.split("::")[0]).parents
            own = tuple(p for p in above if p != folder and (p / "conftest.py").is_file())
            groups.setdefault(own, []).append(test)
        results: dict[str, Result] = {}
        for group in groups.values():
            results |= _run(folder, group, timeout)
    return results


def _run(folder: Path, ids: list[str], timeout: float) -> dict[str, Result]:
    report, chosen, output = (folder / name for name in ("report.jsonl", "chosen", "output"))
    report.write_text("")
    chosen.write_text("\n".join(ids), encoding="utf-8")
    files = dict.fromkeys(test.split("::")[0] for test in ids)
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", *files]
    command += ["-p", "no:cacheprovider", "-p", "patch_queue.reporter"]
    command += ["--continue-on-collection-errors"]
    tools = Path(__file__).resolve().parents[1]
    environ = {
        **os.environ,
        "PYTHONPATH": f"{folder}{os.pathsep}{tools}",
        "OMP_NUM_THREADS": "1",
        LIST: str(chosen),
        REPORT: str(report),
    }
    with open(output, "w") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    if not lines:
        errors = re.findall(r"^E +(\S.*)$", output.read_text(), flags=re.M)
        lines = [{"test": f, "outcome": FAILED, "reason": (errors or [""])[0]} for f in files]
    return {test: _result(test, lines) for test in ids}


def _result(test: str, lines: list[dict]) -> Result:
    """The worst of the test's parameters, or the result of importing its file."""
    own = [line for line in lines if test in (line["test"], line["test"].partition("[")[0])]
    own = own or [line for line in lines if line["test"] == test.split("::")[0]]
    if not own:
        return Result(FAILED, "not found, or timed out")
    worst = min(own, key=lambda line: (FAILED, SKIPPED, PASSED).index(line["outcome"]))
    return Result(worst["outcome"], _short(worst["reason"]))


def _short(line: str) -> str:
    line = re.sub(r"/\S*/(?=(?:tests|megatron)/)", "", line.strip())
    line = re.sub(r"/tmp/\S+", "TEMPORARY", line)
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", line)[:160]


def copy_checkout(workspace: Workspace, tree: Tree, folder: Path) -> None:
    """This checkout with other upstream files: its own files are copied, with build products."""
    upstream = set(workspace.manifest()["files"])
    for path in (workspace.root / PACKAGE).rglob("*"):
        name = path.relative_to(workspace.root).as_posix()
        if path.is_file() and name not in upstream and "__pycache__" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    # Copied, not linked: a test that starts a script by its path must not find this tree's files.
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for entry in workspace.root.iterdir():
        if entry.name.startswith(".") or entry.name in (PACKAGE, "runs", "build", "dist"):
            continue
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name, ignore=skip)
        elif entry.suffix != ".egg-info":
            shutil.copy2(entry, folder / entry.name)
