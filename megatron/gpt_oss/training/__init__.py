# Copyright (c) 2026, the megatron-core gptoss authors.
"""A training run, around Megatron's training loop.

pretrain.py      main function; forward_step.py: batch and loss; datasets.py
run_dir.py       directory of the run; run_lock.py: one run at a time
run_start.py     checkpoint or weights to start from; launcher_variables.py: torchrun's variables
run_record.py    run.json (run_file.py reads it); resume_rules.py: what may change on resume
parameter_patterns.py    --freeze, --lr-multiplier
output_processor.py      chunked loss
checkpoint_retention.py  --keep-checkpoints
corpus_usage.py          samples that a run takes from each corpus
signals.py               SIGTERM and SIGUSR1; failure_messages.py: messages of failed runs
metrics/                 log, metrics.jsonl, TensorBoard and Weights & Biases, plot, report
"""
