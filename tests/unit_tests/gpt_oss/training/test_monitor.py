# Copyright (c) 2026, the megatron-core gptoss authors.

"""Expert load, router entropy, norms by module and samples are equal at every layout."""

import math

import pytest
import torch

from megatron.gpt_oss.checkpoint.load_hf import load_hf
from megatron.gpt_oss.training.metrics.module_norms import kind_of
from megatron.gpt_oss.training.metrics.router_load import RouterLoad
from tests.harness import runs
from tests.harness.models import TINY, trained_tensors, write_hf

pytestmark = pytest.mark.ranks(4)

DISTOPT = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
LAYOUTS = {
    "ep2": (2, "--expert-model-parallel-size 2"),
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tp2-no-sp": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "cp2-distopt": (2, f"--context-parallel-size 2 {DISTOPT}"),
    "dp2": (2, ""),
    "ep2-distopt-grouped": (2, f"--expert-model-parallel-size 2 --moe-grouped-gemm {DISTOPT}"),
    "ep2-tp2": (
        4,
        "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
        f"--expert-tensor-parallel-size 1 {DISTOPT}",
    ),
    "recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}
FLAGS = (
    "--train-iters 2 --monitor-interval 1 --sample-interval 2 --sample-tokens 4 --clip-grad 0.5 "
    "--sample-temperature 0 --sample-prompt def"
)


@pytest.fixture(scope="module")
def one_rank_records(ranks, inputs, tmp_path_factory):
    return runs.start(ranks, inputs, tmp_path_factory.mktemp("run") / "one", FLAGS)


def test_kinds():
    names = {
        "embedding.word_embeddings.weight": "embedding",
        "decoder.layers.0.input_layernorm.weight": "norms",
        "decoder.final_layernorm.weight": "norms",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": "norms",
        "decoder.layers.0.self_attention.core_attention.softmax_offset": "sinks",
        "decoder.layers.0.self_attention.linear_proj.bias": "attention",
        "decoder.layers.0.mlp.router.weight": "router",
        "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight": "experts",
        "output_layer.weight": "head",
        "anything.else": "other",
    }
    assert {name: kind_of(name) for name in names} == names


def test_load_and_entropy_against_transformers(make_model, tmp_path):
    """The router's logits of transformers' model say the same of two micro-batches."""
    transformers = pytest.importorskip("transformers")
    write_hf(tmp_path / "hf", TINY, trained_tensors(TINY))
    model = make_model(TINY, seq_length=32)
    load_hf([model], tmp_path / "hf")
    load = RouterLoad(TINY.num_layers, TINY.num_experts, lambda: wanted, expert_parallel=2)
    load.watch([model])
    ids = torch.randint(0, 256, (2, 3, 32), generator=torch.Generator().manual_seed(0))
    wanted = False
    model(ids[0], torch.arange(32).expand(3, 32), None)
    wanted = True
    for batch in ids:
        model(batch, torch.arange(32).expand(3, 32), None)
    model.eval()
    model(ids[0], torch.arange(32).expand(3, 32), None)
    found = load.take()

    reference = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        per_layer = reference(ids.flatten(0, 1), output_router_logits=True).router_logits
    for layer, logits in enumerate(per_layer):
        logits = logits.double()
        chosen = logits.topk(TINY.num_experts_per_tok).indices.flatten()
        counts = torch.bincount(chosen, minlength=TINY.num_experts).double()
        assert found["max_expert_share"][layer] == pytest.approx(float(counts.max() / counts.sum()))
        halves = counts.view(2, -1).sum(1)  # each rank has experts in a row
        assert found["ep_load_imbalance"][layer] == pytest.approx(
            float(halves.max() / halves.mean())
        )
        variation = math.sqrt(float(counts.var(correction=0))) / float(counts.mean())
        assert found["load_cv"][layer] == pytest.approx(variation)
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        assert found["router_entropy"][layer] == pytest.approx(float(entropy), rel=1e-4)
    assert max(found["load_cv"]) > 0.3
    assert load.take()["max_expert_share"] == [0.0] * TINY.num_layers


def test_one_rank(one_rank_records, inputs):
    """The norms add up to Megatron's own, which knows no kinds; the sample is transformers'."""
    for step, norms in runs.only(one_rank_records, "norms").items():
        total = math.hypot(*norms["grad_norm"].values())
        assert total == pytest.approx(runs.steps(one_rank_records)[step]["grad_norm"], rel=1e-5)
        assert total > 1  # above --clip-grad, so that clipping would show
        assert min(norms["grad_norm"].values()) > 0
    tensors = trained_tensors(_preset())
    weights = runs.only(one_rank_records, "norms")[1]["weight_norm"]
    for kind, part in (("sinks", "sinks"), ("experts", ".experts."), ("router", ".router.")):
        parts = [tensor.bfloat16().double() for name, tensor in tensors.items() if part in name]
        expected = math.sqrt(sum(float((tensor**2).sum()) for tensor in parts))
        assert weights[kind] == pytest.approx(expected, rel=1e-5), kind
    sinks = torch.cat([t.bfloat16().float() for name, t in tensors.items() if "sinks" in name])
    found = runs.only(one_rank_records, "norms")[1]["sinks"]
    assert found == {"min": float(sinks.min()), "max": float(sinks.max())}


def _preset():
    import dataclasses

    return dataclasses.replace(TINY, num_layers=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ranks, inputs, one_rank_records, tmp_path, layout):
    world_size, flags = LAYOUTS[layout]
    expected = one_rank_records
    records = runs.start(ranks, inputs, tmp_path / "run", f"{FLAGS} {flags}", world_size)
    for step, load in runs.only(expected, "experts").items():
        found = runs.only(records, "experts")[step]
        assert found["max_expert_share"] == pytest.approx(load["max_expert_share"], abs=2e-3)
        assert found["load_cv"] == pytest.approx(load["load_cv"], abs=1e-2)
        assert found["router_entropy"] == pytest.approx(load["router_entropy"], rel=1e-4)
    for step, norms in runs.only(expected, "norms").items():
        found = runs.only(records, "norms")[step]
        assert found.keys() == norms.keys()
        for what, by_kind in norms.items():
            assert found[what] == pytest.approx(by_kind, rel=1e-3), what
    assert runs.only(records, "sample") == runs.only(expected, "sample")
    assert len(runs.only(records, "sample")[2]["text"]) > 3
