# Copyright (c) 2026, the megatron-core gptoss authors.

"""benchmarks/training/whole_model.py: the flags of its cases, and the row of a run."""

import functools
from types import SimpleNamespace

import pytest

from benchmarks.training import whole_model
from megatron.gpt_oss.planner.layout import Layout, Recompute, loss_chunk_of
from megatron.gpt_oss.presets import get_preset


def value_of(flags, name):
    """The value of a size on a command line."""
    return int(flags[flags.index(f"--{name}") + 1])


@pytest.mark.parametrize("gpus", [4, 8])
def test_layouts_of_20b(gpus):
    """Full steps of 32,768 tokens a GPU, experts over all GPUs; a sequence over four and over all."""
    args = SimpleNamespace(
        preset="20b", gpus=gpus, steps=None, lr="1e-4", data="d", tokenizer="t", flags=[]
    )
    tokens = {}
    for case in whole_model.CASES:
        flags = whole_model.flags_of(case, args)
        value = functools.partial(value_of, flags)
        used = whole_model.gpus_of(case, args)
        assert value("expert-model-parallel-size") == used
        assert (
            value("global-batch-size")
            % (value("micro-batch-size") * used // value("context-parallel-size"))
            == 0
        )
        tokens[case.name] = value("global-batch-size") * value("seq-length") / used
    assert {tokens[name] for name in ("4k", "32k", "128k", "two-gpus")} == {32_768}
    assert get_preset("20b").num_experts % gpus == 0


def test_smaller_where_cards_are(monkeypatch):
    """Eight cards of 80 GB have no room for all that 4k and 32k keep on 141 GB."""

    def layout_of(flags, gpus):
        """Without Megatron's parser, which wants a process of its own."""
        value = functools.partial(value_of, flags)
        memory = flags[flags.index("--memory") + 1]
        return Layout(
            get_preset("20b"),
            gpus,
            ep=gpus,
            cp=value("context-parallel-size"),
            seq_length=value("seq-length"),
            micro_batch_size=value("micro-batch-size"),
            global_batch_size=value("global-batch-size"),
            recompute=Recompute.from_policy(memory),
            loss_chunk=loss_chunk_of(memory),
        )

    monkeypatch.setattr(whole_model, "layout_from_flags", layout_of)
    args = SimpleNamespace(preset="20b", gpus=8, steps=None, lr="1e-4", data="d", tokenizer="t")
    args.flags = []

    def found(case, card):
        args.gpu_memory = card
        flags, layout = whole_model.fitted(case, args)
        assert layout == layout_of(flags, 8)
        assert flags[flags.index("--memory") + 1] == layout.policy()
        return layout.micro_batch_size, layout.policy()

    four, thirty_two = whole_model.CASES[:2]
    for card in (None, 150.1):
        assert found(four, card) == (2, "fast") and found(thirty_two, card) == (1, "fast")
    assert found(four, 84.9) == (1, "fast") and found(thirty_two, 84.9) == (1, "experts")
    assert found(four, 20.0) == found(thirty_two, 20.0) == (1, "lean")  # that will not fit either


def test_row_leaves_out_what_is_not_training():
    """First steps, and steps that the monitor looked at, are slower."""
    records = [
        {
            "step": step,
            "loss": 10.0 - step,
            "grad_norm": float(step),
            "tokens_per_second": 1.0,
            "tokens_per_second_per_gpu": 1 / seconds,
            "tflops_per_gpu": 1.0,
            "mfu": None,
            "peak_memory_bytes": step * 2**30,
            "seconds_per_step": seconds,
        }
        for step, seconds in enumerate([90, 9, 2, 50, 2.5, 2.2, 60, 2.4, 2.1, 70], start=1)
    ]
    records += [{"step": s, "experts": {"ep_load_imbalance": [1.0, 3.0]}} for s in (4, 7, 10)]
    case = whole_model.CASES[0]
    layout = Layout(get_preset("20b"), 4, ep=4, seq_length=4096, global_batch_size=32)
    row = whole_model.row_of(case, [], layout, records, 1.0)
    assert row.seconds_a_step in (2.2, 2.4)
    assert (row.peak_gib, row.load, row.first_loss, row.last_loss) == (10.0, 2.0, 9.0, 0.0)
    assert row.gradient_norms == [float(step) for step in range(1, 11)]
    assert row.planned_gib_with_load > row.planned_gib
