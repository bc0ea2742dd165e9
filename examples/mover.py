#!/usr/bin/env python3
"""What a conductor does later: resizes, live migrations, and emptying a host. It goes on where conductor.py ends.

    COMPUTE_WORKER_TRANSPORT_URL=rabbit://... examples/mover.py --drain HOST
    examples/mover.py --embedded

Its rules, beside those of conductor.py:

- One message moves an instance: ``prep_resize`` to the destination, with the hosts to ask next in ``alternates``. The
  workers do the rest, and a destination that refuses or fails passes it on under the same operation uuid.
- So the end of one host's part is not the end: the move is over when all of the hosts answer and none has an open part.
  A host that passes it on ends its own part after the next one has it, so asking them all decides.
- A running guest goes by ``live_migration`` to its source: the destination is asked before whether it can take it so
  (``check_can_live_migrate_destination``), and there is nothing to decide afterwards.
- A cold move is decided once, by ``confirm_resize`` or ``revert_resize`` to the host that has the instance now.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from conductor import Conductor, candidates, instances

from compute_worker import errors
from compute_worker.objects import Flavor, ImageMeta, Instance, Migration, Operation
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from compute_worker.states import OperationState, VmState

LOOK_SECONDS = 1.0
RUNNING = (VmState.ACTIVE, VmState.PAUSED)


@dataclass
class Move:
    """One instance on its way to another host. ``state``: sent, resized, confirming, confirmed, failed; of one that
    moves while it runs: sent, moved, failed."""

    instance: Instance
    migration: Migration
    operation: str
    state: str = "sent"
    host: str = ""
    """Where the instance is, as far as that is known."""
    error: str = ""
    confirmation: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def settled(self) -> bool:
        """Whether nothing more is to come."""
        return self.state in ("confirmed", "moved", "failed")

    @property
    def live(self) -> bool:
        """Whether it moves while it runs."""
        return self.migration.migration_type == "live-migration"


class Mover(Conductor):
    """A conductor that also moves what it has booted, or finds."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.moves: dict[str, Move] = {}

    def move(self, instance: Instance, flavor: Flavor | None = None) -> Move:
        """Send one instance to the best other host, with another flavor where one is given.

        :raises RuntimeError: no other host has room.
        :raises ComputeError: nobody takes it, or nobody knows whether somebody has: call it again with the same move.
        """
        self._refresh()
        source = str(instance.host)
        hosts = candidates(self.hosts.values(), flavor or instance.flavor, [source])
        if not hosts:
            raise RuntimeError(f"{instance.name}: no other host has room")
        migration = Migration(
            uuid=str(uuid.uuid4()),
            instance=instance.uuid,
            migration_type="migration" if flavor is None else "resize",
            source_host=source,
            dest_host=hosts[0],
            new_flavor=flavor,
            alternates=hosts[1:],
        )
        move = Move(instance, migration, str(uuid.uuid4()), host=source)
        self._send_move(move)
        self.moves[move.operation] = move
        return move

    def move_live(self, instance: Instance) -> Move | None:
        """Send one running instance to the best other host that can take it so; ``None``: there is none.

        :raises ComputeError: the source refuses, or does not answer: call it again with the same move.
        """
        self._refresh()
        source = str(instance.host)
        for host in candidates(self.hosts.values(), instance.flavor, [source]):
            migration = Migration(
                uuid=str(uuid.uuid4()), instance=instance.uuid, migration_type="live-migration", source_host=source,
                dest_host=host,
            )  # fmt: skip
            try:
                self._api.check_can_live_migrate_destination(instance, migration, host=host)
            except errors.ComputeError as exc:
                self._say(f"{instance.name}: not live to {host}: {exc}")
                continue
            move = Move(instance, migration, str(uuid.uuid4()), host=source)
            self._send_move(move)
            self.moves[move.operation] = move
            return move
        return None

    def _send_move(self, move: Move) -> None:
        """Silence: once more. The same operation is done once, whoever heard the first."""
        for attempt in (1, 2):
            try:
                self._send_once(move)
            except errors.PeerUnavailable:
                if attempt == 2:
                    raise
                continue
            self._say(f"{move.instance.name}: {move.migration.source_host} -> {move.migration.dest_host} accepted")
            return

    def _send_once(self, move: Move) -> None:
        migration, expires_at = move.migration, time.time() + self._expiry
        if move.live:
            self._api.live_migration(
                move.instance.uuid, migration, host=migration.source_host, operation=move.operation,
                expires_at=expires_at,
            )  # fmt: skip
        else:
            self._api.prep_resize(
                move.instance, migration, host=migration.dest_host, operation=move.operation, expires_at=expires_at
            )

    def run_moves(self, seconds: float) -> bool:
        """Follow until every move is confirmed or has failed, at most ``seconds``. Whether all are."""
        deadline = time.monotonic() + seconds
        looked = time.monotonic()
        while not all(move.settled for move in self.moves.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(queue.Empty):
                self._hear(*self._events.get(timeout=min(left, 0.1)))
            if time.monotonic() - looked > LOOK_SECONDS:
                # A notification may have gone to somebody else who reads the same queue.
                looked = time.monotonic()
                for move in list(self.moves.values()):
                    self._look(move)
        return True

    def _hear(self, event_type: str, payload: dict[str, Any]) -> None:
        super()._hear(event_type, payload)
        move = self.moves.get(str(payload.get("operation"))) or next(
            (m for m in self.moves.values() if m.confirmation == payload.get("operation")), None
        )
        if move is not None and event_type.rpartition(".")[2] in ("end", "error"):
            self._look(move)

    def _look(self, move: Move) -> None:
        """Where it is, asked of those who may have it; doing it twice changes nothing."""
        if move.state == "sent" and move.live:
            self._look_at_live(move)
        elif move.state == "sent":
            self._look_at_move(move)
        elif move.state == "confirming":
            confirmed = None
            with contextlib.suppress(errors.ComputeError):
                confirmed = self._part(move.confirmation, move.host)
            if confirmed is not None and confirmed.state is OperationState.DONE:
                move.state = "confirmed"
                self._say(f"{move.instance.name}: confirmed on {move.host}")
        if move.state == "resized":
            self._confirm(move)

    def _look_at_live(self, move: Move) -> None:
        """The source decides, when the destination has told it what it has."""
        part = None
        with contextlib.suppress(errors.ComputeError):
            part = self._part(move.operation, move.migration.source_host)
        if part is None or not part.state.final:
            return
        if part.state is OperationState.DONE:
            move.state, move.host = "moved", move.migration.dest_host
            milliseconds = float(part.result.get("downtime", 0.0)) * 1000
            self._say(f"{move.instance.name}: runs on {move.host}, stood still for {milliseconds:.0f} ms")
        else:
            move.state, move.error = "failed", str((part.error or {}).get("message"))
            self._say(f"{move.instance.name}: runs on on {move.host}: {move.error}")

    def _look_at_move(self, move: Move) -> None:
        hosts = [move.migration.dest_host, *move.migration.alternates]
        try:
            parts = [part for host in hosts if (part := self._part(move.operation, host)) is not None]
        except errors.ComputeError:
            # Whoever is silent may have it.
            return
        taken = [p for p in parts if p.state is OperationState.DONE and p.kind == "prep_resize"]
        if taken:
            move.state, move.host = "resized", taken[0].host
            self._say(f"{move.instance.name}: runs on {move.host}")
        elif parts and all(part.state.final for part in parts):
            move.state = "failed"
            move.error = str((parts[-1].error or {}).get("message"))
            self._say(f"{move.instance.name}: stays on {move.host}: {move.error}")

    def _part(self, operation: str, host: str) -> Operation | None:
        """A host's part of an operation; ``None``: it has none.

        :raises ComputeError: it does not answer.
        """
        try:
            return self._api.get_operation(operation, host=host)
        except errors.OperationNotFound:
            return None

    def _confirm(self, move: Move) -> None:
        """A conductor of one's own looks at the guest first, and reverts what does not work."""
        try:
            self._api.confirm_resize(
                move.instance.uuid, move.migration.uuid, host=move.host, operation=move.confirmation
            )
        except errors.PeerUnavailable:
            return
        move.state = "confirming"

    # --- a whole host -------------------------------------------------------------------------------------------------

    def drain(self, host: str, at_once: int = 2, seconds: float = 600.0) -> list[str]:
        """Move everything off ``host``, some at once; what runs while it runs, where a host can take it so. What
        stays is returned, with the reason."""
        self._api.disable_host("being drained", host=host)
        waiting = self._api.list_instances(host=host)
        stays: list[str] = []
        while waiting:
            batch, waiting = waiting[:at_once], waiting[at_once:]
            for instance in batch:
                try:
                    if instance.vm_state not in RUNNING or self.move_live(instance) is None:
                        self.move(instance)
                except (errors.ComputeError, RuntimeError) as exc:
                    stays.append(f"{instance.name}: {exc}")
            self.run_moves(seconds)
        gone = ("confirmed", "moved")
        stays += [f"{m.instance.name}: {m.error or m.state}" for m in self.moves.values() if m.state not in gone]
        return stays


def empty_host(mover: Mover, host: str) -> int:
    """Drain a host and tell; the exit status."""
    with mover.listening():
        stays = mover.drain(host)
    left = mover._api.list_instances(host=host)
    for reason in stays:
        print(f"stays: {reason}")
    print(f"{host} is empty" if not left else f"{len(left)} instances are left on {host}")
    return 0 if not left else 1


def _embedded() -> int:
    """Boot three, give one another size, and empty a host."""
    from compute_worker.embedded import EmbeddedCell

    logging.getLogger().setLevel(logging.ERROR)  # the workers run in this process
    with tempfile.TemporaryDirectory() as directory:
        cell = EmbeddedCell(["node1", "node2", "node3"], Path(directory), fake={"latency": 0.02})
        Path(directory, "images", "image").write_bytes(b"an image")
        with cell:
            topic = cell.settings["node1"].telemetry.notification_topic
            mover = Mover(cell.api, cell.transport, exchange=cell.exchange, topic=topic, url=cell.url)
            mover.discover(expected=3)
            flavor = Flavor(vcpus=1, memory_mb=128, root_gb=1)
            with mover.listening():
                builds = [mover.boot(i) for i in instances(3, flavor, ImageMeta(id="image"))]
                mover.run(60)
                first = cell.api.get_instance(builds[0].instance.uuid, host=str(builds[0].host))
                mover.move(first, Flavor(vcpus=2, memory_mb=256, root_gb=2))
                if not mover.run_moves(60):
                    return 1
            return empty_host(mover, next(iter(mover.moves.values())).host)


def main(arguments: list[str]) -> int:
    """Exit status: 0 the host is empty, 1 it is not, 2 usage."""
    parser = argparse.ArgumentParser(description="Move instances between hosts.")
    parser.add_argument("--drain", metavar="HOST", help="move everything off this host")
    parser.add_argument("--embedded", action="store_true", help="against three simulated hosts in this process")
    args = parser.parse_args(arguments)
    if args.embedded:
        return _embedded()
    url = os.environ.get("COMPUTE_WORKER_TRANSPORT_URL")
    if not url or not args.drain:
        parser.error("set COMPUTE_WORKER_TRANSPORT_URL and give --drain HOST, or give --embedded")
    transport = get_transport(url)
    mover = Mover(ComputeAPI(transport, timeout=15), transport, url=url)
    if args.drain not in mover.discover():
        print(f"{args.drain} does not answer", file=sys.stderr)
        return 1
    return empty_host(mover, args.drain)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
