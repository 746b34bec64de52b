"""Remember a wish to stop, so that the training loop can finish its step and save first."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
SIGHUP = getattr(signal, "SIGHUP", None)
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
GRACE_SECONDS = 1.0
BEFORE = "training has not begun; what was drawn and encoded so far is kept."
IN_LOOP = "finishing the step, then saving a checkpoint. Once more to exit at once without saving."


class StopRequest:
    """Turn signals and the launcher's death into an answer that the loop asks for once a step.

    Until `begin_loop` there is nothing to save: the first signal raises SystemExit from wherever the process is. From
    then on it is only remembered. From `begin_upload` on it ends the process at once. A signal that comes later than
    `GRACE_SECONDS` after the first always does, without saving. Those within that time count as the same wish: Ctrl-C
    in a terminal reaches the launcher and the trainer, and the launcher passes its own on, as the same or another.

    A launcher is only watched if its environment variables are there, because the shell above a `nohup` run may go.
    Construct it early, before the launcher can die unnoticed, and in the main thread, the only one that may set
    handlers. As a context manager it restores the old handlers at the end.
    """

    def __init__(self) -> None:
        """Install the handlers."""
        self._number: int | None = None  # the signal to stop for
        self._first_signal_time: float | None = None  # of a signal that this process itself received
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHER_VARIABLES) else None
        self._group = None
        self._leave, self._words = sys.exit, BEFORE  # what a signal does, and says first
        # `nohup` ignores SIGHUP, and that stays so.
        heard = [number for number in SIGNALS if number != SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._old_handlers = {number: signal.signal(number, self._receive) for number in heard}

    def __enter__(self) -> "StopRequest":
        """Return the request itself; the handlers are already installed."""
        return self

    def __exit__(self, kind, *exception) -> None:
        """Restore the handlers that were there before, unless a signal is what ends the process: it may come twice."""
        if kind is SystemExit and self._first_signal_time is not None:
            return
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None stands for one that was not set by Python

    def _receive(self, number: int, frame) -> None:
        """Remember the first signal; end the process at a later one."""
        now = time.monotonic()
        if self._first_signal_time is None:
            self._first_signal_time = now
            self._number = self._number or number
            if os.environ.get("RANK", "0") == "0":
                _say(f"Stopping: {self._words}")
            if self._leave is not None:
                self._leave(self.exit_code)
        elif now - self._first_signal_time >= GRACE_SECONDS:
            os._exit(128 + number)

    def begin_loop(self) -> None:
        """Let signals wait from now on, for a loop that asks for them and saves."""
        self._leave, self._words = None, IN_LOOP

    def begin_upload(self, words: str) -> None:
        """Let a signal end the process from now on at once, or here if there was one, and say first what is lost."""
        self._leave, self._words = os._exit, words
        if self.check() is not None:
            _say(f"Stopping: {words}")
            self.leave_if_asked()

    def leave_if_asked(self) -> None:
        """Raise SystemExit if there is a wish to stop, for work that saves as it goes."""
        if self.check() is not None:
            raise SystemExit(self.exit_code)

    def until_asked(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items as long as there is no wish to stop."""
        for item in items:
            if self.check() is not None:
                return
            yield item

    def check(self) -> int | None:
        """Return the number of the signal to stop for, None to go on; the launcher's death counts as SIGTERM."""
        if self._number is None and self._launcher is not None and os.getppid() != self._launcher:
            self._number = int(signal.SIGTERM)
            _say(f"The launcher has ended. Stopping: {self._words}")
        return self._number

    def agree(self, group: "dist.ProcessGroup | None" = None) -> int | None:
        """Return the same answer in all processes: the highest signal number that any of them is to stop for.

        All processes must call it at the same step.

        Args:
            group: a process group that takes CPU tensors; by default one that is made at the first call.
        """
        number = self.check()
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return number
        if group is None:
            self._group = self._group or dist.new_group(backend="gloo")
        highest = torch.tensor([number or 0])
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group or self._group)
        agreed = int(highest) or None
        # Without agreement, a signal that came in the meantime is kept for the next time.
        self._number = agreed or self._number
        return agreed

    @property
    def exit_code(self) -> int:
        """Return the exit status: 128 + signal (130 after Ctrl-C, 143 after SIGTERM), 0 without a wish to stop."""
        return 128 + self._number if self._number else 0


def ignore_signals(worker_id: int) -> None:
    """Let a DataLoader worker (as its `worker_init_fn`) live on until the trainer has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _say(line: str) -> None:
    """Write a line to standard error, also from within a signal handler, where `print` may fail."""
    with contextlib.suppress(OSError):  # Ctrl-C may have ended the reader of a pipe, and the launcher the terminal
        os.write(2, f"{line}\n".encode())
