# Copyright (c) 2026, the megatron-core gptoss authors.

"""The command line of a run: flags, their ledger, one parse, what is refused, recipes."""
