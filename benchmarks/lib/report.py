# Copyright (c) 2026, the megatron-core gptoss authors.

"""What the benchmarks have in common: the machine, a JSON file, a table, a section of a page."""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Former words of command lines, as recorded in results; remove them in the version after 0.19.2+gptoss.1.
RENAMED = {
    "--folder": "--work-dir",
    "one-by-one": "sequential",
    "4k-one-by-one": "4k-sequential",
    "grouped-mm": "grouped-torch",
    "products": "grouped-gemm",
    "products-mm": "grouped-gemm-torch",
}


def machine(*packages: str) -> dict:
    """CPU, Python, commit, and the versions of some packages."""
    facts = {
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cpu_count": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
    }
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "none"
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(words, capture_output=True, text=True)
    facts["commit"] = found.stdout.strip() or "unknown"
    return facts


def write_json(path: Path, facts: dict, launcher: list[str] | None = None, **content) -> None:
    """Write a JSON file with machine, command, date and content.

    Args:
        launcher: what comes before the script in the command, if not python.
    """
    _save(path, facts, _command(launcher or ["python"]), content)


def write_rows(
    path: Path, facts: dict, command: list[str], rows: list, left_out: list, **more
) -> None:
    """Write the rows of a table with the machine and the command.

    Args:
        command: what comes before the script's name: python, or torchrun with its flags.
        rows: dataclasses; a figure that is nan becomes null.
        left_out: [case, reason] for what has no row.
        more: other entries of the file.
    """

    def plain(value):
        return None if isinstance(value, float) and math.isnan(value) else value

    content = {
        "rows": [{name: plain(value) for name, value in vars(row).items()} for row in rows],
        "left_out": [{"case": case, "reason": reason} for case, reason in left_out],
        **more,
    }
    _save(path, facts, _command(command), content)


def _command(launcher: list[str]) -> str:
    """The command line of this process, which runs a module with -m."""
    module = sys.modules["__main__"].__spec__.name
    return " ".join([*launcher, "-m", module, *sys.argv[1:]])


def current_command(command: str) -> str:
    """The command of a result as it is run today.

    Results record the command as it was run. The older ones name the path of a script that is now a
    module, and `RENAMED` words.
    """

    def module(script: re.Match) -> str:
        (path,) = ROOT.glob(f"benchmarks/*/{script[1]}.py")
        return "-m " + ".".join(path.relative_to(ROOT).with_suffix("").parts)

    command = re.sub(r"\bbenchmarks/(\w+)\.py", module, command)
    return " ".join(map(current_word, command.split(" ")))


def current_word(word: str) -> str:
    """The present name of a case, an implementation or a flag."""
    return RENAMED.get(word, word)


def check_names(parser, names, known, flag: str = "--cases", separator: str = ", ") -> None:
    """Reject unknown names of a flag."""
    for name in names:
        if name not in known:
            parser.error(f"{flag} {name}: unknown; there are {separator.join(known)}")


def _save(path: Path, facts: dict, command: str, content: dict) -> None:
    """Write the file atomically."""
    report = {
        "machine": facts,
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_section(page: Path, name: str) -> str:
    """The text of a section."""
    pattern = f"<!-- begin {re.escape(name)}[^>]*-->\n(.*)<!-- end {re.escape(name)} -->"
    found = re.search(pattern, page.read_text(encoding="utf-8"), flags=re.S)
    return found[1].strip() if found else ""


def write_section(page: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- begin NAME` and `<!-- end NAME -->`."""
    old = page.read_text(encoding="utf-8")
    pattern = f"(<!-- begin {re.escape(name)}[^>]*-->\n).*(<!-- end {re.escape(name)} -->)"
    new, count = re.subn(pattern, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", old, flags=re.S)
    if count != 1:
        raise SystemExit(f"{page} has no section '{name}' to write")
    page.write_text(new, encoding="utf-8")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _first(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith(key))
    return next(found, platform.processor() or "unknown")
