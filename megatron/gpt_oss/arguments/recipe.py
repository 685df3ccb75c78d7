# Copyright (c) 2026, the megatron-core gptoss authors.

"""--recipe FILE: reads flags from a file, which may have comments.

    # 20b at 32k on 8 GPUs
    --recipe continual.txt          # flags of another file in the same directory
    --preset 20b
    --context-parallel-size 4

A recipe is read like a shell command line without variables; # starts a comment. Its flags come
before those of the command line, so the command line overrides them.
"""

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Callable, Sequence

from megatron.gpt_oss.arguments.flags import RECIPE
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import read_small_file


def with_recipes(words: Sequence[str], read: Callable[[Sequence[str]], Namespace]) -> list[str]:
    """A command line with the flags of its recipes first.

    Args:
        words: the command line; --recipe stays in it.
        read: parses words to the arguments that they give; raises UsageError.
    Raises:
        UsageError: names the file (and the line) and what is wrong.
    """
    named = getattr(read(words), "recipe", ())
    return [*_flags_of([Path(name) for name in named], read, ()), *words]


def _flags_of(
    files: Sequence[Path], read: Callable[[Sequence[str]], Namespace], within: tuple[Path, ...]
) -> list[str]:
    flags = []
    for file in files:
        if file.resolve() in within:
            raise UsageError(
                f"{RECIPE} {file} includes itself, through {within[-1]}. Drop one line."
            )
        words = read_recipe(file)
        try:
            named = getattr(read(words), "recipe", ())
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error
        included = [file.parent / name for name in named]
        flags += _flags_of(included, read, (*within, file.resolve()))
        flags += _without_recipes(words)
    return flags


def _without_recipes(words: Sequence[str]) -> list[str]:
    """Remove --recipe and its value."""
    rest, after = [], False
    for word in words:
        if not after and word != RECIPE and not word.startswith(f"{RECIPE}="):
            rest.append(word)
        after = word == RECIPE and not after
    return rest


def read_recipe(file: str | Path) -> list[str]:
    """The words of one recipe.

    Raises:
        UsageError: the file cannot be read, or a line has an open quotation.
    """
    try:
        lines = read_small_file(file).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(
            f"{RECIPE} {file}: {reason}. examples/gpt_oss/README.md has a list."
        ) from (error)
    words = []
    for number, line in enumerate(lines, 1):
        try:
            words += shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(
                f"{file}, line {number}: {error}. A quotation must end on the line on which it "
                "starts, and a line needs no \\ at its end."
            ) from error
    return words
