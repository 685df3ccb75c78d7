# Copyright (c) 2026, the megatron-core gptoss authors.

"""Keys of `gptoss plan --json` under their names before 0.19.2+gptoss.1; goes with the next version."""

_PHASES = {
    "forward_experts": "forward: experts",
    "forward_combine": "forward: experts' answer",
    "forward_unpermute": "forward: answer to the tokens",
    "recompute_experts": "made again: experts",
    "recompute_combine": "made again: experts' answer",
    "recompute_unpermute": "made again: answer to the tokens",
    "loss": "loss",
    "loss_grad": "gradient of the loss",
    "output_layer_grad": "gradient of the head",
    "backward_combine": "backward: experts' answer",
    "backward_linear_fc2": "backward: experts' second product",
    "backward_activation": "backward: experts' activation",
    "backward_linear_fc1": "backward: experts' first product",
    "backward_attention": "backward: attention",
    "embedding_grad": "gradient of the embedding",
    "optimizer_step": "optimizer's step",
}
_SECONDS = {
    "experts": "expert_gemms",
    "products": "dense_gemms",
    "passes": "memory_bound",
    "exchange": "model_parallel_comm",
    "bubble": "pipeline_bubble",
    "reduction": "data_parallel_comm",
}


def with_old_keys(plan: dict) -> dict:
    """Add the old keys to the JSON entry of a plan."""
    memory, seconds = plan["memory"], plan["seconds"]
    old_memory = {
        "moments": {_PHASES[name]: size for name, size in memory["phases"].items()},
        "moment": _PHASES[memory["peak_phase"]],
        "step": memory["optimizer_step"],
        "host": memory["cpu_memory"],
    }
    return {
        **plan,
        "memory": {**memory, **old_memory},
        "seconds": {**seconds, **{old: seconds[new] for old, new in _SECONDS.items()}},
        "host_memory_per_machine": plan["cpu_memory_per_machine"],
    }
