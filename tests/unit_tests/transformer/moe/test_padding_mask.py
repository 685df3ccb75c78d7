# Copyright (c) 2026, the megatron-core gptoss authors.

"""Balancing losses of a padded sequence over ranks, against the sequence without its padding.

The sequence is padded at its end, so that causal attention keeps padding out of the other tokens,
and the ranks hold unequal numbers of tokens that count.
"""

import pytest
import torch

from tests.unit_tests.optimizer.test_gradient_norm import Layout, build_model

LENGTH, COUNTED = 8, 5


def router_gradients(tp, sp, stage, per_token, losses, own_groups=False, padded=True):
    """Gradients of the layers' routers by the balancing losses alone, summed over the ranks.

    With one rank, of the sequence without its padding. Without a mask where nothing is padded.
    """
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    sizes = dict(tensor_model_parallel_size=tp, expert_tensor_parallel_size=1)
    ps.initialize_model_parallel(**sizes)
    groups = {"pg_collection": ProcessGroupCollection.use_mpu_process_groups()}
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(1)
    # Every stage but the first lacks the embedding; nobody needs the head here.
    kwargs = {"pre_process": stage == "first", "post_process": False}
    _, model = build_model(
        Layout(tp=tp, sp=sp),
        torch.float32,
        {**kwargs, **(groups if own_groups else {})},
        calculate_per_token_loss=per_token,
        **losses,
    )
    if own_groups:  # the model's are others than Megatron's global ones
        ps.destroy_model_parallel()
        ps.initialize_model_parallel()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(64, (1, LENGTH), generator=generator)
    hidden = torch.randn(LENGTH, 1, 16, generator=generator)
    mask = (torch.arange(LENGTH) >= COUNTED)[None]
    if not padded:
        mask = None
    elif tp == 1:
        tokens, hidden, mask = tokens[:, :COUNTED], hidden[:COUNTED], None
    positions = torch.arange(tokens.size(1))[None]
    if stage == "later":
        rank = groups["pg_collection"].tp.rank()
        model.set_input_tensor(hidden.chunk(tp)[rank].contiguous() if sp else hidden)
    with torch.compiler.set_stance("force_eager"):
        options = {} if mask is None else {"padding_mask": mask}  # new in 0.16
        out = model(tokens, positions, None, **options)
    (0 * out).sum().backward()
    gradients = [layer.mlp.router.weight.grad for layer in model.decoder.layers]
    gradients = torch.stack(gradients)
    if tp > 1:
        torch.distributed.all_reduce(gradients)
    return gradients


def compare(ranks, *args, **kwargs):
    tp, sp, *rest = args
    padded = kwargs.get("padded", True)
    (expected,) = ranks.run(router_gradients, 1, False, *rest, padded=padded, world_size=1)
    assert expected.norm(dim=(1, 2)).min() > 1e-4  # every layer's router has one
    for found in ranks.run(router_gradients, *args, world_size=2, **kwargs):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def losses(kind):
    if kind == "z_loss":
        return {"moe_z_loss_coeff": 0.1}
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.1}


KINDS = ["aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sp", [True, False], ids=["sp", "no-sp"])
def test_per_token_loss(kind, sp, ranks):
    """The count of a rank's tokens was overwritten by that of all ranks: twice the gradient."""
    compare(ranks, 2, sp, "first", True, losses(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_per_token_loss_unpadded(kind, ranks):
    """Until 0.18 the losses were too small by the number of ranks of a sequence."""
    compare(ranks, 2, True, "first", True, losses(kind), padded=False)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_loss(kind, ranks):
    """The z-loss averaged the ranks' means, whatever the number of tokens in them."""
    compare(ranks, 2, True, "first", False, losses(kind))


def test_later_stage(ranks):
    """The mask was split over the ranks of the sequence on the first stage alone."""
    compare(ranks, 2, True, "later", False, losses("aux_loss"))


def test_own_groups(ranks):
    """The mask was split over Megatron's global TP group, not over the model's own."""
    compare(ranks, 2, True, "first", False, losses("aux_loss"), own_groups=True)
