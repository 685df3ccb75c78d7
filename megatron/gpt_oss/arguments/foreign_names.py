# Copyright (c) 2026, the megatron-core gptoss authors.

"""Names of settings in NeMo and Hugging Face, and the flags that replace them."""

# Name: (flag or None, how it differs or why there is none).
FOREIGN_NAMES: dict[str, tuple[str | None, str]] = {
    # NeMo and Lightning
    "constant_steps": ("--lr-wsd-decay-iters", "--lr-decay-style WSD keeps the rate until then"),
    "warmup_steps": ("--lr-warmup-iters", ""),
    "warmup_ratio": ("--lr-warmup-fraction", "of --lr-decay-iters, by default of the full run"),
    "max_steps": ("--train-iters", ""),
    "max_epochs": (None, "set --train-iters or --train-samples"),
    "val_check_interval": ("--eval-interval", ""),
    "limit_val_batches": ("--eval-iters", "batches of --global-batch-size samples"),
    "limit_test_batches": ("--eval-iters", "the same for the test split"),
    "log_every_n_steps": ("--log-interval", ""),
    "every_n_train_steps": ("--save-interval", ""),
    "save_top_k": ("--keep-checkpoints", "the newest ones, whatever their loss"),
    "gradient_clip_val": ("--clip-grad", ""),
    "num_nodes": (None, "torchrun's --nnodes sets it"),
    "devices": (None, "torchrun's --nproc-per-node sets it"),
    "nproc_per_node": (None, "torchrun's option: give it before the script name"),
    "nnodes": (None, "torchrun's option: give it before the script name"),
    "precision": ("--bf16", "fp32 without it"),
    "pipeline_dtype": (None, "pipeline stages use the dtype that --bf16 selects"),
    "params_dtype": ("--bf16", ""),
    "gradient_as_bucket_view": (None, "gradients always are views of the buckets that are reduced"),
    "grad_reduce_in_fp32": ("--accumulate-allreduce-grads-in-fp32", "the default with --bf16"),
    "tensor_model_parallel": ("--tensor-model-parallel-size", ""),
    "tensor_parallel_size": ("--tensor-model-parallel-size", ""),
    "pipeline_parallel_size": ("--pipeline-model-parallel-size", ""),
    "pipeline_model_parallel": ("--pipeline-model-parallel-size", ""),
    "virtual_pipeline_model_parallel_size": ("--num-virtual-stages-per-pipeline-rank", ""),
    "context_parallel": ("--context-parallel-size", ""),
    "expert_parallel_size": ("--expert-model-parallel-size", ""),
    "expert_model_parallel": ("--expert-model-parallel-size", ""),
    "data_parallel_size": (None, "the number of ranks divided by TP * PP * CP"),
    "max_position_embeddings": ("--yarn-factor", "a preset's context is this times 4,096"),
    "seq_len": ("--seq-length", ""),
    "sequence_length": ("--seq-length", ""),
    "encoder_seq_length": ("--seq-length", ""),
    "mbs": ("--micro-batch-size", ""),
    "gbs": ("--global-batch-size", ""),
    "activations_checkpoint_granularity": ("--memory", "or --recompute-granularity"),
    "gradient_accumulation_fusion": (None, "needs Apex; off, cannot be enabled"),
    "resume_if_exists": ("--run-dir", "a restart resumes from its newest complete checkpoint"),
    "resume_from_directory": ("--load", ""),
    "resume_from_checkpoint": ("--load", ""),
    "restore_from_path": ("--load-hf", "or --pretrained-checkpoint for Megatron's format"),
    "dist_ckpt_load_strictness": ("--dist-ckpt-strictness", ""),
    "wandb_name": ("--wandb-exp-name", ""),
    "wandb_dir": ("--wandb-save-dir", ""),
    # Hugging Face
    "learning_rate": ("--lr", ""),
    "min_learning_rate": ("--min-lr", ""),
    "lr_scheduler_type": ("--lr-decay-style", ""),
    "num_train_epochs": (None, "set --train-iters or --train-samples"),
    "per_device_train_batch_size": ("--micro-batch-size", ""),
    "per_device_eval_batch_size": ("--micro-batch-size", "the same for training and evaluation"),
    "train_batch_size": ("--global-batch-size", ""),
    "gradient_accumulation_steps": (
        "--global-batch-size",
        "which is it times --micro-batch-size times the data-parallel ranks",
    ),
    "gradient_checkpointing": ("--memory", "lean recomputes every layer"),
    "max_grad_norm": ("--clip-grad", ""),
    "max_length": ("--seq-length", ""),
    "max_seq_length": ("--seq-length", ""),
    "model_max_length": ("--seq-length", ""),
    "model_name_or_path": ("--load-hf", ""),
    "model_name": ("--preset", ""),
    "tokenizer_name": ("--tokenizer-model", ""),
    "tokenizer": ("--tokenizer-model", ""),
    "dataset_name": ("--data-path", "what gptoss tokenize wrote"),
    "train_file": ("--data-path", "what gptoss tokenize wrote for it"),
    "data_prefix": ("--data-path", ""),
    "output_dir": ("--run-dir", ""),
    "exp_dir": ("--run-dir", ""),
    "logging_steps": ("--log-interval", ""),
    "save_steps": ("--save-interval", ""),
    "eval_steps": ("--eval-interval", ""),
    "save_total_limit": ("--keep-checkpoints", ""),
    "report_to": ("--wandb-project", "or --tensorboard-dir"),
    "adam_beta_1": ("--adam-beta1", ""),
    "adam_beta_2": ("--adam-beta2", ""),
    "adam_epsilon": ("--adam-eps", ""),
    "betas": ("--adam-beta1", "and --adam-beta2"),
    "optim": ("--optimizer", ""),
    "dataloader_num_workers": ("--num-workers", ""),
    "packing": ("--dataloader-inter-document-masking", "samples are always packed; this masks"),
    "fp32": (None, "the default without --bf16"),
    "deepspeed": (None, "--use-distributed-optimizer shards the optimizer over ranks, as ZeRO-1"),
    "fsdp": (
        None,
        "--use-distributed-optimizer shards the optimizer; experts go over --expert-"
        "model-parallel-size",
    ),
    "zero_stage": ("--use-distributed-optimizer", "shards the optimizer, as ZeRO-1"),
    "use_flash_attention_2": (None, "attention kernels are selected automatically: gptoss doctor"),
    "attn_implementation": ("--sink-attention-backend", ""),
    "torch_dtype": ("--bf16", ""),
    "lora_rank": (None, "all weights are trained; --freeze excludes some"),
    "router_aux_loss_coef": ("--moe-aux-loss-coeff", "with --moe-router-load-balancing-type"),
    "num_experts_per_tok": ("--moe-router-topk", "set by the preset"),
    "sliding_window": ("--window-size", "set by the preset"),
}


def foreign_name(flag: str) -> str | None:
    """The table's name for a flag, ignoring dashes, dots and case; None if there is none."""
    words = flag.lstrip("-").split(".")[-1].lower().replace("-", "_")
    return words if words in FOREIGN_NAMES else None


def advice(name: str) -> str:
    """A sentence with the flag to use instead of a name of the table."""
    flag, note = FOREIGN_NAMES[name]
    if flag is None:
        return f"There is no such flag: {note}."
    return f"Did you mean {flag}{f' ({note})' if note else ''}?"
