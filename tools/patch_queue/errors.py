# Copyright (c) 2026, the megatron-core gptoss authors.


class QueueError(Exception):
    """A problem that the user can solve; the message names the problem and a remedy."""
