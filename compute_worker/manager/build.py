"""``build_and_run_instance``: images, disks, interfaces, definition, start paused, COMMIT, resume."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from compute_worker import errors, objects
from compute_worker.errors import ComputeError
from compute_worker.manager.core import Core, as_step, settle_record
from compute_worker.objects import InjectedFile, Instance
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Commit, Do, Kind, Step
from compute_worker.operations.run import Run
from compute_worker.states import PowerState, TaskState, VmState
from compute_worker.virt.driver import SpawnRequest

PLUGGED = "network-vif-plugged"


def admit(core: Core, tx: Tx, instance: Instance) -> bool:
    """Check and write what accepting a build makes true: the record and its claim.

    :raises InstanceDeleted: the uuid was deleted before: it is never used again.
    :raises InstanceExists: it is here already.
    :raises InsufficientResources: it does not fit.
    """
    core.store.forbid_deleted(tx, instance.uuid)
    if core.store.find(tx, instance.uuid) is not None:
        raise errors.InstanceExists(instance=instance.uuid)
    core.claims.claim(tx, instance)
    core.store.put(tx, instance)
    return False


def newborn(instance: Instance, host: str) -> Instance:
    """The record as it begins, whatever states the caller put into it."""
    return msgspec.structs.replace(
        instance,
        host=host,
        vm_state=VmState.BUILDING,
        task_state=TaskState.SPAWNING,
        power_state=PowerState.NOSTATE,
        launched_at=None,
        fault=None,
        seq=0,
    )


def check(core: Core, instance: Instance, request: SpawnRequest) -> None:
    """Refuse what can be known before anything is written.

    :raises Refused: with the reason.
    """
    flavor, image = instance.flavor, instance.image
    if flavor.root_gb and image.min_disk_gb > flavor.root_gb:
        raise errors.InvalidCommand(
            method="build_and_run_instance",
            problem=f"image {image.id} needs a root disk of {image.min_disk_gb} GiB, the flavor has {flavor.root_gb}",
        )
    if image.min_ram_mb > flavor.memory_mb:
        raise errors.InvalidCommand(
            method="build_and_run_instance",
            problem=f"image {image.id} needs {image.min_ram_mb} MiB of memory, the flavor has {flavor.memory_mb}",
        )
    core.driver.check_spawn(instance, request)


def request_of(run: Run) -> SpawnRequest:
    """What the command carried beside the record, from the journal."""
    files: list[InjectedFile] = objects.decode(run.args.get("injected_files", []), list[InjectedFile], "journal")
    return SpawnRequest(injected_files=files, admin_password=run.args.get("admin_password"))


def kind(core: Core) -> Kind:
    """How a build runs. COMMIT is after the guest was started paused and before it runs (``protocol.md`` 1)."""

    def steps(run: Run) -> Sequence[Step]:
        instance: Instance = objects.decode(run.args["instance"], Instance, "journal")
        return [
            *(as_step(part) for part in core.driver.spawn(instance, request_of(run))),
            Do("wait_for_vifs", lambda r: wait_for_vifs(core, r)),
            Commit(lambda tx, r: core.store.forbid_deleted(tx, instance.uuid)),
            # Not unpause: a host that went down after the COMMIT took the paused guest with it.
            Do("resume_guest", lambda r: core.driver.power_on(instance, r)),
        ]

    def finish(tx: Tx, run: Run) -> None:
        assert run.instance is not None
        settle_record(
            core.store,
            tx,
            run.instance,
            vm_state=VmState.ACTIVE,
            power_state=PowerState.RUNNING,
            launched_at=time.time(),
        )

    def abandon(tx: Tx, run: Run, error: ComputeError) -> None:
        assert run.instance is not None
        if run.committed:
            return
        core.store.remove(tx, run.instance, fault=error.message)
        core.claims.release(tx, run.instance)

    return Kind(
        name="build_and_run_instance",
        steps=steps,
        finish=finish,
        abandon=abandon,
        limit="build",
        event="create",
        secret_args=frozenset({"admin_password", "injected_files"}),
    )


def wait_for_vifs(core: Core, run: Run) -> None:
    """Wait until every interface that asks for it was reported plugged. An event that came early counts.

    :raises VifPlugTimeout: one was not, and ``vif_plugging_is_fatal``; or it was reported failed.
    """
    wait_for_plugs(core, run, core.load(run))


def wait_for_plugs(core: Core, run: Run, instance: Instance) -> None:
    """The same for an instance that may not be this host's yet; raises what :func:`wait_for_vifs` raises."""
    options = core.settings.compute
    deadline = time.monotonic() + options.vif_plugging_timeout
    for vif in instance.vifs:
        if not vif.wait_for_plug:
            continue
        left = max(0.0, deadline - time.monotonic())
        came = run.wait(lambda v=vif: core.store.event_status(instance.uuid, PLUGGED, v.id) is not None, left)  # type: ignore[misc]
        status = core.store.event_status(instance.uuid, PLUGGED, vif.id)
        if came and status == "completed":
            run.explain(f"vif {vif.id} is plugged")
        elif options.vif_plugging_is_fatal:
            raise errors.VifPlugTimeout(instance=instance.uuid, vif=vif.id, seconds=options.vif_plugging_timeout)
        else:
            run.explain(f"vif {vif.id} was not reported plugged ({status}): vif_plugging_is_fatal is off")
