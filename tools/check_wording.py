# Copyright (c) 2026, the megatron-core gptoss authors.

"""Rejects added text with a phrase of tools/wording.txt; `make lint` runs it.

python tools/check_wording.py [BASE]    compare the working tree with BASE

BASE is the merge base with origin/main, or the parent of HEAD where they are the same commit. Only
prose is read: comments and strings of Python files, the header and the added lines of patches, and
all other text except code spans.
"""

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Iterator

WORDING = Path(__file__).with_name("wording.txt")
QUOTES_PHRASES = {WORDING.name, "test_check_wording.py", "deprecated.py"}
_STRINGS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)}


def git(*words: str, check: bool = True) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=check)
    return done.stdout.strip()


def base_commit() -> str | None:
    """What to compare with; None in a shallow clone that has neither a branch nor a parent."""
    head = git("rev-parse", "HEAD")
    merge_base = git("merge-base", "HEAD", "origin/main", check=False)
    if merge_base and merge_base != head:
        return merge_base
    return git("rev-parse", "--verify", "--quiet", "HEAD~1", check=False) or None


def added_lines(base: str) -> Iterator[tuple[str, int]]:
    """(path, line number) of each line that the working tree adds to `base`."""
    path, flags = "", ("--unified=0", "--no-color", "--no-ext-diff", "--relative")
    for line in git("diff", *flags, base, "--").splitlines():
        if line.startswith("+++ "):
            path = line.removeprefix("+++ ").removeprefix("b/")
        elif match := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(match[1]), int(match[2] or 1)
            yield from ((path, number) for number in range(first, first + count))


def prose(path: Path) -> dict[int, str]:
    """{line number: text for people}; empty for a file that is not text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return {}
    lines = dict(enumerate(text.splitlines(), start=1))
    if path.suffix == ".py":
        return _strings_and_comments(text)
    if path.suffix == ".patch":
        end_of_header = next((n for n, line in lines.items() if line == "---"), 0)
        return {n: t for n, t in lines.items() if n < end_of_header or t.startswith("+")}
    return {number: re.sub(r"`[^`]*`", "", line) for number, line in lines.items()}


def _strings_and_comments(text: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        words = len(token.string.split())
        if token.type in _STRINGS and words > 1:  # one word is a key or a file name
            for number, line in enumerate(token.string.splitlines(), start=token.start[0]):
                without_code = re.sub(r"`[^`]*`|\{[^{}]*\}", "", line)
                found[number] = f"{found.get(number, '')} {without_code}"
    return found


def phrases(file: Path = WORDING) -> dict[re.Pattern, str]:
    """{pattern of a phrase: what to write instead}."""
    lines = (line.rstrip() for line in file.read_text(encoding="utf-8").splitlines())
    pairs = (re.split(r"\t|  +", line, maxsplit=1) for line in lines if line and line[0] != "#")
    # The first letter in either case: FOLDER is a placeholder. `folder:` documents an argument, and
    # --folder is a flag.
    return {
        re.compile(rf"(?<!--)\b[{old[0].upper()}{old[0]}]{re.escape(old[1:])}\b(?!:)"): new
        for old, new in pairs
    }


def complaints(base: str) -> Iterator[str]:
    """One line per added phrase, with its file, line number and replacement."""
    texts: dict[str, dict[int, str]] = {}
    rejected = phrases()
    for path, number in added_lines(base):
        if Path(path).name in QUOTES_PHRASES or path.startswith("benchmarks/results/"):
            continue
        if path not in texts:
            texts[path] = prose(Path(path))
        for phrase, instead in rejected.items():
            if match := phrase.search(texts[path].get(number, "")):
                yield f"{path}:{number}: '{match[0].lower()}': write {instead}"


def main() -> None:
    base = sys.argv[1] if len(sys.argv) > 1 else base_commit()
    if base is None:
        print("check_wording: no commit to compare with in this shallow clone.")
        return
    found = list(complaints(base))
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
