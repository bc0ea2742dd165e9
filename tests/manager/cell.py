"""Several machines that reach each other, and one instance that moves between them."""

from __future__ import annotations

import uuid
from pathlib import Path

import msgspec

from compute_worker import errors
from compute_worker.objects import Flavor, Instance, Migration
from compute_worker.states import OperationState
from compute_worker.virt.simulated.cell import SimulatedCell
from tests.manager.machine import IMAGE, Machine, make_instance
from tests.manager.net import Net
from tests.waiting import wait_for

SOURCE, DESTINATION, THIRD = "node1", "node2", "node3"
UUID = make_instance().uuid
OPERATION = "bbbbbbbb-0000-4000-8000-000000000001"
DECISION = "bbbbbbbb-0000-4000-8000-000000000002"
MIGRATION = "cccccccc-0000-4000-8000-000000000001"
WRITTEN = b"written by the guest"
BIGGER = Flavor(name="bigger", vcpus=2, memory_mb=256, root_gb=2, ephemeral_gb=2, swap_mb=128)


class Cell:
    """Machines by name. The instance runs on :data:`SOURCE` and has written to its disk."""

    def __init__(self, directory: Path, names: tuple[str, ...] = (SOURCE, DESTINATION), **compute) -> None:
        self.simulated = SimulatedCell()
        self.simulated.images.put(IMAGE, b"root file system")
        self.net = Net()
        self.machines = {
            name: Machine(directory, name, self.simulated, self.net, **compute) for name in names
        }

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    def boot(self, **changes) -> Instance:
        """The instance, running on the source."""
        source = self[SOURCE]
        assert source.do("build_and_run_instance", make_instance(**changes)).state is OperationState.DONE
        source.host.guest_write(UUID, WRITTEN)
        instance = source.instance(UUID)
        assert instance is not None
        return instance

    def migration(self, **changes) -> Migration:
        fields = {
            "uuid": MIGRATION,
            "instance": UUID,
            "migration_type": "resize",
            "source_host": SOURCE,
            "dest_host": DESTINATION,
            "new_flavor": BIGGER,
        }
        return Migration(**(fields | changes))

    def resize(self, instance: Instance | None = None, **changes) -> str:
        """Send ``prep_resize``; the operation's uuid."""
        migration = self.migration(**changes)
        record = instance or self[migration.source_host].instance(UUID)
        return self[migration.dest_host].send("prep_resize", record, migration, operation=OPERATION)

    def migrate(self, **changes) -> str:
        """Send ``live_migration``; the operation's uuid."""
        migration = self.migration(new_flavor=None, migration_type="live-migration", **changes)
        return self[SOURCE].send("live_migration", UUID, migration, operation=OPERATION)

    def resized(self) -> None:
        """Resize and wait until both hosts have recorded it."""
        self.resize()
        assert self.outcome(DESTINATION).state is OperationState.DONE, self.outcome(DESTINATION).error
        assert self.outcome(SOURCE).state is OperationState.DONE

    def outcome(self, name: str, operation: str = OPERATION):
        return self[name].outcome(operation)

    def phase(self, name: str, operation: str = OPERATION) -> str:
        """What an operation is at; empty while the host has not heard of it."""
        try:
            return self[name].worker.operations.get(operation).phase
        except errors.OperationNotFound:
            return ""

    def owners(self) -> list[str]:
        """Hosts that say that they own the instance."""
        found = [(name, machine.instance(UUID)) for name, machine in self.machines.items()]
        return [name for name, record in found if record is not None and record.host == name]

    def quiet(self) -> None:
        """Wait until no operation is open anywhere."""
        # Twice: the end of one host's may have given another that was looked at before something to do.
        for name, machine in [*self.machines.items()] * 2:

            def ended(m: Machine = machine) -> bool:
                return not m.worker.operations.list(None, None, True)

            def what(n: str = name, m: Machine = machine) -> str:
                said = [
                    f"{o.kind} {o.state} {o.phase} waits for {o.waiting_for}"
                    for o in m.worker.operations.list(None, None, True)
                ]
                return f"operations of {n} to end: {said}"

            try:
                wait_for(ended, deadline=15, what=f"operations of {name} to end")
            except AssertionError as exc:
                raise AssertionError(what()) from exc

    def leftovers(self, name: str) -> set[str]:
        return {left.kind for left in self[name].host.leftovers()}

    def used_mb(self, name: str) -> float:
        return self[name].worker.core.claims.usage()["memory_mb"].used

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()


def changed(instance: Instance, **changes) -> Instance:
    return msgspec.structs.replace(instance, **changes)


def new_uuid() -> str:
    return str(uuid.uuid4())


