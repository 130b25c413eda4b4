"""Signals that ask a run to end, and saves that are due by time: all processes learn of both between the same steps."""

import signal
import time
from contextlib import contextmanager

import torch

from classifier.messages import BadInput, Preempted, RunFailed

# Sent by Ctrl-C, launchers and clusters. Windows has no SIGUSR1, and SIGBREAK for Ctrl-Break and a closed window.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
SECONDS_BETWEEN_POLLS = 1


def save_interval(text, steps_per_epoch):
    """Return --save_every (epoch, N or Nm) as (steps, minutes), one of them None. Raises BadInput for other text."""
    number = text.removesuffix("m")
    try:
        interval = steps_per_epoch if text == "epoch" else float(number) if number != text else int(number)
    except ValueError:
        interval = 0
    if not 0 < interval < float("inf"):
        raise BadInput(f"--save_every {text}: no interval", "Write epoch, a number of steps (500), or minutes (10m).")
    return (None, interval) if number != text else (interval, None)


class SignalWatch:
    """Handles signals: outside the training loop one ends the process at once, inside it at the next poll()."""

    def __init__(self, accelerator):
        # On a CPU group of its own: a poll must not wait for a GPU.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.is_training = False
        self.received, self.received_at = 0, 0.0
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number, _):
        now = time.monotonic()
        if not self.is_training:
            raise Preempted(f"{signal.Signals(number).name}: stopped; the same command resumes")
        # A terminal sends Ctrl-C to the launcher and to this process, and the launcher forwards it: that counts once.
        if self.received and number == signal.SIGINT and now - self.received_at > 1:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.received_at = number, now

    @contextmanager
    def training(self, save, interval, first_step):
        """Under `with`, poll() is called between steps, starting at first_step; a run that a signal ends is saved.

        save() returns whether it succeeded; interval: (steps, minutes) between saves, from save_interval.
        """
        self.save_steps, save_minutes = interval
        self.save_seconds = save_minutes and 60 * save_minutes
        self.first_step, self.last_save = first_step, time.monotonic()
        self.poll_next_time()
        self.is_training = True
        try:
            yield
        except Preempted as signal_name:
            if not save():
                message = f"{signal_name}: not saved; the same command resumes from the previous checkpoint"
                raise RunFailed(message) from None
            raise Preempted(f"{signal_name}: saved between two steps; the same command resumes") from None
        finally:
            self.is_training = False

    def poll_next_time(self):
        """Make the processes meet at the next poll(): what follows may take longer than the steps before."""
        self.calls_per_meeting, self.calls_left, self.last_meeting = 1, 1, time.monotonic()

    def poll(self, step=None):
        """Return whether a save is due at this step. Raises Preempted on all processes if one has received a signal.

        All processes call this at the same points, in training with the step. They meet about once a second.
        """
        is_due = bool(self.save_steps and step and step > self.first_step and step % self.save_steps == 0)
        self.calls_left -= 1
        if self.calls_left > 0:
            return is_due
        now = time.monotonic()
        calls = int(self.calls_per_meeting * SECONDS_BETWEEN_POLLS / max(now - self.last_meeting, 1e-6))
        is_time_to_save = bool(self.save_seconds and step is not None and now - self.last_save >= self.save_seconds)
        agreed = torch.tensor([self.received, is_time_to_save, max(1, min(calls, 2 * self.calls_per_meeting))])
        if self.group:
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self.group)
        received, is_time_to_save, self.calls_per_meeting = agreed.tolist()
        self.calls_left, self.last_meeting = self.calls_per_meeting, now
        if is_time_to_save:
            self.last_save = now
        if received:
            raise Preempted(signal.Signals(received).name)
        return is_due or bool(is_time_to_save)
