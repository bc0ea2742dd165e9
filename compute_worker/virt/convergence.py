"""Whether a live migration converges, and what is done when it does not: pure decisions over job statistics.

A guest is switched over when what is left of its memory can be sent within the permitted downtime. One that writes
faster than the link carries never gets there by itself. It is judged by *iterations* of memory, not by the clock: an
iteration that leaves hardly less than the one before has brought nothing, and the next will not either. Then, in this
order and as far as the policy permits: the permitted downtime grows by a step; a hypervisor that throttles the guest by
itself is given the time to; the guest is switched to post-copy. The clock only ends what took too long, by
``timeout_action``. From post-copy on nothing is decided any more: there is no way back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from compute_worker.virt.driver import JobStatistics

GIB = 1 << 30
_MIB = 1 << 20
LEAST_GIB = 2.0
"""A guest smaller than this is given the time of one that large."""
FIRST_DOWNTIME_MS = 50
"""The first step; QEMU's own default is 300 ms."""
PROGRESS = 0.9
"""An iteration that leaves more than this share of what the one before left has stalled."""
SMOOTHING = 0.3
"""Weight of the newest bandwidth in the smoothed one."""
MOST_THROTTLE = 99
_KEPT = 64


class Action(StrEnum):
    """What is done. ``DOWNTIME``: permit more of it; ``WAIT``: nothing."""

    WAIT = "wait"
    DOWNTIME = "downtime"
    POSTCOPY = "postcopy"
    PAUSE = "pause"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be done. Times in seconds, for a guest of ``size_gib`` (memory and disks that move).

    ``post_copy``: whether this migration was begun so that it can be switched to it.
    """

    size_gib: float = LEAST_GIB
    max_downtime_ms: int = 500
    downtime_steps: int = 6
    downtime_delay: float = 5.0
    post_copy: bool = False
    auto_converge: bool = False
    completion_timeout: float = 150.0
    timeout_action: str = "abort"
    progress_timeout: float = 15.0

    @property
    def ladder(self) -> tuple[int, ...]:
        """The permitted downtimes in milliseconds, in order; each the same multiple of the one before."""
        first, count = min(FIRST_DOWNTIME_MS, self.max_downtime_ms), self.downtime_steps
        if count == 1:
            return (self.max_downtime_ms,)
        growth = (self.max_downtime_ms / first) ** (1 / (count - 1))
        steps = [*(round(first * growth**n) for n in range(count - 1)), self.max_downtime_ms]
        return tuple(dict.fromkeys(steps))

    @property
    def deadline(self) -> float | None:
        """Seconds after which ``timeout_action`` is taken."""
        return self.completion_timeout * max(LEAST_GIB, self.size_gib) or None

    @property
    def patience(self) -> float:
        """Seconds that a permitted downtime has at least."""
        return self.downtime_delay * self.size_gib


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do and why. ``downtime_ms``: for ``DOWNTIME``."""

    action: Action
    reason: str
    downtime_ms: int = 0


@dataclass(frozen=True, slots=True)
class History:
    """What was seen of a migration, and what was done to it. ``now``: seconds since it began to be watched.

    ``left``: bytes of memory that each iteration left at its end, the newest last. ``step``: place in the ladder.
    """

    now: float = 0.0
    latest: JobStatistics = field(default_factory=lambda: JobStatistics(type="none"))
    bandwidth: float = 0.0
    iteration: int = 0
    lowest: int | None = None
    left: tuple[int, ...] = ()
    moved: int = -1
    moved_at: float = 0.0
    step: int = -1
    acted_at: float = 0.0
    acted_iterations: int = 0
    forced: bool = False
    aborted: bool = False

    def seen(self, stats: JobStatistics, now: float) -> History:
        """The same with what libvirt says now."""
        rate = stats.memory_rate or 0.0
        smoothed = rate if not self.bandwidth else SMOOTHING * rate + (1 - SMOOTHING) * self.bandwidth
        moved = (stats.memory_processed or 0) + (stats.disk_processed or 0)
        progressed = moved > self.moved or stats.type not in ("bounded", "unbounded")
        iteration, left, lowest = stats.memory_iteration or 0, self.left, self.lowest
        if iteration > self.iteration:
            if self.iteration and lowest is not None:
                left = (*left, lowest)[-_KEPT:]
            lowest = None
        if stats.memory_remaining is not None and iteration:
            lowest = stats.memory_remaining if lowest is None else min(lowest, stats.memory_remaining)
        return replace(
            self,
            now=now,
            latest=stats,
            bandwidth=smoothed if rate else self.bandwidth,
            iteration=max(iteration, self.iteration),
            lowest=lowest,
            left=left,
            moved=max(moved, self.moved),
            moved_at=now if progressed else self.moved_at,
        )

    def did(self, decision: Decision) -> History:
        """The same after the decision was carried out."""
        if decision.action is Action.WAIT:
            return self
        step = self.step + 1 if decision.action is Action.DOWNTIME else self.step
        forced = self.forced or decision.action in (Action.POSTCOPY, Action.PAUSE)
        return replace(
            self,
            step=step,
            forced=forced,
            aborted=self.aborted or decision.action is Action.ABORT,
            acted_at=self.now,
            acted_iterations=len(self.left),
        )

    @property
    def quiet(self) -> float:
        """Seconds since a byte was sent."""
        return self.now - self.moved_at

    @property
    def stalled(self) -> bool:
        """Whether the newest iteration that ended since the last action left hardly less than the one before it."""
        if len(self.left) < 2 or len(self.left) <= self.acted_iterations:
            return False
        return self.left[-1] > self.left[-2] * PROGRESS

    @property
    def expected_downtime_ms(self) -> float | None:
        """Milliseconds that what is left now would take."""
        left = self.latest.memory_remaining
        return None if left is None or not self.bandwidth else left / self.bandwidth * 1000


def decide(history: History, policy: Policy) -> Decision:
    """What to do now. Whatever is not ``WAIT`` has a reason with its numbers; in post-copy it is always ``WAIT``."""
    stats = history.latest
    if stats.postcopy:
        return _wait("it is in post-copy: its memory is on both hosts, and nothing but its end can be waited for")
    if stats.type not in ("bounded", "unbounded"):
        return _wait(f"no migration is running ({stats.type})")
    if history.aborted:
        return _wait("it was aborted")
    return (
        _silent(history, policy)
        or _late(history, policy)
        or (_wait("it was forced: it ends by itself") if history.forced else None)
        or _first(history, policy)
        or _stalled(history, policy)
        or _wait(_course(history))
    )


def _silent(history: History, policy: Policy) -> Decision | None:
    quiet = history.quiet
    # A permitted bandwidth that is used up by others looks the same for a moment, not for this long.
    if not policy.progress_timeout or quiet < policy.progress_timeout:
        return None
    reason = (
        f"not a byte was sent for {quiet:.0f} s (progress_timeout {policy.progress_timeout:.0f} s) after"
        f" {_mib(max(0, history.moved))} MiB: the destination or the way to it is gone"
    )
    return Decision(Action.ABORT, reason)


def _late(history: History, policy: Policy) -> Decision | None:
    deadline = policy.deadline
    if deadline is None or history.now <= deadline:
        return None
    reason = (
        f"it took longer than {deadline:.0f} s (completion_timeout {policy.completion_timeout:.0f} s for each of"
        f" {max(LEAST_GIB, policy.size_gib):.1f} GiB); {_course(history)}"
    )
    if policy.timeout_action == "abort":
        return Decision(Action.ABORT, reason)
    if history.forced:
        return None
    return Decision(Action.POSTCOPY if policy.post_copy else Action.PAUSE, reason)


def _first(history: History, policy: Policy) -> Decision | None:
    if history.step >= 0:
        return None
    first = policy.ladder[0]
    return Decision(Action.DOWNTIME, f"it begins: a downtime of {first} ms is permitted", first)


def _stalled(history: History, policy: Policy) -> Decision | None:
    if not history.stalled:
        return None
    before, last = history.left[-2:]
    why = f"iteration {history.iteration - 1} left {_mib(last)} MiB, the one before {_mib(before)}"
    ladder, step = policy.ladder, history.step + 1
    if step < len(ladder):
        if history.now - history.acted_at < policy.patience:
            return _wait(f"{why}: {ladder[history.step]} ms of downtime are permitted for {policy.patience:.0f} s")
        return Decision(Action.DOWNTIME, f"{why}: a downtime of {ladder[step]} ms is permitted", ladder[step])
    throttle = history.latest.throttle or 0
    if policy.auto_converge and throttle < MOST_THROTTLE:
        return _wait(f"{why}: the hypervisor slows the guest down, by {throttle} % now")
    if policy.post_copy:
        return Decision(Action.POSTCOPY, f"{why}, with {ladder[-1]} ms of downtime permitted: it does not converge")
    return None


def _course(history: History) -> str:
    stats = history.latest
    parts = [f"iteration {history.iteration}", f"{_mib(stats.memory_remaining or 0)} MiB of memory left"]
    if stats.disk_remaining:
        parts.append(f"{_mib(stats.disk_remaining)} MiB of disk left")
    if history.bandwidth:
        parts.append(f"{_mib(history.bandwidth)} MiB/s")
    if stats.memory_dirty_rate is not None:
        parts.append(f"the guest writes {_mib(stats.memory_dirty_rate)} MiB/s")
    expected = history.expected_downtime_ms
    if expected is not None:
        parts.append(f"would stand still for {expected:.0f} ms")
    return ", ".join(parts)


def _wait(reason: str) -> Decision:
    return Decision(Action.WAIT, reason)


def _mib(number: float) -> str:
    return f"{number / _MIB:.1f}"
