# Copyright (c) 2026, the megatron-core gptoss authors.

"""A validation set for each corpus, through main() of the entry script."""

import json
import time

import pytest

from megatron.gpt_oss.data.byte_tokenizer import write_byte_tokenizer
from megatron.gpt_oss.data.tokenize.files import tokenize_files
from megatron.gpt_oss.data.tokenizer_files import load_text_tokenizer
from tests.harness.ranks import RankFailure

FLAGS = (
    "--preset tiny --preset-layers 2 --seq-length 32 --micro-batch-size 1 --global-batch-size 2 "
    "--lr 1e-3 --eval-interval 2 --eval-iters 3 --num-workers 0 --distributed-timeout-minutes 1"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two corpora with validation sets: of 9 sequences, and of less than one."""
    folder = tmp_path_factory.mktemp("validation")
    write_byte_tokenizer(folder)
    tokenizer = load_text_tokenizer(folder)
    for name, text, documents in (("a", "abc", 40), ("b", "xyz", 40), ("a.valid", "bca", 8)):
        (folder / f"{name}.txt").write_text(text * 11)
        texts = [json.dumps({"text": text * (3 + i % 17)}) for i in range(documents)]
        (folder / f"{name}.jsonl").write_text("\n".join(texts))
        tokenize_files([folder / f"{name}.jsonl"], folder / name, tokenizer)
    (folder / "b.valid.txt").write_text("zyxzy")
    tokenize_files([folder / "b.valid.txt"], folder / "b.valid", tokenizer)
    write_blend(folder / "both.yaml", a={"weight": 1}, b={"weight": 2}, gone={"weight": 0})
    for name in "ab":  # trained on both, evaluated on one
        others = {other: {"weight": 1 + (other == "b")} for other in "ab"}
        others["b" if name == "a" else "a"]["validation"] = False
        write_blend(folder / f"only-{name}.yaml", **others)
    return folder


def write_blend(file, **corpora):
    for name, corpus in corpora.items():
        corpus["path"] = name
    file.write_text(json.dumps({"corpora": corpora}))  # YAML, too


def train(argv):
    """Train in a rank."""
    from megatron.gpt_oss.training.pretrain import main
    from megatron.training import set_startup_timestamps, step_callbacks

    step_callbacks.clear()
    # Each rank must: an earlier run of this process set them, or the ranks do not agree on them.
    set_startup_timestamps(program_start=time.time(), main_entry=time.time())
    main(argv)


def run(ranks, folder, name, *flags, steps=4, world_size=1, data=None):
    """Train; [(step, set, loss)] of the evaluations."""
    out = folder / f"run-{name}"
    data = data or ["--data-blend", str(folder / f"{name.split('+')[0]}.yaml")]
    words = [*data, "--tokenizer-model", str(folder), "--run-dir", str(out)]
    words += ["--train-iters", str(steps), *flags]
    ranks.run(train, [*FLAGS, *words], world_size=world_size, init_process_group=False)
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["set"], r["valid_loss"]) for r in records if "valid_loss" in r]


@pytest.fixture(scope="module")
def both(ranks, folder):
    return run(ranks, folder, "both")


def test_each_corpus_has_its_loss(ranks, folder, both):
    """The losses of runs with one of the sets alone, at every step; a third corpus is not there."""
    assert [found[:2] for found in both] == [
        (step, f"validation {name}") for step in (2, 4) for name in "ab"
    ]
    for name in "ab":
        expected = run(ranks, folder, f"only-{name}")
        found = [entry for entry in both if entry[1] == f"validation {name}"]
        assert found == expected and len(found) == 2
    losses = [entry[2] for entry in both]
    assert losses[0] != losses[1]
    assert losses[2] < losses[0] and losses[3] < losses[1]


def test_last_step_is_evaluated_once(ranks, folder, both):
    """The last step is evaluated once at the end of a run, and once more by a second start."""
    assert [step for step, _, _ in run(ranks, folder, "only-a")] == [2, 4]
    found = run(ranks, folder, "only-a+odd", "--eval-interval", "3")
    assert [step for step, _, _ in found] == [3, 4]
    # Started again, it evaluates the last step again, on the same samples.
    assert run(ranks, folder, "only-a+odd", "--eval-interval", "3") == found


def test_losses_go_on_after_a_resume(ranks, folder, both):
    whole = run(ranks, folder, "both+resumed", "--save-interval", "2")
    assert whole == both
    checkpoints = folder / "run-both+resumed" / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    assert run(ranks, folder, "both+resumed", "--save-interval", "2") == both


@pytest.mark.parametrize(
    "flags",
    [
        "--context-parallel-size 2",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--preset-layers 4",
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ],
    ids=["cp2", "pp2-vpp2", "tp2"],
)
def test_layouts(ranks, folder, both, flags):
    """Sets belong to names, whatever ranks and stages there are."""
    found = run(ranks, folder, f"both+{flags.split()[0]}", *flags.split(), world_size=2)
    assert [entry[:2] for entry in found] == [entry[:2] for entry in both]
    if "preset-layers" not in flags:
        losses = [entry[2] for entry in both]
        assert [entry[2] for entry in found] == pytest.approx(losses, rel=0.05)
    assert found[3][2] < found[1][2]


def test_weight_0_of_a_data_path(ranks, folder):
    """Not checked and not opened; Megatron rejected such a weight without a message."""
    data = ["--data-path", "1", str(folder / "a"), "0", str(folder / "nowhere"), "--split", "1,0,0"]
    run(ranks, folder, "data-path", "--eval-iters", "0", data=data, steps=1)
    records = map(json.loads, (folder / "run-data-path" / "metrics.jsonl").read_text().splitlines())
    assert sum("loss" in record for record in records) == 1


def test_no_validation_set(ranks, folder):
    """Then nothing is evaluated; to ask for it was a TypeError at the first evaluation."""
    write_blend(folder / "none.yaml", a={"weight": 1, "validation": False})
    assert run(ranks, folder, "none", "--eval-iters", "0", steps=1) == []
    with pytest.raises(RankFailure, match="no validation set, and --eval-iters is 3. Give"):
        run(ranks, folder, "none", steps=1)
