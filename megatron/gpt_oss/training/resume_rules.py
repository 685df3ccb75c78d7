# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which arguments may change when a run resumes from its checkpoint.

Each argument is in one class. FREE arguments do not change the numbers of training, or set lengths
and intervals. `megatron.training.run_position` reports changes of AT_LOAD arguments when it loads
the checkpoint. Changes of MODEL and OPTIMIZER arguments are refused, because the checkpoints hold
another model or optimizer state that does not fit. All others may change, and one line lists the
changes.
"""

from typing import Any, Mapping

from megatron.gpt_oss.errors import UsageError

FREE = frozenset(
    """
    run_dir recipe dry_run help_all allow_untested_flags local_rank
    load save save_interval save_retain_interval keep_checkpoints async_save async_strategy
    use_persistent_ckpt_worker ckpt_format ckpt_fully_parallel_save ckpt_fully_parallel_load
    ckpt_assume_constant_structure dist_ckpt_workers dist_ckpt_strictness dist_ckpt_optim_fully_reshardable
    ckpt_step no_load_rng no_save_rng non_persistent_save_interval auto_detect_ckpt_format
    exit_on_missing_checkpoint exit_interval exit_duration_in_mins exit_signal exit_signal_handler
    train_iters train_samples skip_train finetune pretrained_checkpoint load_hf
    eval_interval eval_iters start_eval_at_iter eval_global_batch_size eval_micro_batch_size
    full_validation
    monitor_interval sample_interval sample_prompt sample_tokens sample_temperature
    log_interval log_progress log_throughput log_params_norm log_num_zeros_in_grad log_memory_interval
    log_memory_to_tensorboard log_timers_to_tensorboard log_loss_scale_to_tensorboard
    log_validation_ppl_to_tensorboard log_world_size_to_tensorboard log_device_memory_used log_energy
    logging_level timing_log_level timing_log_option barrier_with_L1_time nvtx_ranges record_shapes
    tensorboard_dir tensorboard_log_interval tensorboard_queue_size
    wandb_project wandb_entity wandb_exp_name wandb_save_dir
    profile profile_ranks profile_step_start profile_step_end use_pytorch_profiler
    record_memory_history memory_snapshot_path
    distributed_timeout_minutes distributed_timeout_seconds_after_init distributed_backend
    use_gloo_process_groups manual_gc manual_gc_interval manual_gc_eval train_sync_interval
    empty_unused_memory_level num_workers mmap_bin_files data_cache_path num_dataset_builder_threads
    trust_remote_code disable_jit_fuser use_cpu_initialization init_method_std embedding_init_method_std
    perform_initialization
    tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size
    pipeline_model_parallel_layout num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank microbatch_group_size_per_vp_stage
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    context_parallel_size cp_comm_type hierarchical_context_parallel_sizes
    expert_model_parallel_size expert_tensor_parallel_size tensor_parallel_num_weight_shards
    expert_tensor_parallel_num_weight_shards num_distributed_optimizer_instances
    moe_token_dispatcher_type moe_permute_fusion use_distributed_optimizer
    overlap_grad_reduce overlap_param_gather overlap_p2p_comm overlap_moe_expert_parallel_comm
    overlap_param_gather_with_optimizer_step align_param_gather align_grad_reduce
    delay_wgrad_compute ddp_bucket_size ddp_num_buckets ddp_average_in_collective
    defer_embedding_wgrad_compute tp_comm_overlap
    memory recompute_granularity recompute_method recompute_num_layers recompute_modules
    recompute_activations moe_layer_recompute checkpoint_activations lm_loss_chunk_size
    fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
    activation_offload_fraction cpu_offloading_num_layers optimizer_cpu_offload
    optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params
    use_torch_optimizer_for_cpu_offload
    check_for_nan_in_loss_and_grad check_for_spiky_loss check_for_large_grads rerun_mode
    encoder_num_layers encoder_seq_length decoder_seq_length inference_cuda_graph_scope
    preset preset_layers yarn_factor data_blend data_path train_data_path
    tokenizer_model tokenizer_type vocab_size
    """.split()
)
# Other checks cover some of them: MODEL (below) the preset, run_record.py data, tokenizer and
# weights.

AT_LOAD = frozenset(
    """
    lr min_lr lr_decay_style lr_decay_iters lr_decay_samples lr_warmup_fraction lr_warmup_iters
    lr_warmup_samples lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples
    weight_decay start_weight_decay end_weight_decay weight_decay_incr_style
    override_opt_param_scheduler use_checkpoint_opt_param_scheduler
    adam_beta1 adam_beta2 adam_eps sgd_momentum lr_multiplier decoupled_lr decoupled_min_lr
    global_batch_size step_batch_size_schedule seq_length no_load_optim no_save_optim
    """.split()
)

MODEL = frozenset(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups
    kv_channels num_experts moe_ffn_hidden_size moe_layer_freq moe_router_topk
    moe_router_score_function moe_router_pre_softmax window_size window_attn_skip_freq softmax_type
    position_embedding_type rotary_base rotary_percent rotary_interleaved rotary_scaling_factor
    use_rope_scaling rope_scaling_factor yarn_original_max_position_embeddings yarn_beta_fast
    yarn_beta_slow yarn_correction_range_round_to_int yarn_attention_factor mscale mscale_all_dim
    normalization layernorm_epsilon add_bias_linear add_qkv_bias swiglu quick_geglu squared_relu
    activation_func_clamp_value glu_linear_offset untie_embeddings_and_output_weights
    padded_vocab_size qk_layernorm multi_latent_attention
    """.split()
)
# Flags that set these arguments.
_GIVEN_AS = {"num_layers": ("preset_layers",), "rotary_scaling_factor": ("yarn_factor",)}

_LONGEST_SHOWN = 80

# Refused only if the optimizer state of the checkpoint is loaded.
OPTIMIZER = frozenset(["freeze", "optimizer"])

_CONSEQUENCES = {
    "seed": "the data is shuffled differently: samples may repeat or be skipped",
    "sft_overlong": "the samples differ: conversations may repeat or be skipped",
    "split": "the training documents differ: samples may repeat or be skipped",
    "dataloader_type": "the sample order differs",
    "micro_batch_size": "aux_loss balances the experts over the tokens of a micro-batch",
    "tokenizer_model": "used only if the documents of the data end with different tokens",
    "load_hf": "not read, because the run resumes from its own checkpoint",
    "data_path": "the run skips as many samples of the new data as it has consumed",
    "train_data_path": "the run skips as many samples of the new data as it has consumed",
}


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Arguments of both starts whose values differ: name -> (then, now)."""
    return {
        name: (then[name], now[name])
        for name in sorted(then.keys() & now.keys())
        if then[name] != now[name]
    }


def check_changes(
    then: Mapping[str, Any], now: Mapping[str, Any], loads_optimizer: bool = True
) -> dict[str, tuple[Any, Any]]:
    """Refuse changes that are not allowed when a run resumes.

    Args:
        then: arguments of the previous start, by name, as JSON values.
        now: arguments of this start.
        loads_optimizer: whether the optimizer state of the checkpoint is loaded.
    Returns:
        The changes to report: name -> (then, now).
    Raises:
        UsageError: names the argument, both values and what to do.
    """
    differing = changed(then, now)
    for name in differing:
        if name in MODEL:
            named = next(
                (word for word in (*_GIVEN_AS.get(name, ()), "preset") if word in differing), name
            )
            also = "" if named == name else f" ({name} {_both(differing[name])})"
            raise UsageError(
                f"{flag_of(named)} {_both(differing[named])}{also}: the run's checkpoints hold "
                "a different model. Restore the earlier value, or start a new run from them: "
                "--pretrained-checkpoint CHECKPOINTS --run-dir NEW."
            )
        if name in OPTIMIZER and loads_optimizer:
            state = "of a different optimizer" if name == "optimizer" else "for other parameters"
            raise UsageError(
                f"{flag_of(name)} {_both(differing[name])}: the run's checkpoints hold optimizer "
                f"state {state}. Restore the earlier value, or start with new optimizer state: "
                "--no-load-optim."
            )
    return {
        name: values
        for name, values in differing.items()
        if name not in FREE and name not in AT_LOAD and not _is_without_effect(name, now)
    }


def _is_without_effect(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether an argument does not change the numbers of training with these other arguments."""
    balancing = arguments.get("moe_router_load_balancing_type") or ()
    return name == "micro_batch_size" and "aux_loss" not in (
        [balancing] if isinstance(balancing, str) else balancing
    )


def changes_line(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """One line that lists the changes."""
    words = [
        f"{flag_of(name)} {_both(values)}"
        + (f": {_CONSEQUENCES[name]}" if name in _CONSEQUENCES else "")
        for name, values in changes.items()
    ]
    return f"changed since this run was last started: {'; '.join(words)}"


def flag_of(name: str) -> str:
    """The flag of an argument, except for a few that Megatron names differently."""
    return f"--{name.replace('_', '-')}"


def _both(values: tuple[Any, Any]) -> str:
    then, now = (_word(value) for value in values)
    return f"was {then} and is {now}"


def _word(value: Any) -> str:
    if value is None or value == []:
        return "not given"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
