# Copyright (c) 2026, the megatron-core gptoss authors.

"""GroupedExperts over several ranks: values, gradients, and checkpoints at other layouts.

The reference is SequentialMLP in one process. Checkpoints go from either implementation to the
other, each at a layout of its own.
"""

from dataclasses import dataclass

import pytest
import torch

from tests.harness.compare import relative_error

pytestmark = pytest.mark.ranks(4)

# Tokens, split over up to 4 ranks, and what is added to the router's biases.
ROUTINGS = {
    "empty-expert": (8, 2, {2: -100}),  # sequence, batch
    "all-to-two-experts": (8, 2, {0: 100, 1: 100}),  # of one rank under EP; the other has no row
    "odd-on-2-ranks": (10, 1, {3: 1}),
    "odd-on-4-ranks": (20, 1, {3: 1}),
}
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; the sequence is split over tp as sequence parallelism does."""

    tp: int = 1
    ep: int = 1
    etp: int = 1
    dispatcher: str = "alltoall"


LAYOUTS = {
    "ep2": (2, Layout(ep=2)),
    "ep2-allgather": (2, Layout(ep=2, dispatcher="allgather")),
    "tp2-etp2": (2, Layout(tp=2, etp=2)),
    "tp2-etp1-ep2": (2, Layout(tp=2, ep=2)),
    "tp2-ep2-etp2": (4, Layout(tp=2, ep=2, etp=2)),
}


def build(grouped, layout):
    """A float64 MoE layer of this rank."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from tests.harness.experts_reference import moe_layer

    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return moe_layer(
        grouped,
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.tp > 1,
        moe_token_dispatcher_type=layout.dispatcher,
    )


def whole_case(sequence, batch, biases):
    """SequentialMLP in one process: {place: tensor} of parameters and gradients, in and outputs."""
    from megatron.core import parallel_state as ps
    from tests.harness.experts_reference import (
        HIDDEN,
        by_place,
        randomize,
    )

    layer = build(False, Layout())
    randomize(layer)
    with torch.no_grad():
        for expert, bias in biases.items():
            layer.router.bias[expert] += bias
    x, dout = (torch.randn(sequence, batch, HIDDEN, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    out, _ = layer(x)
    out.backward(dout)
    case = {"x": x.detach(), "dout": dout, "out": out.detach(), "dx": x.grad}
    case["params"] = {place: t.detach().clone() for place, t in by_place(layer).items()}
    case["grads"] = by_place(layer, gradients=True)
    ps.destroy_model_parallel()
    return case


def cut(tensors, place, shape):
    """The part of a checkpoint tensor that begins at a rank's offset.

    The whole comes as one piece for each expert (and for gate and up): find the one that holds it.
    """
    key, offset = place
    for (other, start), whole in tensors.items():
        if other != key:
            continue
        lead = len(start) - whole.dim()
        begin = [o - s for o, s in zip(offset[lead:], start[lead:])]
        if offset[:lead] == start[:lead] and all(
            0 <= b and b + n <= size for b, n, size in zip(begin, shape, whole.shape)
        ):
            for dim, (b, n) in enumerate(zip(begin, shape)):
                whole = whole.narrow(dim, b, n)
            return whole
    raise KeyError(f"{place} of shape {tuple(shape)} is in no piece of the whole layer")


def run_layout(grouped, layout, case):
    """Largest relative errors of outputs and gradients on this rank, by name."""
    from megatron.core import parallel_state as ps
    from tests.harness.experts_reference import by_place

    layer = build(grouped, layout)
    with torch.no_grad():
        for place, tensor in by_place(layer).items():
            tensor.copy_(cut(case["params"], place, tensor.shape))
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    x, dout, out_ref, dx_ref = (case[n].chunk(size)[rank] for n in ("x", "dout", "out", "dx"))
    x = x.clone().requires_grad_()
    out, _ = layer(x)
    out.backward(dout)
    errors = {"out": relative_error(out, out_ref), "dx": relative_error(x.grad, dx_ref)}
    for place, grad in by_place(layer, gradients=True).items():
        if "router" not in place[0]:  # of this rank's tokens alone
            errors[place] = relative_error(grad, cut(case["grads"], place, grad.shape))
    marks = {
        name: tuple(getattr(p, m, None) for m in ("allreduce", "tensor_model_parallel"))
        for name, p in layer.experts.named_parameters()
    }
    ps.destroy_model_parallel()
    return errors, marks


@pytest.fixture(scope="module")
def cases(ranks):
    return {name: ranks.run(whole_case, *how, world_size=1)[0] for name, how in ROUTINGS.items()}


@pytest.fixture(scope="module")
def case(cases):
    return cases["empty-expert"]


@pytest.mark.parametrize(
    "layout, routing",
    [
        (layout, routing)
        for layout, (world_size, _) in LAYOUTS.items()
        for routing in ROUTINGS
        if not routing.startswith("odd") or f"-{world_size}-" in routing
    ],
)
def test_layout(ranks, cases, layout, routing):
    """Output, input gradient and the experts' gradients are those of one process."""
    world_size, sizes = LAYOUTS[layout]
    case = cases[routing]
    assert case["grads"]
    for errors, _ in ranks.run(run_layout, True, sizes, case, world_size=world_size):
        assert len(errors) > 2
        wrong = {what: error for what, error in errors.items() if not error < TOLERANCE}
        assert not wrong, wrong


@pytest.mark.parametrize("layout", ["ep2", "tp2-etp2"])
def test_marks(ranks, case, layout):
    """DDP and gradient norm treat the parameters as those of upstream's experts."""
    world_size, sizes = LAYOUTS[layout]
    both = [
        ranks.run(run_layout, grouped, sizes, case, world_size=world_size)[0][1]
        for grouped in (True, False)
    ]
    assert len(both[0]) == 4
    for name, marks in both[0].items():
        assert marks == both[1][f"local_experts.0.{name}"], name


def save(grouped, layout, case, folder):
    """Write the case's parameters from one implementation at one layout."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps
    from tests.harness.experts_reference import by_place

    layer = build(grouped, layout)
    with torch.no_grad():
        for place, tensor in by_place(layer).items():
            tensor.copy_(cut(case["params"], place, tensor.shape))
    dist_checkpointing.save(layer.sharded_state_dict("layer."), folder)
    ps.destroy_model_parallel()


def load(grouped, layout, case, folder):
    """Names of what differs from the case after loading, and how many parameters there are."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps
    from tests.harness.experts_reference import by_place

    layer = build(grouped, layout)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    loaded = dist_checkpointing.load(layer.sharded_state_dict("layer."), folder, strict="raise_all")
    layer.load_state_dict({key.removeprefix("layer."): v for key, v in loaded.items()})
    places = by_place(layer)
    wrong = [
        place
        for place, tensor in places.items()
        if not torch.equal(tensor, cut(case["params"], place, tensor.shape))
    ]
    ps.destroy_model_parallel()
    return wrong, len(places)


EXCHANGES = {
    # writer: grouped, ranks, layout; reader: the same
    "sequential-ep2-to-grouped-etp2": (False, "ep2", True, "tp2-etp2"),
    "grouped-etp2-to-sequential-ep2": (True, "tp2-etp2", False, "ep2"),
    "sequential-ep2-etp2-to-grouped": (False, "tp2-ep2-etp2", True, None),
    "grouped-to-sequential-ep2-etp2": (True, None, False, "tp2-ep2-etp2"),
    "grouped-ep2-to-grouped-etp2": (True, "ep2", True, "tp2-etp2"),
}


@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
def test_checkpoint(ranks, case, exchange, tmp_path):
    """A torch_dist checkpoint of one implementation is one of the other, at any layout."""
    writes, at, reads, to = exchange
    layouts = {**LAYOUTS, None: (1, Layout())}
    folder = str(tmp_path)
    world_size, layout = layouts[at]
    ranks.run(save, writes, layout, case, folder, world_size=world_size)
    world_size, layout = layouts[to]
    for wrong, count in ranks.run(load, reads, layout, case, folder, world_size=world_size):
        assert count and not wrong, wrong
