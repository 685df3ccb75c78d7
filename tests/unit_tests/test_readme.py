# Copyright (c) 2026, the megatron-core gptoss authors.
"""Every command that README.md shows exists, with the flags that it shows."""

import argparse
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def commands():
    """The command lines of the code blocks, continuation lines joined, comments dropped."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split(" #")[0].split("&&")]
    return [part for part in parts if part.split(" ")[0] in KINDS]


def check_make(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words[1:]:
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"no make target {target}"


def check_pip(words):
    assert words[1] == "install"


def check_gptoss(words):
    from megatron.gpt_oss.cli import build_parser

    build_parser().parse_args(words[1:])


def check_python(words):
    import patches

    assert words[1] == "tools/patches.py"
    patches.parser().parse_args(words[2:])


def check_torchrun(words):
    from megatron.gpt_oss.arguments import add_gpt_oss_arguments
    from megatron.gpt_oss.training.run_arguments import add_run_arguments
    from megatron.training.arguments import add_megatron_arguments

    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[at]).is_file()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_run_arguments(add_gpt_oss_arguments(add_megatron_arguments(parser)))
    parser.parse_args(words[at + 1 :])


KINDS = {
    "make": check_make,
    "pip": check_pip,
    "gptoss": check_gptoss,
    "python": check_python,
    "torchrun": check_torchrun,
}


@pytest.mark.parametrize("command", commands())
def test_command_exists(command):
    words = shlex.split(command)
    KINDS[words[0]](words)


def test_every_kind_is_shown():
    assert {command.split(" ")[0] for command in commands()} == set(KINDS)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
    for path in re.findall(r"`((?:examples|tools|docs|tests|patches)/[\w./-]+)`", text):
        exists = (ROOT / path).exists() or path.startswith("patches/fixes/what_is_wrong")
        assert exists, f"{page}: {path}"
