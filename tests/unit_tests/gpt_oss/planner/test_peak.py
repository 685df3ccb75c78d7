# Copyright (c) 2026, the megatron-core gptoss authors.

"""The peak of forward and backward, planned and counted while a model runs.

Live tensors are counted on the CPU, with kernels and norms that allocate as those of CUDA do.
Python frames and autograd hold the same tensors on both.
"""

import dataclasses
import gc
import json
from pathlib import Path

import pytest
import torch

from megatron.gpt_oss.planner.activations import HeadActivations, LayerActivations
from megatron.gpt_oss.planner.layout import Layout, Recompute
from megatron.gpt_oss.planner.memory import (
    StageActivations,
    gather_buffer,
    optimizer_memory,
    peak_rank_memory,
)
from megatron.gpt_oss.presets import get_preset
from tests.harness.live_memory import (
    LiveMemory,
    balanced_routing,
    kernels_of_cuda,
)
from tests.unit_tests.gpt_oss.planner import test_memory

# Wide experts and little attention, as in gpt-oss; short, for the CPU's attention keeps all scores.
MODEL = dataclasses.replace(
    get_preset("tiny", 3),
    hidden_size=320,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    moe_ffn_hidden_size=352,
    vocab_size=512,
    sliding_window=24,
)
LARGE_HEAD = dataclasses.replace(MODEL, num_layers=1, vocab_size=8192)


def _layout(world_size=1, policy="fast", preset=MODEL, recompute=None, **sizes):
    layout = test_memory._layout(world_size, policy, seq_length=96, micro_batch_size=8, **sizes)
    layout = dataclasses.replace(layout, preset=preset, recompute=recompute or layout.recompute)
    return dataclasses.replace(layout, loss_chunk=2 * layout.loss_chunk)


def peak_bytes(layout):
    """Peak bytes of live tensors in one forward and backward, without weights."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.gpt_oss.training.output_processor import chunked_loss_processor

    test_memory._start(layout)
    builder = test_memory._builder(layout)
    model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
    model = model.bfloat16().train()
    for parameter in model.parameters():  # as DDP, which has added it to its buffer
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    length = layout.seq_length // layout.cp
    options = {}
    if layout.loss_chunk:
        options["output_processor"] = chunked_loss_processor(layout.loss_chunk)
    with kernels_of_cuda(), balanced_routing():
        peaks = []
        for _ in range(2 if layout.gpus == 1 else 4):  # the first makes buffers that stay
            ids = torch.randint(layout.preset.vocab_size, (layout.micro_batch_size, length))
            positions, mask = torch.arange(length).expand_as(ids), torch.ones(ids.shape)
            gc.collect()  # what cycles hold would count
            memory = LiveMemory(known=model.parameters())
            with memory:
                losses = model(ids, positions, None, labels=ids, loss_mask=mask, **options)
                losses.sum().backward()
            del losses
            peaks.append(memory.peak)
    # gloo's threads free sent tensors when they are scheduled, which is later on loaded cores.
    return min(peaks[1:])


CASES = {
    "fast": _layout(),
    "balanced": _layout(policy="balanced"),
    "lean": _layout(policy="lean"),
    # Whatever the backward of a layer leaves behind weighs most in a deep model.
    "lean-deep": _layout(policy="lean", preset=dataclasses.replace(MODEL, num_layers=16)),
    "recompute-moe": _layout(policy="balanced", recompute=Recompute("selective", ("moe",))),
    "two-layers-of-three": _layout(recompute=Recompute("full", (), "block", 2)),
    "two-layers-a-unit": _layout(recompute=Recompute("full", (), "uniform", 2)),
    "all-logits": _layout(preset=LARGE_HEAD),
    "logits-in-chunks": _layout(policy="balanced", preset=LARGE_HEAD),
    "logits-in-one-chunk": dataclasses.replace(
        _layout(policy="balanced", preset=LARGE_HEAD), loss_chunk=10**6
    ),
    "ep2": _layout(2, ep=2),
    "ep2-balanced": _layout(2, "balanced", ep=2),
    "ep2-lean": _layout(2, "lean", ep=2),
    "tp2-ep2": _layout(2, tp=2, ep=2),
    "tp2-lean": _layout(2, "lean", tp=2, ep=2),
    "cp2-ep2": _layout(2, cp=2, ep=2, cp_comm_type="all_gather"),
}


@pytest.mark.parametrize("case", CASES)
def test_peak(ranks, case):
    layout = CASES[case]
    measured = ranks.run(peak_bytes, layout, world_size=layout.gpus)
    measured = sum(measured) / len(measured)
    phases = StageActivations(layout, 0).phases(gather_buffer(layout)).present()
    expected = max(phase.total for phase in phases.values())
    # Small tensors that are not planned: indices of rows, the router's, temporaries of collectives.
    assert expected == pytest.approx(measured, rel=0.05)


def _measured(name):
    """The rows of a benchmark's result on a GPU."""
    path = Path(__file__).resolve().parents[4] / "benchmarks" / "results" / name
    if not path.is_file():
        pytest.skip(f"{name} is not in benchmarks/results")
    return json.loads(path.read_text())["rows"]


def test_head_as_measured_on_a_gpu():
    """Beyond hidden states, weight and main_grad; the unchunked loss there has no gradient buffer."""
    lengths = {"8k": 8192, "32k": 32768}
    for row in _measured("lm_loss_h100.json"):
        kind, _, chunk = row["loss"].partition("-")
        layout = Layout(
            get_preset("20b"),
            1,
            seq_length=lengths[row["case"]],
            loss_chunk=int(chunk or 0),
            grad_bytes=2 if kind == "chunked" else 4,
        )
        phases = vars(HeadActivations(layout).phases()).values()
        expected = max(size for size in phases if size is not None) / 2**20
        assert expected == pytest.approx(row["peak_mib"], rel=0.01), row["loss"]


@pytest.mark.parametrize(
    "case, length, size, modules, parts",
    [("4k", 4096, 8, (), 1), ("32k", 32768, 1, (), 1), ("128k", 131072, 1, ("moe",), 4)],
)
def test_steps_as_measured_on_a_gpu(case, length, size, modules, parts):
    """Peak memory of a step with two layers and the output layer, balanced routing."""
    row = {row["case"]: row for row in _measured("train_step_h100.json")}[case]
    layout = Layout(
        get_preset("20b", 2),
        1,
        seq_length=length,
        micro_batch_size=size,
        global_batch_size=size,
        recompute=Recompute("selective" if modules else None, modules),
        mlp_chunks=parts,
        loss_chunk=4096,
    )
    assert peak_rank_memory(layout).total / 2**30 == pytest.approx(row["peak_gib"], rel=0.05)


def test_experts_as_measured_on_a_gpu():
    """The benchmark holds the output and, beyond the weights, every gradient."""
    rows_of = {"16k": 16384, "32k": 32768, "131k": 131072}
    measured = {(row["case"], row["implementation"]): row for row in _measured("experts_h100.json")}
    for case, rows in rows_of.items():
        layout = Layout(get_preset("20b"), 1, seq_length=rows // 4)
        layer = LayerActivations(layout, False)
        saved = layer.experts.fc1_output + layer.experts.fc2_input
        out = 2 * rows * 2880
        assert (saved + out) / 2**20 == pytest.approx(
            measured[case, "grouped"]["kept_mib"], rel=0.01
        )
        # In the activation's backward, or with all gradients at the end; without the residual.
        backward = layer.backward_phases().activation - layer.all_saved
        backward += saved - 2 * layer.sizes.residual * 2880
        weights = 2 * 32 * 2880 * 3 * 2880
        first = 4 * rows * 2880 + 2 * rows * 2880
        peak = out + max(weights // 3 + backward, weights + first)
        assert peak / 2**20 == pytest.approx(measured[case, "grouped"]["peak_mib"], rel=0.03)


def test_step_of_adamw():
    """The kernel allocates nothing in addition to gradients and state, on the CPU as on CUDA."""
    parameter = torch.nn.Parameter(torch.ones(1000, 100))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [t for tensors in optimizer.state.values() for t in tensors.values()]
    memory = LiveMemory(known=[parameter, parameter.grad, *state])
    with memory:
        optimizer.step()
    assert memory.peak < 1000


def test_clipping():
    """Megatron without TransformerEngine clips in place; gradients in bf16 are copied to fp32 first."""
    from megatron.core.utils import local_multi_tensor_scale

    gradients = [torch.ones(size, 64) for size in (1000, 300, 700)]
    memory = LiveMemory(known=gradients)
    with memory:
        local_multi_tensor_scale(0, None, [gradients, gradients], 0.5)
    assert memory.peak < 1000
    assert optimizer_memory(_layout(), 10**8, 10**7).step == 0
    in_bf16 = dataclasses.replace(_layout(), grad_bytes=2)
    assert optimizer_memory(in_bf16, 10**8, 10**7).step == 4 * (10**8 + 10**7)
