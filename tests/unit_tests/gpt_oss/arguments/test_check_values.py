# Copyright (c) 2026, the megatron-core gptoss authors.

"""Invalid values are rejected with flag and value, before anything is created."""

import os
from argparse import Namespace

import pytest

from megatron.gpt_oss import cli
from megatron.gpt_oss.arguments import check_values, parse
from megatron.gpt_oss.arguments.recipe import read_recipe
from megatron.gpt_oss.arguments.validate_data import read_prefixes
from megatron.gpt_oss.data.blend import read_blend
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import read_json
from tests.harness.parser import whole_parser

# What is refused, by what the message expects; an argument is one word after --flag=.
BAD = {
    "finite number": "--lr=nan --lr=inf --min-lr=nan --clip-grad=nan --moe-z-loss-coeff=nan "
    "--initial-loss-scale=nan --mid-level-dataset-surplus=nan --init-method-std=inf "
    "--sample-temperature=nan --yarn-factor=inf --weight-decay=nan",
    "0 or more": "--lr=-1e-3 --clip-grad=-1 --weight-decay=-5 --eval-iters=-3 --exit-interval=-1 "
    "--exit-duration-in-mins=-5 --lr-warmup-iters=-3 --start-eval-at-iter=-4 "
    "--manual-gc-interval=-1 --keep-checkpoints=-1 --sample-temperature=-3 --moe-aux-loss-coeff=-1 "
    "--tensorboard-queue-size=-5 --logging-level=-99 --monitor-interval=-1 --ckpt-step=-1",
    "1 or more": "--seq-length=0 --seq-length=-64 --log-interval=0 --log-interval=-3 "
    "--eval-interval=0 --eval-interval=-3 --save-interval=0 --tensor-model-parallel-size=0 "
    "--pipeline-model-parallel-size=-1 --context-parallel-size=-2 --micro-batch-size=0 "
    "--global-batch-size=-2 --lr-decay-iters=0 --iterations-to-skip=-1 --log-memory-interval=0 "
    "--mlp-chunks-for-training=0 --make-vocab-size-divisible-by=0 --ddp-bucket-size=0 "
    "--tensorboard-log-interval=0 --save-retain-interval=0 --eval-global-batch-size=0 "
    "--recompute-num-layers=0 --sample-tokens=0",
    "more than 0": "--adam-eps=0 --adam-eps=-1 --yarn-factor=0",
    "below 1": "--adam-beta2=1.0 --adam-beta1=-0.5 --attention-dropout=2 --hidden-dropout=-1 "
    "--sgd-momentum=-1",
    "0 to 1": "--optimizer-offload-fraction=7",
    "0 to 1024": "--num-workers=-1 --num-workers=100000",
    "1 to 1024": "--dist-ckpt-workers=0 --num-dataset-builder-threads=0",
    "1 to 1000000": "--distributed-timeout-minutes=0 --distributed-timeout-minutes=99999999999999",
    "0 to 4294967295": "--seed=-1 --seed=99999999999999999999999",
    "0 to 10^8": "--train-iters=-4 --train-iters=99999999999999999999",
    "smaller number": "--lm-loss-chunk-size=99999999999999999999",
    "training, validation and test": "--split=-1,2,3 --split=a,b,c --split=0,0,0 --split=nan,1,1 "
    "--split=1,1,1,1 --split=1;2;3",
    "is empty": "--run-dir= --load-hf= --data-path= --tokenizer-model= --data-cache-path= --recipe= "
    "--data-blend= --split= --freeze=",
}
GOOD = (
    "--lr=0 --lr=1e-30 --seed=0 --eval-iters=0 --exit-interval=0 --train-iters=100000 "
    "--clip-grad=0 --num-workers=0 --split=1 --split=98,1,1 --split=.5,.5 --split=1,0,0 "
    "--adam-beta1=0 --hidden-dropout=0 --sample-prompt= --moe-aux-loss-coeff=0"
)
CASES = [(word, expected) for expected, words in BAD.items() for word in words.split()]


def _check(*words: str) -> None:
    parser = whole_parser()
    check_values.check_values(parse._explicit(parser, words), parser)


@pytest.mark.parametrize("word, expected", CASES, ids=lambda text: text.replace("/", " "))
def test_bad_value(word, expected):
    with pytest.raises(UsageError) as error:
        _check(word)
    flag, value = word.split("=")
    message = str(error.value)
    assert message.startswith(flag) and expected in message and "\n" not in message
    number = value.lstrip("-").replace(".", "")
    assert not number.isdigit() or value in message


@pytest.mark.parametrize("word", GOOD.split())
def test_good_value(word):
    _check(word)


def test_every_range_is_of_a_flag():
    """A name that the parser does not have would check nothing."""
    known = {action.dest for action in whole_parser()._actions}
    assert set(check_values._RANGE_OF) <= known


def test_negative_number_is_a_value():
    """argparse takes -1e-3 for a flag, and misses the value of the flag before it."""
    with pytest.raises(UsageError, match=r"^--lr -0.001: expected 0 or more"):
        parse.read("--preset tiny --lr -1e-3".split())


@pytest.mark.parametrize(
    "argv, words",
    [
        ("sample DIR --temperature nan", "--temperature: nan: expected a finite number"),
        ("sample DIR --temperature -1", "--temperature: -1: expected 0 or more"),
        ("sample DIR --temperature x", "'x' is not a number; expected 0 or more"),
        ("sample DIR --max-new-tokens 0", "--max-new-tokens: 0: expected 1 or more"),
        ("sample DIR --prompt a\udcff", "'a\\udcff' is not UTF-8"),
        ("sample DIR --seed 99999999999999999999", "expected 0 to 4294967295"),
        ("sample ", "'' is not a path"),
        ("init-tiny DIR --seed -1", "--seed: -1: expected 0 to 4294967295"),
        ("init-tiny ", "'' is not a path"),
        ("convert to-hf --load DIR --out ", "--out: '' is not a path"),
        ("convert to-hf --load  --out DIR", "--load: '' is not a path"),
        ("convert to-hf --load DIR --out DIR --yarn-factor inf", "expected a finite number"),
        ("convert to-hf --load DIR --out DIR --vocab-size 0", "--vocab-size: 0: expected 1"),
        ("convert to-megatron --hf DIR --out DIR --tp 0", "--tp: 0: expected 1 or more"),
        ("convert to-megatron --hf DIR --out ", "--out: '' is not a path"),
        ("verify --hf DIR --load DIR --num-tokens 0", "--num-tokens: 0: expected 1 or more"),
        ("verify-data ", "PREFIX: '' is not a path"),
        ("tokenize DIR --output DIR --tokenizer ", "--tokenizer: '' is not a path"),
        ("tokenize DIR --output DIR --workers 1000000", "--workers: 1000000: expected 1 to 1024"),
        ("tokenize DIR --output DIR --workers 0", "--workers: 0: expected 1 to 1024"),
        ("tokenize DIR --output DIR --split-at ", "--split-at: is empty"),
        ("tokenize DIR --output DIR --end-token ", "--end-token: is empty"),
        ("tokenize DIR --output DIR --end-token <eos>", "--end-token <eos> without --tokenizer"),
        ("tokenize . --output DIR --split-at " + "9" * 40, "invalid length '999"),
        ("plan --preset 20b --gpus 8 --gpu-memory nan", "--gpu-memory nan: expected more than 0"),
        ("plan --preset 20b --gpus 8 --seq-length 99999999999999", "at most 1,000,000,000"),
        ("plan --preset 20b --gpus 8 --foo", "Unrecognized arguments: --foo. `gptoss --help`"),
        ("huge", "invalid choice: 'huge'"),
    ],
)
def test_commands(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv.split(" "))
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.startswith("error: ") and words in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        ("0.5", "0.5 is a weight, and 1 words are not pairs"),
        ("0.5 a 0.5", "0.5 is a weight, and 3 words are not pairs"),
        ("0.5 a b c", "b is not a weight"),
        ("... a 1 b", "... is not a weight"),
        ("1e400 a 1 b", "1e400 is not a weight"),
        ("nan a 1 b", "nan is not a weight"),
        ("0.5 a -1 b", "-1 is not a weight"),
    ],
)
def test_bad_weights_of_a_blend(words, message):
    with pytest.raises(UsageError) as error:
        read_prefixes(words.split())
    assert str(error.value).startswith("--data-path") and message in str(error.value)


@pytest.mark.parametrize(
    "words, prefixes", [("a", "a"), ("a b", "a b"), ("a b c", "a b c"), ("1 a 0 b 2e-1 c", "a c")]
)
def test_prefixes_of_a_blend(words, prefixes):
    assert read_prefixes(words.split()) == prefixes.split()


@pytest.mark.parametrize("read", [read_recipe, read_blend, read_json], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "make, words",
    [
        (os.mkfifo, "named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "larger than 16 MB"),
        (lambda path: path.touch() or os.truncate(path, 2**40), "larger than 16 MB"),
        (os.mkdir, "Is a directory"),
    ],
    ids=["pipe", "device", "sparse", "directory"],
)
def test_file_of_settings(tmp_path, read, make, words):
    """A pipe or a device in place of a file neither blocks nor is read without end."""
    make(tmp_path / "file")
    with pytest.raises(UsageError) as error:
        read(tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value) and words in str(error.value)


def test_defaults_are_not_refused():
    parser = whole_parser()
    defaults = {action.dest: parser.get_default(action.dest) for action in parser._actions}
    check_values.check_values(Namespace(**defaults), parser)
