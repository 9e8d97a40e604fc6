"""Ctrl-C, SIGTERM and SIGHUP while a model is trained: the step is finished, everything saved, then the run
ends."""

import os
import signal
import sys
import time

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last: a terminal was closed; Windows has none
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Interruption:
    """Notes the first of SIGNALS; a second one, a second later, ends the process at once.

    A second of grace, because torchrun passes a Ctrl-C on to processes that already had the terminal's.
    """

    GRACE = 1.0

    def __init__(self):
        self.number, self.since, self.previous = 0, 0.0, {}

    @property
    def requested(self) -> bool:
        return bool(self.number)

    def __enter__(self) -> "Interruption":
        for number in SIGNALS:
            self.previous[number] = signal.signal(number, self.note)
            # nohup lets a run outlive its terminal. (Scripts start programs deaf to SIGINT, meaning nothing.)
            if self.previous[number] is signal.SIG_IGN and number not in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, _) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > self.GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def leave(self) -> None:
        """End the process, as interrupted programs do (130, 143); under torchrun with 0, since it takes
        anything else for a crash."""
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        sys.exit(0 if under_torchrun else 128 + (self.number or signal.SIGTERM))


def ignore_interrupts(_worker: int) -> None:
    """For the loader's processes: a Ctrl-C reaches them too, but the main process says when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
