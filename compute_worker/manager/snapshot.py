"""``snapshot_instance`` and ``backup_instance``: an image of a guest's root disk in the image store. Their COMMIT is
that it is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from compute_worker import objects
from compute_worker.errors import ComputeError
from compute_worker.manager import snapshot_image, withdrawals
from compute_worker.manager.core import Core, as_step, begin, require_state, settle_record
from compute_worker.objects import ImageMeta, Instance, SnapshotOptions
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Commit, Do, Kind, Result, Step
from compute_worker.operations.run import Run
from compute_worker.states import TaskState
from compute_worker.virt.driver import Part, SnapshotRequest

SNAPSHOT = "snapshot_instance"
BACKUP = "backup_instance"
LastStep = Callable[[Run, Sequence[Part]], Do]
_CREATE, _FREEZE, _UPLOAD = "create_image", "freeze", "upload"


def admit(core: Core, tx: Tx, uuid: str, method: str) -> bool:
    """Check the state and write the task.

    :raises InvalidState: not in this state.
    """
    begin(core.store, tx, require_state(core.store, tx, uuid, method), method)
    return False


def snapshot_kind(core: Core) -> Kind:
    """How a snapshot runs."""
    return _kind(core, SNAPSHOT, "snapshot", lambda run, parts: Do("report", partial(_report, parts[-1].name)))


def backup_kind(core: Core) -> Kind:
    """How a backup runs: a snapshot after which older ones of its kind go."""
    return _kind(core, BACKUP, "backup", lambda run, parts: Do("rotate", lambda r: _rotate(core, parts[-1].name, r)))


def plan(core: Core, instance: Instance, args: Mapping[str, Any], operation: str) -> SnapshotRequest:
    """What the driver is asked for; the same after a restart."""
    options: SnapshotOptions = objects.decode(args.get("image_options") or {}, SnapshotOptions, "image_options")
    image = snapshot_image.describe(
        instance,
        args["image"],
        options,
        operation=operation,
        default_format=core.settings.images.snapshot_format,
        backup_type=args.get("backup_type"),
    )
    return SnapshotRequest(image=image, live=args.get("live", True), compression=options.compression)


def _kind(core: Core, name: str, event: str, last: LastStep) -> Kind:
    def steps(run: Run) -> Sequence[Step]:
        instance = core.load(run)
        request = plan(core, instance, run.args, run.uuid)
        parts = core.driver.snapshot(instance, request)
        return [
            *(_as_step(core, part, request.image) for part in parts),
            Commit(lambda tx, r: core.store.forbid_deleted(tx, instance.uuid)),
            last(run, parts),
        ]

    def finish(tx: Tx, run: Run) -> None:
        settle_record(core.store, tx, run.instance or "")

    def abandon(tx: Tx, run: Run, error: ComputeError) -> None:
        if not run.preempted:
            settle_record(core.store, tx, run.instance or "", fault=error.message)

    return Kind(name=name, steps=steps, finish=finish, abandon=abandon, limit="snapshot", event=event)


def _as_step(core: Core, part: Part, image: ImageMeta) -> Do:
    step = as_step(part)
    if part.name == _CREATE:
        return Do(part.name, step.do, lambda run: _withdraw(core, step, image, run))
    if part.name == _FREEZE:
        return Do(part.name, lambda run: _after(core, step, TaskState.IMAGE_PENDING_UPLOAD, run), step.undo)
    if part.name == _UPLOAD:
        return Do(part.name, lambda run: _during(core, step, TaskState.IMAGE_UPLOADING, run), step.undo)
    return step


def _withdraw(core: Core, step: Do, image: ImageMeta, run: Run) -> None:
    """A store that does not answer, or refuses, is asked again later: the instance, and a delete of it, do not wait."""
    try:
        step.undo(run)
    except ComputeError as exc:
        withdrawals.add(core, image)
        run.explain(f"image {image.id} is withdrawn as soon as its store lets it go: {exc}")


def _during(core: Core, step: Do, task: TaskState, run: Run) -> Result:
    _say(core, run, task)
    return step.do(run)


def _after(core: Core, step: Do, task: TaskState, run: Run) -> Result:
    told = step.do(run)
    _say(core, run, task)
    return told


def _say(core: Core, run: Run, task: TaskState) -> None:
    def write(tx: Tx) -> None:
        now = core.store.find(tx, run.instance or "")
        if now is not None and now.task_state is not TaskState.DELETING:
            core.store.change(tx, now.uuid, task_state=task)

    core.database.write(write)


def _report(name: str, run: Run) -> dict[str, Any]:
    """The operation's result: what the store has now, and under ``how`` what the driver told of taking it."""
    told = {**run.results.get(_FREEZE, {}), **run.results.get(_UPLOAD, {})}
    return {**run.results.get(name, {}), "how": told}


def _rotate(core: Core, name: str, run: Run) -> Result:
    """Delete backups of this kind beyond ``rotation``. The backup itself is made: a store that does not let them go
    now is told by the result, and the next backup finds them again."""
    request = plan(core, core.load(run), run.args, run.uuid)
    store = core.driver.image_store(request.image.store)
    wanted = {
        key: request.image.properties[key]
        for key in (snapshot_image.INSTANCE, snapshot_image.TYPE, snapshot_image.BACKUP_TYPE)
    }
    deleted: list[str] = []
    try:
        found = store.list_images(wanted)
        for old in snapshot_image.beyond_rotation(found, request.image.id, run.args["rotation"]):
            store.delete(old)
            deleted.append(old)
    except ComputeError as exc:
        run.explain(f"older backups stay for now: {exc}")
        return {**_report(name, run), "deleted": deleted, "rotation_error": exc.message}
    run.explain(f"{len(found)} backups of this kind, {len(deleted)} beyond {run.args['rotation']} deleted")
    return {**_report(name, run), "deleted": deleted}
