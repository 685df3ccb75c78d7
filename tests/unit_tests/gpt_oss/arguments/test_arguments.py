# Copyright (c) 2026, the megatron-core gptoss authors.

"""The command line: overrides, contradictions, missing files; one sentence and exit code 2."""

import argparse
import os
import sys

import numpy
import pytest

from megatron.gpt_oss.arguments import parse as arguments
from megatron.gpt_oss.arguments.megatron_validation import validate
from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.data.indexed_dataset import write_index
from megatron.gpt_oss.diagnostics.random_checkpoint import write_tiny_hf
from megatron.gpt_oss.errors import PresetError, UsageError, exit_with
from megatron.gpt_oss.planner.dry_run import validated
from megatron.gpt_oss.presets import PRESETS
from megatron.training import arguments as megatron_arguments
from tests.harness import commands


@pytest.fixture(scope="module")
def tiny_hf(tmp_path_factory):
    return write_tiny_hf(tmp_path_factory.mktemp("hf") / "tiny")


NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "256"]


def _check(*argv):
    return arguments.read([*map(str, argv), *NULL])


def _parse(*argv):
    """Checked and parsed, not validated."""
    return arguments.read([*argv, *NULL]).args


def test_preset_supplies_defaults_and_flags_override_them():
    args = _parse("--preset", "tiny")
    assert (args.num_layers, args.seq_length, args.hidden_dropout) == (4, 512, 0.0)
    argv = "--preset tiny --seq-length 256 --hidden-dropout 0.5 --moe-router-dtype fp64".split()
    args = _parse(*argv)
    assert (args.seq_length, args.hidden_dropout, args.moe_router_dtype) == (256, 0.5, "fp64")
    assert args.moe_token_dispatcher_type == "alltoall"


@pytest.mark.parametrize(
    "flags, grouped",
    [
        ("--preset tiny", True),
        ("--preset tiny --no-moe-grouped-gemm", False),
        ("--preset tiny --transformer-impl transformer_engine", True),
        ("--preset tiny --transformer-impl transformer_engine --no-moe-grouped-gemm", False),
    ],
)
def test_grouped_experts(flags, grouped):
    """On by default, in plain PyTorch and on TransformerEngine, with a way back."""
    assert _parse(*flags.split()).moe_grouped_gemm is grouped


def test_same_value_as_the_preset_is_no_contradiction():
    argv = "--preset 20b --num-layers 24 --window-size 127,0 --quick-geglu --norm-epsilon 1e-5"
    assert _parse(*argv.split()).num_layers == 24


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num-layers 12", ["--num-layers 12", "20b", "num_layers = 24", "--preset-layers 12"]),
        ("--hidden-size 4096", ["--hidden-size 4096", "hidden_size = 2880", "--preset none"]),
        ("--swiglu", ["--swiglu", "20b", "swiglu = False"]),
        ("--disable-bias-linear", ["--disable-bias-linear", "add_bias_linear = True"]),
        ("--window-size 128,0", ["--window-size 128,0", "(127, 0)"]),
        ("--rotary-base 10000", ["--rotary-base 10000", "150000"]),
        ("--rope-type yarn", ["--rope-type yarn", "--position-embedding-type yarn"]),
        ("--moe-router-topk 2", ["--moe-router-topk 2", "moe_router_topk = 4"]),
        ("--padded-vocab-size 201216", ["--padded-vocab-size 201216", "201088"]),
    ],
)
def test_contradiction(flags, words):
    with pytest.raises(PresetError) as error:
        arguments.read(["--preset", "20b", *flags.split()])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_depth_of_the_same_shape():
    args = _parse("--preset", "120b", "--preset-layers", "2")
    assert (args.num_layers, args.num_experts) == (2, 128)
    with pytest.raises(PresetError, match="num_layers = 2"):
        _check(*"--preset 120b --preset-layers 2 --num-layers 4".split())


def test_no_preset():
    args = _parse("--preset", "none", "--num-layers", "3", "--swiglu")
    assert (args.num_layers, args.swiglu, args.num_experts) == (3, True, None)
    with pytest.raises(PresetError, match="--num-layers"):
        arguments.read(["--preset", "none", "--preset-layers", "3"])
    for argv, word in (([], "No --preset"), (["--preset", "21b"], "'21b'")):
        with pytest.raises(PresetError) as error:
            arguments.read(argv)
        assert all(name in str(error.value) for name in (word, *PRESETS))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--preset", "tiny", "--seq-lenght", "5"], ["--seq-lenght", "--seq-length"]),
        (["--preset", "tiny", "stray"], ["'stray'"]),
        (["--preset", "tiny", "--seq-length", "many"], ["--seq-length", "many"]),
        (["--preset", "tiny", "--ckpt-format", "zip"], ["--ckpt-format", "zip", "torch_dist"]),
    ],
)
def test_mistyped_flags(argv, words):
    """Upstream prints several hundred lines of usage."""
    with pytest.raises(UsageError) as error:
        arguments.read(argv)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_extra_flags_of_the_entry_script():
    def add(parser):
        parser.add_argument("--run-name", default="x")
        return parser

    argv = ["--preset", "tiny", "--run-name", "y", *NULL]
    assert arguments.read(argv, add).args.run_name == "y"
    with pytest.raises(UsageError, match="--run-name"):
        arguments.read(argv)


def test_missing_files(tmp_path, tiny_hf):
    present = tmp_path / "data"
    for name in ("data", "damaged"):
        (tmp_path / f"{name}.bin").write_bytes(bytes(8))
        with open(tmp_path / f"{name}.idx", "wb") as stream:
            write_index(stream, numpy.array([4]), "uint16")
    (tmp_path / "damaged.idx").write_bytes((tmp_path / "damaged.idx").read_bytes()[:-4])
    for name in ("half.bin", "split.0-8k.idx", "split.8k-up.idx"):
        (tmp_path / name).touch()
    (tmp_path / "data.yaml").write_text("corpora: {a: {path: data}}")
    check = lambda *argv: _check("--preset", "tiny", *argv)
    check("--data-path", 0.5, present, "1e-2", present, 0, tmp_path / "gone")
    check("--data-blend", tmp_path / "data.yaml")
    for argv, words in (
        (("--data-path", 0.5, present, 1, tmp_path / "gone"), ("gone.bin", "gone.idx")),
        (
            ("--data-path", present, tmp_path / "damaged"),
            ("damaged.idx", "58 bytes", "--overwrite"),
        ),
        (
            ("--data-blend", tmp_path / "data.yaml", "--split", "9,1,0"),
            ("--split", "both specify data"),
        ),
        (("--data-path", tmp_path / "split"), ("split by length", "--data-blend")),
        (("--data-blend", tmp_path / "no.yaml"), ("--data-blend", "no.yaml")),
        (("--valid-data-path", tmp_path / "half"), ("--valid-data-path", "half.idx")),
        (("--data-path", f"{present}.bin"), ("without its extension", str(present))),
        (("--tokenizer-model", tmp_path / "no"), ("--tokenizer-model", "tokenizer.json")),
        (("--load-hf", tmp_path / "no"), ("no",)),
        (("--load-hf", tmp_path), ("config.json",)),
    ):
        with pytest.raises(UsageError) as error:
            check(*argv)
        assert all(word in str(error.value) for word in words), error.value
        assert "\n" not in str(error.value)
    check("--load-hf", tiny_hf, "--tokenizer-model", tiny_hf)
    with pytest.raises(UsageError, match="No tokenizer.*--tokenizer-model DIR"):
        arguments.read(["--preset", "tiny"])
    with pytest.raises(PresetError, match="num_layers = 4, the preset 2"):
        check("--load-hf", tiny_hf, "--preset-layers", 2)
    with pytest.raises(PresetError, match="a different model than --preset 20b"):
        arguments.read(["--preset", "20b", "--load-hf", str(tiny_hf)])


def test_tokenizer_comes_with_the_checkpoint(tiny_hf, tmp_path):
    argv = ["--preset", "tiny", "--load-hf", str(tiny_hf)]
    args = arguments.read(argv).args
    assert (args.tokenizer_type, args.tokenizer_model) == ("HuggingFaceTokenizer", str(tiny_hf))
    write_tiny_hf(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="tokenizer.json"):
        arguments.read(["--preset", "tiny", "--load-hf", str(tmp_path)])


def test_refusals_of_megatron_are_one_sentence():
    """Its asserts would end in a traceback; a bare one says nothing at all."""
    argv = ["--preset", "tiny", "--micro-batch-size", "1", "--tensor-model-parallel-size", "3"]
    argv += NULL
    before = list(sys.argv)
    with pytest.raises(UsageError, match="world size .1. is not divisible"):
        validate(arguments.read(argv))
    with pytest.raises(UsageError, match="args.min_lr <= args.lr .--min-lr is 0.1, --lr is"):
        validate(arguments.read(["--preset", "tiny", "--lr", "1e-3", "--min-lr", "0.1", *NULL]))
    assert sys.argv == before


def test_one_parser_reads_a_command_line_once(monkeypatch, tmp_path):
    """Recipes, a dry run and Megatron's validation included."""
    built, read_words = [], []
    build, parse = (
        megatron_arguments.add_megatron_arguments,
        argparse.ArgumentParser.parse_known_args,
    )

    def counted(parser):
        built.append(parser)
        return build(parser)

    def noted(self, args=None, namespace=None):
        read_words.append(tuple(args))
        return parse(self, args, namespace)

    monkeypatch.setattr(megatron_arguments, "add_megatron_arguments", counted)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", noted)
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "recipe.txt").write_text("--lr 1e-5")
    own = ["--preset", "tiny", "--recipe", str(tmp_path / "recipe.txt"), *NULL]
    spec = arguments.read([*own, "--dry-run", "1"])
    validated(spec, 1)
    assert len(built) == 1
    assert spec.words == ("--lr", "1e-5", *own, "--dry-run", "1") and spec.dry_run.ranks == 1
    assert spec.args.lr == spec.given.lr == 1e-5 and not hasattr(spec.given, "num_layers")
    assert read_words.count(spec.words) == 1  # next to each part of it, and () for the defaults
    assert sum(map(len, read_words)) == 2 * len(spec.words)
    # Nothing is left behind: another one in the same process, and no writer was opened.
    own += ["--tensorboard-dir", str(tmp_path / "tensorboard")]
    assert validated(arguments.read([*own, "--dry-run"]), 1).world_size == 1
    assert not (tmp_path / "tensorboard").exists()


def test_exit_code_and_rank(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        exit_with(UsageError("what"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: what\n"
    monkeypatch.setenv("RANK", "3")
    waits = []

    def sleep(seconds):
        assert capsys.readouterr().err == ""  # not before rank 0 could
        waits.append(seconds)

    monkeypatch.setattr("time.sleep", sleep)
    with pytest.raises(SystemExit):
        exit_with(UsageError("what"))
    assert sum(waits) >= 3  # torchrun ends this rank, too, when rank 0 leaves
    assert capsys.readouterr().err == "error: what\n"  # it did not: nobody else knows


SCRIPT = """
import sys, torch
from megatron.gpt_oss.arguments.megatron_validation import validate
from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.errors import run_main
def main():
    args = validate(read(sys.argv[1:]))
    print(args.num_layers, args.hidden_size, args.moe_router_topk)
run_main(main)
assert not torch.distributed.is_initialized()
"""


@pytest.mark.parametrize(
    "argv, code, out, err",
    [
        ("--preset tiny --micro-batch-size 1 --load-hf HF", 0, "4 128 4", ""),
        (
            "--preset tiny --micro-batch-size 1 --tokenizer-type NullTokenizer --vocab-size 300",
            2,
            "",
            "error: The tokenizer has 30",
        ),
        ("--preset huge", 2, "", "error: Unknown preset 'huge'"),
        (
            "--preset tiny --context-parallel-size 4 --seq-length 510 --tokenizer-model HF",
            2,
            "",
            "error: Sequence length 510 is not a multiple of 2 * context_parallel_size = 8. Give "
            "--seq-length 512.",
        ),
        ("--help-all", 0, "--tensor-model-parallel-size", ""),
    ],
)
def test_entry_script(tiny_hf, argv, code, out, err):
    argv = argv.replace("HF", str(tiny_hf))
    done = commands.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *argv.split(" ")],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert out in done.stdout and err in done.stderr
    if code == 2:
        assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
        assert "Traceback" not in done.stderr
    if argv == "--help-all":  # ours first
        at = [
            done.stdout.index(f"\n  {flag} ") for flag in ("--preset", "--load-hf", "--num-experts")
        ]
        assert at == sorted(at) and at[0] < 2000


def test_no_checkpoints():
    """--run-dir without checkpoints; a directory for them contradicts it."""
    words = "--preset tiny --tokenizer-type NullTokenizer --vocab-size 100 --run-dir run".split()
    assert read(words).args.save == "run/checkpoints"
    args = read([*words, "--no-checkpoints"]).args
    assert args.save is None and args.load is None
    with pytest.raises(UsageError, match="--no-checkpoints and --save x: drop one of them"):
        read([*words, "--no-checkpoints", "--save", "x"])
