# Copyright (c) 2026, the megatron-core gptoss authors.

"""--sft: packs of conversations, their loss weights, and runs in several layouts."""

from types import SimpleNamespace
from unittest import mock

import numpy
import pytest
import torch
import yaml

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.data.chat.harmony import USER_TURN
from megatron.gpt_oss.data.packing import best_fit
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.chat_dataset import ChatDataset, ChatDatasetConfig
from megatron.gpt_oss.training.metrics.jsonl import read_metrics
from tests.harness import runs
from tests.harness.conversations import random_conversations, write_conversations

pytestmark = pytest.mark.ranks(2)
LENGTH = 64


def test_best_fit():
    """Every item once, no pack over its capacity, few packs, and the same ones for a seed."""
    sizes = numpy.random.default_rng(0).integers(1, LENGTH // 2, 500)
    packs = best_fit(sizes, LENGTH, numpy.random.default_rng(1))
    assert sorted(item for pack in packs for item in pack) == list(range(500))
    filled = [int(sizes[pack].sum()) for pack in packs]
    assert max(filled) <= LENGTH and sum(filled) > 0.99 * LENGTH * (len(packs) - 1)
    assert packs == best_fit(sizes, LENGTH, numpy.random.default_rng(1))
    assert packs != best_fit(sizes, LENGTH, numpy.random.default_rng(2))


def open_dataset(prefix, num_samples=None, overlong="refuse", seed=3):
    dataset = IndexedDataset(str(prefix))
    config = ChatDatasetConfig(
        random_seed=seed,
        sequence_length=LENGTH,
        blend=([str(prefix)], None),
        split="1,0,0",
        tokenizer=SimpleNamespace(vocab_size=201_088, eod=0, pad=-1, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        inter_document_masking=True,
        overlong=overlong,
    )
    documents = numpy.arange(len(dataset), dtype=numpy.int32)
    return ChatDataset(dataset, str(prefix), documents, num_samples, Split.train, config)


def conversations_of(sample):
    """(tokens with the last label, loss weights of all but the first) of each packed conversation."""
    ends = sample["cu_seqlens"].unique().tolist()
    found = []
    for start, end in zip(ends, ends[1:]):
        assert sample["position_ids"][start:end].tolist() == list(range(end - start))
        ids = [*sample["tokens"][start:end].tolist(), int(sample["labels"][end - 1])]
        assert ids[1:] == sample["labels"][start:end].tolist()
        found.append((ids, sample["loss_mask"][start:end].tolist()))
    return found


def test_samples(tmp_path):
    """An epoch has every conversation once, entire, with its weights; the next differs."""
    written = random_conversations(50, LENGTH + 1, seed=1)
    prefix = write_conversations(tmp_path / "chat", written)
    dataset = open_dataset(prefix)
    found = [one for sample in dataset for one in conversations_of(sample)]
    # The padding at the end of a sample has no loss; every conversation has some.
    found = sorted((ids, weights) for ids, weights in found if any(weights))
    expected = sorted((ids.tolist(), weights[1:].tolist()) for ids, weights in written)
    assert found == expected
    for sample in dataset:
        assert sample["max_seqlen"] == sample["cu_seqlens"].diff().max() <= LENGTH
        assert sample["cu_seqlens"][-1] == LENGTH and len(sample["cu_seqlens"]) == LENGTH + 1
    epochs = open_dataset(prefix, num_samples=2 * len(dataset))
    assert len(epochs) == 2 * len(dataset) and epochs.fill == pytest.approx(dataset.fill, abs=0.05)
    first = [epochs[i]["tokens"].tolist() for i in range(len(dataset))]
    assert first == [sample["tokens"].tolist() for sample in dataset]
    assert first != [epochs[len(dataset) + i]["tokens"].tolist() for i in range(len(dataset))]
    assert not dataset[None]["loss_mask"].any()


def test_overlong(tmp_path):
    """Refused with the numbers, dropped, or cut before a user message with loss before it."""
    turn = [*USER_TURN, 5, 6, 7]
    long_ids, no_turn = turn * 20, list(range(9, 9 + LENGTH + 9))
    written = [
        (turn, [0, 0, 0, 1, 1]),
        (long_ids, [0, 0, 0, 1, 1] * 20),
        (no_turn, [1.0] * len(no_turn)),
    ]
    prefix = write_conversations(tmp_path / "chat", written)
    with pytest.raises(ValueError, match="has 2 conversations of more than 65 tokens.*100"):
        open_dataset(prefix)
    (sample,) = open_dataset(prefix, overlong="drop")
    assert conversations_of(sample)[0][0] == turn
    dataset = open_dataset(prefix, overlong="cut-at-turn")
    found = [ids for sample in dataset for ids, weights in conversations_of(sample) if any(weights)]
    # 13 turns are 65 tokens; the 14th user message would be too long.
    assert sorted(found, key=len) == [turn, turn * 13] and dataset.num_overlong == 2


@pytest.fixture(scope="module")
def blend(inputs, tmp_path_factory):
    """A data file with conversations, their validation set, and a pre-training corpus."""
    directory = tmp_path_factory.mktemp("blend")
    write_conversations(directory / "chat", random_conversations(60, LENGTH + 1, seed=2))
    write_conversations(directory / "chat.valid", random_conversations(20, LENGTH, seed=3))
    corpora = {
        "chat": {"path": str(directory / "chat"), "weight": 0.75},
        "replay": {"path": f"{inputs}/data", "weight": 0.25, "validation": f"{inputs}/data"},
    }
    file = directory / "chat.yaml"
    file.write_text(yaml.safe_dump({"corpora": corpora}))
    return file


FLAGS = (
    "--preset tiny --preset-layers 2 --seq-length 64 --global-batch-size 4 --lr 1e-3 "
    "--lr-warmup-iters 1 --monitor-interval 0 --distributed-timeout-minutes 1 --num-workers 0 "
    "--sft --eval-iters 2 --eval-interval 2 --save-interval 2"
)


def train(ranks, inputs, blend, run_dir, flags, world_size=1):
    """Records of the run, and the output and the evaluations of rank 0."""
    argv = f"{FLAGS} --load-hf {inputs}/hf --data-blend {blend} --run-dir {run_dir} {flags}".split()
    results = ranks.run(main_in_rank, argv, world_size=world_size, init_process_group=False)
    return read_metrics(run_dir / "metrics.jsonl"), *results[0]


def main_in_rank(argv):
    """What the run prints, and (sum of losses, number of tokens) of each evaluated micro-batch."""
    from megatron.gpt_oss.training import forward_step

    reports, loss_func = [], forward_step.loss_func

    def recorded(*args, **options):
        result = loss_func(*args, **options)
        if not torch.is_grad_enabled():
            reports.append(result[2]["lm loss"].tolist())
        return result

    with mock.patch.object(forward_step, "loss_func", recorded):
        return runs.main_in_rank(argv), reports


@pytest.fixture(scope="module")
def one_rank(ranks, inputs, blend, tmp_path_factory):
    """Four steps on one rank; see `train`."""
    return train(ranks, inputs, blend, tmp_path_factory.mktemp("one") / "run", "--train-iters 4")


def validation(records):
    return [(record["set"], record["valid_loss"]) for record in records if "valid_loss" in record]


def numbers(records):
    """Losses and gradient norms of the steps, and validation losses."""
    found = [(record["loss"], record["grad_norm"]) for record in runs.steps(records).values()]
    return torch.tensor([*sum(found, ()), *(loss for _, loss in validation(records))])


def test_run(one_rank):
    """The corpora are described, and each has a validation loss per token of its whole set."""
    records, printed, reports = one_rank
    assert "data chat: 7" in printed and "60 conversations" in printed and "% padding" in printed
    assert len(runs.steps(records)) == 4
    (chat, found), (replay, _) = validation(records)[:2]
    assert "chat" in chat and "replay" in replay
    losses, tokens = torch.tensor(reports[:8], dtype=torch.float64).sum(0)  # 2 x 4 micro-batches
    assert found == pytest.approx(float(losses / tokens), rel=1e-6)


def test_resume(ranks, inputs, blend, one_rank, tmp_path):
    """Two steps and two more are the four of one start, bit for bit."""
    for steps in (2, 4):
        flags = f"--train-iters {steps} --lr-decay-iters 4"
        records, *_ = train(ranks, inputs, blend, tmp_path / "run", flags)
    losses = [record["loss"] for record in runs.steps(records).values()]
    assert losses == [record["loss"] for record in runs.steps(one_rank[0]).values()]


@pytest.mark.parametrize("flags", ["", "--context-parallel-size 2"], ids=["dp2", "cp2"])
def test_two_ranks_equal_one(ranks, inputs, blend, one_rank, tmp_path, flags):
    """The loss is per token of the global batch, however unequally the tokens are spread."""
    records, *_ = train(ranks, inputs, blend, tmp_path / "run", f"--train-iters 4 {flags}", 2)
    torch.testing.assert_close(numbers(records), numbers(one_rank[0]), rtol=1e-6, atol=0)


def test_refused(inputs, blend):
    """Conversations without --sft, --sft without conversations, and flags that contradict it."""
    base = f"--preset tiny --preset-layers 2 --load-hf {inputs}/hf --seq-length 64"
    for flags, words in (
        (f"--data-blend {blend}", "holds conversations with loss weights, which only --sft uses"),
        (f"--sft --data-path {inputs}/data", "--sft without conversations"),
        ("--sft --mock-data", "--sft and --mock-data both specify data"),
        (f"--sft-overlong drop --data-path {inputs}/data", "--sft-overlong drop is for"),
        (f"--sft --data-blend {blend} --micro-batch-size 2", "--micro-batch-size 2 with"),
    ):
        with pytest.raises(UsageError) as error:
            read(f"{base} {flags}".split())
        assert words in str(error.value)
    args = read(f"{base} --sft --data-blend {blend}".split()).args
    assert args.dataloader_inter_document_masking and args.calculate_per_token_loss
