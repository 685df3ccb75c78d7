# Copyright (c) 2026, the megatron-core gptoss authors.

"""Each of Megatron's flags is in the ledger, and the command line follows it."""

import functools
import re
import sys
from pathlib import Path

import pytest

from megatron.gpt_oss.arguments.check_flags import entries_of, ledger
from megatron.gpt_oss.arguments.flags import add_our_arguments
from megatron.gpt_oss.arguments.foreign_names import FOREIGN_NAMES
from megatron.gpt_oss.arguments.ledger import SUPPORTED
from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.presets import get_preset, preset_flags
from tests.harness.parser import whole_parser

ROOT = Path(__file__).resolve().parents[4]
TESTS = ROOT / "tests" / "unit_tests"
sys.path.insert(0, str(ROOT / "tools"))
NULL = "--tokenizer-type NullTokenizer --vocab-size 256"
FLAG = r"(?<![\w-])--[a-z0-9][a-z0-9_-]+"


@functools.cache
def our_flags():
    from argparse import ArgumentParser

    return frozenset(add_our_arguments(ArgumentParser())._option_string_actions)


@functools.cache
def megatron_flags():
    return frozenset(whole_parser()._option_string_actions) - our_flags()


def test_ledger_has_what_the_parser_has():
    in_ledger = {name.split("=")[0] for name in ledger()}
    assert sorted(megatron_flags() - in_ledger) == []
    assert sorted(in_ledger - megatron_flags()) == []
    # A flag that is there by value alone would say nothing of its other values.
    assert sorted(in_ledger - ledger().keys()) == []


def test_values_are_ones_of_the_parser():
    for name in ledger():
        flag, _, value = name.partition("=")
        choices = whole_parser()._option_string_actions[flag].choices
        if value and choices:
            assert value in [getattr(choice, "name", choice) for choice in choices], name


@functools.cache
def text_of(module):
    """A test module and those of tests/ that it imports."""
    text = module.read_text()
    for package, names in re.findall(r"^ *from (tests[\w.]*) import ([\w, ]+)", text, flags=re.M):
        folder = ROOT / package.replace(".", "/")
        for path in [folder.with_suffix(".py"), *(folder / f"{n}.py" for n in names.split(", "))]:
            if path.is_file() and path != module:
                text += text_of(path)
    return text


def reached_by_default():
    """Arguments that every run of a preset sets."""
    return preset_flags(get_preset("tiny")).keys()


@pytest.mark.parametrize("test", SUPPORTED)
def test_supported_flags_are_in_their_test(test):
    file, name = test.split("::")
    text = text_of(TESTS / file)
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), flags=re.M)
    words = set(re.findall(FLAG, text)) | set(re.findall(r"\w+", text))
    for flag in SUPPORTED[test].split():
        action = whole_parser()._option_string_actions[flag.split("=")[0]]
        names = {*action.option_strings, action.dest}
        assert names & words or action.dest in reached_by_default(), flag
        value = flag.partition("=")[2]
        assert not value or value in words, flag


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--rampup-batch-size 2 2 8", "Megatron ignores it. Give --step-batch-size-schedule"),
        ("--use-megatron-fsdp", "--use-megatron-fsdp is refused: it needs"),
        ("--use-torch-fsdp2", "is refused"),
        ("--optimizer muon", "--optimizer muon is refused: no test runs this optimizer"),
        ("--muon-momentum 0.5", "has no effect on a gpt-oss run: it is for --optimizer muon"),
        ("--cuda-graph-impl local", "CUDA graph"),
        ("--enable-cuda-graph", "CUDA graph"),
        ("--inprocess-restart", "nvidia-resiliency-ext"),
        ("--enable-ft-package", "nvidia-resiliency-ext"),
        ("--hybrid-context-parallel", "no test splits samples"),
        ("--moe-token-dispatcher-type flex", "DeepEP"),
        ("--moe-enable-deepep", "DeepEP"),
        ("--moe-router-load-balancing-type sinkhorn", "sinkhorn is refused"),
        ("--moe-router-load-balancing-type aux_loss sinkhorn", "aux_loss sinkhorn is refused"),
        ("--img-h=3", "--img-h 3 has no effect on a gpt-oss run: it is for vision models"),
        ("--yaml-cfg x.yaml", "Give --recipe FILE"),
        ("--use-checkpoint-args", "is refused"),
        ("--ckpt-format torch", "its files have no hashes"),
        ("--async-strategy nvrx", "no test runs nvidia-resiliency-ext"),
        ("--preset none --mtp-num-layers 1", "one token"),
    ],
)
def test_refused(flags, words):
    """One sentence; the flags of whoever is wrong stay refused when all others are let through."""
    argv = f"--preset tiny {NULL} {flags}".split()
    with pytest.raises(UsageError) as error:
        read(argv)
    assert words in str(error.value) and "\n" not in str(error.value)
    known_wrong = {"--rampup-batch-size", "--yaml-cfg", "--use-checkpoint-args"}
    argv.append("--allow-untested-flags")
    if known_wrong & set(argv):
        with pytest.raises(UsageError):
            read(argv)
    else:
        assert read(argv).untested


def test_what_a_run_has_anyway_is_not_refused():
    """A value that is the run's without the flag; a value of a list that is supported."""
    flags = "--optimizer adam --img-h 224 --moe-token-dispatcher-type alltoall --mtp-loss-scaling"
    flags = flags.replace("--mtp-loss-scaling", "--mtp-loss-scaling-factor 0.1")
    spec = read(f"--preset tiny {NULL} {flags} --moe-router-load-balancing-type aux_loss".split())
    assert spec.untested == () and spec.untested_line() is None
    assert [entry.status for entry in entries_of("--optimizer", "sgd")] == ["supported"]


# Flags that these pages name as what not to give, or as another program's.
NAMED_ONLY = {
    "--sft",
    "--rampup-batch-size",
    "--mtp-num-layers",
    "--hybrid-context-parallel",
    "--fine-grained-activation-offloading",
    "--cpu-offloading",
    "--fp4-format",
    "--profile",
    "--no-position-embedding",
    "--use-torch-fsdp2",
    "--use-megatron-fsdp",
    "--verify-integrity",
    "--spec",
    "--log-device-memory-used",
    "--async-strategy",
    "--use-persistent-ckpt-worker",
}


def test_flags_of_docs_recipes_and_benchmarks_are_accepted():
    files = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/gpt_oss/**/*")]
    files += ROOT.glob("benchmarks/**/*.py")
    for file in files:
        if not file.is_file() or file.name in ("flags.md", "upstream_faults.md"):
            continue
        found = set(re.findall(FLAG, file.read_text(errors="replace"))) & megatron_flags()
        for flag in found - NAMED_ONLY:
            assert ledger()[flag].status == "supported" or any(
                name.startswith(f"{flag}=") and entry.status == "supported"
                for name, entry in ledger().items()
            ), f"{file.name}: {flag}"


def test_page():
    import flags_page

    assert flags_page.PAGE.read_text() == flags_page.page(), "tools/flags_page.py --write"


def test_names_of_other_projects():
    every = megatron_flags() | our_flags()
    for name, (flag, note) in FOREIGN_NAMES.items():
        assert flag is None or flag in every, name
        assert flag or note
        if "--" + name.replace("_", "-") in every:  # then it is understood, or the ledger says why
            assert name == "max_position_embeddings" or ledger()["--" + name.replace("_", "-")]


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--learning_rate", "Did you mean --lr?"),
        ("--trainer.max_steps=5", "Unknown flag --trainer.max_steps. Did you mean --train-iters?"),
        ("--per-device-train-batch-size", "Did you mean --micro-batch-size?"),
        ("--gradient_as_bucket_view", "There is no such flag: gradients always are views"),
        ("--num-nodes", "There is no such flag: torchrun's --nnodes sets it."),
        ("--constant_steps", "Did you mean --lr-wsd-decay-iters (--lr-decay-style WSD"),
        ("--limit_val_batches", "Did you mean --eval-iters"),
        ("trainer.max_steps=5", "'trainer.max_steps=5' is not a flag. Did you mean --train-iters?"),
        ("--seq-lenght", "Did you mean --seq-length?"),
    ],
)
def test_did_you_mean(flag, words):
    words_given = [flag] if "=" in flag else [flag, "5"]
    with pytest.raises(UsageError) as error:
        read(["--preset", "tiny", *words_given])
    assert words in str(error.value)
