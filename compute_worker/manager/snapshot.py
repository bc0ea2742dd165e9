"""``snapshot_instance``: an image of a guest's root disk in the image store. Its COMMIT is that it is published."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from compute_worker.errors import ComputeError
from compute_worker.manager.core import Core, Wish, accept, as_step, begin, require_state, settle_record
from compute_worker.manager.lifecycle import Expiry
from compute_worker.messages import Context, command
from compute_worker.objects import Accepted, ImageId, Uuid
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Commit, Do, Kind, Result, Step
from compute_worker.operations.run import Run
from compute_worker.operations.service import Operations
from compute_worker.states import TaskState

METHOD = "snapshot_instance"
_TASKS = {"freeze": TaskState.IMAGE_PENDING_UPLOAD, "upload": TaskState.IMAGE_UPLOADING}
"""What the instance says once a part of that name has ended, or while it runs."""


class SnapshotEndpoint:
    """Snapshots of instances of this host."""

    def __init__(self, core: Core, operations: Operations) -> None:
        self._core = core
        self._operations = operations

    @command
    def snapshot_instance(
        self,
        context: Context,
        instance: Uuid,
        image: ImageId,
        live: bool = True,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Make image ``image`` of the instance's root disk; the guest runs on. Ends with the image whole and visible in
        the store, or with none of it there.

        :raises NotSupported: this host's driver makes no snapshots.
        """
        core = self._core
        core.driver.snapshot(core.store.get(instance), image, live)
        return accept(
            self._operations,
            context,
            METHOD,
            Wish(operation, expires_at, check_only),
            lambda tx: admit(core, tx, instance),
            instance=instance,
            args={"image": image, "live": live},
        )


def admit(core: Core, tx: Tx, uuid: str) -> bool:
    """Check the state and write the task.

    :raises InvalidState: not in this state.
    """
    begin(core.store, tx, require_state(core.store, tx, uuid, METHOD), METHOD)
    return False


def kind(core: Core) -> Kind:
    """How a snapshot runs."""

    def steps(run: Run) -> Sequence[Step]:
        instance = core.load(run)
        parts = core.driver.snapshot(instance, run.args["image"], run.args["live"])
        return [
            *(_with_task(core, as_step(part)) for part in parts),
            Commit(lambda tx, r: core.store.forbid_deleted(tx, instance.uuid)),
            Do("report", partial(_report, parts[-1].name)),
        ]

    def finish(tx: Tx, run: Run) -> None:
        settle_record(core.store, tx, run.instance or "")

    def abandon(tx: Tx, run: Run, error: ComputeError) -> None:
        if not run.preempted:
            settle_record(core.store, tx, run.instance or "", fault=error.message)

    return Kind(name=METHOD, steps=steps, finish=finish, abandon=abandon, limit="snapshot", event="snapshot")


def _with_task(core: Core, step: Do) -> Do:
    task = _TASKS.get(step.name)
    if task is None:
        return step

    def do(run: Run) -> Result:
        if step.name == "upload":
            _say(core, run, task)
        told = step.do(run)
        if step.name != "upload":
            _say(core, run, task)
        return told

    return Do(step.name, do, step.undo)


def _say(core: Core, run: Run, task: TaskState) -> None:
    def write(tx: Tx) -> None:
        now = core.store.find(tx, run.instance or "")
        if now is not None and now.task_state is not TaskState.DELETING:
            core.store.change(tx, now.uuid, task_state=task)

    core.database.write(write)


def _report(name: str, run: Run) -> Result:
    """What the store has now is the operation's result."""
    return run.results.get(name, {})
