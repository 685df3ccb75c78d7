# Copyright (c) 2026, the megatron-core gptoss authors.

"""run.json: a second start detects changes, and continues, reports them in one line, or refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.errors import RunError, UsageError
from megatron.gpt_oss.presets import architecture_flags, get_preset
from megatron.gpt_oss.training import resume_rules, run_record
from tests.harness import commands, runs
from tests.unit_tests.gpt_oss.training.test_run_lock import HOLD, ROOT

pytestmark = pytest.mark.ranks(1)

SAVED = "--train-iters 2 --eval-interval 100 --save-interval 2"
LONGER = SAVED.replace("--train-iters 2", "--train-iters 3")


@pytest.fixture(scope="module")
def first(ranks, inputs, tmp_path_factory):
    """The directory of a run of two steps."""
    folder = tmp_path_factory.mktemp("first") / "run"
    runs.start(ranks, inputs, folder, SAVED)
    return folder


@pytest.fixture
def run_dir(first, tmp_path):
    return shutil.copytree(first, tmp_path / "run")


def start(ranks, inputs, run_dir, flags, words=None):
    """What the second start prints for people."""
    argv = words or runs.command(inputs, run_dir, f"{LONGER} {flags}")
    printed, error = ranks.run(output_or_error, argv, world_size=1, init_process_group=False)[0]
    if error:
        raise UsageError(error)
    return printed


def output_or_error(argv):
    """(output of a run, '') or ('', its error message), so that the rank can be reused."""
    try:
        return runs.main_in_rank(argv), ""
    except (UsageError, RunError) as error:
        return "", str(error)


def record_of(run_dir):
    return json.loads((run_dir / "run.json").read_text())


def test_what_is_recorded(first, inputs):
    record = record_of(first)
    assert record["arguments"]["lr"] == 1e-3 and record["arguments"]["num_layers"] == 2
    assert record["arguments"]["data_path"] == [f"{inputs}/data"]
    data = record["data"][f"{inputs}/data"]
    assert data["bin_bytes"] == (inputs / "data.bin").stat().st_size and data["idx_sha256"]
    assert record["tokenizer"]["sha256"] and record["weights"]["sha256"]["config.json"]
    assert record["command"][:2] == ["--preset", "tiny"] and record["changes"] == []
    assert not (first / "arguments.json").exists()
    assert not (first / "run.lock.json").exists()


def test_goes_on(ranks, inputs, run_dir):
    """One start after the other, each with what the one before it had, and more."""
    flags, changes = "", []
    for step, (more, line) in enumerate(
        [
            ("", None),
            (
                "--micro-batch-size 2 --recompute-granularity full --recompute-method uniform "
                "--recompute-num-layers 1 --log-throughput",
                None,
            ),
            ("--seed 5", "--seed was 1234 and is 5: the data is shuffled differently"),
            (
                "--split 80,20,0",
                "--split was 90,10,0 and is 80,20,0: the training documents differ",
            ),
            (
                "--clip-grad 0.5 --moe-z-loss-coeff 0.1",
                "--clip-grad was 1.0 and is 0.5; --moe-z-loss-coeff was not given and is 0.1",
            ),
            ("", None),
        ],
        start=2,
    ):
        flags = f"{flags} {more}"
        printed = start(ranks, inputs, run_dir, f"{flags} --train-iters {step + 1}")
        assert f"resumed at step {step}" in printed and f"step {step + 1}/{step + 1}" in printed
        lines = [text for text in printed.splitlines() if text.startswith("changed since")]
        assert len(lines) == (line is not None), lines
        # Once: the next start compares with this one. And only what is new.
        assert line is None or lines[0].partition(": ")[2].startswith(line)
        found = record_of(run_dir)["changes"]
        assert found[: len(changes)] == changes and len(found) == len(changes) + len(lines)
        assert all(item["step"] == step for item in found[len(changes) :])
        changes = found


def test_a_finished_run_keeps_its_checkpoint(ranks, inputs, run_dir):
    """Writing it again would lose it if the run is killed meanwhile."""
    start(ranks, inputs, run_dir, "")
    written = {path: path.stat() for path in (run_dir / "checkpoints").rglob("*")}
    assert run_dir / "checkpoints" / "iter_0000003" in written
    assert "resumed at step 3" in start(ranks, inputs, run_dir, "")
    again = {path: path.stat() for path in (run_dir / "checkpoints").rglob("*")}
    assert again.keys() == written.keys()
    assert all(again[path].st_mtime_ns == info.st_mtime_ns for path, info in written.items())


@pytest.mark.parametrize("flags", ["--seq-length 32", "--global-batch-size 2", "--lr 5e-4"])
def test_told_by_the_loader_alone(ranks, inputs, run_dir, flags):
    """Each once: `run_position` says it with what the learning rate becomes."""
    printed = start(ranks, inputs, run_dir, flags)
    assert "changed since" not in printed and "in the checkpoint" in printed


def test_refused(ranks, inputs, run_dir):
    before = {path: path.read_bytes() for path in run_dir.rglob("*.json")}
    for flags, message in (
        (
            "--yarn-factor 64",
            r"--yarn-factor was not given and is 64.* \(rotary_scaling_factor was",
        ),
        ("--freeze *.router.*", r"--freeze was not given and is \*.router.\*: .* other parameters"),
        (
            "--optimizer sgd",
            "--optimizer was adam and is sgd: .* a different optimizer.*--no-load-optim",
        ),
    ):
        with pytest.raises(Exception, match=message):
            start(ranks, inputs, run_dir, flags)
        assert {path: path.read_bytes() for path in run_dir.rglob("*.json")} == before
    assert "step 3/3" in start(ranks, inputs, run_dir, "")


def test_other_layers_of_a_preset(ranks, inputs, run_dir):
    argv = runs.command(inputs, run_dir, LONGER)
    argv[argv.index("--preset-layers") + 1] = "3"
    index = argv.index("--load-hf")
    argv[index] = "--tokenizer-model"
    with pytest.raises(Exception, match="--preset-layers was 2 and is 3.*hold a different model"):
        start(ranks, inputs, run_dir, "", argv)


def test_frozen_with_fresh_optimizer_state(ranks, inputs, run_dir):
    printed = start(ranks, inputs, run_dir, "--freeze *.router.* --no-load-optim")
    assert "step 3/3" in printed and "--freeze was not given and is *.router.*" in printed


def copied(inputs, tmp_path, *names):
    folder = tmp_path / "copied"
    folder.mkdir(exist_ok=True)
    for name in names:
        source = inputs / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def words(inputs, run_dir, **changes):
    argv = runs.command(inputs, run_dir, LONGER)
    for flag, value in changes.items():
        argv[argv.index("--" + flag.replace("_", "-")) + 1] = str(value)
    return argv


def test_data_that_moved(ranks, inputs, run_dir, tmp_path):
    folder = copied(inputs, tmp_path, "data.bin", "data.idx")
    printed = start(ranks, inputs, run_dir, "", words(inputs, run_dir, data_path=folder / "data"))
    assert "step 3/3" in printed and "changed since" not in printed


def other_data(inputs, prefix):
    from megatron.gpt_oss.data.tokenize.files import tokenize_files
    from megatron.gpt_oss.data.tokenizer_files import load_text_tokenizer

    files = sorted(str(path) for path in Path(__file__).parents[1].rglob("test_*.py"))
    tokenize_files(files[-12:], str(prefix), load_text_tokenizer(inputs / "hf"))


def test_other_data(ranks, inputs, run_dir, tmp_path):
    other_data(inputs, tmp_path / "other")
    printed = start(
        ranks, inputs, run_dir, "", words(inputs, run_dir, data_path=tmp_path / "other")
    )
    assert "--data-path was" in printed and "the run skips as many samples" in printed


def test_a_relative_path_of_another_directory():
    """The same word names other data there."""
    records = []
    for directory in ("/a", "/b"):
        entry = {"path": f"{directory}/data", "idx_sha256": directory}
        record = {"arguments": {"data_path": ["data"]}, "data": {"data": entry}}
        records.append({**record, "tokenizer": None, "weights": None})
    assert run_record.compare_records(*records) == {"data_path": (["/a/data"], ["/b/data"])}
    assert run_record.compare_records(records[0], records[0]) == {}
    assert run_record.compare_records({**records[0], "data": {}}, records[1]) == {}  # not recorded


def test_other_data_under_the_same_name(ranks, inputs, tmp_path):
    folder = copied(inputs, tmp_path, "data.bin", "data.idx")
    argv = words(inputs, tmp_path / "run", data_path=folder / "data", train_iters=2)
    start(ranks, inputs, tmp_path / "run", "", argv)
    for name in ("data.bin", "data.idx"):
        (folder / name).unlink()
    other_data(inputs, folder / "data")
    argv = words(inputs, tmp_path / "run", data_path=folder / "data")
    with pytest.raises(Exception, match="data.idx changed since this run was last started"):
        start(ranks, inputs, tmp_path / "run", "", argv)


def test_other_tokenizer_or_weights(ranks, inputs, run_dir, tmp_path):
    folder = copied(inputs, tmp_path, "hf")
    argv = words(inputs, run_dir, load_hf=folder / "hf")
    assert "changed since" not in start(ranks, inputs, run_dir, "", argv)
    config = folder / "hf" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(Exception, match="has different weights from .* Drop --load-hf"):
        start(ranks, inputs, run_dir, "", argv)
    tokenizer = folder / "hf" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"model"', ' "model"', 1))
    with pytest.raises(Exception, match="differs from .* token ids would change"):
        start(ranks, inputs, run_dir, "", argv)


def test_another_eos_token(ranks, inputs, run_dir, tmp_path):
    """Told in one line; a record of a version without the token is not compared."""
    folder = copied(inputs, tmp_path, "hf")
    argv = words(inputs, run_dir, load_hf=folder / "hf")
    config = folder / "hf" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"chat_template": "other"}))
    assert "changed since" not in start(ranks, inputs, run_dir, "", argv)
    config.write_text(json.dumps(settings | {"eos_token": "<|return|>"}))
    printed = start(ranks, inputs, run_dir, "", argv)
    assert f"was with eos_token {settings['eos_token']} and is with eos_token <|return|>" in printed
    record = record_of(run_dir)
    del record["tokenizer"]["eos_token"]
    config.write_text(json.dumps(settings))
    now = record["tokenizer"] | {"eos_token": "any"}
    assert not run_record.compare_records(record, record | {"tokenizer": now})


@pytest.mark.parametrize("text", [None, "", '{"made_by": "pretrain', "[]"])
def test_damaged_record_stops_no_resume(ranks, inputs, run_dir, text):
    record = run_dir / "run.json"
    record.unlink()
    if text is not None:
        record.write_text(text.replace('{"', '{\n "') if text != "[]" else '{\n "made_by"')
    assert "step 3/3" in start(ranks, inputs, run_dir, "--seed 5")
    assert record_of(run_dir)["arguments"]["seed"] == 5


def test_record_of_an_older_version(ranks, inputs, run_dir):
    arguments = record_of(run_dir)["arguments"]
    (run_dir / "run.json").unlink()
    (run_dir / "arguments.json").write_text(json.dumps(arguments))
    with pytest.raises(Exception, match="--freeze was not given"):
        start(ranks, inputs, run_dir, "--freeze *.router.*")
    printed = start(ranks, inputs, run_dir, "--seed 5")
    assert "--seed was 1234 and is 5" in printed and "--data-path" not in printed


def test_somebody_elses_run_json(ranks, inputs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"mine": 1}')
    with pytest.raises(
        Exception, match="run.json exists, but pretrain_gpt_oss.py did not create it"
    ):
        start(ranks, inputs, tmp_path / "run", "")
    assert (tmp_path / "run" / "run.json").read_text() == '{"mine": 1}'


def test_save_over_another_run(ranks, inputs, first, run_dir):
    """--save without --load, from elsewhere, or --finetune a second time."""
    checkpoints = run_dir / "checkpoints"
    before = sorted(path.name for path in checkpoints.rglob("*"))
    argv = runs.command(inputs, run_dir, LONGER)
    where = argv.index("--run-dir")
    for other in ("", f"--load {first}/checkpoints", f"--load {checkpoints} --finetune"):
        argv[where : where + 2] = ["--save", str(checkpoints)]
        with pytest.raises(
            Exception, match="holds checkpoints that this run would not resume from"
        ):
            start(ranks, inputs, run_dir, "", [*argv, *other.split()])
    assert sorted(path.name for path in checkpoints.rglob("*") if "run." not in path.name) == before
    printed = start(ranks, inputs, run_dir, "", [*argv, "--load", str(checkpoints), "--seed", "5"])
    assert "resumed at step 2" in printed and "--seed was 1234" in printed
    assert (checkpoints / "run.json").is_file()


def test_folder_in_use(ranks, inputs, tmp_path, monkeypatch):
    """Nothing is made there; a run that fails gives the directory back."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with commands.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Exception, match="is in use by another run"):
            start(ranks, inputs, tmp_path, "")
        # Without what is being renamed: the holder counts up at the same time.
        names = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".new")
        assert names == ["run.lock", "run.lock.json"]
        holder.kill()
    with pytest.raises(Exception, match="--lr-warmup-iters 1 leaves none"):
        start(ranks, inputs, tmp_path, "--train-iters 1")
    assert not (tmp_path / "run.lock.json").exists()
    assert "step 2/2" in start(ranks, inputs, tmp_path, "--train-iters 2")


def test_classes():
    """Every name is an argument, in one class; what makes a preset's model is refused."""
    names = set(read("--preset tiny --mock-data --dry-run".split()).names)
    classes = (resume_rules.FREE, resume_rules.AT_LOAD, resume_rules.MODEL, resume_rules.OPTIMIZER)
    assert sum(map(len, classes)) == len(frozenset.union(*classes))
    assert frozenset.union(*classes) <= names, frozenset.union(*classes) - names
    model = set(architecture_flags(get_preset("tiny")))
    assert model - {"max_position_embeddings", "softmax_type"} <= resume_rules.MODEL | {
        name for name in model if name not in names
    }, model - resume_rules.MODEL


@pytest.mark.parametrize(
    "balancing, told",
    [
        ("aux_loss", True),
        (["aux_loss", "seq_aux_loss"], True),
        ("seq_aux_loss", False),
        ("none", False),
    ],
)
def test_micro_batch_size(balancing, told):
    """It changes the numbers only with a loss over the tokens of a micro-batch."""
    both = {"moe_router_load_balancing_type": balancing}
    changes = resume_rules.check_changes(
        both | {"micro_batch_size": 1}, both | {"micro_batch_size": 2}
    )
    assert changes == ({"micro_batch_size": (1, 2)} if told else {})
    assert not told or "tokens of a micro-batch" in resume_rules.changes_line(changes)


def test_every_model_argument_is_refused():
    for name in resume_rules.MODEL:
        with pytest.raises(UsageError, match="hold a different model"):
            resume_rules.check_changes({name: 1}, {name: 2})
    assert resume_rules.check_changes({"unheard_of": 1}, {"unheard_of": 2}) == {
        "unheard_of": (1, 2)
    }
    assert resume_rules.check_changes({"gone": 1}, {"new": 2}) == {}
