# Copyright (c) 2026, the megatron-core gptoss authors.

"""Several gloo ranks for a test module, started once and shared by its tests.

    pytestmark = pytest.mark.ranks(4)  # processes in the pool; 2 without the line

    def test_sum(ranks):
        assert ranks.run(all_reduce_one, world_size=2) == [2.0, 2.0]

Each process needs seconds to import torch and Megatron, so the ranks stay alive between tests.
After a call a rank destroys Megatron's globals and the process groups. A rank that raises ends the
call with its traceback. A call that exceeds its timeout ends with the stack of every rank that
hangs. The ranks are then replaced, because the others may wait in a collective.
"""

import faulthandler
import gc
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, Callable, Dict, List

PROCESS_GROUP_TIMEOUT = timedelta(seconds=60)


def free_port() -> int:
    """A free TCP port.

    Below the range from which the kernel takes the ports of outgoing connections: gloo opens many,
    and one of them could take the port between this look and the rank that listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def host_store() -> tuple:
    """(a TCPStore of this process, the variables with which ranks connect to it).

    torchrun hosts the store of its ranks in the same way. A store of rank 0 may start after another
    rank tries to connect, which then waits half a second before it tries again.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    return store, {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}


class RankFailure(AssertionError):
    """One rank raised or hung; the message holds its traceback."""


class RankPool:
    """`size` processes that run a function as ranks 0 .. world_size - 1.

    Args:
        size: the largest world size that a test of the module needs.
        threads: OMP_NUM_THREADS of each rank.
    """

    def __init__(self, size: int, threads: int = 1):
        self.size = size
        self.threads = threads
        self._processes: List[multiprocessing.Process] = []
        self._pipes: List[Any] = []
        self._stack_files: List[str] = []

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def run(
        self,
        function: Callable,
        *args,
        world_size: int,
        timeout: float = 600,
        init_process_group: bool = True,
        **kwargs,
    ) -> List[Any]:
        """Call function(*args, **kwargs) in every rank and return the results in rank order.

        Args:
            function: a function of a module's top level (it is pickled by name).
            world_size: ranks that take part, at most the pool's size.
            timeout: seconds until the call counts as hung.
            init_process_group: False where the function makes the default group itself, as
                pretrain() does; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are set.

        Raises:
            RankFailure: if a rank raised, died or did not return in time.
        """
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size is {world_size}, but this pool has {self.size} ranks.")
        self._start()
        self._store, variables = host_store()
        for rank in range(world_size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                **variables,
            }
            self._pipes[rank].send((function, args, kwargs, environment, init_process_group))
        return self._collect(world_size, time.monotonic() + timeout, timeout)

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            _kill_session(process.pid)
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        for name in self._stack_files:
            os.unlink(name)
        self._processes, self._pipes, self._stack_files = [], [], []

    def _start(self) -> None:
        if self._processes:
            return
        context = _context()
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            handle, stack_file = tempfile.mkstemp(suffix=".stack")
            os.close(handle)
            process = context.Process(
                # Not a daemon: what it runs may start processes of its own.
                target=_serve,
                args=(theirs, stack_file, list(sys.path), environment),
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
            self._stack_files.append(stack_file)

    def _collect(self, world_size: int, deadline: float, timeout: float) -> List[Any]:
        results: List[Any] = [None] * world_size
        failures: List[str] = []
        waiting = {self._pipes[rank]: rank for rank in range(world_size)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready and failures:
                break
            if not ready:
                hung = sorted(waiting.values())
                stacks = self._stacks(hung)
                self.close()
                raise RankFailure(f"Ranks {hung} did not return within {timeout:g} s.\n{stacks}")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    succeeded, results[rank] = pipe.recv()
                    if not succeeded:
                        failures.append(f"Rank {rank} of {world_size} failed.\n{results[rank]}")
                except EOFError:
                    self._processes[rank].join(5)
                    code = self._processes[rank].exitcode
                    failures.insert(0, f"Rank {rank} of {world_size} died with exit code {code}.")
                if failures:
                    # The others follow when their peer is gone, or hang: wait a moment for them.
                    deadline = min(deadline, time.monotonic() + 1)
        if failures:
            self.close()
            # What the others say of the lost peer is worth one line each.
            others = [text.rstrip().splitlines() for text in failures[1:]]
            others = [f"{lines[0]} {lines[-1] if len(lines) > 1 else ''}" for lines in others]
            raise RankFailure("\n".join([failures[0], *others]))
        for rank in range(world_size):
            self._pipes[rank].send(None)  # everybody has returned: take down what the call left
        return results

    def _stacks(self, ranks: List[int]) -> str:
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        stacks = []
        for rank in ranks:
            with open(self._stack_files[rank]) as file:
                stacks.append(f"--- rank {rank}\n{file.read()}")
        return "\n".join(stacks)


def _context():
    """Forked from a server that has imported torch and Megatron: seconds a rank less.

    Not with CUDA, which the imports initialise and a forked process cannot use then.
    """
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.rank_imports"])
    return context


def _serve(pipe, stack_file: str, path: List[str], environment: Dict[str, str]) -> None:
    """Body of one rank: run what comes through the pipe until it is closed."""
    import torch

    os.setsid()  # So that the pool can end what the rank starts, too.
    os.environ.clear()  # The server's is of the time when it was started.
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    threading.Thread(target=_follow_parent, daemon=True).start()
    sys.path[:] = path
    stacks = open(stack_file, "w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return _kill_session(os.getpid())
        try:
            # Unpickled here, so that an import error of the test module is reported too.
            call = _loads(message)
            if call is None:
                _tear_down()
                continue
            function, args, kwargs, environment, init_process_group = call
            os.environ.update(environment)
            pipe.send((True, _call(function, args, kwargs, init_process_group)))
        except BaseException:  # SystemExit too: argparse and Megatron call sys.exit().
            # Told before anything is taken down, so that the cause comes before what the other
            # ranks say of the lost connection. The pool replaces this process.
            pipe.send((False, traceback.format_exc()))


def _follow_parent() -> None:
    """End this rank when the test process is gone, even in the middle of a collective."""
    wait([multiprocessing.parent_process().sentinel])
    _kill_session(os.getpid())


def _kill_session(leader: int) -> None:
    try:
        # Not the caller's own group, should the rank not have made its session yet.
        if os.getpgid(leader) == leader:
            os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _loads(message: bytes):
    from multiprocessing.reduction import ForkingPickler

    return ForkingPickler.loads(message)


def _call(function, args, kwargs, init_process_group: bool):
    import torch

    if init_process_group:
        torch.distributed.init_process_group("gloo", timeout=PROCESS_GROUP_TIMEOUT)
    # Groups go when every rank has returned. A group of gloo whose peer is gone already keeps a
    # thread busy, and with dozens of them the last rank hardly gets on.
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda group=None: None
    try:
        return function(*args, **kwargs)
    finally:
        torch.distributed.destroy_process_group = destroy


def _tear_down() -> None:
    """Destroy the state that a call left in this process, before the next call."""
    import torch

    if "megatron.training.training" in sys.modules:
        sys.modules["megatron.training.training"].destroy_global_state()
    elif "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    if "megatron.training.async_utils" in sys.modules:  # it counts saves, alike on all ranks
        sys.modules["megatron.training.async_utils"]._async_calls_queue = None
    if "megatron.core.tensor_parallel.random" in sys.modules:
        random = sys.modules["megatron.core.tensor_parallel.random"]
        random.initialize_rng_tracker(force_reset=True)
    if "megatron.core.transformer.moe.moe_logging" in sys.modules:  # sized for this model's layers
        sys.modules["megatron.core.transformer.moe.moe_logging"].destroy_moe_metrics_tracker()
    if "megatron.core.optimizer.optimizer" in sys.modules:
        # Its views of parameters are in cycles through C++ that are never collected, and with them
        # the model and every process group with its threads.
        optimizer = sys.modules["megatron.core.optimizer.optimizer"].MegatronOptimizer
        for found in gc.get_objects():
            if issubclass(type(found), optimizer):
                vars(found).clear()
    groups = []
    if torch.distributed.is_initialized():
        groups.extend(torch.distributed.distributed_c10d._world.pg_map)
        torch.distributed.destroy_process_group()
    # Models in reference cycles hold process groups, and a group whose peers are gone keeps a
    # thread of gloo's busy.
    gc.collect()
    # The last reference to a group waits for its thread, which looks up every 10 ms: dozens of
    # groups end together, not one after another.
    threads = [threading.Thread(target=groups.pop) for _ in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
