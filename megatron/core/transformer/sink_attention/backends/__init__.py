# Copyright (c) 2026, the megatron-core gptoss authors.

"""One file a kernel; the interface is in base.py."""
