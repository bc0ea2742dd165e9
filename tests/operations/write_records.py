"""One operation whose steps write, set aside and remove the records of an instance; for a test that traces it.

Argument: a directory. Ends when the operation is done.
"""

from __future__ import annotations

import sys
from pathlib import Path

from compute_worker.messages import Context
from compute_worker.objects import Disk, DiskInfo, Flavor, ImageMeta, Instance
from compute_worker.operations.database import Database
from compute_worker.operations.kinds import Commit, Do, Kind
from compute_worker.operations.run import Run
from compute_worker.operations.schema import SCHEMA
from compute_worker.operations.service import Command, Operations
from compute_worker.states import OperationState
from compute_worker.virt.libvirt.disks.instance_dir import RESIZE, InstancesDirectory

UUID = "12345678-0000-4000-8000-000000000001"


def main(root: str) -> None:
    """Run it."""
    directory = InstancesDirectory(Path(root) / "instances")
    directory.prepare()
    instance = Instance(uuid=UUID, flavor=Flavor(vcpus=1, memory_mb=64), image=ImageMeta(id="img"))

    def write(run: Run) -> dict[str, str]:
        directory.create(UUID)
        directory.write_disk_info(UUID, DiskInfo(disks=[Disk(name="disk", format="raw", virtual_size_bytes=1)]))
        directory.write_record(instance)
        return {"is": "result-of-write"}

    def move(run: Run) -> dict[str, str]:
        directory.move(UUID, "", RESIZE)
        return {"is": "result-of-move"}

    def remove(run: Run) -> dict[str, str]:
        directory.remove(UUID, RESIZE)
        return {"is": "result-of-remove"}

    kind = Kind(
        name="files",
        steps=lambda run: [Do("write", write), Do("move", move), Commit(lambda tx, r: None), Do("remove", remove)],
        finish=lambda tx, run: None,
        abandon=lambda tx, run, error: None,
        limit="files",
        event="files",
    )
    database = Database(Path(root) / "journal.sqlite", [SCHEMA])
    operations = Operations(database, "node1", {"files": kind}, {"files": 1})
    operations.start()
    command = Command(kind="files", context=Context(request_id="r", message_id="m"), instance=UUID)
    accepted = operations.accept(command, lambda tx: False)
    assert accepted.operation is not None
    assert operations.get(accepted.operation, 30).state is OperationState.DONE
    operations.stop(5)
    database.close()


if __name__ == "__main__":
    main(sys.argv[1])
