from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.objects import ImageMeta, InjectedFile, Vif
from compute_worker.virt.driver import SpawnRequest
from compute_worker.virt.libvirt.disks import configdrive
from tests.images.support import Job
from tests.virt.libvirt.disks.support import OTHER, UUID, instance

GUEST = instance(
    ImageMeta(id="img"),
    hostname="web1",
    user_data="#cloud-config\nä: 1\n",
    metadata={"role": "web"},
    vifs=[Vif(id=OTHER, mac="52:54:00:00:00:01", bridge="br0", mtu=1450)],
)
REQUEST = SpawnRequest(
    injected_files=[
        InjectedFile(path="../../../etc/cron.d/evil", content_base64=base64.b64encode(b"\0binary").decode()),
        InjectedFile(path="/etc/motd", content_base64=base64.b64encode(b"hello").decode()),
    ],
    admin_password="sesame",
)


def extract(iso: Path, target: Path) -> dict[str, bytes]:
    target.mkdir()
    words = ["xorriso", "-no_rc", "-osirrox", "on", "-indev", iso, "-extract", "/", target]
    subprocess.run(words, check=True, capture_output=True)
    subprocess.run(["chmod", "-R", "u+rwX", target], check=True)
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def test_the_drive_as_a_guest_reads_it(tmp_path: Path, job: Job) -> None:
    iso = tmp_path / "disk.config.part"
    configdrive.build(iso, GUEST, REQUEST, job)
    label = subprocess.check_output(["blkid", "-p", "-o", "value", "-s", "LABEL", iso], text=True).strip()
    assert label == "config-2"
    found = extract(iso, tmp_path / "out")
    assert set(found) == {
        "openstack/latest/meta_data.json",
        "openstack/latest/network_data.json",
        "openstack/latest/vendor_data.json",
        "openstack/latest/user_data",
        "openstack/content/0000",
        "openstack/content/0001",
    }
    meta = json.loads(found["openstack/latest/meta_data.json"])
    assert (meta["uuid"], meta["hostname"], meta["admin_pass"]) == (UUID, "web1", "sesame")
    assert meta["meta"] == {"role": "web"}
    assert meta["files"][0] == {"path": "../../../etc/cron.d/evil", "content_path": "/content/0000"}
    assert found["openstack/content/0000"] == b"\0binary"
    assert found["openstack/content/0001"] == b"hello"
    assert found["openstack/latest/user_data"].decode() == GUEST.user_data
    network = json.loads(found["openstack/latest/network_data.json"])
    assert network["links"][0] == {
        "id": "tap" + OTHER[:11],
        "vif_id": OTHER,
        "type": "bridge",
        "ethernet_mac_address": "52:54:00:00:00:01",
        "mtu": 1450,
    }
    assert network["networks"][0]["type"] == "ipv4_dhcp"


def test_nobody_else_reads_it_and_nothing_else_is_left(tmp_path: Path, job: Job) -> None:
    iso = tmp_path / "disk.config.part"
    (tmp_path / "disk.config.tree.part").mkdir()
    configdrive.build(iso, GUEST, REQUEST, job)
    assert iso.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["disk.config.part"]


def test_without_secrets_there_are_none() -> None:
    meta = configdrive.meta_data(GUEST, SpawnRequest())
    assert "admin_pass" not in meta
    assert "files" not in meta
    assert set(configdrive.content(instance(ImageMeta(id="x")), SpawnRequest())) == {
        "openstack/latest/meta_data.json",
        "openstack/latest/network_data.json",
        "openstack/latest/vendor_data.json",
    }


def test_the_password_is_in_no_error(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configdrive, "PROGRAM", "no-such-xorriso")
    with pytest.raises(errors.CommandFailed, match="no-such-xorriso") as caught:
        configdrive.build(tmp_path / "disk.config.part", GUEST, REQUEST, job)
    assert "sesame" not in json.dumps(caught.value.to_dict())
    assert not (tmp_path / "disk.config.tree.part").exists()
