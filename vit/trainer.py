"""The training loop."""

import signal
from dataclasses import dataclass


class Interrupted(Exception):
    """A signal asked for the end; the step in hand was finished on every process."""

    def __init__(self, signum: int):
        self.signum = signum


class NonFiniteLoss(Exception):
    """The loss became infinite or NaN; raised on every process at once."""

    def mend(self, args, rate: str, clip: str) -> str:
        """What the user can do that is not done yet, by the names that this script has for it. ``args``.

        Precision, max_norm.
        """
        ways = (
            [f"lower {rate}"]
            + [f"set {clip}"] * (not args.max_norm)
            + ["use bf16 or fp32"] * (args.precision == "fp16")
        )
        return f"{self}: {', or '.join(ways)}"


@dataclass
class EpochProgress:
    """Sums over (the part so far of) an epoch.

    Kept in checkpoints, so that a resumed epoch reports its whole.
    """

    loss_sum: float = 0.0  # over images
    images: int = 0
    steps: int = 0
    seconds: float = 0.0  # in training steps


class SignalHandler:
    """Remembers SIGINT or SIGTERM, so that a step can be finished and saved before the process ends."""

    def __init__(self):
        self.signum = 0

    def __enter__(self):
        self.previous = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _remember(self, signum, frame):
        self.signum = signum

    def end_if_set(self) -> None:
        """Where nothing has begun that could be lost."""
        if self.signum:
            raise SystemExit(128 + self.signum)

    def __exit__(self, *exc):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
