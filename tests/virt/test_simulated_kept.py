"""A simulated host outlives the worker: in the process that made it, and over the death of that process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.config import Compute, Fake, Images, Settings
from compute_worker.images.store import ORIGIN
from compute_worker.objects import Flavor, ImageMeta, Instance
from compute_worker.states import PowerState
from compute_worker.virt.driver import ComputeDriver, SpawnRequest
from compute_worker.virt.fake import FakeDriver
from compute_worker.virt.simulated import ImageShelf, SimulatedCell, SimulatedHost
from compute_worker.virt.simulated import disk as disk_module
from compute_worker.virt.simulated.cell import default_cell
from compute_worker.virt.simulated.connection import Connection
from compute_worker.virt.simulated.images import HEAD_BYTES, Image, from_qcow2, to_qcow2
from compute_worker.virt.simulated.model import Domain, File, Memory, Slot
from tests.virt.jobs import RecordingJob
from tests.virt.world import run

UUID = "6f3a1c52-0a4e-4c7a-9d7e-0123456789ab"
IMAGE = b"kept image"

CHILD = """
import sys
from tests.virt.jobs import RecordingJob
from tests.virt.test_simulated_kept import instance_of, settings_of
from compute_worker.virt.driver import SpawnRequest
from compute_worker.virt.fake import FakeDriver
driver = FakeDriver(settings_of(sys.argv[1]))
instance = instance_of()
for part in driver.spawn(instance, SpawnRequest()):
    part.do(RecordingJob())
driver.unpause(instance)
driver.simulated.guest_write(instance.uuid, b"written")
print(driver.simulated.guest_memory(instance.uuid)[0], flush=True)
sys.stdin.read()
"""


def settings_of(root: str | Path, **fake: int) -> Settings:
    return Settings(
        compute=Compute(host="kept", state_path=str(root)),
        images=Images(file_path=f"{root}/images"),
        fake=Fake(**fake),
    )


def instance_of() -> Instance:
    return Instance(uuid=UUID, host="kept", flavor=Flavor(vcpus=1, memory_mb=64, root_gb=1), image=ImageMeta(id="img"))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "img").write_bytes(IMAGE)
    yield tmp_path
    host = default_cell().hosts.pop("kept", None)
    if host is not None:
        host.close()


def test_same_process_finds_the_same_host(root: Path) -> None:
    first, second = FakeDriver(settings_of(root)), FakeDriver(settings_of(root, vcpus=3))
    assert first.simulated is second.simulated
    assert second.get_available_resource().vcpus == 3


def test_another_state_path_is_another_host(root: Path, tmp_path: Path) -> None:
    first = FakeDriver(settings_of(root))
    run(first.spawn(instance_of(), SpawnRequest()), RecordingJob())
    second = FakeDriver(settings_of(tmp_path / "other"))
    assert second.list_instances() == []
    assert default_cell().hosts["kept"] is second.simulated


def test_killed_process_leaves_its_guests_to_the_next(root: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    assert child.stdout is not None
    token = child.stdout.readline().strip()
    child.kill()
    child.communicate()
    assert token
    driver = FakeDriver(settings_of(root))
    host = driver.simulated
    assert driver.get_info(UUID).power_state is PowerState.RUNNING
    assert host.guest_memory(UUID)[0] == token
    assert host.read_disk(UUID) == IMAGE + b"written"
    assert [record.uuid for record in driver.list_records()] == [UUID]
    assert (host.effects[UUID, "boot"], host.effects["img", "download"]) == (1, 1)
    run(driver.destroy(instance_of()), RecordingJob())
    assert host.leftovers() == []


def reopened(root: Path) -> SimulatedHost:
    return SimulatedHost("kept", SimulatedCell(), directory=root / "host")


def test_boot_id_is_kept_until_the_host_reboots(tmp_path: Path) -> None:
    host = reopened(tmp_path)
    assert reopened(tmp_path).boot_id == host.boot_id
    host = reopened(tmp_path)
    before = host.boot_id
    host.power_failure()
    host.power_restore()
    assert host.boot_id != before
    assert reopened(tmp_path).boot_id == host.boot_id


def test_torn_last_line_is_dropped(tmp_path: Path) -> None:
    host = reopened(tmp_path)
    host.write(UUID, {"disk": File(b"x")})
    with (tmp_path / "host" / "log").open("ab") as log:
        log.write(b'S{"uuid":"torn')
    assert set(reopened(tmp_path).slots) == {UUID}


def test_what_is_done_in_one_call_is_kept_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """A guest is suspended: wherever the log is cut, the effect and the new state are both there, or neither."""
    host = reopened(tmp_path)
    domain = Domain(UUID, power=PowerState.RUNNING, memory=Memory("t"))
    host.changed(Slot(UUID, domain))
    log = tmp_path / "host" / "log"
    before = log.stat().st_size
    connection = Connection(host)
    with connection.call("suspend", UUID):
        host.effect(UUID, "suspend")
        domain.saved = domain.memory
        host.power(domain, PowerState.SUSPENDED, "saved")
        assert log.stat().st_size == before, "nothing is kept before the call has ended"
    whole = log.read_bytes()
    states = set()
    for cut in range(before, len(whole) + 1):
        log.write_bytes(whole[:cut])
        again = reopened(tmp_path)
        states.add((again.effects[UUID, "suspend"], again.power_of(UUID)))
        again.close()
    assert states == {(0, PowerState.RUNNING), (1, PowerState.SUSPENDED)}


def test_what_a_failing_call_has_done_is_kept(tmp_path: Path) -> None:
    host = reopened(tmp_path)
    with pytest.raises(OSError), Connection(host).call("write", UUID):
        host.write(UUID, {"disk": File(b"half")})
        raise OSError("the rest")
    assert reopened(tmp_path).slots[UUID].directories[""]["disk"].data == b"half"


def test_log_is_written_anew_when_it_grew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "MAX_LOG_BYTES", 10_000)
    host = reopened(tmp_path)
    for number in range(200):
        host.write(UUID, {"disk": File(str(number).encode())})
        host.effect(UUID, "boot")
    assert os.path.getsize(tmp_path / "host" / "log") < 11_000
    again = reopened(tmp_path)
    assert again.slots[UUID].directories[""]["disk"].data == b"199"
    assert again.effects[UUID, "boot"] == 200


def test_migration_in_flight_ends_with_its_process(tmp_path: Path) -> None:
    host = reopened(tmp_path)
    outgoing = Domain(UUID, power=PowerState.PAUSED, reason="migrating", migrating=True, memory=Memory("t"))
    other = UUID.replace("6f3a", "7f3a")
    incoming = Domain(other, power=PowerState.PAUSED, migrating=True, persistent=False)
    host.changed(Slot(UUID, outgoing))
    host.changed(Slot(other, incoming))
    again = reopened(tmp_path)
    assert again.power_of(UUID) is PowerState.RUNNING and again.guest_memory(UUID)[0] == "t"
    assert again.power_of(other) is PowerState.NOSTATE


def test_state_is_for_its_owner_only(tmp_path: Path) -> None:
    reopened(tmp_path)
    assert (tmp_path / "host").stat().st_mode & 0o077 == 0
    assert (tmp_path / "host" / "log").stat().st_mode & 0o077 == 0


def test_entry_point_names_the_driver() -> None:
    parser = ConfigParser()
    parser.read(Path(__file__).parents[2] / "setup.cfg")
    lines = parser["entry_points"]["compute_worker.virt_drivers"].strip().splitlines()
    points = dict((part.strip() for part in line.split("=")) for line in lines)
    module, _, name = points["fake"].partition(":")
    cls = getattr(import_module(module), name)
    assert issubclass(cls, ComputeDriver) and not cls.__abstractmethods__


class TestImageShelf:
    def test_large_file_gives_its_beginning_and_size(self, tmp_path: Path) -> None:
        content = b"z" * (HEAD_BYTES + 10)
        (tmp_path / "big").write_bytes(content)
        image = ImageShelf(directory=tmp_path).get("big")
        assert image is not None
        assert (len(image.data), image.size) == (HEAD_BYTES, HEAD_BYTES + 10)
        assert image.digest("sha512") == hashlib.sha512(content).hexdigest()

    def test_unknown(self, tmp_path: Path) -> None:
        assert ImageShelf(directory=tmp_path).get("none") is None
        assert ImageShelf().get("none") is None

    def test_looks_below(self, tmp_path: Path) -> None:
        below = ImageShelf({"x": b"1"})
        image = ImageShelf(directory=tmp_path, below=below).get("x")
        assert image is not None and image.data == b"1"

    @pytest.mark.parametrize("on_disk", [True, False])
    def test_published_by_rename_and_withdrawn_by_its_origin_only(self, tmp_path: Path, on_disk: bool) -> None:
        shelf = ImageShelf(directory=tmp_path if on_disk else None)
        mine = ImageMeta(id="snap", properties={ORIGIN: "me"})
        other = ImageMeta(id="snap", properties={ORIGIN: "somebody else"})
        assert shelf.create(mine) and shelf.create(mine) and not shelf.create(other)
        shelf.stage("snap", b"data")
        assert shelf.get("snap") is None and not shelf.made_by(mine)
        assert shelf.publish("snap")
        assert not shelf.publish("snap") and not shelf.create(mine)
        assert shelf.made_by(mine) and not shelf.made_by(other)
        shelf.withdraw(other)
        image, note = shelf.get("snap"), shelf.note("snap")
        assert image is not None and image.data == b"data"
        assert note is not None and (note.image.size_bytes, note.image.checksum) == (4, image.digest("sha256"))
        assert shelf.published() == {"snap"}
        shelf.withdraw(mine)
        assert shelf.get("snap") is None and shelf.note("snap") is None and shelf.published() == set()
        assert list(tmp_path.iterdir()) == []

    def test_publish_of_nothing(self) -> None:
        with pytest.raises(KeyError):
            ImageShelf().publish("snap")

    @pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
    def test_what_is_sent_as_qcow2_comes_back(self, compression: str) -> None:
        sent = to_qcow2(b"content" * 9, 3 << 30, compression)
        image = Image(sent, len(sent))
        assert (image.disk_format, image.virtual_size) == ("qcow2", 3 << 30)
        assert from_qcow2(sent) == b"content" * 9
        assert from_qcow2(sent[:32]) == sent[:32]
        assert from_qcow2(b"raw") == b"raw"

    def test_qcow2_size_is_its_virtual_size(self) -> None:
        header = b"QFI\xfb\x00\x00\x00\x03" + bytes(16) + (5 << 30).to_bytes(8, "big")
        image = ImageShelf({"q": header}).get("q")
        assert image is not None
        assert (image.disk_format, image.virtual_size) == ("qcow2", 5 << 30)


def test_flavor_smaller_than_the_image() -> None:
    header = b"QFI\xfb\x00\x00\x00\x03" + bytes(16) + (5 << 30).to_bytes(8, "big")
    cell = SimulatedCell(ImageShelf({"q": header}))
    driver = FakeDriver(Settings(), SimulatedHost("kept", cell))
    small = Instance(
        uuid=UUID, flavor=Flavor(vcpus=1, memory_mb=64, root_gb=4), image=ImageMeta(id="q", disk_format="qcow2")
    )
    with pytest.raises(errors.FlavorDiskTooSmall):
        run(driver.spawn(small, SpawnRequest()), RecordingJob())
