"""Signals that end a training: a step is finished and saved before the processes end."""

from __future__ import annotations

import os
import signal
import threading

import torch

from vit.distributed import all_reduce_max, device


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived at some rank; raised on every rank after the same step."""

    def __init__(self, signum: int):
        super().__init__(f"signal {signum}")
        self.signum = signum
        self.step: int | None = None  # optimizer steps done, if the training was interrupted


class SignalHandler:
    """Remembers SIGINT or SIGTERM, so that a step can be finished and saved before the process ends.

    Before the training starts nothing can be lost: the process ends some seconds later, in which it may
    report an error that has ended another one.
    """

    SECONDS_TO_REPORT = 3

    def __init__(self):
        self.signum = 0
        self.end: threading.Timer | None = None
        self.is_training = False

    def __enter__(self):
        self.previous = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _remember(self, signum, frame):
        self.signum = signum
        if not (self.is_training or self.end):
            self.end = threading.Timer(self.SECONDS_TO_REPORT, os._exit, [128 + signum])
            self.end.daemon = True
            self.end.start()

    def start_training(self) -> None:
        """From now on there is something to save."""
        self.is_training = True
        if self.end:
            self.end.cancel()

    def of_any_rank(self) -> int:
        """The signal that any rank received; 0: none. Collective."""
        return int(all_reduce_max(torch.tensor(float(self.signum), device=device())).item())

    def raise_if_set(self) -> None:
        """Raise `Interrupted` on every rank if a signal reached one of them. Collective."""
        if signum := self.of_any_rank():
            raise Interrupted(signum)

    def __exit__(self, *exc):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
