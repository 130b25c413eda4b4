"""Signals that ask a run to end, and the time to save: all processes learn of both together, between two steps."""

import signal
import time
from contextlib import contextmanager

import torch

from classifier.messages import BadInput, Preempted, RunFailed

# From Ctrl-C, from launchers and clusters. Windows has no SIGUSR1.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
SECONDS_BETWEEN_POLLS = 1


def save_interval(words, steps_per_epoch):
    """Return --save_every (epoch, N, or Nm) as (steps, minutes), one of them None. Raises BadInput for other words."""
    number = words.removesuffix("m")
    try:
        amount = steps_per_epoch if words == "epoch" else float(number) if number != words else int(number)
    except ValueError:
        amount = 0
    if not 0 < amount < float("inf"):
        raise BadInput(f"--save_every {words}: no interval", "Write epoch, a number of steps (500), or minutes (10m).")
    return (None, amount) if number != words else (amount, None)


class SignalWatch:
    """Looks out for signals. Outside the loop one ends the process there and then; in it, at the next look."""

    def __init__(self, accelerator):
        # Devices meet on their own group, signals on the CPU: looking must not wait for a GPU.
        several = accelerator.num_processes > 1
        self.group = torch.distributed.new_group(backend="gloo") if several else None
        self.is_training = False
        self.received, self.received_at = 0, 0.0
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number, _):
        now = time.monotonic()
        if not self.is_training:
            raise Preempted(f"{signal.Signals(number).name}: stopped; the same command goes on")
        # A terminal sends Ctrl-C to the launcher and to us, and the launcher sends it on: that is one.
        if self.received and number == signal.SIGINT and now - self.received_at > 1:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.received_at = number, now

    @contextmanager
    def training(self, save, interval, first_step):
        """Under `with`, poll() is called between steps, from first_step on; what a signal ends is saved first.

        save() returns whether it could; interval: when poll() asks for it, as save_interval returns it.
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
                raise RunFailed(f"{signal_name}: not saved; the same command goes on from the save before") from None
            raise Preempted(f"{signal_name}: ended between two steps; the same command goes on") from None
        finally:
            self.is_training = False

    def poll_next_time(self):
        """Look at once the next time: what comes may take longer than what was."""
        self.calls, self.left, self.last_poll = 1, 1, time.monotonic()

    def poll(self, step=None):
        """Return whether to save at this step. Raises Preempted on all processes once one has received a signal.

        All processes call this at the same points, in training with the step. They meet about once a second.
        """
        is_due = bool(self.save_steps and step and step > self.first_step and step % self.save_steps == 0)
        self.left -= 1
        if self.left > 0:
            return is_due
        now = time.monotonic()
        pace = int(self.calls * SECONDS_BETWEEN_POLLS / max(now - self.last_poll, 1e-6))
        has_time_come = bool(self.save_seconds and step is not None and now - self.last_save >= self.save_seconds)
        found = torch.tensor([self.received, has_time_come, max(1, min(pace, 2 * self.calls))])
        if self.group:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.group)
        received, has_time_come, self.calls = found.tolist()
        self.left, self.last_poll = self.calls, now
        if has_time_come:
            self.last_save = now
        if received:
            raise Preempted(signal.Signals(received).name)
        return is_due or bool(has_time_come)
