"""Remember a wish to stop, so that the training loop can finish its step and save first."""

import contextlib
import os
import signal
import time

import torch
import torch.distributed as dist

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
SIGHUP = getattr(signal, "SIGHUP", None)
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
GRACE_SECONDS = 1.0


class StopRequest:
    """Turn signals and the launcher's death into an answer that the loop asks for once a step.

    The first signal is only remembered. One that comes later than `GRACE_SECONDS` after it ends the process at once,
    without saving. Signals within that time count as the same wish: Ctrl-C in a terminal reaches the launcher and the
    trainer, and the launcher passes its own on, as the same signal or another.

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
        # `nohup` ignores SIGHUP, and that stays so.
        heard = [number for number in SIGNALS if number != SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._old_handlers = {number: signal.signal(number, self._receive) for number in heard}

    def __enter__(self) -> "StopRequest":
        """Return the request itself; the handlers are already installed."""
        return self

    def __exit__(self, *exception) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None stands for one that was not set by Python

    def _receive(self, number: int, frame) -> None:
        """Remember the first signal; end the process at a later one."""
        now = time.monotonic()
        if self._first_signal_time is None:
            self._first_signal_time = now
            self._number = self._number or number
            if os.environ.get("RANK", "0") == "0":
                _say(
                    "Stopping: finishing the step, then saving a checkpoint. Once more to exit at once without saving."
                )
        elif now - self._first_signal_time >= GRACE_SECONDS:
            os._exit(128 + number)

    def check(self) -> int | None:
        """Return the number of the signal to stop for, None to go on; the launcher's death counts as SIGTERM."""
        if self._number is None and self._launcher is not None and os.getppid() != self._launcher:
            self._number = int(signal.SIGTERM)
            _say("The launcher has ended. Stopping: finishing the step, then saving a checkpoint.")
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
        self._number = int(highest) or None
        return self._number

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
