# Copyright (c) 2026, the megatron-core gptoss authors.


class QueueError(Exception):
    """A problem that the user can solve; the message says what was found and what to do."""
