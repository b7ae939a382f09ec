"""Ends this process when the launch around it is gone: its launcher, or another process of the run.

A launcher that was killed stops nobody, and a collective waits for minutes, or forever, for a process that is
gone.
"""

import atexit
import os
import secrets
import select
import selectors
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

from vit.console import ignore_lost_readers

SECONDS_TO_SAVE = 7  # when the launcher is gone
SECONDS_TO_REPORT = 3  # for the launcher of a process that is gone: it knows why
SECONDS_TO_EXIT = 20  # when another process ends with an error: this one may find and report the same error
LOST = 75  # exit status (EX_TEMPFAIL): another process is gone

DONE, FAILED, GONE = "done", "failed", "gone"  # how a process ends; one that was killed cannot say it
CONTINUE = "--resume auto continues from the last checkpoint"


def watch_launcher() -> None:
    """When torchrun's agent is gone, stop as by SIGTERM: save, and end within 7 s in any case.

    Polled, because Linux's parent-death signal is missed if the parent dies before it is asked for.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # by hand: the shell may be closed
        return
    # launch.py says who it is, in case that it is gone already
    launcher = int(os.environ.get("LAUNCH_AGENT") or os.getppid())

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_SAVE)
        os.kill(os.getpid(), signal.SIGKILL)

    ignore_lost_readers()
    threading.Thread(target=watch, daemon=True).start()


class Peers:
    """Watches the other processes of a run, through an idle TCP connection of each one with rank 0.

    The connection of a killed process is closed at once. If a machine or its network fails, nothing is
    closed: the kernel therefore asks the other end for a sign of life every 5 s, and gives up after 20 s.

    Args:
        address: of rank 0.
        gather: of this process's value -> the values of all, ordered by rank.
    """

    def __init__(self, rank: int, address: str, gather):
        self.rank, self.state, self.lost = rank, "", threading.Event()
        self.connections: dict[socket.socket, int] = {}  # to which rank
        listener = _listener() if rank == 0 else None
        port = listener.getsockname()[1] if listener else None
        offers = gather((socket.gethostname(), port, secrets.token_hex(8)))
        self.hosts = [host for host, *_ in offers]
        _, port, token = offers[0]
        if listener:
            self._accept(listener, token)
        else:
            self._connect(address, port, f"{token} {rank}\n")
        self.wakeup, writer = os.pipe()
        os.set_blocking(writer, False)
        # a handler in Python is not called while a collective waits, but the number of the signal is written
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        sys.excepthook = self._report_exception
        atexit.register(self._say, FAILED)
        threading.Thread(target=self._watch, daemon=True).start()

    def leave(self) -> None:
        """The run is over: the others may go."""
        self._say(DONE)

    def _say(self, state: str, rank: int | None = None) -> None:
        """Tell how this process, or ``rank``, ends. Only the first time counts."""
        if self.state:
            return
        self.state = state
        for connection in self.connections:
            with suppress(OSError):
                connection.sendall(f"{state} {self.rank if rank is None else rank}\n".encode())

    def _accept(self, listener: socket.socket, token: str) -> None:
        """Connections of the other ranks, as far as they come within 10 s each."""
        with listener, suppress(TimeoutError):
            while len(self.connections) < len(self.hosts) - 1:
                connection, _ = listener.accept()
                connection.settimeout(10)
                with suppress(OSError, ValueError):  # anybody may connect
                    said, rank = connection.makefile().readline().split()
                    if said == token:
                        self.connections[_kept_alive(connection)] = int(rank)

    def _connect(self, address: str, port: int, hello: str) -> None:
        with suppress(OSError):  # a firewall: this process is not watched
            connection = socket.create_connection((address, port), timeout=10)
            connection.sendall(hello.encode())
            self.connections[_kept_alive(connection)] = 0

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for connection, rank in self.connections.items():
            selector.register(connection, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                assert isinstance(key.fileobj, socket.socket)
                said = ""
                with suppress(OSError):
                    said = key.fileobj.recv(64).decode()
                state, lost = said.split()[:2] if said else (GONE, key.data)
                if state == DONE or self.state in (DONE, GONE):  # this process ends by itself
                    selector.unregister(key.fileobj)
                else:
                    self._end(state, int(lost))

    def _end(self, state: str, rank: int) -> None:
        """End this process, because ``rank`` has ended too early.

        The launcher of ``rank`` reports it, unless the machine is another one and maybe gone too.
        """
        if state == GONE:
            self.lost.set()
        self._say(state, rank)
        stopped = self._is_stopped_within(SECONDS_TO_REPORT if state == GONE else SECONDS_TO_EXIT)
        own, other = socket.gethostname(), self.hosts[rank]
        if own != other and not stopped and os.environ.get("LOCAL_RANK", "0") == "0":
            why = "is gone: killed, or the machine or its network failed" if state == GONE else "has failed"
            print(f"error on {own}: process {rank} on {other} {why}; {CONTINUE}", file=sys.stderr, flush=True)
        os._exit(LOST)

    def _is_stopped_within(self, seconds: float) -> bool:
        """Wait. -> whether this process got a signal to stop"""
        received: set[int] = set()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self.wakeup], [], [], left)[0]:
                received |= set(os.read(self.wakeup, 4096))
        return bool(received & {signal.SIGINT, signal.SIGTERM})

    def _report_exception(self, kind, error, trace) -> None:
        """An exception that nothing caught. A collective raises one if another process is gone."""
        if self.lost.wait(timeout=1):
            threading.Event().wait()  # the thread ends this process
        self.state = GONE  # the others need not wait
        sys.__excepthook__(kind, error, trace)
        for connection in self.connections:  # now: Python may take seconds to end
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)


def _listener() -> socket.socket:
    """On any free port, of every address of this machine."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0))
    listener.settimeout(10)
    return listener


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    keep_alive(connection)
    return connection


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel close a connection whose other end has not answered for 20 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)
