# Copyright (c) 2026, the megatron-core gptoss authors.

"""--recipe FILE: flags of the command line kept in a file, with comments that say why.

    # 20b at 32k on 8 GPUs
    --recipe continual.txt          # another file's flags, beside this one
    --preset 20b
    --context-parallel-size 4

A recipe holds words as a shell reads them, without variables; # begins a comment. Its flags stand
before those of the command line, of which the last one counts.
"""

import shlex
from argparse import ArgumentParser
from pathlib import Path
from typing import Callable, Sequence

from megatron.gpt_oss.errors import UsageError

FLAG = "--recipe"


def add_recipe_argument(group) -> None:
    """The flag, so that --help has it."""
    group.add_argument(
        FLAG,
        metavar="FILE",
        action="append",
        default=None,
        help="Flags from a file (examples/gpt_oss/recipes); those of the command line win.",
    )


def with_recipe(argv: Sequence[str], check: Callable[[list[str]], object]) -> list[str]:
    """A command line with the flags of its recipes before its own.

    Args:
        argv: words of the command line; --recipe itself stays among them.
        check: raises UsageError for words that are no command line.
    Raises:
        UsageError: names the file (and the line) and what is wrong there.
    """
    argv = list(argv)
    return [*_flags_of([Path(name) for name in _named(argv)], check, ()), *argv]


def _named(words: Sequence[str]) -> list[str]:
    """The files of --recipe; one without a value is left to the parser's own complaint."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(FLAG, action="append", nargs="?", default=[])
    return [name for name in finder.parse_known_args(list(words))[0].recipe if name]


def _flags_of(
    files: Sequence[Path], check: Callable[[list[str]], object], within: tuple[Path, ...]
) -> list[str]:
    flags = []
    for file in files:
        if file.resolve() in within:
            raise UsageError(f"{FLAG} {file} names itself, through {within[-1]}. Drop one line.")
        words = read_recipe(file)
        try:
            check(words)
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error
        named = [file.parent / name for name in _named(words)]
        flags += _flags_of(named, check, (*within, file.resolve()))
        flags += _without_recipes(words)
    return flags


def _without_recipes(words: list[str]) -> list[str]:
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(FLAG, action="append")
    return finder.parse_known_args(words)[1]


def read_recipe(file: str | Path) -> list[str]:
    """The words of one recipe.

    Raises:
        UsageError: the file cannot be read, or a line is not what a shell would read.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"{FLAG} {file}: {reason}. examples/gpt_oss/README.md has a list.") from (
            error
        )
    words = []
    for number, line in enumerate(lines, 1):
        try:
            words += shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(
                f"{file}, line {number}: {error}. Quotation marks end on the line on which they "
                "begin, and lines need no \\ at their end."
            ) from error
    return words
