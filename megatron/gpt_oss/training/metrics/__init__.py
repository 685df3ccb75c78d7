# Copyright (c) 2026, the megatron-core gptoss authors.

"""What a run measures, and where it goes: log, metrics.jsonl, trackers, plots, report."""
