# Copyright (c) 2026, the megatron-core gptoss authors.

"""A forked command against the same command in a new Python process, and its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.harness import commands

# What both ways have to do alike: (name, program, words, environment, standard input).
LOOK = """
import multiprocessing, os, sys
print(__name__, sys.argv, os.getcwd(), os.environ.get('INVENTED'), 'HOME' in os.environ)
print(sys.path[0], globals().get('__file__'), sys.modules['__main__'].__dict__ is globals())
print(multiprocessing.current_process().name, multiprocessing.parent_process())
print(multiprocessing.get_start_method(allow_none=True), multiprocessing.get_start_method())
print(sys.stdin.read(), sys.stdout.isatty(), sys.stdout.encoding, sys.stderr.errors)
"""
CASES = {
    "seen": LOOK,
    "status 3": "import sys; print('before'); sys.exit(3)",
    "status 300": "import sys; sys.exit(300)",
    "status -1": "raise SystemExit(-1)",
    "status None": "import sys; sys.exit()",
    "status a sentence": "import sys; print('out'); sys.exit('error: no such thing')",
    "status an object": "import sys; sys.exit((1, 2))",
    "traceback": "def inner():\n    {}['key']\ninner()",
    "cause": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('b') from error",
    "excepthook": "import sys\nsys.excepthook = lambda *e: print('hook', e[0].__name__)\nx",
    "syntax": "print(1",
    "interrupted": "raise KeyboardInterrupt",
    "atexit": "import atexit; atexit.register(print, 'last'); print('first'); 1 / 0",
    "thread": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n"
        "print('main')"
    ),
    "killed": "import os; print(1, flush=True); os.kill(os.getpid(), 9)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "_exit": "import os; print('lost', end=''); os._exit(4)",
    "much": "import sys\nfor i in range(30000): print('o' * 9, i); print('e', i, file=sys.stderr)",
    "left open": "f = open('left', 'w'); f.write('kept')",
    "full": "import sys; sys.stdout = open('/dev/full', 'w'); print('x')",
    "child": (
        "import multiprocessing as m\n"
        "p = m.get_context('fork').Process(target=print, args=('child',)); p.start(); p.join()\n"
        "print(p.exitcode, m.active_children())"
    ),
    "spawned": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(5)'])",
    "warning": "import warnings; warnings.warn('shown'); warnings.warn('hidden', ResourceWarning)",
    "random": "import random, numpy; print(len({random.random(), numpy.random.rand()}))",
}


def both(command, **options):
    """Results of a forked command and of a new process."""
    command = [sys.executable, *command]
    forked = commands.run(command, **options)
    return forked, subprocess.run(command, **options)


@pytest.mark.parametrize("program", CASES.values(), ids=CASES)
def test_as_a_process_of_its_own(tmp_path, program):
    """Streams, status, traceback."""
    (tmp_path / "script.py").write_text(program)
    environ = {**os.environ, "INVENTED": "a"}
    environ.pop("HOME", None)  # which the server has
    options = dict(cwd=tmp_path, env=environ, input="given", capture_output=True, text=True)
    forked, own = both([tmp_path / "script.py", "a", "--b c"], **options)
    assert forked.returncode == own.returncode
    assert forked.stdout == own.stdout and forked.stderr == own.stderr
    assert own.stdout or own.stderr or own.returncode or program.startswith(("import sys", "f ="))
    if program.startswith("f ="):
        assert (tmp_path / "left").read_text() == "kept"


@pytest.mark.parametrize(
    "words",
    [
        ("-c", LOOK, "a", "-b"),
        ("-W", "ignore", "-c", 'import warnings; warnings.warn("x"); x'),
        ("-W", "error", "-c", 'import warnings; warnings.warn("x")'),
        ("-m", "package.module", "a"),
        ("-m", "package", "b"),
        ("-m", "package.absent"),
        ("absent.py",),
    ],
    ids=lambda words: " ".join(words[-2:])[-20:],
)
def test_ways_to_name_a_program(tmp_path, words):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    for name in ("module", "__main__"):
        text = f"print(__package__, __spec__.name)\nfrom . import __path__\n{LOOK}"
        (tmp_path / "package" / f"{name}.py").write_text(text)
    forked, own = both(words, cwd=tmp_path, input="", capture_output=True, text=True)
    assert (forked.returncode, forked.stdout, forked.stderr) == (
        own.returncode,
        own.stdout,
        own.stderr,
    )


def test_python_path(tmp_path):
    """Its directories come first, and none of the tests' own."""
    (tmp_path / "invented.py").write_text("print('imported')")
    program = "import invented, sys; print(sys.path[1:])"
    options = dict(cwd="/", capture_output=True, text=True)
    forked, own = both(["-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path)}, **options)
    assert forked.returncode == 0 and forked.stdout == own.stdout
    forked, own = both(["-c", program], **options)
    assert forked.returncode == own.returncode == 1 and forked.stderr == own.stderr


def test_files_and_merged_streams(tmp_path):
    program = (
        "import os, sys; print('a', flush=True); print('b', file=sys.stderr); os.system('echo c')"
    )
    with open(tmp_path / "out", "w") as out:
        done = commands.run(
            [sys.executable, "-c", program], stdout=out, stderr=subprocess.STDOUT, check=True
        )
    assert (tmp_path / "out").read_text() == "a\nb\nc\n" and done.stdout is None
    with pytest.raises(subprocess.CalledProcessError):
        commands.run([sys.executable, "-c", "1 / 0"], stderr=subprocess.DEVNULL, check=True)


def test_torch_is_there_already():
    """What this is for; and the threads are those of the environment."""
    program = (
        "import sys; print('torch' in sys.modules, 'megatron.training.training' in sys.modules);"
        "import torch; print(torch.get_num_threads())"
    )
    environ = {**os.environ, "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-c", program]
    done = commands.run(command, env=environ, capture_output=True, text=True)
    assert done.stdout == "True True\n3\n", done.stderr


WAITS = """
import signal, subprocess, sys, time
if sys.argv[1:] == ['saves']:
    signal.signal(signal.SIGUSR1, lambda *_: (print('saved'), sys.exit(5)))
child = subprocess.Popen(['sleep', '600'])
print(child.pid, flush=True)
time.sleep(600)
"""


def started(*words):
    command = [sys.executable, "-c", WAITS, *words]
    process = commands.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def gone(pid):
    """Whether the process ends within a short time; a zombie counts as ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_signals():
    process, child = started("saves")
    with process:
        assert process.poll() is None and os.getsid(process.pid) == process.pid
        assert os.getsid(process.pid) != os.getsid(0)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=20) == 5 and process.stdout.readline() == "saved\n"
    assert gone(child)  # at the end of the block
    process, child = started()
    process.kill()
    assert process.wait(timeout=20) == -signal.SIGKILL and process.poll() == -signal.SIGKILL
    assert not psutil.pid_exists(process.pid)
    process.close()
    assert gone(child)


def test_a_command_that_hangs_is_ended():
    """A command that hangs is ended together with its child processes."""
    command = [sys.executable, "-c", WAITS]
    with pytest.raises(subprocess.TimeoutExpired) as expired:
        commands.run(command, capture_output=True, timeout=1)
    assert gone(int(expired.value.stdout))


TESTS = """
import multiprocessing, os, subprocess, sys
from tests.harness import commands
if __name__ == '__main__':
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tests.harness.commands'])
    commands._context = lambda: context
    sleep = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'
    process = commands.Popen([sys.executable, '-c', sleep], stdout=subprocess.PIPE)
    print(process.stdout.readline().decode(), end='', flush=True)
    if sys.argv[1] == 'killed':
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_nothing_outlives_the_tests(how):
    """A server of its own, which is quick, for it imports neither torch nor Megatron."""
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-c", TESTS, how],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == (0 if how == "ended" else -signal.SIGKILL)
    assert gone(int(done.stdout))


def test_ranks():
    """Together, each with its variables; what one prints is its own."""
    program = (
        'import os, torch, torch.distributed as d; d.init_process_group("gloo")\n'
        'x = torch.ones(1); d.all_reduce(x); print(os.environ["LOCAL_RANK"], x.item())'
    )
    done = commands.run_ranks([sys.executable, "-c", program], 2, text=True, timeout=60)
    assert [rank.stdout for rank in done] == ["0 2.0\n", "1 2.0\n"], done[0].stderr
    assert [rank.returncode for rank in done] == [0, 0]


def test_triton_in_its_interpreter(tmp_path):
    """It is imported with the variable; the next command is forked from the usual server."""
    pytest.importorskip("triton")
    (tmp_path / "script.py").write_text(
        "import sys, triton\n@triton.jit\ndef kernel(x): pass\n"
        "print(type(kernel).__name__, 'megatron.training.training' in sys.modules)"
    )
    for value, name in (("1", "InterpretedFunction"), (None, "JITFunction")):
        environ = {**os.environ, **({"TRITON_INTERPRET": value} if value else {})}
        command = [sys.executable, tmp_path / "script.py"]
        done = commands.run(command, env=environ, capture_output=True, text=True)
        assert done.stdout == f"{name} True\n", done.stderr


def test_a_rank_that_fails_ends_the_others():
    program = (
        "import os, sys, time\n"
        'if os.environ["RANK"] == "1": sys.exit("error: rank 1")\n'
        "time.sleep(600)"
    )
    done = commands.run_ranks([sys.executable, "-c", program], 3, text=True, timeout=60)
    assert [rank.returncode for rank in done] == [-signal.SIGTERM, 1, -signal.SIGTERM]
    assert done[1].stderr == "error: rank 1\n"
    waits = [sys.executable, "-c", WAITS]
    with pytest.raises(subprocess.TimeoutExpired):
        commands.run_ranks(waits, 2, text=True, timeout=0.5)


def test_stand_in_of_a_program_in_a_shell_script(tmp_path):
    """Words, streams, directory, variables and status reach the script's Python and its shell."""
    (tmp_path / "bin").mkdir()
    program = (
        "import os, sys\nprint('torch' in sys.modules, sys.argv[1:], os.getcwd(), "
        "sys.stdin.read())\nprint(os.environ['GIVEN'], "
        "file=sys.stderr)\nsys.exit(int(sys.argv[1]))\n"
    )
    (tmp_path / "invented").write_text(program)
    text = 'cd /; GIVEN=a invented 0 "b  c" <<< in && GIVEN=d invented 3 </dev/null; echo status $?'
    environ = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    with commands.stand_in(tmp_path / "invented", tmp_path / "bin"):
        done = subprocess.run(["bash", "-c", text], env=environ, capture_output=True, text=True)
    first, second = "True ['0', 'b  c'] / in\n\n", "True ['3'] / \n"
    assert done.stdout == f"{first}{second}status 3\n" and done.stderr == "a\nd\n"


@pytest.mark.parametrize(
    "command, options, words",
    [
        (["git", "log"], {}, "git is not this Python"),
        ([sys.executable, "-X", "dev", "x.py"], {}, "only -W, -c, -m and a script"),
        ([sys.executable, "-c"], {}, "only -W, -c, -m and a script"),
        ([sys.executable, "x.py"], {"env": {"LD_PRELOAD": "x.so"}}, "LD_PRELOAD is read"),
        ([sys.executable, "x.py"], {"env": {"PYTHONHASHSEED": "1"}}, "PYTHONHASHSEED is read"),
        ([sys.executable, "x.py"], {"shell": True}, "not for a forked command"),
    ],
)
def test_what_only_a_python_that_starts_shows_is_refused(command, options, words):
    if "env" in options:
        options = {"env": {**os.environ, **options["env"]}}
    with pytest.raises(ValueError, match=words):
        commands.run(command, **options)
