"""libvirt's own test driver, one private host for each test."""

import itertools
from typing import Any

import pytest

from compute_worker.virt.libvirt.domain import Devices, Domain, Os
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.host import Host
from tests.virt.libvirt.moveworld import MoveWorld

NODE = """<node><cpu><mhz>2000</mhz><model>i686</model><active>4</active><nodes>1</nodes><sockets>1</sockets>
<cores>4</cores><threads>1</threads></cpu><memory>4194304</memory></node>"""
UUID = "0f7a4ac5-4b7d-4e6b-9f0a-0123456789ab"

_numbers = itertools.count()


@pytest.fixture
def uri(tmp_path):
    path = tmp_path / f"node-{next(_numbers)}.xml"
    path.write_text(NODE)
    return f"test://{path}"


@pytest.fixture
def host(uri):
    host = Host(uri, host="node1", backoff=(0.01, 0.05))
    yield host
    host.close()


@pytest.fixture
def received(host):
    """Every event of the host, in order."""
    events = []
    host.subscribe(events.append)
    return events


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt's test driver cannot start a guest paused (it is paused right after its start), knows no ACPI and has no
    jobs."""
    launch, shutdown = Guest.launch, Guest.shutdown

    def launch_and_pause(guest: Any, *, paused: bool = False, discard_saved: bool = False) -> bool:
        began = launch(guest, discard_saved=discard_saved)
        if began and paused:
            guest.pause()
        return began

    monkeypatch.setattr(Guest, "launch", launch_and_pause)
    monkeypatch.setattr(Guest, "shutdown", lambda guest: shutdown(guest, "default"))
    monkeypatch.setattr(Guest, "job_operation", lambda guest: "")


def domain(uuid=UUID, name="instance-1", **values):
    """A guest for the test driver."""
    base = {"type": "test", "memory_kib": 65536, "vcpus": 2, "os": Os(type="hvm"), "devices": Devices()}
    return Domain(uuid=uuid, name=name, **{**base, **values})


@pytest.fixture
def move_world(tmp_path, able):
    """Makes two hosts; `options` are [libvirt]'s of both, `there` those of the destination where they differ."""
    made = []

    def make(there=None, transfer=None, shared=False, **options):
        uris = {}
        for name in (MoveWorld.a, MoveWorld.b):
            path = tmp_path / f"{name}.xml"
            path.write_text(NODE)
            uris[name] = f"test://{path}"
        both = {MoveWorld.a: options, MoveWorld.b: {**options, **(there or {})}}
        made.append(MoveWorld(tmp_path, uris, both, shared, **(transfer or {})))
        return made[-1]

    yield make
    for world in made:
        world.close()
