"""Images that are to leave a store that did not answer."""

from __future__ import annotations

import pytest

from compute_worker import errors
from compute_worker.manager import withdrawals
from compute_worker.objects import ORIGIN, ImageMeta
from tests.manager.machine import IMAGE, Machine, quiet_deaths
from tests.waiting import wait_for


@pytest.fixture
def machine(tmp_path, monkeypatch):
    quiet_deaths(monkeypatch)
    machine = Machine(tmp_path)
    yield machine
    machine.close()


def begun(machine: Machine, operation: str, name: str = "snap") -> ImageMeta:
    image = ImageMeta(id=name, properties={ORIGIN: operation})
    assert machine.host.images.create(image)
    machine.host.images.stage(name, b"half")
    return image


def waiting(machine: Machine) -> list[str]:
    return [image.id for image in withdrawals.waiting(machine.worker.core)]


def gone(machine: Machine) -> None:
    wait_for(lambda: waiting(machine) == [], what="nothing to be withdrawn")


def test_withdrawn_in_the_background(machine):
    for name in ("one", "two"):
        withdrawals.add(machine.worker.core, begun(machine, "op", name))
    gone(machine)
    assert machine.host.images.names() == {IMAGE}


def test_remembered_over_deaths_and_once_each(machine):
    image = begun(machine, "op")
    machine.host.faults.fail("withdraw", errors.ImageStoreUnavailable(store="x", reason="injected"), times=None)
    withdrawals.add(machine.worker.core, image)
    withdrawals.add(machine.worker.core, image)
    for _ in range(2):
        machine.kill()
        machine.restart()
        assert waiting(machine) == ["snap"]
    machine.host.faults.clear()
    gone(machine)
    assert machine.host.images.names() == {IMAGE}


def test_the_image_of_a_later_operation_stays(machine):
    begun(machine, "later")
    machine.host.images.publish("snap")
    withdrawals.add(machine.worker.core, ImageMeta(id="snap", properties={ORIGIN: "earlier"}))
    gone(machine)
    assert machine.host.images.names() == {IMAGE, "snap"}


def test_a_store_that_refuses_for_good_is_told_once_and_not_asked_again(machine, caplog):
    machine.host.faults.fail("withdraw", errors.ImageUnacceptable(image="snap", reason="protected"), times=1)
    withdrawals.add(machine.worker.core, begun(machine, "op"))
    gone(machine)
    assert [r.message for r in caplog.records if "by hand" in r.message and "protected" in r.message]
    assert machine.host.images.names() == {IMAGE, "snap.part"}


def test_a_store_that_is_configured_no_more(machine, caplog):
    withdrawals.add(machine.worker.core, ImageMeta(id="snap", store="nosuch", properties={ORIGIN: "op"}))
    gone(machine)
    assert [r.message for r in caplog.records if "by hand" in r.message]
