"""A guest's root disk standing still: brought to it, found again by a successor, let go.

What was begun is on record (``snapshot.part/snapshot.json`` beside the disks) before it happens. Whatever died when,
:meth:`Points.abandon` leaves a guest that is defined, thawed and on if it was on, without a job, checkpoint or file of
an image that is not there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from compute_worker import errors
from compute_worker.images import files
from compute_worker.images.store import ORIGIN, ImageStore
from compute_worker.objects import Disk, Instance
from compute_worker.states import PowerState
from compute_worker.virt.driver import Job, SnapshotRequest
from compute_worker.virt.libvirt.deeds import OFF, Deeds
from compute_worker.virt.libvirt.disks.builder import ROOT
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.snapshot import freezing, live, record
from compute_worker.virt.libvirt.snapshot.decision import ChainFacts, Facts, Method, builds_on_last, decide
from compute_worker.virt.libvirt.snapshot.live import LiveDisk
from compute_worker.virt.libvirt.snapshot.record import DIRECTORY, Held, Last

LOG = logging.getLogger(__name__)


class Points:
    """Points in time of the root disks of this host's instances. Thread-safe for different instances."""

    def __init__(self, deeds: Deeds) -> None:
        self._deeds = deeds
        self._options = deeds.settings.libvirt

    # --- looking ------------------------------------------------------------------------------------------------

    def directory(self, uuid: str) -> Path:
        """The instance's own."""
        return self._deeds.disks.directory.path(uuid)

    def place(self, uuid: str) -> Path:
        """Where everything of a snapshot is until it is published."""
        return self.directory(uuid) / DIRECTORY

    def root(self, uuid: str) -> Disk:
        """The root disk, as it was written down when it was made.

        :raises GuestFailed: there is none.
        """
        info = self._deeds.need_disk_info(uuid)
        found = next((disk for disk in info.disks if disk.name == ROOT), None)
        if found is None:
            raise errors.GuestFailed(instance=uuid, reason=f"it has no root disk in {self.directory(uuid)}")
        return found

    def store(self, request: SnapshotRequest) -> ImageStore:
        """Where the image goes."""
        return self._deeds.disks.stores.get(request.image.store)

    def held(self, instance: Instance, request: SnapshotRequest) -> Held | None:
        """The point in time of this image, as far as it got; not whether it still stands."""
        found = record.held(self.directory(instance.uuid))
        return found if found is not None and is_of(found, request) else None

    def live_disk(self, uuid: str, held: Held) -> LiveDisk:
        """The disk of a ``backup``."""
        return LiveDisk(self._deeds.guest(uuid), held.target, self.place(uuid))

    def stands(self, uuid: str, held: Held) -> bool:
        """Whether what was frozen can still be read as it was."""
        if not held.ready:
            return False
        if held.method is Method.BACKUP:
            return self._deeds.power(uuid) not in OFF and self.live_disk(uuid, held).stands()
        if held.method is Method.SAVED:
            return self._deeds.power(uuid) is PowerState.SUSPENDED
        return self._deeds.power(uuid) in OFF

    # --- doing --------------------------------------------------------------------------------------------------

    def freeze(self, instance: Instance, request: SnapshotRequest, job: Job) -> Held:
        """The disk stands still from now on. Called again, and nothing happened to it: the same point in time.

        :raises HypervisorBusy: another job runs on the guest.
        :raises DiskFull: no room for a directory.
        """
        uuid, guest = instance.uuid, self._deeds.guest(instance.uuid)
        found = self.held(instance, request)
        if found is not None and (found.written or self.stands(uuid, found)):
            return found
        root = self.root(uuid)
        self.abandon(uuid)
        target = self._target(guest, uuid)
        power = self._deeds.power(uuid)
        hindered = live.obstacle(guest, target, self.place(uuid)) if power not in OFF and request.live else ""
        method, why = decide(Facts(power, request.live, hindered))
        self._make_place(uuid)
        held = Held(image=request.image.id, origin=origin_of(request), method=method, target=target)
        record.keep(self.directory(uuid), held)
        if method is Method.BACKUP:
            try:
                return self._back_up(instance, request, root, held, why, job)
            except (errors.GuestFailed, errors.NotSupported) as exc:
                if self._deeds.power(uuid) in OFF:
                    raise
                held = msgspec.structs.replace(held, method=Method.SAVED)
                why = f"the hypervisor cannot keep a point in time of a guest that runs: {exc}"
                record.keep(self.directory(uuid), held)
        if held.method is Method.SAVED:
            _save(guest, job)
        job.explain(f"{held.method}: {why}")
        return self._ready(uuid, held)

    def _back_up(
        self, instance: Instance, request: SnapshotRequest, root: Disk, held: Held, why: str, job: Job
    ) -> Held:
        uuid, guest = instance.uuid, self._deeds.guest(instance.uuid)
        disk = self.live_disk(uuid, held)
        disk.make_scratch(self._deeds.disks.qemu_img, root.virtual_size_bytes, self._options.disk_owner_group, job)
        last, chain = self._chain(guest, uuid, request)
        # Only a qcow2 can say later what was written since, and only some stores can build on an image that they have.
        token = live.new_token() if root.format == "qcow2" and self.store(request).takes_deltas else ""
        held = msgspec.structs.replace(held, token=token, thawed=False)
        if last is not None:
            held = msgspec.structs.replace(held, since=last.token, parent=last.image)
        record.keep(self.directory(uuid), held)
        seconds = self._options.snapshot_freeze_timeout if self._deeds.power(uuid) is PowerState.RUNNING else 0.0
        with freezing.frozen(guest, seconds) as still:
            try:
                disk.begin(held.token, held.since)
            except errors.GuestFailed as exc:
                if not held.since:
                    raise
                # A bitmap that was not written when its hypervisor died cannot be believed.
                chain = f"the disk cannot say what was written since the last image: {exc}"
                held = msgspec.structs.replace(held, since="", parent="")
                disk.begin(held.token, "")
        job.explain(f"{held.method}: {why}; {still.describe()}; {chain}")
        return self._ready(uuid, msgspec.structs.replace(held, thawed=still.thawed))

    def _chain(self, guest: Guest, uuid: str, request: SnapshotRequest) -> tuple[Last | None, str]:
        last = record.last(self.directory(uuid))
        facts = ChainFacts(
            wanted=self._options.snapshot_incremental,
            compressed=request.compression != "none" and request.image.disk_format == "qcow2",
            last=last is not None,
            held=last is not None and bool(last.token) and last.token in guest.checkpoints(),
            there=last is not None and self.published_path(last, request) is not None,
        )
        builds, why = builds_on_last(facts)
        return (last if builds else None), why

    def published_path(self, last: Last, request: SnapshotRequest) -> Path | None:
        """The image as a file of this host, when it is in the store of ``request`` and unchanged."""
        store = self.store(request)
        if store.name != last.store or not last.validator:
            return None
        try:
            return store.local_path(last.image) if store.stat(last.image).validator == last.validator else None
        except errors.ComputeError:
            return None

    def finish(self, uuid: str, held: Held) -> None:
        """The disk has been read: the hypervisor keeps nothing any more, the guest is on if it was."""
        if held.method is Method.BACKUP:
            self.live_disk(uuid, held).end()
        if held.method is Method.SAVED:
            self._wake(uuid)
        if not held.thawed and freezing.thaw(self._deeds.guest(uuid)):
            record.keep(self.directory(uuid), msgspec.structs.replace(held, thawed=True))

    def abandon(self, uuid: str) -> None:
        """No point in time that is not published is left. Ends well when there is none, and when there is no guest.

        :raises HypervisorUnavailable: libvirt does not answer: ask again.
        """
        directory, guest = self.directory(uuid), self._deeds.guest(uuid)
        if not self.place(uuid).is_dir():
            return
        found = record.held(directory)
        if found is not None:
            LOG.info("instance %s: what was frozen for image %s is let go", uuid, found.image)
            if not found.thawed:
                freezing.thaw(guest)
            if found.method is Method.BACKUP:
                self.live_disk(uuid, found).end()
            if found.method is Method.SAVED:
                self._wake(uuid)
        last = record.last(directory)
        self.drop_checkpoints(uuid, keep=last.token if last is not None else "")
        self.remove_place(uuid)

    def remove_place(self, uuid: str) -> None:
        """Its files go."""
        place = self.place(uuid)
        with files.disk_errors(place):
            if place.is_dir():
                files.remove_tree(place)

    def drop_checkpoints(self, uuid: str, keep: str = "") -> None:
        """No checkpoint of an image is left but ``keep``."""
        info = self._deeds.disks.directory.read_disk_info(uuid)
        found = next((one for one in info.disks if one.name == ROOT and one.format == "qcow2"), None) if info else None
        path = self.directory(uuid) / ROOT if found is not None else None
        live.drop_checkpoints(self._deeds.guest(uuid), path, self._deeds.disks.qemu_img, keep)

    # --- inside -------------------------------------------------------------------------------------------------

    def _target(self, guest: Guest, uuid: str) -> str:
        path = str(self.directory(uuid) / ROOT)
        try:
            return next((one.target_dev or "" for one in live.disks(guest) if one.source_file == path), "")
        except errors.InstanceNotFound:
            return ""

    def _make_place(self, uuid: str) -> None:
        place, group = self.place(uuid), self._options.disk_owner_group
        with files.disk_errors(place):
            place.mkdir(mode=0o700, exist_ok=True)
            # The hypervisor makes its socket in it, which gets the directory's group.
            files.give_to_group(place, group, 0o2770 if group else 0o700)

    def _ready(self, uuid: str, held: Held) -> Held:
        held = msgspec.structs.replace(held, ready=True)
        record.keep(self.directory(uuid), held)
        return held

    def _wake(self, uuid: str) -> None:
        """A guest whose memory we saved goes on from there, paused if it was."""
        if self._deeds.power(uuid) is PowerState.SUSPENDED:
            self._deeds.guest(uuid).launch()



def origin_of(request: SnapshotRequest) -> str:
    """The operation that makes the image."""
    return request.image.properties.get(ORIGIN, "")


def is_of(found: Held | Last, request: SnapshotRequest) -> bool:
    """Whether it is of this image, made by this operation."""
    return (found.image, found.origin) == (request.image.id, origin_of(request))


def _save(guest: Guest, job: Job) -> None:
    def abort() -> None:
        guest.abort_job()

    end: Callable[[], None] = abort
    with job.on_cancel(end):
        guest.managed_save()
