"""Long jobs on a guest: live migration, backup, freezing its file systems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import libvirt

from compute_worker import errors
from compute_worker.virt.driver import JobStatistics
from compute_worker.virt.libvirt.events import JOB_OPERATIONS, word
from compute_worker.virt.libvirt.faults import code_of
from compute_worker.virt.libvirt.guest_state import job_statistics, state_of

_MIB = 1024 * 1024


class GuestJobs:
    """What :class:`~compute_worker.virt.libvirt.guest.Guest` can do that takes long, or bears on what does."""

    uuid: str

    def domain_for(self, doing: str, *, through_peer: bool = False) -> AbstractContextManager[Any]:
        """The ``virDomain`` for one call."""
        raise NotImplementedError

    def job_operation(self) -> str:
        """The job that runs on it: ``migration_out``, ``migration_in``, ``save``, ``backup``, ...; empty: none."""
        with self.domain_for("reading its job") as dom:
            try:
                stats = dom.jobStats(0) if dom.isActive() else {}
            except libvirt.libvirtError as exc:
                # "migration statistics are available only on the source host": of no other job.
                if code_of(exc) == libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
                    return "migration_in"
                raise
        if int(stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE)) == libvirt.VIR_DOMAIN_JOB_NONE:
            return ""
        return word(JOB_OPERATIONS, int(stats.get(libvirt.VIR_DOMAIN_JOB_OPERATION, 0)))

    def job_stats(self, *, completed: bool = False) -> JobStatistics:
        """How far its job is; ``completed``: how the last one went (kept until the next, also at a destination).

        A guest that is off has no job: type ``none``. After post-copy libvirt keeps no statistics: also ``none``.
        """
        with self.domain_for("reading its job's statistics") as dom:
            if not completed and not dom.isActive():
                return job_statistics({})
            flags = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
            stats = dom.jobStats(flags if completed else 0)
            state, reason = dom.state()
            return job_statistics(stats, postcopy=state_of(state, reason, saved=False).in_postcopy)

    def abort_job(self) -> bool:
        """End its job (migration, backup, save); the guest goes on. ``False``: there is none."""
        with self.domain_for("aborting its job") as dom:
            try:
                dom.abortJob()
            except libvirt.libvirtError as exc:
                if code_of(exc) == libvirt.VIR_ERR_OPERATION_INVALID:
                    return False
                raise
            return True

    def sever_migration(self) -> bool:
        """Cut the connections of an outgoing migration inside QEMU (its ``yank``), so that it fails there and then.
        ``False``: there is none to cut.

        For a destination that is silent: aborting waits for what is on its way to it, and the guest stands still as
        long as the kernel believes in the connection, which can be minutes. libvirt marks the guest as tainted.

        :raises NotSupported: QEMU before 6.0, or no libvirt-qemu.
        """
        with self.domain_for("cutting the connections of its migration") as dom:
            found = json.loads(_monitor(dom, {"execute": "query-yank"})).get("return")
            if found is None:
                raise errors.NotSupported(what="cutting the connections of a migration (yank)")
            instances = [one for one in found if _of_migration(one)]
            if instances:
                _monitor(dom, {"execute": "yank", "arguments": {"instances": instances}})
            return bool(instances)

    def migrate(self, destination_uri: str, params: Mapping[str, Any], flags: int) -> None:
        """Move it, as ``virDomainMigrateToURI3`` does; blocks until it is there or is not going.

        ``params`` by libvirt's names (``VIR_MIGRATE_PARAM_*``). When this process dies libvirt goes on by itself.
        A connection error of the *destination's* libvirtd is not taken for one of ours.

        :raises Cancelled: :meth:`abort_job` was called.
        :raises GuestFailed: it did not move; whether it runs here, its state says.
        """
        with self.domain_for("migrating the guest", through_peer=True) as dom:
            dom.migrateToURI3(destination_uri, dict(params), flags)

    def set_max_downtime(self, seconds: float) -> None:
        """The longest it may stand still when a running migration switches over."""
        with self.domain_for("setting its migration's downtime") as dom:
            dom.migrateSetMaxDowntime(max(1, round(seconds * 1000)), 0)

    def set_max_speed(self, bytes_per_second: int, *, postcopy: bool = False) -> None:
        """Limit a running migration; libvirt counts in MiB/s, so it is rounded up to the next."""
        flags = libvirt.VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY if postcopy else 0
        with self.domain_for("setting its migration's speed") as dom:
            dom.migrateSetMaxSpeed(-(-bytes_per_second // _MIB), flags)

    def start_postcopy(self) -> bool:
        """Switch a running migration (begun with VIR_MIGRATE_POSTCOPY) over now. ``False``: it is in post-copy.

        From here the guest needs both hosts: if either dies, it dies.
        """
        with self.domain_for("switching its migration to post-copy") as dom:
            state, reason = dom.state()
            if state_of(state, reason, saved=False).in_postcopy:
                return False
            dom.migrateStartPostCopy(0)
            return True

    def backup_begin(self, backup_xml: str, checkpoint_xml: str | None = None, *, reuse_external: bool = False) -> None:
        """Begin a backup, with a checkpoint for the next where given; :meth:`abort_job` ends a pull-mode one.

        :param reuse_external: write into files that are there.
        """
        flags = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL if reuse_external else 0
        with self.domain_for("beginning a backup of the guest") as dom:
            dom.backupBegin(backup_xml, checkpoint_xml, flags)

    def backup_xml(self) -> str | None:
        """The backup that runs, as libvirt describes it; ``None``: none does."""
        with self.domain_for("reading its backup") as dom:
            try:
                return str(dom.backupGetXMLDesc(0))
            except libvirt.libvirtError as exc:
                if code_of(exc) == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                    return None
                raise

    def checkpoints(self) -> list[str]:
        """Names of its checkpoints."""
        with self.domain_for("listing its checkpoints") as dom:
            return [str(one.getName()) for one in dom.listAllCheckpoints(0)]

    def delete_checkpoint(self, name: str, *, metadata_only: bool = False) -> bool:
        """Delete a checkpoint and its bitmaps; ``metadata_only`` leaves the bitmaps. ``False``: there is none."""
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY if metadata_only else 0
        with self.domain_for(f"deleting checkpoint {name}") as dom:
            try:
                dom.checkpointLookupByName(name, 0).delete(flags)
            except libvirt.libvirtError as exc:
                if code_of(exc) == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                    return False
                raise
            return True

    def set_agent_patience(self, seconds: int) -> None:
        """How long its agent is waited for from now on, in whole seconds; libvirt alone waits for ever."""
        with self.domain_for("setting the patience with its agent") as dom:
            dom.agentSetResponseTimeout(seconds, 0)

    def fs_freeze(self, mountpoints: Sequence[str] | None = None) -> int:
        """Flush and freeze its file systems through the guest agent; how many. Freezing twice fails: thaw first.

        :raises NotSupported: there is no agent, or it does not answer.
        """
        with self.domain_for("freezing its file systems") as dom:
            return int(dom.fsFreeze(list(mountpoints) if mountpoints is not None else None, 0))

    def fs_thaw(self, mountpoints: Sequence[str] | None = None) -> int:
        """Thaw what :meth:`fs_freeze` froze; how many (0: nothing was frozen)."""
        with self.domain_for("thawing its file systems") as dom:
            return int(dom.fsThaw(list(mountpoints) if mountpoints is not None else None, 0))


def _monitor(dom: Any, command: Mapping[str, Any]) -> str:
    try:
        import libvirt_qemu
    except ImportError:
        raise errors.NotSupported(what="speaking to QEMU's monitor (libvirt-qemu)") from None
    return str(libvirt_qemu.qemuMonitorCommand(dom, json.dumps(command), 0))


def _of_migration(instance: Mapping[str, Any]) -> bool:
    """Whether it is a connection of a migration: of its memory, or of a disk that libvirt copies."""
    if instance.get("type") == "migration":
        return True
    return instance.get("type") == "block-node" and str(instance.get("node-name", "")).startswith("migration-")
