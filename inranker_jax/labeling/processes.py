"""Processes that share a job through a folder: which one this is, how it waits for others, how all end together.

There are two kinds. Processes of one JAX program (found on Cloud TPU, Slurm, Open MPI 4 and GKE, or told by
`--coordinator_address`) hear of each other through the store of JAX's coordination service; none computes across
hosts, so none waits for a collective. Independent processes (`--process_index` and `--process_count` alone) know of
each other only by the files in the folder, and may run at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping

from inranker_jax import distributed
from inranker_jax.errors import InputError
from inranker_jax.interruption import Interruption
from inranker_jax.telemetry.phases import Phases
from inranker_jax.watchdog import Watchdog

_FIRST_SECONDS, _SHOW_SECONDS = 2.0, 30.0
_LONGEST_PAUSE = 1.0
# Network file systems show a file of another host after at most a minute, with their usual settings.
_GRACE_SECONDS = 120.0
_PREFIX = "inranker_jax/shared_job"


class PeerStopped(Exception):
    """Another process of the JAX program has stopped, so this one stops too.

    Attributes:
      status: the exit status that all of them leave with.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that share a job.

    Attributes:
      index: its number, from 0; process 0 also prepares the job and writes its summary.
      count: how many there are.
      joined: whether they are one JAX program.
      phases: what this one is at; `wait` notes that it waits.
    """

    index: int = 0
    count: int = 1
    joined: bool = False
    phases: Phases = dataclasses.field(default_factory=Phases.of_scoring, compare=False, repr=False)

    @classmethod
    def join(cls, flags: argparse.Namespace) -> Processes:
        """Joins the others, as the flags of `distributed.add_flags` or the environment say.

        Must come before anything that touches a device, and inside an `Interruption` if signals are to be noted.

        Raises:
          InputError: an index that is not one of the count, or the others were not reached.
        """
        index, count = flags.process_index, flags.process_count
        if flags.coordinator_address is None and (index is not None or count is not None):
            if index is None and count != 1:
                raise InputError(
                    f"--process_count={count} needs --process_index too: which share of the work is this process's?"
                )
            index, count = index or 0, 1 if count is None else count
            if not 0 <= index < count:
                raise InputError(
                    f"--process_index={index} of --process_count={count}: expected a number from 0 to one less than "
                    "the count."
                )
            return cls(index, count)
        index, count = distributed.join(flags.coordinator_address, count, index)
        if count > 1:
            for number in Interruption.SIGNALS:
                # JAX's preemption service has taken the signal for itself. Here every process may stop where it is.
                signal.signal(number, signal.getsignal(number))
        return cls(index, count, joined=count > 1)

    def watched(self, seconds: float, step: str) -> Watchdog:
        """Reports, while it is open, where this process is when no `step` was finished for too long."""
        return Watchdog(self.phases, seconds, process=(self.index, self.count), step=step)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    # ------------------------------------------------------------------------------------------ hearing of others

    def tell(self, what: str, value: str = "") -> None:
        """Lets the other processes of the JAX program know that this one has come to `what`."""
        if self.joined:
            with _coordinated():
                distributed.client().key_value_set(
                    f"{_key(what)}/{self.index}", value or "yes", allow_overwrite=True
                )

    def heard(self, what: str) -> dict[int, str]:
        """Which processes of the JAX program have told `what`, and their values; none of independent processes."""
        if not self.joined:
            return {}
        with _coordinated():
            pairs = distributed.client().key_value_dir_get(f"{_key(what)}/")
        return {int(key.rpartition("/")[2]): value for key, value in pairs}

    def check(self) -> None:
        """Notices that another process has stopped.

        Raises:
          PeerStopped: it has, by a signal or an error.
        """
        for index, told in sorted(self.heard("stopped").items()):
            if index != self.index:
                status, _, reason = told.partition(" ")
                raise PeerStopped(
                    int(status),
                    f"process {index} has stopped ({reason}), so this one stops: what was finished is kept; run the "
                    "same command to go on.",
                )

    # ------------------------------------------------------------------------------------------ waiting

    def wait(
        self,
        what: str,
        missing: Callable[[], Mapping[int, str]],
        place: object,
        announce: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits until nothing is missing in a folder that the processes share, and says what is now and then.

        Args:
          what: what a process of the JAX program tells when its part is in the folder.
          missing: process -> what is not there yet of its part; empty at the end.
          place: the folder, for messages.
          announce: prints a line.
          check: called now and then; raises to stop waiting.

        Raises:
          InputError: a process says that its part is there, and it is not, for two minutes.
          PeerStopped: another process has stopped.
        """
        pause, began = 0.02, time.monotonic()
        shown = began + _FIRST_SECONDS - _SHOW_SECONDS
        done_since: dict[int, float] = {}
        with self.phases.phase("waiting"):
            while lacking := missing():
                self.phases.alive()
                check()
                self.check()
                now = time.monotonic()
                for index in self.heard(what):
                    if index in lacking and now - done_since.setdefault(index, now) > _GRACE_SECONDS:
                        raise InputError(
                            f"process {index} has written its part, but {lacking[index]} is not in {place} here. "
                            "Expected a folder that all hosts share. Use one on a shared or mounted file system."
                        )
                if now - shown >= _SHOW_SECONDS:
                    shown = now
                    announce(self._waiting(lacking))
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _waiting(self, lacking: Mapping[int, str]) -> str:
        parts = [f"process {index} ({lacking[index]})" for index in sorted(lacking)]
        more = f" and {len(parts) - 8} others" if len(parts) > 8 else ""
        hint = (
            "Should one have died, JAX ends all after its heartbeat: then run the same command again, with any number "
            "of processes"
            if self.joined
            else "Start those that do not run, or stop this one and run the command without --process_count"
        )
        return f"waiting for {', '.join(parts[:8])}{more}. {hint}; what is finished is kept."

    @contextlib.contextmanager
    def ending_together(
        self, announce: Callable[[str], None], interruption: Interruption | None = None
    ) -> Iterator[None]:
        """Around a process's work: at its end waits for the others, and tells them when it ends early.

        A JAX program whose processes leave one by one would be taken for a broken one.

        Args:
          announce: prints a line.
          interruption: ends the waiting too.

        Raises:
          KeyboardInterrupt: a signal came while it waited; the argument is the exit status.
          PeerStopped: another process has stopped.
        """
        if not self.joined:
            yield
            return

        def check() -> None:
            if interruption is not None and interruption.requested:
                raise KeyboardInterrupt(interruption.exit_status)

        def missing() -> dict[int, str]:
            there = self.heard("finished")
            return {index: "not finished" for index in range(self.count) if index not in there}

        try:
            yield
            self.tell("finished")
            self.wait("finished", missing, "the coordination service", announce, check)
        except PeerStopped:
            raise
        except BaseException as error:
            with contextlib.suppress(PeerStopped):  # the error that is under way says more
                self.tell("stopped", _last_words(error, interruption))
            raise


def _last_words(error: BaseException, interruption: Interruption | None) -> str:
    """The exit status and the reason, in one line."""
    if interruption is not None and interruption.requested:
        return f"{interruption.exit_status} by a signal"
    if isinstance(error, KeyboardInterrupt):
        return f"{error.args[0] if error.args else 130} by a signal"
    message = (str(error).splitlines() or [""])[0]
    return f"2 {message}" if isinstance(error, InputError) else f"1 {type(error).__name__}: {message}"


def _key(what: str) -> str:
    return f"{_PREFIX}/{what.replace('/', '|')}"


@contextlib.contextmanager
def _coordinated() -> Iterator[None]:
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise PeerStopped(
            1,
            f"process 0, which coordinates, cannot be reached ({str(error).splitlines()[0]}): what was finished is "
            "kept; run the same command to go on.",
        ) from error


ALONE = Processes()
