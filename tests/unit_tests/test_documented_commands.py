# Copyright (c) 2026, the megatron-core gptoss authors.

"""Every command of README.md, docs/, examples/ and the other pages, as far as a CPU can run it.

All fenced and indented blocks of the pages are read, so that a new one is covered by being there: a
YAML block is parsed, a block of commands is run line by line in a directory that looks like the
repository's root, with tiny models and corpora where the page has /models and /corpora. Training
commands become dry runs, what needs a GPU or a cluster is parsed by its own parser. What is not a
command is listed in `NOT_COMMANDS`, what is parsed and not run in `PARSED`, each with the reason.
Commands in running text, in messages and in comments are parsed, and flags named there must exist.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import yaml

from tests.harness.command_lines import ROOT, dry_run, joined_lines, torchrun_parts
from tests.harness.conversations import random_conversations, write_conversations

FOLDER = ROOT / "examples" / "gpt_oss"
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "tests/*.md", "patches/*.md")
    for path in ROOT.glob(pattern)
)
# First words of the commands that are known here.
KINDS = {
    *("gptoss", "torchrun", "python", "pip", "make", "git", "export", "sbatch", "apptainer"),
    "examples/gpt_oss/launch.sh",
}
# Blocks that are no commands, by a piece of their first line.
NOT_COMMANDS = {
    "gpt-oss tiny: 4 layers": "what a run prints",
    "error: --num-layers 12": "what a mistake prints",
    "pretrain_gpt_oss.py   ": "a map of the modules",
    "data/stdlib.json": "what gptoss tokenize prints",
    "data b.512-up": "what a run prints",
    "validation english": "what a run prints",
    "learning rate at step": "what a run prints",
    "saved runs/": "what a run prints",
    "changed since this run": "what a run prints",
}
# Commands that are parsed by their own parser and not run, by their first words.
PARSED = {
    "gptoss doctor": "times kernels for a minute",
    "gptoss tokenize chats.jsonl": "needs gpt-oss' own tokenizer",
    "python tools/patches.py try 0.17.1": "downloads that release",
    "python tools/patches.py export 0.17.1": "downloads that release",
    "python tools/patches.py new": "writes into patches/",
    "python tools/patches.py refresh": "writes into patches/",
    "python tools/patches.py table --write": "writes into patches/",
    "python -m": "has a test of its own",
}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(page: str, root: Path = ROOT) -> list[Block]:
    """Fenced blocks, and those indented by four after an empty line and outside of a list."""
    found, lines = [], (root / page).read_text(encoding="utf-8").splitlines()
    number = 0
    in_list = False
    while number < len(lines):
        line = lines[number]
        fence = re.match(r"( *)```+ *([\w-]*) *$", line)
        start = number + 1
        if fence:
            number += 1
            while lines[number].strip().strip("`"):
                number += 1
                if lines[number].strip().startswith("```"):
                    break
            while not lines[number].strip().startswith("```"):
                number += 1
            text = "\n".join(lines[start:number])
            found.append(Block(page, start, fence[2], text))
        elif line.startswith("    ") and not in_list and not lines[number - 1].strip():
            while number + 1 < len(lines) and lines[number + 1].startswith("    "):
                number += 1
            text = "\n".join(row[4:] for row in lines[start - 1 : number + 1])
            found.append(Block(page, start, "", text))
        elif line.strip() and not line.startswith(" "):
            in_list = re.match(r"([-*+]|\d+\.) ", line) is not None
        number += 1
    return found


def first_word(line: str) -> str:
    """The first word of a command, after its variables."""
    return next((word for word in line.split() if not re.match(r"[A-Z_]+=", word)), "")


def commands(block: Block) -> list[str]:
    """The commands of a block; none if it is of another kind, which then has to be listed."""
    lines = joined_lines(block.text)
    if block.language in ("yaml", "json"):
        assert yaml.safe_load(block.text) is not None
        return []
    if block.language in ("", "bash", "sh", "console") and first_word(lines[0]) in KINDS:
        return [part.strip() for line in lines for part in without_comment(line).split(" && ")]
    known = [start for start in NOT_COMMANDS if block.text.startswith(start)]
    assert known, (
        f"{block}: begins with {lines[0]!r}, which is no command of {sorted(KINDS)}. If it is not "
        "one, list it in NOT_COMMANDS."
    )
    return []


def without_comment(line: str) -> str:
    return re.sub(r"\s+# .*", "", line)


# A directory like the repository's root, with models and corpora.

ABSOLUTE = ("/models", "/corpora", "/path/to", "/data")


class Place:
    """Where the commands of one page run.

    Args:
        folder: a new one. seed: the directory with models and corpora that all pages share.
    """

    def __init__(self, folder: Path, seed: Path):
        self.folder, self.seed = folder, seed
        folder.mkdir()
        for path in ROOT.iterdir():
            if path.name not in ("runs", "data", "checkpoints", "series", "build", "data.yaml"):
                (folder / path.name).symlink_to(path)
        (folder / "corpus").symlink_to(seed / "tiny" / "corpus")
        for name in ("data", "runs", "data.yaml", "chat.yaml"):
            source = seed / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / name)

    def word(self, word: str, trains: bool = False) -> str:
        """A word of a command with its paths here."""
        for start in ABSOLUTE:
            if word == start or word.startswith(start + "/"):
                found = f"{self.seed}/{'full' if trains else 'tiny'}{word}"
                shared = Path(found.split("*")[0]).exists()
                return found if shared else f"{self.folder}{word}"
        return {"PATH": str(self.fork()), "DIR": str(self.folder / "new")}.get(word, word)

    def fork(self) -> Path:
        """A checkout of the release, created for each command that uses it."""
        return self.folder / "path" / "to" / "Megatron-LM"

    def make_fork(self) -> None:
        """Upstream's wheel as a repository of git."""
        sys.path.insert(0, str(ROOT / "tools"))
        from patch_queue.upstream import VERSION, locate_release

        if self.fork().is_dir():
            commands = ["reset -q --hard theirs", "clean -fdq"]
        else:
            self.fork().mkdir(parents=True)
            with zipfile.ZipFile(locate_release(ROOT, VERSION)) as archive:
                members = [name for name in archive.namelist() if name.endswith(".py")]
                archive.extractall(self.fork(), members)
            commands = ["init -q", "config gc.auto 0", "add -A", "commit -qm theirs", "tag theirs"]
        for words in commands:
            subprocess.run([*GIT, *words.split()], cwd=self.fork(), check=True)

    def forget(self, words: list[str]) -> None:
        """Delete the output of a command before it runs."""
        for flag, path in zip(words, words[1:]):
            if flag == "--output":
                for file in self.folder.glob(f"{path}.*"):
                    file.unlink()
            elif flag == "--out":
                shutil.rmtree(self.folder / path, ignore_errors=True)


ONE_PROCESS = ("--workers", "1")
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@invalid", "-c", "commit.gpgsign=false")


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """Tiny models, a checkpoint, corpora; directories with published sizes and a small tensor."""
    import torch
    from safetensors.torch import save_file

    from megatron.gpt_oss import cli
    from megatron.gpt_oss.checkpoint.hf.config import hf_config_from_preset
    from megatron.gpt_oss.data.byte_tokenizer import write_byte_tokenizer
    from megatron.gpt_oss.diagnostics.random_checkpoint import write_json, write_tiny_hf
    from megatron.gpt_oss.presets import get_preset

    folder = tmp_path_factory.mktemp("commands")
    for name in ("20b", "120b"):
        write_tiny_hf(folder / f"tiny/models/gpt-oss-{name}")
        full = folder / f"full/models/gpt-oss-{name}"
        write_byte_tokenizer(full)
        write_json(full / "config.json", hf_config_from_preset(get_preset(name)))
        save_file({"model.norm.weight": torch.zeros(2)}, full / "model.safetensors")
    for name, texts in {
        "corpora/ja": ["long " * 3000, "longer " * 6000, *["short"] * 4],
        "corpora/en": ["one", "two", "three"] * 3,
        "corpora/more": [],
        "corpus": ["a b c " * 20] * 8,
    }.items():
        path = folder / "tiny" / name
        path.mkdir(parents=True)
        lines = (json.dumps({"text": text}) for text in texts)
        (path / "part.jsonl").write_text("\n".join(lines))
    write_parquet(folder / "tiny/corpora/more/part.parquet")
    hf = folder / "tiny/models/gpt-oss-20b"
    with contextlib.redirect_stdout(io.StringIO()):
        for name in ("corpus", "ja", "ja.8k-32k", "ja.32k-up", "en", "code", "math.valid"):
            flags = ["--tokenizer", str(hf), "--output", str(folder / "data" / name), *ONE_PROCESS]
            cli.main(["tokenize", str(folder / "tiny/corpus"), *flags])
        for run in ("20b", "ja-32k"):
            out = folder / "runs" / run
            cli.main(["convert", "to-megatron", "--hf", str(hf), "--out", str(out / "checkpoints")])
            numbers = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0}
            records = [{"step": step, **numbers, "tokens": step * 64} for step in (1, 2)]
            (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
            (out / "run.json").write_text('{"arguments": {"lr": 0.001}}')
    write_conversations(folder / "data" / "chat", random_conversations(8, longest=64, seed=0))
    pages = {"data.yaml": "docs/continual_pretraining.md", "chat.yaml": "docs/sft.md"}
    for name, page in pages.items():
        block = next(b for b in blocks(page) if b.language == "yaml")
        (folder / name).write_text(block.text)
    shutil.copytree(folder / "data", folder / "corpora")  # $CORPORA
    return folder


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["four", "five"]}), path)


# How each kind of command is run. All of them raise what is wrong.


class _Parsed(BaseException):
    """A script has parsed its arguments."""


def run_gptoss(place, words, run=True):
    from megatron.gpt_oss import cli

    args = cli.build_parser().parse_args(words[1:])
    words = [*words, *ONE_PROCESS] if words[1] == "tokenize" else words
    if run:
        with contextlib.redirect_stderr(io.StringIO()) as error:
            try:
                cli.main(words[1:])
            except SystemExit as stop:
                raise AssertionError(f"exit code {stop.code}: {error.getvalue()}") from stop
    return args


def parse_script(words, module=False):
    """Parse the arguments with the script's parser; the rest of the script does not run."""
    source = ROOT / words[0].replace(".", "/") if module else ROOT / words[0]
    if module and source.is_dir():
        source = source / "__main__.py"
    elif module:
        source = source.with_suffix(".py")
    text = source.read_text(encoding="utf-8")
    if "parse_args(" not in text:
        compile(text, str(source), "exec")
        assert "__main__" in text or "def main" in text
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise _Parsed

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_leave),
        mock.patch.object(sys, "argv", [str(source), *words[1:]]),
        mock.patch.object(sys, "path", [str(source.parent), str(ROOT), *sys.path]),
        pytest.raises(_Parsed),
    ):
        runpy.run_path(str(source), run_name="__main__")


def run_pretrain(words, machines):
    """A dry run of the words, which may ask for one themselves; as if TransformerEngine were there."""
    from megatron.gpt_oss.arguments import te_requirements as transformer_engine

    versions = transformer_engine.Versions((2, 20, 2), (9, 19, 0))
    with mock.patch.object(transformer_engine, "installed_versions", lambda: versions):
        if "--dry-run" not in words:
            return dry_run(words, machines)
        return dry_run([*words, machines] if words[-1] == "--dry-run" else words)


def run_torchrun(place, words, run=True):
    machines, ranks, script, argv = torchrun_parts(words)
    if Path(script).name == "pretrain_gpt_oss.py":
        assert Path(script).resolve() == ROOT / "pretrain_gpt_oss.py"
        return run_pretrain(argv, f"{machines}x{ranks}")
    return parse_script([script, *argv], module=not script.endswith(".py"))


def run_python(place, words, run=True):
    if words[1] == "-m":
        if words[2] == "build":
            return None
        return parse_script(words[2:], module=True)
    if words[1] == "pretrain_gpt_oss.py":
        return run_pretrain(words[2:], "1")
    if words[1] != "tools/patches.py":
        return parse_script(words[1:])
    sys.path.insert(0, str(ROOT / "tools"))
    import patches

    args = patches.parser().parse_args(words[2:])
    if not run or (args.command == "apply" and args.to is None):
        return None
    if str(place.fork()) in words or args.command == "export":
        place.make_fork()
    if args.command == "try" and not args.no_tests:  # which takes minutes
        words = [*words, "--no-tests"]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert patches.main(words[2:]) == 0, error.getvalue()


def run_pip(place, words, run=True):
    """Paths and extras exist; nothing is downloaded."""
    assert words[1] in ("install", "uninstall"), words
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        name, extras = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?", word).groups()
        if word.startswith("-"):
            assert word in ("-e", "--upgrade", "-q", "--pre"), word
        elif extras:
            assert name in (".", project["name"]), word
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), word


def run_make(place, words, run=True):
    bash("make -n " + shlex.join(words[1:]), ROOT)


def run_git(place, words, run=True):
    if run:
        bash(shlex.join([*GIT, *words[1:]]), place.folder)


def bash(text: str, folder: Path, **environ) -> str:
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return done.stdout


def gpus_of(words: list[str]) -> int:
    """Number of GPUs in the name of the recipe."""
    return next(int(m[1]) for word in words if (m := re.search(r"-(\d+)gpus", word)))


def run_launch(place, words, run=True, machines=1):
    """What launch.sh would start on each machine, as a dry run."""
    environ = {"DRY": "1", "GPUS": str(gpus_of(words) // machines), "NODES": str(machines)}
    if machines > 1:
        environ |= {"RENDEZVOUS": "host:29500", "JOB": "7"}
    printed = bash(f"bash {FOLDER}/launch.sh {shlex.join(words[1:])}", place.folder, **environ)
    return run_torchrun(place, shlex.split(printed))


def run_sbatch(place, words, run=True):
    """slurm.sbatch is bash, and launch.sh starts what it says on each of the machines."""
    assert words[1] == "--nodes", words
    script = place.folder / words[3]
    bash(f"bash -n {script}", place.folder)
    run_launch(place, words[3:], machines=int(words[2]))


def run_apptainer(place, words, run=True):
    """The recipe's sections are there, its scripts are bash; running it is launch.sh."""
    if words[1] == "build":
        assert words[2].endswith(".sif")
        return check_image(place.folder / words[3])
    assert words[1] == "run", words
    at = next(i for i, word in enumerate(words) if word.endswith(".sif"))
    return run_launch(place, ["launch.sh", *words[at + 1 :]])


def check_image(path: Path) -> None:
    """What setup.py needs is in the image: its files, git, and a compiler."""
    text = path.read_text()
    sections = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, flags=re.M | re.S))
    assert {"files", "post", "runscript", "help"} <= set(sections)
    for name in ("post", "runscript"):
        bash(f'bash -n <<"END"\n{sections[name]}\nEND', ROOT)
    copied = {
        line.split()[0]: line.split()[1] for line in sections["files"].split("\n") if line.strip()
    }
    for source in copied:
        assert (ROOT / source).exists(), source
    installed = re.search(r"apt-get install (.*)", sections["post"])[1].split()
    assert "git" in installed  # patches are applied with it (tools/patch_queue)
    assert sections["post"].index("apt-get update") < sections["post"].index("apt-get install")
    assert re.search(r"^From: .*-devel$", text, flags=re.M)  # a C++ compiler
    launch = re.search(r"exec (\S+)", sections["runscript"])[1]
    assert launch.startswith(copied["examples"] + "/")
    assert (ROOT / "examples" / launch.removeprefix(copied["examples"] + "/")).is_file()


RUN = {
    "gptoss": run_gptoss,
    "torchrun": run_torchrun,
    "python": run_python,
    "pip": run_pip,
    "make": run_make,
    "git": run_git,
    "sbatch": run_sbatch,
    "apptainer": run_apptainer,
    "examples/gpt_oss/launch.sh": run_launch,
    "export": lambda place, words, run=True: None,
}
TRAINS = {"torchrun", "sbatch", "apptainer", "examples/gpt_oss/launch.sh"}


# They read, patch and commit the whole of upstream's tree: `test_patch_commands` runs them.
PATCH_COMMANDS = ("python tools/patches.py", "git ")


def run_command(place: Place, command: str, patches: bool = False) -> None:
    """Run one command of a page where the page's commands run.

    Args:
        patches: also those of `PATCH_COMMANDS`, which are parsed otherwise.
    """
    bash(f'bash -n <<"END"\n{command}\nEND', ROOT)
    command = command.replace('"$PWD"', str(place.folder))
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    assert "..." not in words, f'{command}: has no words in the place of "..."'
    trains = words[0] in TRAINS or words[1] == "pretrain_gpt_oss.py"
    words = [place.word(word, trains) for word in words]
    words = [found for word in words for found in expanded(place, word)]
    reasons = [start for start in PARSED if command.startswith(start)]
    if not reasons:
        place.forget(words)
    runs = not reasons and (patches or not command.startswith(PATCH_COMMANDS))
    with (
        contextlib.chdir(place.folder),
        mock.patch.dict(os.environ, CORPORA=str(place.seed / "corpora")),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        RUN[words[0]](place, words, run=runs)


def expanded(place: Place, word: str) -> list[str]:
    """As the shell does with *; a pattern that fits nothing is the word itself."""
    if "*" not in word:
        return [word]
    found = sorted(map(str, Path("/").glob(word[1:]))) if word[0] == "/" else []
    return found or [word]


PAGES_WITH_COMMANDS = [page for page in PAGES if any(commands(block) for block in blocks(page))]


def failures(page: str, seed: Path, folder: Path, patches: bool) -> str:
    """Errors of the commands of a page; either those of the patches or all others."""
    place, wrong = Place(folder, seed), []
    for block in blocks(page):
        for command in commands(block):
            if patches and not command.startswith(PATCH_COMMANDS):
                continue
            try:
                run_command(place, command, patches)
            except (Exception, SystemExit) as error:
                wrong.append(f"{block}: {command}\n    {type(error).__name__}: {error}")
    return "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_blocks(page, seed, tmp_path):
    """Each command of each block of a page."""
    wrong = failures(page, seed, tmp_path / "root", patches=False)
    assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "patches/README.md", "docs/upstreaming.md"])
def test_patch_commands(page, seed, tmp_path):
    """A checkout of the release is tried, patched, and gets the series as commits."""
    wrong = failures(page, seed, tmp_path / "root", patches=True)
    assert not wrong, wrong
    if page == "README.md":
        log = bash("git log --oneline", tmp_path / "root/path/to/Megatron-LM")
        series = re.findall(r"^\S+\.patch$", (ROOT / "patches/series").read_text(), flags=re.M)
        assert len(log.splitlines()) > len(series) / 2  # next to those not needed for this release


def test_every_listed_reason_is_needed():
    """Every listed entry occurs on a page."""
    texts = [block.text for page in PAGES for block in blocks(page)]
    spans = [span for page in PAGES for _, span in inline(page)]
    assert all(any(text.startswith(start) for text in texts) for start in NOT_COMMANDS)
    lines = [line for text in texts for line in joined_lines(text)] + spans
    assert all(any(line.startswith(start) for line in lines) for start in PARSED)


def test_a_new_block_has_to_be_known(tmp_path):
    """Commands are found without being listed; what is neither a command nor listed is refused."""
    (tmp_path / "new.md").write_text(
        "a\n\n```bash\n# note\ngptoss presets \\\n    20b && make test\n```\n\n    pip install -e "
        ".\n\n- in a list\n\n    more of it\n\n```\nfoo --bar\n```\n"
    )
    first, second, third = blocks("new.md", tmp_path)
    assert commands(first) == ["gptoss presets 20b", "make test"]
    assert commands(second) == ["pip install -e ."]
    with pytest.raises(AssertionError, match="foo --bar.*NOT_COMMANDS"):
        commands(third)


# Commands in running text, messages and comments.


def inline(page: str) -> list[tuple[str, str]]:
    """(page, command) of the commands in backticks outside of blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    spans = re.findall(r"`([^`]+)`", text)
    spans = [" ".join(span.split()) for span in spans]
    return [(page, s) for s in dict.fromkeys(spans) if first_word(s) in KINDS and " " in s]


def in_sources() -> list[tuple[str, str]]:
    """Commands in the strings (messages, help, docstrings) of our own modules."""
    found = []
    tracked = subprocess.run(
        ["git", "ls-files", "megatron", "tools", "pretrain_gpt_oss.py", "setup.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.splitlines():
        if not name.endswith(".py"):
            continue
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for text in filter(None, map(string_of, ast.walk(tree))):
            for command in re.findall(
                r"(?<![\w/-])((?:gptoss|python tools/patches\.py|pip install) [^`.;,)\n]*)", text
            ):
                found.append((name, command.strip()))
    return list(dict.fromkeys(found))


def string_of(node: ast.AST) -> str | None:
    """The text of a string, with a word in the place of each value."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        return "".join(map(str, parts))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return None


def parser_of(words: list[str], parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The subparser that the words name, as far as they are names of one."""
    for word in words:
        subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not subs or word not in subs[0].choices:
            break
        parser = subs[0].choices[word]
    return parser


def check_named(command: str, prose: bool) -> None:
    """What a command in a sentence names exists: subcommand, flags, script, target, extra.

    Args:
        prose: words of the sentence may follow.
    """
    words = command.replace("'", "").replace('"', "").split()
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:2] == ["gptoss", "launch"]:  # which takes torchrun's words
        words = ["torchrun", *words[2:]]
    flags = [word.split("=")[0] for word in words if re.match(r"--[a-z]", word)]
    if words[0] == "gptoss" or words[:2] == ["python", "tools/patches.py"]:
        if words[0] == "gptoss":
            from megatron.gpt_oss.cli import build_parser as top
        else:
            sys.path.insert(0, str(ROOT / "tools"))
            from patches import parser as top
        rest = words[1 if words[0] == "gptoss" else 2 :]
        parser, whole = parser_of(rest, top()), top()
        assert parser.prog != whole.prog or (prose and not flags), f"{command}: no such command"
        known = parser._option_string_actions
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            assert "=" in word or re.search(rf"^{word}:", makefile, flags=re.M), command
        return
    elif words[0] == "pip":
        return run_pip(None, words[:3] if prose else words)
    elif words[0] in ("python", "torchrun"):
        script = next((word for word in words if word.endswith(".py")), None)
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            known = dict(get_args_parser()._option_string_actions)
        else:
            known = {}
        module = next((word for word in words if word.startswith("benchmarks.")), None)
        if module is not None:
            script = f"{module.replace('.', '/')}.py"
        elif words[:2] == ["python", "-m"]:
            return
        if script is not None:
            text = (ROOT / script).read_text(encoding="utf-8")
            if "cases.make_parser" in text:  # the flags of every kernel benchmark
                text += (ROOT / "benchmarks/lib/cases.py").read_text(encoding="utf-8")
            known |= dict.fromkeys(re.findall(r'"(--[\w-]+)"', text))
    else:
        return
    for flag in flags:
        assert flag in known, f"{command}: {flag} does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences(page):
    for _, command in inline(page):
        check_named(command, prose=False)


def test_commands_in_messages():
    """Errors, help and docstrings recommend commands that exist."""
    found = in_sources()
    assert len(found) > 5
    wrong = []
    for name, command in found:
        try:
            check_named(command, prose=True)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_scripts_in_sentences_parse(page):
    """The benchmarks' own parsers take the words that the pages show."""
    for _, command in inline(page):
        words = shlex.split(command)
        if words[0] in ("python", "torchrun") and "/" in command and "..." not in command:
            if any(word.startswith("benchmarks.") for word in words):
                RUN[words[0]](None, words, run=False)
