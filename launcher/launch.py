"""Start a Python script on several processes, with `colossalai run` or torchrun.

Only launch.sh calls this file.

    launch.py gpus                                      number of GPUs that this process may use
    launch.py port [PORT]                               a free port, or PORT if it is free
    launch.py hosts FILE                                number of machines in a hostfile
    launch.py colossalai|torchrun OPTIONS -- SCRIPT ARGS...

The last form starts this tree. Signals travel down, output travels up:

    launch.py -> `colossalai run`: one child per machine -> shell, or ssh -> agent -> processes
    launch.py ->                                                             agent -> processes

The agent is torchrun, called by `launch.py agent`. It is stopped by closing its standard input: that works
through ssh, and also if a process above it is killed.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

# this folder, which python -I and PYTHONSAFEPATH leave out, and the project
sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

import colossalai_run

from vit.system import count_gpus, die_with_parent, host_exists
from vit.watch import LOST


def exit_with_errors(message):
    print(f"launch: {message}", file=sys.stderr)
    raise SystemExit(2)


def free_port(wanted=0):
    """``wanted`` if it is free, or any free port if it is 0; otherwise ends the program with a message."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(wanted)))
        except (ValueError, OverflowError, OSError) as error:
            exit_with_errors(
                f"MASTER_PORT={wanted} cannot be used ({error}): "
                "choose another, or leave it out to get a free one"
            )
        return probe.getsockname()[1]


def count_hosts(path):
    """Number of machines in a hostfile. Checked here, because `colossalai run` exits with 0 for a bad one."""
    try:
        with open(path) as file:
            hosts = [line.strip() for line in file if line.strip()]
    except OSError as error:
        exit_with_errors(f"HOSTFILE={path} cannot be read: {error.strerror}")
    if not hosts:
        exit_with_errors(f"HOSTFILE={path} names no machine: write one host name per line")
    for host in hosts:
        if hosts.count(host) > 1:
            exit_with_errors(f"HOSTFILE={path} names {host} twice")
        if not host_exists(host):
            exit_with_errors(f"HOSTFILE={path}: there is no machine called {host!r}")
    return len(hosts)


def run_torchrun(command, stdin):
    """Run an agent on this machine. -> exit status"""
    code = subprocess.run([sys.executable, __file__, "agent", *command], stdin=stdin).returncode
    return colossalai_run.agent_status(code, socket.gethostname())


def supervise(launcher, argv):
    """Start the processes, pass a signal on to them, and return the exit status."""
    split = argv.index("--")
    options, (script, *args) = argv[:split], argv[split + 1 :]
    received = []
    reader, writer = os.pipe()
    pid = os.getpid()

    def stop(signum, _frame):
        if os.getpid() != pid or received:  # in a child, or a second signal
            return
        received.append(signum)
        os.close(writer)
        if signum != signal.SIGUSR1:
            print(
                "\nlaunch: stopping; each process may finish its step and save, within 30 s", file=sys.stderr
            )

    if os.getpgrp() != pid:
        os.setsid()  # Ctrl-C then reaches only the script, which sends SIGINT once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a background job of a script
    die_with_parent()
    if int(os.environ.pop("LAUNCH_PARENT", os.getppid())) != os.getppid():  # it is gone already
        return 128 + signal.SIGKILL
    if launcher == "colossalai":
        colossalai_run.import_cli()  # takes seconds, in which a signal ends this process immediately
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, stop)
    with os.fdopen(reader) as stdin:
        try:
            if launcher == "colossalai":
                code = colossalai_run.run(options, script, args, stdin, writer, agent=__file__)
            else:
                code = run_torchrun([*options, script, *args], stdin)
        finally:
            stop(signal.SIGUSR1, None)
    if code and received and received[0] != signal.SIGUSR1:
        code = 128 + received[0]
    return code


def run_agent(argv):
    """Run torchrun on one machine, without its tables, until its standard input is closed. -> exit status"""
    parent_alive_pipe = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # standard input of the processes
    if argv[0] == colossalai_run.READ_ENVIRONMENT:
        argv = argv[1:]
        colossalai_run.read_environment(parent_alive_pipe)
    os.environ["LAUNCH_AGENT"] = str(os.getpid())  # vit/watch.py: the processes end if it is gone

    def watch():
        while os.read(parent_alive_pipe, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        # torchrun passes the signal on and waits 30 s. It cannot while it waits in C++ for another machine,
        # before its processes start and after they ended; then nothing has to be saved, and the agent ends
        # itself.
        while True:
            time.sleep(1)
            try:
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # no processes
                os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    # Compiling a kernel calls ninja, which is in Python's folder: on the PATH only if the environment is
    # active.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
    processes = int(next(a.partition("=")[2] for a in argv if a.startswith("--nproc_per_node=")))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    logging.disable(logging.ERROR)  # failures are reported below, in one line

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(argv)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code == LOST:  # reported where the process was that is gone
            return code
        what = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        print(f"launch: process {rank} {what} on {socket.gethostname()}", file=sys.stderr)
        return 128 - code if code < 0 else code
    return 0


def leave(code):
    """End this process at once: its work is done, and Python takes half a second to free torch."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "agent":
        leave(run_agent(rest))
    elif command in ("colossalai", "torchrun"):
        leave(supervise(command, rest))
    else:
        answers = {"gpus": count_gpus, "port": free_port, "hosts": count_hosts}
        print(answers[command](*rest))
