# Copyright (c) 2026, the megatron-core gptoss authors.

"""Each of Megatron's flags, and whether a gpt-oss run may be given it (docs/flags.md).

SUPPORTED names the test that runs a flag. The others are refused where they are given with another
value than a run has without them: INERT and UNTESTED ones unless --allow-untested-flags is given,
WRONG ones always. `--flag=value` is one value of a flag; it goes before the flag itself.
"""

# Flags by the test that runs them.
SUPPORTED: dict[str, str] = {
    "gpt_oss/arguments/test_arguments.py::test_no_preset": """
        --swiglu
    """,
    "gpt_oss/arguments/test_arguments.py::test_same_value_as_the_preset_is_no_contradiction": """
        --rope-type
    """,
    "gpt_oss/arguments/test_arguments.py::test_tokenizer_comes_with_the_checkpoint": """
        --tokenizer-type=HuggingFaceTokenizer
    """,
    "gpt_oss/training/test_async_save.py::test_full_disk_of_one_of_several_files": """
        --dist-ckpt-workers
    """,
    "gpt_oss/training/test_async_save.py::test_lines_and_metrics": """
        --async-save
    """,
    "gpt_oss/arguments/test_expert_overlap.py::test_accepted": """
        --delay-wgrad-compute
    """,
    "gpt_oss/arguments/test_expert_overlap.py::test_equals_the_run_without": """
        --fp16 --overlap-moe-expert-parallel-comm --recompute-modules --initial-loss-scale
        --num-layers-per-virtual-pipeline-stage
    """,
    "gpt_oss/training/test_sft.py::test_run": """
        --sft
    """,
    "gpt_oss/checkpoint/test_export_hf.py::test_round_trip_bit_for_bit": """
        --save
    """,
    "gpt_oss/arguments/test_flags_run.py::test_balanced_routing": """
        --moe-router-force-load-balancing --mock-data
    """,
    "gpt_oss/arguments/test_flags_run.py::test_cyclic": """
        --dataloader-type
    """,
    "gpt_oss/arguments/test_flags_run.py::test_data": """
        --multiple-validation-sets --validation-set-names --train-data-path --valid-data-path
        --test-data-path --data-cache-path --no-mmap-bin-files --num-dataset-builder-threads
        --mid-level-dataset-surplus
    """,
    "gpt_oss/arguments/test_flags_run.py::test_end_of_a_run": """
        --empty-unused-memory-level --train-sync-interval --exit-duration-in-mins
        --exit-signal-handler --exit-signal --manual-gc --manual-gc-interval
        --no-manual-gc-eval --disable-manual-gc-eval --persistent-save-interval
        --save-retain-interval --ckpt-fully-parallel-load --dist-ckpt-strictness --no-save-rng
        --no-load-rng
    """,
    "gpt_oss/arguments/test_flags_run.py::test_logging": """
        --log-params-norm --log-throughput --log-progress --timing-log-level
        --timing-log-option --tensorboard-log-interval --tensorboard-queue-size
        --log-timers-to-tensorboard --no-log-loss-scale-to-tensorboard
        --disable-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard
        --log-memory-interval --log-num-zeros-in-grad --no-barrier-with-level-1-timing
        --log-world-size-to-tensorboard --logging-level
    """,
    "gpt_oss/arguments/test_flags_run.py::test_optimizer": """
        --init-method-std --adam-beta1 --sgd-momentum --optimizer=adam --optimizer=sgd
        --start-weight-decay --end-weight-decay --weight-decay-incr-style
    """,
    "gpt_oss/arguments/test_flags_run.py::test_same_numbers": """
        --use-cpu-initialization --mlp-chunks-for-training --no-masked-softmax-fusion
        --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
        --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
        --accumulate-allreduce-grads-in-fp32 --distributed-backend
        --disable-gloo-process-groups --distributed-timeout-seconds-after-init
        --disable-jit-fuser --no-overlap-p2p-communication
        --no-create-attention-mask-in-dataloader --trust-remote-code
    """,
    "gpt_oss/arguments/test_flags_run.py::test_same_numbers_with_checks": """
        --deterministic-mode --recompute-activations --check-for-large-grads
        --no-align-grad-reduce --disable-align-grad-reduce --ddp-average-in-collective
        --no-align-param-gather --eval-global-batch-size --eval-micro-batch-size
        --reset-position-ids --reset-attention-mask --wandb-entity --rerun-mode
        --check-for-spiky-loss
    """,
    "gpt_oss/arguments/test_flags_run.py::test_schedule_in_samples": """
        --lr-decay-samples --lr-wsd-decay-samples --lr-warmup-samples
    """,
    "gpt_oss/arguments/test_flags_run.py::test_start_of_a_run": """
        --pretrained-checkpoint --exit-on-missing-checkpoint --start-eval-at-iter --skip-train
    """,
    "gpt_oss/training/test_monitor.py::test_kinds": """
        --moe-grouped-gemm
    """,
    "gpt_oss/test_presets.py::test_flags_make_the_transformer_config": """
        --num-layers --hidden-size --num-attention-heads --softmax-type --num-query-groups
        --kv-channels --norm-epsilon --disable-bias-linear --moe-router-topk --window-size
        --max-position-embeddings --position-embedding-type --rotary-base --quick-geglu
        --padded-vocab-size --num-experts
    """,
    "gpt_oss/training/test_pretrain_gpu.py::test_optimizer_on_the_host": """
        --optimizer-cpu-offload --optimizer-offload-fraction --overlap-cpu-optimizer-d2h-h2d
        --use-precision-aware-optimizer
    """,
    "gpt_oss/training/test_resumed_schedule.py::test_batch_size_schedule": """
        --lr-warmup-fraction --lr-warmup-init
    """,
    "gpt_oss/training/test_resumed_schedule.py::test_change": """
        --lr-decay-style=WSD --lr-decay-style=constant --lr-decay-style=cosine
        --lr-decay-style=linear --lr-decay-iters --no-load-optim
    """,
    "gpt_oss/training/test_resumed_schedule.py::test_last_step_is_evaluated_once": """
        --eval-interval
    """,
    "gpt_oss/training/test_resumed_schedule.py::test_multipliers_change": """
        --exit-interval
    """,
    "gpt_oss/training/test_resumed_schedule.py::test_optimizer_left_out_of_the_checkpoint": """
        --no-save-optim
    """,
    "gpt_oss/training/test_resumed_schedule.py::test_refused": """
        --override-opt_param-scheduler --override-opt-param-scheduler
    """,
    "gpt_oss/training/test_resumed_schedule.py::test_samples": """
        --train-samples
    """,
    "gpt_oss/training/test_resumed_schedule.py::test_samples_then_iterations": """
        --step-batch-size-schedule
    """,
    "gpt_oss/training/test_resumed_schedule.py::test_schedule_of_the_checkpoint": """
        --use-checkpoint-opt_param-scheduler --use-checkpoint-opt-param-scheduler
    """,
    "gpt_oss/training/test_resumed_schedule.py::test_starts_anew": """
        --finetune
    """,
    "gpt_oss/test_router_choices.py::test_global_batch": """
        --moe-router-load-balancing-type=global_aux_loss
    """,
    "gpt_oss/arguments/test_schedules.py::test_curve": """
        --lr-decay-style --lr-wsd-decay-style
    """,
    "gpt_oss/arguments/test_te_requirements.py::test_oldest_and_unknown_versions": """
        --attention-backend
    """,
    "gpt_oss/arguments/test_te_gpu.py::test_bf16": """
        --transformer-impl=transformer_engine
    """,
    "gpt_oss/arguments/test_te_gpu.py::test_fp8": """
        --fp8-format --fp8-recipe
    """,
    "gpt_oss/arguments/test_te_gpu.py::test_fp8_router_padding": """
        --moe-router-padding-for-quantization
    """,
    "gpt_oss/training/test_writers.py::test_both_get_what_metrics_jsonl_gets": """
        --tensorboard-dir --wandb-project --wandb-exp-name --wandb-save-dir
    """,
    "test_fuzz.py::test_fresh_cases": """
        --tensor-model-parallel-size --pipeline-model-parallel-size --sequence-parallel
        --context-parallel-size --hierarchical-context-parallel-sizes
        --expert-model-parallel-size --expert-tensor-parallel-size --bf16
        --calculate-per-token-loss --recompute-granularity --recompute-method
        --recompute-num-layers --moe-router-dtype --moe-z-loss-coeff
        --moe-token-dispatcher-type=allgather --moe-token-dispatcher-type=alltoall
        --weight-decay --clip-grad --adam-beta2 --adam-eps --micro-batch-size
        --global-batch-size --train-iters --seed --lr-wsd-decay-iters --lr-warmup-iters --lr
        --min-lr --save-interval --load --grad-reduce-in-bf16 --distributed-timeout-minutes
        --pipeline-model-parallel-layout --num-virtual-stages-per-pipeline-rank
        --overlap-grad-reduce --ddp-num-buckets --ddp-bucket-size --overlap-param-gather
        --use-distributed-optimizer --cp-comm-type --eval-iters --data-path --split
        --seq-length --num-workers --dataloader-inter-document-masking --eod-mask-loss
        --vocab-size --tokenizer-type=NullTokenizer --moe-router-load-balancing-type=none
        --moe-router-load-balancing-type=seq_aux_loss --moe-aux-loss-coeff --log-interval
    """,
    "training/test_arguments_attention.py::test_softmax_in_fp32": """
        --attention-softmax-in-fp32 --no-attention-softmax-in-fp32 --spec
    """,
    "training/test_arguments_sink_attention.py::test_flag": """
        --sink-attention-backend
    """,
    "training/test_async_checkpoint.py::test_constant_structure": """
        --ckpt-assume-constant-structure
    """,
    "training/test_async_checkpoint.py::test_equals_a_synchronous_one": """
        --no-ckpt-fully-parallel-save
    """,
    "training/test_async_checkpoint.py::test_resume_at_another_layout": """
        --ckpt-step
    """,
    "training/test_non_finite.py::test_unchecked_updates_are_left_out": """
        --no-check-for-nan-in-loss-and-grad
    """,
    "training/test_parallel_losses.py::test_checkpoint_resumes": """
        --hidden-dropout --attention-dropout
    """,
    "training/test_parallel_losses.py::test_one_process": """
        --ffn-hidden-size --glu-linear-offset --activation-func-clamp-value --normalization
        --moe-ffn-hidden-size --moe-router-score-function --transformer-impl=local
        --group-query-attention --window-attn-skip-freq
        --yarn-original-max-position-embeddings --yarn-beta-fast --yarn-beta-slow
        --make-vocab-size-divisible-by --untie-embeddings-and-output-weights
        --ckpt-format=torch_dist
    """,
    "training/test_parallel_losses.py::test_router_losses": """
        --dist-ckpt-optim-fully-reshardable --moe-router-load-balancing-type=aux_loss
    """,
    "training/test_parallel_losses.py::test_skipped_iteration": """
        --iterations-to-skip
    """,
    "training/test_rope_arguments.py::test_legacy_rope_flag_is_refused": """
        --use-rotary-position-embeddings
    """,
    "training/test_rope_arguments.py::test_rope_scaling_factor": """
        --no-yarn-correction-range-round-to-int --use-rope-scaling --rope-scaling-factor
        --rotary-scaling-factor --mscale --mscale-all-dim
    """,
    "training/test_rope_arguments.py::test_yarn_flags": """
        --yarn-attention-factor
    """,
    "training/test_step_callbacks.py::test_full_validation_of_one_set": """
        --full-validation
    """,
    "training/test_validation_sets.py::test_each_corpus_has_its_loss": """
        --tokenizer-model
    """,
}

# Flags without effect on a gpt-oss run, by the reason.
INERT: dict[str, str] = {
    "for multi-token prediction, which is refused": """
        --mtp-standalone --mtp-loss-scaling-factor --mtp-use-repeated-layer --mtp-detach-heads
    """,
    "for Mamba and hybrid models": """
        --mtp-hybrid-override-pattern --is-hybrid-model --mamba-state-dim --mamba-head-dim
        --mamba-num-groups --mamba-num-heads --disable-mamba-mem-eff-path
        --mamba-training-ssm-states-dtype --hybrid-layer-pattern --hybrid-override-pattern
    """,
    "for attention variants that gpt-oss does not have": """
        --experimental-attention-variant --dsa-indexer-n-heads --dsa-indexer-head-dim
        --dsa-indexer-topk --dsa-indexer-topk-freq --dsa-indexer-skip-topk-offset
        --dsa-indexer-loss-coeff --dsa-indexer-use-sparse-loss --dsa-kernel-backend
        --dsa-indexer-rope-interleaved --no-dsa-indexer-rotate-activation
        --disable-dsa-indexer-rotate-activation --no-dsa-indexer-scoring-relu
        --disable-dsa-indexer-scoring-relu --dsa-indexer-k-norm-epsilon
        --dsa-indexer-k-norm-fp32 --linear-conv-kernel-dim --linear-key-head-dim
        --linear-value-head-dim --linear-num-key-heads --linear-num-value-heads
        --linear-attention-freq
    """,
    "for --use-mup, whose scales a gpt-oss run does not use": """
        --mup-width-mult --mup-base-hidden-size --mup-embedding-mult --mup-output-mult
        --mup-base-head-dim --mup-attn-scale-power
    """,
    "for models with shared experts, which gpt-oss does not have": """
        --moe-shared-expert-intermediate-size --moe-shared-expert-gate
        --moe-shared-expert-overlap --use-grouped-gemm-for-shared-expert
        --moe-shared-expert-glu-interleave-size
    """,
    "for DeepEP and HybridEP, which are refused": """
        --moe-flex-dispatcher-backend --moe-permute-fusion-into-hybridep
        --moe-hybridep-pad-uneven-dispatch-inputs --moe-flex-dispatcher-num-sms
        --moe-deepep-num-sms --moe-hybridep-num-sms --moe-hybridep-num-blocks-permute
        --moe-hybridep-num-blocks-unpermute --moe-hybridep-num-sms-preprocessing
        --moe-ncclep-static-shape --moe-ncclep-zero-copy
    """,
    "for CUDA graphs, which are refused": """
        --cuda-graph-warmup-steps --no-clone-scatter-output-in-embedding
        --disable-clone-scatter-output-in-embedding --delay-offload-until-cuda-graph
        --cuda-graph-modules
    """,
    "for inference": """
        --inference-cuda-graph-scope --flash-decode --batch-invariant-mode --symmetric-ar-type
        --nccl-all-reduce-for-prefill --inference-fuse-tp-communication
        --inference-disable-triton-nvls-kernels --inference-grouped-gemm-backend
        --inference-moe-disable-fused-quant-kernels --inference-moe-token-dispatcher-type
        --mlp-chunks-for-prefill --inference-rng-tracker
        --inference-batch-times-seqlen-threshold --max-tokens-to-oom
        --use-legacy-static-engine --inference-max-requests --inference-max-seq-length
        --inference-dynamic-batching --inference-dynamic-batching-buffer-size-gb
        --inference-dynamic-batching-paused-buffer-size-gb
        --inference-dynamic-batching-mamba-memory-ratio
        --inference-dynamic-batching-block-size --inference-dynamic-batching-max-requests
        --inference-dynamic-batching-max-tokens --inference-dynamic-batching-num-cuda-graphs
        --inference-dynamic-batching-track-paused-request-events
        --inference-dynamic-batching-track-generated-token-events
        --inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens
        --inference-dynamic-batching-unified-memory-level --enable-chunked-prefill
        --num-speculative-tokens --inference-dynamic-batching-prefix-caching
        --no-inference-dynamic-batching-prefix-caching
        --inference-dynamic-batching-prefix-caching-eviction-policy
        --inference-dynamic-batching-prefix-caching-coordinator-policy
        --inference-dynamic-batching-prefix-caching-routing-alpha
        --inference-dynamic-batching-prefix-caching-mamba-gb
        --inference-dynamic-batching-cuda-graph-mixed-prefill-count
        --inference-dynamic-batching-cuda-graph-sizing-distribution
        --inference-dynamic-batching-sampling-backend --use-same-sampling-seed-across-dp-ranks
        --inference-dynamic-batching-async-sched-mode
        --inference-dynamic-batching-logprobs-mode --inference-logging-step-interval
        --inference-text-gen-server-logging --no-inference-text-gen-server-logging
        --inference-wandb-logging --no-inference-wandb-logging --inference-coordinator-port
        --mamba-inference-conv-states-dtype --mamba-inference-ssm-states-dtype
        --inference-use-synchronous-zmq-collectives
        --no-inference-use-synchronous-zmq-collectives --inference-disable-ep-consensus
        --no-inference-disable-ep-consensus --inference-shards
    """,
    "for position embeddings that gpt-oss does not have": """
        --mrope-section --relative-attention-num-buckets --relative-attention-max-distance
    """,
    "for T5": """
        --decoder-num-layers --encoder-seq-length --decoder-seq-length --vocab-extra-ids
    """,
    "Megatron no longer reads it": """
        --onnx-safe --use-flash-attn --use-mcore-models --use-dist-ckpt
        --ckpt-fully-parallel-save --disable-msc
    """,
    "for BERT's retriever": """
        --bert-no-binary-head --mask-prob --short-seq-prob --ict-head-size
        --biencoder-projection-dim --biencoder-shared-query-context-model --ict-load
        --bert-load --titles-data-path --query-in-block-prob --use-one-sent-docs
        --evidence-data-path --retriever-report-topk-accuracies --retriever-score-scaling
        --block-data-path --embedding-path --indexer-batch-size --indexer-log-interval
        --output-bert-embeddings --bert-embedder-type
    """,
    "for --optimizer muon, which is refused": """
        --muon-momentum --muon-no-split-qkv --muon-nesterov --muon-scale-mode
        --muon-fp32-matmul-prec --muon-coefficient-type --muon-num-ns-steps --muon-tp-mode
        --muon-extra-scale-factor --muon-scalar-optimizer
    """,
    "for --optimizer lion, which is refused": """
        --lion-beta1 --lion-beta2
    """,
    "reinforcement learning, which pretrain_gpt_oss.py does not do": """
        --perform-rl-step --rl-prompts-per-eval --grpo-prompts-per-step --grpo-group-size
        --rl-generation-lag --rl-submission-granularity --rl-consumption-granularity
        --grpo-iterations --grpo-clamp-eps-lower --grpo-clamp-eps-upper --grpo-kl-beta
        --grpo-entropy-term-weight --grpo-filter-groups-with-same-reward --langrl-env-config
        --rl-default-temperature --rl-default-top-p --rl-default-top-k
        --rl-offload-optimizer-during-inference --rl-kv-cache-management-mode
        --rl-persist-cuda-graphs --no-rl-persist-cuda-graphs --rl-partial-rollouts
        --no-rl-partial-rollouts --rl-inference-logprobs-is-correction
        --no-rl-inference-logprobs-is-correction --rl-importance-sampling-truncation-coef
        --rl-use-sequence-packing --no-rl-use-sequence-packing
        --rl-sequence-packing-max-sequences-per-bin --rl-sequence-packing-algo
        --rl-training-cuda-graphs --no-rl-training-cuda-graphs
        --rl-inference-tensor-model-parallel-size --rl-inference-pipeline-model-parallel-size
        --rl-inference-expert-model-parallel-size
        --rl-inference-expert-tensor-model-parallel-size
        --rl-inference-model-unified-memory-level
        --rl-offload-inference-model-weights-when-idle
        --no-rl-offload-inference-model-weights-when-idle --refit-method
        --rl-verify-model-weights-swap --no-rl-verify-model-weights-swap --rl-skip-bos-token
        --no-rl-skip-bos-token --rl-profile --rl-profile-dir --rl-inference-parsers
    """,
    "for fully sharded weights, which are refused": """
        --no-strict-fsdp-dtensor-load --disable-strict-fsdp-dtensor-load
        --fsdp-manual-registration --data-parallel-sharding-strategy
        --outer-dp-sharding-strategy --fsdp-double-buffer --suggested-communication-unit-size
        --keep-fp8-transpose-cache --enable-full-sharding-in-hsdp
        --torch-fsdp2-no-reshard-after-forward --megatron-fsdp-main-params-dtype
        --megatron-fsdp-main-grads-dtype --megatron-fsdp-grad-comm-dtype
        --megatron-fsdp-enable-fine-grained-param-gather
        --megatron-fsdp-max-pool-double-buffer --fsdp-db-use-persist-buf-on-alloc-fail
    """,
    "the launcher sets it (LOCAL_RANK)": """
        --local-rank
    """,
    "for data formats that pretrain_gpt_oss.py does not read": """
        --sample-rate --chat-template --sft-tokenizer-prompt-format
    """,
    "for fill-in-the-middle data, which is refused": """
        --fim-rate --fim-spm-rate --fim-split-sample --fim-fragment-rate --fim-no-prefix
        --fim-prefix-token --fim-middle-token --fim-suffix-token --fim-pad-token
        --fim-eod-token
    """,
    "for tokenizers that gpt-oss does not use": """
        --vocab-file --merge-file --tiktoken-pattern --tiktoken-num-special-tokens
        --tokenizer-sentencepiece-legacy --no-tokenizer-sentencepiece-ignore-extra-whitespaces
        --disable-tokenizer-sentencepiece-ignore-extra-whitespaces
    """,
    "for NVIDIA's own clusters": """
        --adlr-autoresume --adlr-autoresume-interval
    """,
    "for vision models": """
        --num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction
        --data-per-class-fraction --no-data-sharding --head-lr-mult --vision-pretraining
        --vision-pretraining-type --vision-backbone-type --swin-backbone-type --mask-type
        --mask-factor --iter-per-epoch --dino-local-img-size --dino-local-crops-number
        --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer
        --dino-norm-last-layer --dino-warmup-teacher-temp --dino-teacher-temp
        --dino-warmup-teacher-temp-epochs
    """,
    "for multi-latent attention, which gpt-oss does not have": """
        --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim
        --cache-mla-latents --mla-down-proj-fusion
    """,
    "for Megatron's straggler detection, which --log-straggler enables": """
        --straggler-ctrlr-port --straggler-minmax-count --disable-straggler-on-startup
    """,
    "for NVIDIA's own one_logger service": """
        --no-one-logger --one-logger-project --one-logger-run-name --one-logger-async
        --app-tag-run-name --app-tag-run-version
    """,
    "for --inprocess-restart, which is refused": """
        --inprocess-max-iterations --inprocess-monitor-thread-interval
        --inprocess-monitor-process-interval --inprocess-progress-watchdog-interval
        --inprocess-heartbeat-interval --inprocess-soft-timeout --inprocess-hard-timeout
        --inprocess-heartbeat-timeout --inprocess-barrier-timeout
        --inprocess-completion-timeout --inprocess-last-call-wait
        --inprocess-termination-grace-time --inprocess-granularity
        --inprocess-active-world-size --inprocess-empty-cuda-cache
    """,
    "for --enable-ft-package, which is refused": """
        --calc-ft-timeouts --ft-num-warmup-iters
    """,
}

# Flags that no test runs, by what is known of them.
UNTESTED: dict[str, str] = {
    "no test runs it here": """
        --tensor-parallel-num-weight-shards --pipeline-model-parallel-comm-backend
        --expert-tensor-parallel-num-weight-shards --no-initialization
        --cross-entropy-loss-fusion --overlap-dispatch-backward-with-experts-wgrad
        --ep-overlap-early-attn-memory-release --use-ring-exchange-p2p
        --defer-embedding-wgrad-compute --wgrad-deferral-limit
        --overlap-p2p-communication-warmup-flush
        --microbatch-group-size-per-virtual-pipeline-stage
        --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
        --flash-attention-version --fp32-residual-connection
        --apply-residual-connection-post-layernorm --apply-layernorm-1p --rotary-interleaved
        --embedding-init-method-std --init-model-with-meta-device --use-mup
        --disable-bf16-reduced-precision-matmul --use-fused-weighted-squared-relu
        --fused-residual-rmsnorm --distribute-saved-activations
        --high-priority-a2a-comm-stream --moe-enable-routing-replay
        --moe-router-padding-for-fp8 --moe-router-num-groups --moe-router-group-topk
        --moe-router-pre-softmax --moe-router-topk-scaling-factor --moe-router-force-biased
        --use-grouped-gemm-for-dense-mlp --moe-single-grouped-weight --moe-single-grouped-bias
        --moe-input-jitter-eps --moe-per-layer-logging --moe-expert-capacity-factor
        --moe-pad-expert-input-to-capacity --moe-pad-experts-for-cuda-graph-inference
        --moe-token-drop-policy --moe-layer-recompute --moe-apply-probs-on-input
        --moe-latent-size --moe-mlp-glu-interleave-size --moe-expert-rank-capacity-factor
        --config-logger-dir --encoder-num-layers --yarn-correction-range-round-to-int
        --rotary-percent --rotary-seq-len-interpolation-factor --no-rope-freq
        --no-position-embedding --openai-gelu --squared-relu --apply-wd-to-qk-layernorm
        --no-weight-decay-cond-type --profile --profile-step-start --profile-step-end
        --use-pytorch-profiler --pytorch-profiler-collect-shapes
        --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra --profile-ranks
        --record-memory-history --memory-snapshot-path --record-shapes --nvtx-ranges
        --decrease-batch-size-if-needed --check-weight-hash-across-dp-replicas-interval
        --gpu-sniff-test-interval --exit-signal-handler-for-dataloader
        --exit-signal-handler-for-training --result-rejected-tracker-filename
        --use-torch-optimizer-for-cpu-offload --dump-param-to-param-group-map
        --no-pin-cpu-grads --no-pin-cpu-params --data-parallel-random-init
        --init-method-xavier-uniform --decoupled-lr --decoupled-min-lr --freeze-all-layers
        --save-params-interval --save-activations-interval --save-tokens-per-expert-interval
        --save-wgrads-interval --save-dgrads-interval --load-main-params-from-ckpt
        --non-persistent-save-interval --non-persistent-ckpt-type
        --non-persistent-global-ckpt-dir --non-persistent-local-ckpt-dir
        --non-persistent-local-ckpt-algo --no-use-tokenizer-model-from-checkpoint-args
        --disable-use-tokenizer-model-from-checkpoint-args --ckpt-convert-format
        --ckpt-convert-save --ckpt-convert-update-legacy-dist-opt-format
        --async-ckpt-cpu-priority --async-ckpt-io-priority --async-ckpt-use-cpu-shm
        --ckpt-fully-parallel-load-exchange-algo --ckpt-fully-parallel-save-process-group
        --ckpt-fully-parallel-load-process-group --no-ckpt-load-validate-sharding-integrity
        --disable-ckpt-load-validate-sharding-integrity --dist-ckpt-save-pre-mcore-014
        --distrib-optim-fully-reshardable-mem-efficient --replication --replication-jump
        --replication-factor --verify-integrity --no-stream-ckpt-dequant
        --disable-stream-ckpt-dequant --override-ckpt-iteration --dist-ckpt-format
        --loss-scale --min-loss-scale --loss-scale-window --hysteresis --fp16-lm-cross-entropy
        --reuse-grad-buf-for-mxfp8-param-ag --lazy-mpu-init --nccl-communicator-config-path
        --use-tp-pp-dp-mapping --use-sharp --sharp-enabled-group --high-priority-stream-groups
        --flight-recorder-dump-path --flight-recorder-trace-buffer-size
        --no-flight-recorder-dump-on-timeout --disable-flight-recorder-dump-on-timeout
        --flight-recorder-include-stack-trace --no-flight-recorder-include-only-active
        --disable-flight-recorder-include-only-active --no-flight-recorder-extra-dump-on-exec
        --disable-flight-recorder-extra-dump-on-exec --decoder-first-pipeline-num-layers
        --decoder-last-pipeline-num-layers --ddp-pad-buckets-for-high-nccl-busbw
        --ddp-reduce-scatter-with-fp32-accumulation
        --ddp-param-name-patterns-for-fp32-local-accumulation
        --overlap-param-gather-with-optimizer-step --no-use-layer-wise-param-layout
        --use-nccl-ub --disable-symmetric-registration --create-all-gather-group
        --no-gradient-reduce-div-fusion --num-distributed-optimizer-instances
        --phase-transition-iterations --data-args-path --per-split-data-args-path
        --per-dataset-sequences-path --dataloader-fast-cache-load
        --dataloader-defer-npy-index-mmap --object-storage-cache-path
        --allow-ambiguous-pad-tokens --no-pad-vocab-size --disable-pad-vocab-size
        --tokenizer-metadata --tokenizer-special-tokens --tokenizer-hf-no-use-fast
        --tokenizer-hf-no-include-special-tokens --null-tokenizer-eod-id
        --null-tokenizer-pad-id --moe-layer-freq --moe-use-upcycling
        --moe-upcycling-granularity --heterogeneous-layers-config-path
        --heterogeneous-layers-config-encoded-json --log-energy --moe-routing-trace-path
        --moe-routing-trace-max-training-iters --moe-routing-trace-capture-logits
        --moe-routing-trace-capture-hidden-states --moe-routing-trace-dump-weights
        --logits-save-top-k --logits-save-top-p --logits-save-top-p-min-k --logits-save-dir
        --logits-save-dtype --logits-load-dir --logits-load-decode-threads
        --logits-load-prefetch-factor --logits-load-msc-prefetch-depth
        --logits-load-kd-loss-alpha --logits-load-ignore-errors --log-straggler
        --run-workload-inspector-server --enable-experimental --main-grads-dtype
        --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype --enable-msc
    """,
    (
        "no test splits samples of different lengths over ranks; to pack documents of any "
        "length use --dataloader-inter-document-masking"
    ): """
        --max-seqlen-per-dp-cp-rank --hybrid-context-parallel
    """,
    "TransformerEngine has it, and no test runs it here": """
        --tp-comm-overlap --no-tp-comm-bulk-wgrad --disable-tp-comm-bulk-wgrad
        --no-tp-comm-bulk-dgrad --disable-tp-comm-bulk-dgrad --no-tp-comm-overlap-ag
        --disable-tp-comm-overlap-ag --no-tp-comm-overlap-rs --disable-tp-comm-overlap-rs
        --tp-comm-overlap-rs-dgrad --no-tp-comm-split-ag --disable-tp-comm-split-ag
        --no-tp-comm-split-rs --disable-tp-comm-split-rs --cross-entropy-fusion-impl
        --tp-comm-bootstrap-backend --use-transformer-engine-op-fuser --fp8-quantizer-factory
        --fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo
        --no-fp8-wgrad --disable-fp8-wgrad --fp8-output-proj --first-last-layers-bf16
        --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16 --use-kitchen-attention
        --kitchen-attention-backend --fp4-format --fp4-recipe --fp4-quantizer-factory
        --moe-permute-fusion --moe-router-fusion --use-te-activation-func
        --tp-comm-overlap-cfg --optimizer-cuda-graph --te-rng-tracker
        --log-max-attention-logit --fp4-param-gather --fp8-param-gather
        --te-precision-config-file
    """,
    "no test offloads activations to CPU memory": """
        --cpu-offloading-num-layers --cpu-offloading-retain-pinned-cpu-buffers
        --fine-grained-activation-offloading --offload-modules --min-offloaded-tensor-size
        --delta-offload-bytes-across-pp-ranks --activation-offload-fraction --moe-paged-stash
        --moe-paged-stash-page-size --moe-paged-stash-buffer-size-factor-cuda
        --moe-paged-stash-buffer-size-factor-cpu
        --fine-grained-offloading-max-inflight-offloads
    """,
    "gpt-oss predicts one token, and no preset has multi-token prediction layers": """
        --mtp-num-layers
    """,
    "the attention of gpt-oss, in the presets and in Hugging Face, does not have it": """
        --add-qkv-bias --qk-layernorm --qk-l2-norm --qk-clip --qk-clip-alpha
        --qk-clip-threshold --attention-output-gate --multi-latent-attention
        --apply-query-key-layer-scaling
    """,
    "gpt-oss routes by a softmax, and balancing by an expert bias is for other routers": """
        --moe-router-enable-expert-bias --moe-router-bias-update-rate
        --moe-router-quantile-balancing-ema
    """,
    "DeepEP and HybridEP need packages and GPUs on which no test runs here": """
        --moe-token-dispatcher-type --moe-enable-deepep
    """,
    "it needs a GPU, and no test captures a gpt-oss step in a CUDA graph": """
        --enable-cuda-graph --external-cuda-graph --cuda-graph-impl --cuda-graph-scope
        --decode-only-cuda-graphs
    """,
    "no test runs this implementation here": """
        --transformer-impl
    """,
    (
        "no test runs this optimizer here, and all but adam and sgd need the package "
        "emerging-optimizers"
    ): """
        --optimizer
    """,
    "its files have no hashes, so damage is not detected; torch_dist has them": """
        --ckpt-format --auto-detect-ckpt-format
    """,
    (
        "no test runs nvidia-resiliency-ext here, and its files have no hashes; --async-save alone "
        "writes in the background"
    ): """
        --async-strategy --use-persistent-ckpt-worker
    """,
    "it needs --ckpt-format fsdp_dtensor, which gptoss convert does not read, and a GPU": """
        --use-megatron-fsdp
    """,
    (
        "it needs a GPU and changes the checkpoint format; on the CPU Megatron fails with an "
        "AttributeError"
    ): """
        --use-torch-fsdp2
    """,
    "it is for failure tests": """
        --fake-process-group --test-mode --error-injection-rate --error-injection-type
        --fault-injector-ranks --fault-injector-num-ranks --fault-injector-fault-types
        --fault-injector-fault-probabilities --fault-injector-fault-delay
        --fault-injector-delay-start-iteration --fault-injector-mtti-seconds
        --fault-injector-offset-seconds --fault-injector-seed
    """,
    "gpt-oss uses a different tokenizer": """
        --tokenizer-type
    """,
    "no test runs this load balancing here": """
        --moe-router-load-balancing-type
    """,
    "it needs a GPU, and no test runs it there; on the CPU it fails with a KeyError": """
        --log-memory-to-tensorboard
    """,
    "it needs the package nvidia-ml-py and a GPU, and no test runs it there": """
        --log-device-memory-used
    """,
    (
        "it needs nvidia-resiliency-ext and a GPU, and parses the command line a second time "
        "without our flags"
    ): """
        --inprocess-restart --enable-ft-package
    """,
}

# Flags that do not do what they say, or end a run, by the reason.
WRONG: dict[str, str] = {
    "Megatron ignores it. Give --step-batch-size-schedule": """
        --rampup-batch-size
    """,
    (
        "it is an old name. Give --pipeline-model-parallel-size, "
        "--tensor-model-parallel-size, --micro-batch-size, --lr-warmup-fraction or "
        "--recompute-granularity"
    ): """
        --batch-size --checkpoint-activations --warmup --model-parallel-size
    """,
    (
        "it overrides checked arguments with those of the checkpoint. Give --preset and the "
        "layout flags"
    ): """
        --use-checkpoint-args --use-mp-args-from-checkpoint-args
    """,
    (
        "documents are packed by --dataloader-inter-document-masking, and fill-in-the-middle "
        "needs tokens that gpt-oss does not have. Drop it"
    ): """
        --fim-data
    """,
    "it replaces all arguments, including those of --preset. Give --recipe FILE": """
        --yaml-cfg
    """,
}
