# Copyright (c) 2026, the megatron-core gptoss authors.

"""Loss and gradients of a sharded gpt-oss GPTModel on the local spec, against Hugging Face.

Four gloo ranks run every layout: attention with sinks and a window that the
sequence crosses, YaRN, grouped heads, experts with biases. After finalize_model_grads each rank
compares the gradient of each of its parameters with its slice of Hugging Face's gradient.
"""

import functools
import inspect
import re
from dataclasses import dataclass

import pytest
import torch

from tests.harness.compare import relative_error
from tests.harness.ranks import RankFailure

WORLD_SIZE = 4
pytestmark = pytest.mark.ranks(WORLD_SIZE)
NUM_EXPERTS = 4
NUM_LAYERS = 2
BATCH_SIZE = 8
SEQ_LENGTH = 16  # windows of 5 are crossed more than once

SPLIT = ("tensor_model_parallel", "partition_dim", "partition_stride")

# The parameters are float64; cross entropy, RoPE's tables and the softmax over the chosen experts
# are float32 in Megatron, which leaves 1e-6.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; the remaining factor of the four ranks is data parallel."""

    tp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool = False
    dispatcher: str = "alltoall"


LAYOUTS = {
    "dp4": Layout(),
    "ep2": Layout(ep=2),
    "tp2-etp1-sp": Layout(tp=2, sp=True),
    "tp2-etp2-sp": Layout(tp=2, etp=2, sp=True),
    "tp2-ep2-etp1-sp": Layout(tp=2, ep=2, sp=True),
    "tp2-ep2-etp2-sp": Layout(tp=2, ep=2, etp=2, sp=True),
    "tp2-etp1": Layout(tp=2),
    "tp2-etp2": Layout(tp=2, etp=2),
    "tp2-ep2-etp1": Layout(tp=2, ep=2),
    "tp2-ep2-etp2": Layout(tp=2, ep=2, etp=2),
    "tp4-sp": Layout(tp=4, sp=True),  # more ranks than key/value heads
    "tp2-ep2-etp2-allgather": Layout(tp=2, ep=2, etp=2, dispatcher="allgather"),
    "ep2-allgather": Layout(ep=2, dispatcher="allgather"),
}


def build_model(layout, sizes, yarn):
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=sizes["hidden_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_key_value_heads"],
        kv_channels=sizes["head_dim"],
        ffn_hidden_size=sizes["intermediate_size"],
        moe_ffn_hidden_size=sizes["intermediate_size"],
        num_moe_experts=sizes["num_local_experts"],
        moe_router_topk=sizes["num_experts_per_tok"],
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=layout.dispatcher,
        moe_router_dtype="fp64",
        gated_linear_unit=True,
        activation_func=quick_gelu,
        glu_linear_offset=1.0,
        activation_func_clamp_value=7.0,
        add_bias_linear=True,
        bias_dropout_fusion=False,
        normalization="RMSNorm",
        layernorm_epsilon=sizes["rms_norm_eps"],
        attention_dropout=0.0,
        hidden_dropout=0.0,
        softmax_type="learnable",
        window_size=(sizes["sliding_window"] - 1, 0),
        window_attn_skip_freq=2,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
        use_cpu_initialization=True,
        params_dtype=torch.float64,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    config.yarn_rotary_scaling_factor = yarn["factor"]
    config.yarn_original_max_position_embeddings = yarn["original_max_position_embeddings"]
    config.yarn_beta_fast, config.yarn_beta_slow = yarn["beta_fast"], yarn["beta_slow"]
    config.yarn_mscale, config.yarn_mscale_all_dim = 1.0, 0.0
    config.yarn_correction_range_round_to_int = False
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        vocab_size=sizes["vocab_size"],
        max_sequence_length=sizes["max_position_embeddings"],
        position_embedding_type="yarn",
        rotary_base=yarn["rope_theta"],
        share_embeddings_and_output_weights=False,
    )
    return config, model


def shard(name, full):
    """The slice of an unsharded tensor that the parameter `name` of this rank holds."""
    from megatron.core import parallel_state as ps

    rank, size = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
    expert = re.search(r"local_experts\.(\d+)\.", name)
    if expert is not None:
        num_local = NUM_EXPERTS // ps.get_expert_model_parallel_world_size()
        index = ps.get_expert_model_parallel_rank() * num_local + int(expert[1])
        name = name.replace(expert[0], f"local_experts.{index}.")
        rank, size = (
            ps.get_expert_tensor_parallel_rank(),
            ps.get_expert_tensor_parallel_world_size(),
        )
    tensor = full[name]
    if "linear_fc1" in name:  # gate and up are split each for itself
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    if re.search(r"linear_qkv|softmax_offset|word_embeddings|output_layer", name):
        return tensor.chunk(size)[rank]
    if re.search(r"linear_(proj|fc2)\.weight", name):
        return tensor.chunk(size, dim=1)[rank]
    return tensor


def kind(name):
    """The parameter's name without the numbers of its layer and expert."""
    return re.sub(r"\.\d+\.", ".", name)


@torch.compiler.set_stance("force_eager")  # the maths is tested, not the compiler
def run_layout(layout, path, seq_length=SEQ_LENGTH):
    """One step; {what: relative error} of this rank."""
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    case = torch.load(path)
    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config, model = build_model(layout, case["sizes"], case["yarn"])
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(shard(name, case["params"]))
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    ddp.zero_grad_buffer()

    dp_rank, dp_size = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
    tokens, labels = (
        case[key].chunk(dp_size)[dp_rank][:, :seq_length] for key in ("tokens", "labels")
    )
    positions = torch.arange(seq_length).expand_as(tokens)
    loss = ddp(tokens, positions, None, labels=labels).mean()
    loss.backward()
    finalize_model_grads([ddp])
    ddp.eval()
    with torch.no_grad():  # without sequence parallelism, every TP rank routes all tokens here
        eval_loss = ddp(tokens, positions, None, labels=labels).mean()

    errors = {}
    for what, value in (("loss", loss), ("eval loss", eval_loss)):
        value = value.detach() / dp_size
        torch.distributed.all_reduce(value, group=ps.get_data_parallel_group())
        errors[what] = relative_error(value, case["loss"])
    squares = {kind(name): torch.zeros((), dtype=torch.float64) for name in case["grads"]}
    groups = [ps.get_tensor_model_parallel_group(), ps.get_expert_tensor_parallel_group()]
    # Until 0.18 it takes one group.
    groups = groups[: len(inspect.signature(param_is_not_tensor_parallel_duplicate).parameters) - 1]
    for name, param in model.named_parameters():
        errors[name] = relative_error(param.main_grad, shard(name, case["grads"]))
        if param_is_not_tensor_parallel_duplicate(param, *groups):
            squares[kind(name)] += param.main_grad.double().square().sum()
    # The groups that hold different shards: of an expert's parameters, and of all others.
    groups = (
        ps.get_expert_tensor_and_model_parallel_group(),
        ps.get_tensor_model_parallel_group(),
    )
    for what in squares:
        reference = [grad for name, grad in case["grads"].items() if kind(name) == what]
        square = squares[what]
        torch.distributed.all_reduce(square, group=groups["experts" not in what])
        reference = torch.cat([grad.flatten() for grad in reference]).norm()
        errors[f"grad norm of {what}"] = relative_error(square.sqrt(), reference)
    return errors


def sinks_at_init(tp, use_cpu_initialization):
    """The sinks of this rank as built, and where its shard lies in a checkpoint."""
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    ps.initialize_model_parallel(tensor_model_parallel_size=tp)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=8,
        softmax_type="learnable",
        use_cpu_initialization=use_cpu_initialization,
        tensor_model_parallel_size=tp,
    )
    torch.manual_seed(3)
    tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    attention = DotProductAttention(config, 1, AttnMaskType.causal, "self")
    sinks = attention.softmax_offset
    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    sharded = attention.sharded_state_dict("a.", metadata=metadata)["a.softmax_offset"]
    return {
        "tp_rank": ps.get_tensor_model_parallel_rank(),
        "values": sinks.detach().clone(),
        "split": [getattr(sinks, name, None) for name in SPLIT],
        "sharded": (sharded.global_shape, sharded.global_offset, sharded.replica_id[:2]),
    }


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Path of a model, its inputs, and Hugging Face's loss and gradients."""
    from tests.harness.hf_reference import SIZES, YARN, hf_model, to_megatron

    model = hf_model()
    generator = torch.Generator().manual_seed(5)
    shape = (BATCH_SIZE, SEQ_LENGTH)
    tokens, labels = (
        torch.randint(SIZES["vocab_size"], shape, generator=generator) for _ in range(2)
    )
    logits = model(tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    params = {name: param.detach() for name, param in model.named_parameters()}
    grads = {name: param.grad for name, param in model.named_parameters()}
    case = {
        "params": to_megatron(params, NUM_LAYERS, SIZES["num_key_value_heads"]),
        "grads": to_megatron(grads, NUM_LAYERS, SIZES["num_key_value_heads"]),
        "loss": loss.detach(),
        "tokens": tokens,
        "labels": labels,
        "sizes": SIZES,
        "yarn": YARN,
    }
    path = tmp_path_factory.mktemp("parallel") / "case.pt"
    torch.save(case, path)
    return path


@pytest.fixture(scope="module")
def errors_of(ranks, case):
    """errors_of(layout) -> {what: largest relative error over the ranks}; runs a layout once."""

    @functools.cache
    def errors_of(layout):
        everyone = ranks.run(run_layout, LAYOUTS[layout], case, world_size=WORLD_SIZE)
        # The names differ by rank only in the numbers of the experts.
        return {what: max(e.get(what, 0.0) for e in everyone) for what in everyone[0]}

    return errors_of


def table(errors):
    return "\n" + "\n".join(f"{error:9.2e}  {what}" for what, error in errors.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, errors_of):
    """The loss and every gradient are those of the model that is not split."""
    errors = {what: e for what, e in errors_of(layout).items() if not what.startswith("grad norm")}
    wrong = {what: error for what, error in errors.items() if not error < TOLERANCE}
    assert not wrong, table(wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_norm(layout, errors_of):
    """Each parameter is counted once in the gradient norm, a shard of it on each of its ranks."""
    errors = {what: e for what, e in errors_of(layout).items() if what.startswith("grad norm")}
    wrong = {what: error for what, error in errors.items() if not error < TOLERANCE}
    assert errors and not wrong, table(wrong)


def test_odd_length(ranks, case):
    """Without sequence parallelism, the experts still split the sequence over TP."""
    message = (
        f"Sequence length {SEQ_LENGTH - 1} is not a multiple of the tensor parallel.*"
        f"Pad it to {SEQ_LENGTH}\\."
    )
    with pytest.raises(RankFailure, match=message):
        ranks.run(run_layout, Layout(tp=2), case, SEQ_LENGTH - 1, world_size=WORLD_SIZE)


@pytest.mark.parametrize("use_cpu_initialization", [True, False], ids=["cpu-init", "device-init"])
def test_sinks_at_init(use_cpu_initialization, ranks):
    """Sinks were drawn alike on all TP ranks, and not marked as split."""
    (whole, *_), split = (
        ranks.run(sinks_at_init, tp, use_cpu_initialization, world_size=WORLD_SIZE) for tp in (1, 2)
    )
    for rank in split:
        assert rank["split"] == [True, 0, 1]
        # Shape of all heads, where this rank's begin, (PP, TP) replica: each is the only one.
        assert rank["sharded"] == ((8,), (4 * rank["tp_rank"],), (0, 0))
    first, second = (
        next(rank["values"] for rank in split if rank["tp_rank"] == tp_rank) for tp_rank in (0, 1)
    )
    for rank in split:
        assert torch.equal(rank["values"], (first, second)[rank["tp_rank"]])  # over DP
    assert not torch.equal(first, second)
    assert whole["values"].unique().numel() == 8 and 0 < whole["values"].std() < 0.05
    if use_cpu_initialization:
        assert torch.equal(torch.cat([first, second]), whole["values"])
