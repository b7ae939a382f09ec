"""Runs `colossalai run`, with its handling of arguments, environment, signals and exit status corrected."""

import contextlib
import fnmatch
import importlib
import io
import json
import multiprocessing.connection
import os
import re
import select
import shlex
import signal
import socket
import sys
import threading
import time
import types

from vit.watch import LOST, SECONDS_TO_SAVE, keep_alive

READ_ENVIRONMENT = "--environment-from-stdin"
# What other machines get, apart from LAUNCH_ENV: variables that a training reads and that hold no secret. An
# asterisk stands for any end.
SENT = (
    "CUBLAS_* CUDA_* CUDNN_* GLOO_* KMP_* MKL_* NCCL_* OMP_* OPENBLAS_* PYTORCH_* TORCH_* TORCHINDUCTOR_* "
    "PYTHONPATH PYTHONUNBUFFERED PYTHONHASHSEED TOKENIZERS_PARALLELISM TRANSFORMERS_OFFLINE "
    "HF_HOME HF_HUB_CACHE HF_DATASETS_CACHE HF_HUB_OFFLINE HF_DATASETS_OFFLINE HF_ENDPOINT XDG_CACHE_HOME "
    "DATA PROGRESS COLUMNS VIT_*"
)


def import_cli():
    """Import the command line of Colossal-AI (seconds), without its warnings on packages not used here.

    Its other command, `colossalai check`, imports what compiles kernels: half a second that no run needs.
    """
    check = types.ModuleType("colossalai.cli.check")
    check.check = importlib.import_module("click").Command("check")
    sys.modules[check.__name__] = check
    with contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module("colossalai.cli").cli


def agent_status(code, host):
    """Exit status for ``code``, that of the agent on ``host``: negative if a signal ended it, or ssh."""
    if code >= 0:  # the agent has said why
        return code
    if -code in (signal.SIGINT, signal.SIGTERM):
        return 128 - code
    print(f"launch: lost {host}: its agent was killed, or the connection failed", file=sys.stderr)
    return LOST


def run(options, script, args, stdin, stdin_writer, agent):
    """Start ``script`` on every machine through ``agent``, which runs torchrun there. -> exit status

    Args:
        options: of `colossalai run`.
        stdin, stdin_writer: the read end (file) and write end (descriptor) of the pipe that keeps the agents
            alive.
    """
    environment = dict(os.environ)
    failed = multiprocessing.Value("i", 0)
    quote_command(script, args, agent)
    hide_environment(environment, stdin_writer)
    pass_stdin(stdin, variables_to_send(environment))
    notice_lost_connections()
    notice_lost_children(failed)
    shorten_messages(failed, os.getpid())
    try:
        import_cli()(["run", *options, "--", script, *args])
    except SystemExit as end:
        if end.code is None:  # an error of its own; after a run the status is a number
            print("launch: `colossalai run` started nothing", file=sys.stderr)
            raise SystemExit(2) from None
        return failed.value or end.code
    except Exception as error:
        print(f"launch: `colossalai run`: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def variables_to_send(environment):
    """The part of ``environment`` that other machines get: SENT, and what the user adds in LAUNCH_ENV."""
    patterns = f"{SENT} {environment.get('LAUNCH_ENV', '')}".split()
    return {
        name: value
        for name, value in environment.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def read_environment(stdin):
    """Add what `Stdin` sends in its first line to the environment."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(stdin, 1)):
            return
        line += byte
    os.environ.update(json.loads(line))


def quote_command(script, args, agent):
    """Quote every word of the command, because `colossalai run` joins them with blanks for a shell.

    Programs and the folder get absolute paths, since the PATH of another machine may differ.
    """
    launcher = importlib.import_module("colossalai.cli.launcher.run")
    words = shlex.join(["exec", sys.executable, agent, "agent", READ_ENVIRONMENT])
    original, folder = launcher.get_launch_command, os.getcwd()

    def shell_command(user_script, user_args, **kwargs):
        line = original(user_script=shlex.quote(script), user_args=[shlex.quote(a) for a in args], **kwargs)
        return f"cd {shlex.quote(folder)} && " + line.replace("torchrun", words, 1)

    launcher.get_launch_command = shell_command


def hide_environment(environment, stdin_writer):
    """Show `colossalai run` one harmless variable; its child processes inherit the true environment.

    It writes `export NAME="VALUE"` for all of os.environ to a shell, which would execute a value with $().
    """

    def in_child():
        os.environ.update(environment)
        os.close(stdin_writer)
        threading.Thread(target=end_without_parent, args=(os.getppid(),), daemon=True).start()

    os.environ.clear()
    os.environ["COLOSSALAI_RUN"] = "1"
    os.register_at_fork(after_in_child=in_child)
    os.chdir("/")


def end_without_parent(parent):
    """End some seconds after ``parent`` was killed, when the output of the stopping processes was printed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(SECONDS_TO_SAVE)
    os._exit(128 + signal.SIGKILL)


class Stdin:
    """What an agent reads: the variables, in a line, then nothing until ``pipe`` is closed.

    Not words of the command, which every user of a machine can see, and which errors contain.
    """

    def __init__(self, pipe, variables):
        self.pipe, self.first = pipe, json.dumps(variables) + "\n"

    def read(self, _size):
        """The next text; None: not yet; empty: the end."""
        if first := self.first:
            self.first = ""
            return first
        return self.pipe.read(1) if select.select([self.pipe], [], [], 0)[0] else None


def pass_stdin(pipe, variables):
    """Give a `Stdin` to the agents, which run as long as ``pipe`` is open."""
    import fabric

    def with_stdin(original):
        return lambda self, command, **kwargs: original(
            self, command, in_stream=Stdin(pipe, variables), **kwargs
        )

    for method in ("local", "run"):
        setattr(fabric.Connection, method, with_stdin(getattr(fabric.Connection, method)))


def notice_lost_connections():
    """Have the kernel close a connection to a machine that has not answered for 20 s."""
    import fabric

    original = fabric.Connection.open

    def open_connection(self):
        result = original(self)
        keep_alive(self.transport.sock)
        return result

    fabric.Connection.open = open_connection


def notice_lost_children(failed):
    """The process that `colossalai run` has for a machine may be killed: it would wait for it, or crash."""
    runner = importlib.import_module("colossalai.cli.launcher.multinode_runner").MultiNodeRunner

    def receive(self):
        messages = {}
        for host, connection in self.master_recv_conns.items():
            multiprocessing.connection.wait([connection, self.processes[host].sentinel])
            try:
                messages[host] = connection.recv() if connection.poll() else "failure"
            except EOFError:
                messages[host] = "failure"
            if messages[host] == "failure" and not failed.value:  # otherwise it has said why
                failed.value = LOST
                print(f"launch: the process that starts {host} was killed", file=sys.stderr)
        return messages

    def stop_all(self):
        for connection in self.master_send_conns.values():
            with contextlib.suppress(OSError):
                connection.send("exit")

    runner.recv_from_all, runner.stop_all = receive, stop_all


def shorten_messages(failed, pid):
    """Store the exit status in ``failed``, and print errors without the tables of `colossalai run`.

    If one machine fails, stop the others, which would wait for it, by SIGUSR1 to ``pid``.
    """
    import click

    failure = re.compile(r"Error: failed to run .* on (\S+), is localhost: (\w+), exception: (.*)", re.DOTALL)

    def echo(message="", **_):
        if found := failure.fullmatch(message):
            host, is_local, reason = found.groups()
            code = re.search(r"^Exit code: (-?\d+)$", reason, re.MULTILINE)
            if code:
                status = agent_status(int(code[1]), socket.gethostname() if is_local == "True" else host)
            else:
                print(f"launch: {host}: {reason}", file=sys.stderr)
                status = 1
            failed.value = failed.value or status
            if os.getppid() == pid:
                os.kill(pid, signal.SIGUSR1)
        elif not re.fullmatch(r"\s*=+ .* =+|\S+: (success|failure|finish)", message):
            print(message, file=sys.stderr)

    click.echo = echo
