"""Scenes in which a guest moves while it runs: there and back, aborted in the middle, and one too busy to go."""

from __future__ import annotations

import itertools
import re
import threading
import uuid
from collections.abc import Sequence
from types import TracebackType

from compute_worker.ctl.chain import Follower
from compute_worker.ctl.livemoves import chain_of, stood_still
from compute_worker.ctl.text import amount, progress_line
from compute_worker.demo.stage import FIRST, LONGEST_OPERATION, Scene, Stage
from compute_worker.objects import Accepted, Migration, Operation
from compute_worker.states import MigrationStatus, OperationState

LISTEN_SECONDS = 0.05
BUSY = "busy"
ACTED = ("pause: ", "postcopy: ")
"""How a decision begins that ends a migration at the guest's expense."""


class Ears:
    """While open, listens to a guest's consoles on all hosts; afterwards :attr:`texts` is all that they said, in the
    order in which they were first heard, whether they are still there or not."""

    def __init__(self, stage: Stage, instance: str) -> None:
        self._cell = stage.cell
        self._instance = instance
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="ears", daemon=True)
        self.texts: Sequence[str] = ()

    def _listen(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(LISTEN_SECONDS)
            self.texts = self._cell.hear(self._instance)

    def __enter__(self) -> Ears:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


def problems(texts: Sequence[str], boot: str, tick: str, since: int) -> list[str]:
    """What consoles say against one guest that counted on without a hole, and on one host at a time, from ``since``.

    A line may begin on one console and end on the next.
    """
    seen = [[int(n) for n in re.findall(tick, text, re.MULTILINE) if int(n) >= since] for text in texts]
    counted = [int(n) for n in re.findall(tick, "".join(texts), re.MULTILINE) if int(n) >= since]
    found = [f"{b} after {a}" for a, b in itertools.pairwise(counted) if b != a + 1]
    for place, ticks in enumerate(seen):
        twice = {n for other in seen[:place] for n in other} & set(ticks)
        found += [f"{n} on two hosts" for n in sorted(twice)]
    if any(re.search(boot, text, re.MULTILINE) for text in texts[1:]):
        found.append("it booted anew")
    return found


def there_and_back(stage: Stage) -> str:
    """To the other host and back; its counter goes on as if nothing had happened."""
    uuid_, source = stage.guest(FIRST)
    dest = _other(stage, source)
    shared = len({stage.api.get_host_state(host=host).instances_id for host in stage.cell.hosts}) == 1
    how = "one instances directory for both" if shared else "each host has its own instances directory: disks go too"
    before = stage.counter(FIRST)
    with Ears(stage, uuid_) as ears:
        went = _move(stage, FIRST, dest)
        between = stage.tick_after(FIRST, before, f"{FIRST} to go on ticking on {dest}")
        came = _move(stage, FIRST, source)
        after = stage.tick_after(FIRST, between, f"{FIRST} to go on ticking on {source}")
    said = "ticks on"
    if stage.cell.guest.keeps_count:
        wrong = problems(ears.texts, stage.cell.guest.boot, stage.cell.guest.tick, before)
        stage.require(not wrong, f"{FIRST}: {'; '.join(wrong)}")
        said = f"no tick is missing or there twice from {before} to {after}"
    return f"{source} -> {dest}: {_cost(went)}; back: {_cost(came)}; {said}; {how}"


def _cost(ended: Operation) -> str:
    sent = int(ended.result.get("memory_processed", 0)) + int(ended.result.get("disk_processed", 0))
    return f"{amount(sent)} sent, {stood_still(ended)}"


def aborted(stage: Stage) -> str:
    """Stopped on its way; it goes on where it was, and nothing is left on the other host."""
    uuid_, source = stage.guest(FIRST)
    dest = _other(stage, source)
    accepted, migration = _send(stage, FIRST, dest)

    def on_its_way() -> Operation | None:
        found: Operation = stage.api.get_operation(accepted.operation, host=source)
        stage.require(not found.state.final, f"it is {found.state} before it could be aborted")
        sent = found.progress is not None and found.progress.detail.get("status") == MigrationStatus.RUNNING.value
        return found if sent and found.progress is not None and found.progress.done_bytes else None

    found = stage.until(on_its_way, stage.cell.guest.patience, f"{FIRST} to be on its way")
    before = stage.counter(FIRST)
    stage.api.live_migration_abort(uuid_, migration, host=source)
    stage.say(f"aborted at: {progress_line(found.progress) if found else ''}")
    ended = _ended(stage, accepted, source, dest)
    stage.require((ended.error or {}).get("class") == "Cancelled", f"it is {ended.state}, not aborted")
    left = [line for line in stage.cell.leftovers() if uuid_ in line and dest in line]
    stage.require(not left, f"after the abort: {'; '.join(left)}")
    later = stage.tick_after(FIRST, before, f"{FIRST} to go on where it was")
    return f"it goes on on {source} (tick {before}, then {later}), nothing is left on {dest}"


def busy(stage: Stage) -> str:
    """It writes its memory faster than it can be sent, so that it never gets away by itself."""
    host = stage.cell.hosts[0]
    dest = _other(stage, host)
    stage.cell.policy(host, stage.cell.strict)
    stage.say(f"{host}: {', '.join(f'{name} = {value}' for name, value in stage.cell.strict.items())}")
    instance = stage.cell.busy(stage.make(BUSY, stage.cell.kernel_image))
    stage.end_of(stage.send_boot(host, instance))
    before = stage.booted(BUSY, 1)
    ended = _move(stage, BUSY, dest)
    reasons = "; ".join(step.reason or "" for step in ended.steps if step.name == "live_migration")
    acted = next((word for word in ACTED if word in reasons), None)
    stage.require(acted is not None, f"nothing had to be done about it: {reasons}")
    later = stage.tick_after(BUSY, before, f"{BUSY} to go on ticking on {dest}")
    took = float(ended.result.get("elapsed", 0.0))
    return f"{host} -> {dest} in {took:.1f} s by {(acted or '')[:-2]}: {_cost(ended)}; tick {before}, then {later}"


SCENES = (
    Scene("live migration, there and back", there_and_back),
    Scene("live migration, aborted in the middle", aborted),
    Scene("live migration of a busy guest, until the policy acts", busy),
)


def _other(stage: Stage, host: str) -> str:
    return next(name for name in stage.cell.hosts if name != host)


def _send(stage: Stage, name: str, dest: str) -> tuple[Accepted, str]:
    uuid_, source = stage.guest(name)
    migration = Migration(
        uuid=str(uuid.uuid4()), instance=uuid_, migration_type="live-migration", source_host=source, dest_host=dest
    )
    accepted: Accepted = stage.api.live_migration(uuid_, migration, host=source)
    stage.say(f"live migration of {name} to {dest} accepted by {source} as operation {accepted.operation}")
    return accepted, migration.uuid


def _move(stage: Stage, name: str, dest: str) -> Operation:
    """Move it and wait for both hosts; the source's part."""
    uuid_, source = stage.guest(name)
    accepted, _ = _send(stage, name, dest)
    ended = _ended(stage, accepted, source, dest)
    message = (ended.error or {}).get("message")
    stage.require(ended.state is OperationState.DONE, f"{ended.kind}: {ended.state.value}: {message}")
    stage.memory.where[uuid_] = dest
    return ended


def _ended(stage: Stage, accepted: Accepted, source: str, dest: str) -> Operation:
    chain = chain_of(accepted.operation or "", source, dest)
    with stage.out.following("    move", by=lambda part: part.host) as following:
        follower = Follower(stage.api, chain, following)
        ended = follower.until_end(LONGEST_OPERATION)
        late = follower.until_witnessed()
    for part in follower.view.parts.values():
        stage.tell_steps(part)
    stage.require(not late, f"{', '.join(late)} has not recorded it")
    return ended
