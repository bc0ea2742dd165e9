"""What the oracle reads out of a console."""

from __future__ import annotations

import pytest

from tests.lab import oracle
from tests.lab.guest_images import GuestImages
from tests.lab.namespaces import LabError

FIRST = "LAB: cmdline a\nLAB: BOOT OK boots=1 disk=/dev/vda\n"
SECOND = "LAB: cmdline a\nLAB: BOOT OK boots=2 disk=/dev/vda\n"


def ticks(*numbers: int) -> str:
    return "".join(f"LAB: tick {n} up={n}.0\r\n" for n in numbers)


def test_boots_with_their_ticks_and_ends() -> None:
    console = FIRST + ticks(1, 2) + "LAB: CLEAN SHUTDOWN\n" + SECOND + ticks(3)
    assert oracle.boots(console) == [
        oracle.Boot(1, (1, 2), clean_shutdown=True),
        oracle.Boot(2, (3,), clean_shutdown=False),
    ]


def test_a_guest_that_arrived_running_is_boot_zero() -> None:
    assert oracle.boots(ticks(7, 8)) == [oracle.Boot(0, (7, 8), clean_shutdown=False)]
    assert oracle.boots("") == []


@pytest.mark.parametrize(
    ("console", "problems"),
    [
        (FIRST + ticks(1, 2, 3), []),
        (FIRST + ticks(1, 2) + SECOND + ticks(3, 4), []),
        # Killed between the write and the word about it.
        (FIRST + ticks(1, 2) + SECOND + ticks(4), []),
        (FIRST + ticks(1, 3), ["boot 1: tick 3 after 1"]),
        (FIRST + ticks(1, 2, 2), ["boot 1: tick 2 after 2"]),
        # The disk forgot what the guest had said: a lost write.
        (FIRST + ticks(1, 2, 3) + SECOND + ticks(3), ["boot 2: tick 3 after 3"]),
        (FIRST + ticks(1, 2) + SECOND + ticks(1), ["boot 2: tick 1 after 2"]),
    ],
)
def test_continuity(console: str, problems: list[str]) -> None:
    assert oracle.continuity_problems(console) == problems


def test_the_same_tick_on_two_hosts_is_a_double_run() -> None:
    assert oracle.double_run(FIRST + ticks(1, 2), ticks(3, 4)) == []
    assert oracle.double_run(FIRST + ticks(1, 2, 3), ticks(3, 4)) == [3]


def test_what_the_guest_saw_is_of_its_last_boot() -> None:
    console = (
        "LAB: cmdline x\nLAB: disk vda size=10 label=OLD fs=ext4 ro=0 serial=\r\n"
        "LAB: cmdline y\nLAB: disk vda size=20 label=LABDATA fs=ext4 ro=0 serial=s1\r\n"
        "LAB: disk vdb size=5 label=- fs=swap ro=0 serial=\r\n"
        "LAB: nic eth0 mac=52:54:00:00:00:01 mtu=1500\r\n"
        "LAB: configdrive uuid=u-1 device=sr0\r\n"
        'LAB: configdrive meta_data={"uuid": "u-1"}\r\n'
    )
    disks = oracle.seen_disks(console)
    assert disks["vda"] == {"size": "20", "label": "LABDATA", "fs": "ext4", "ro": "0",
                            "serial": "s1"}
    assert disks["vdb"]["fs"] == "swap"
    assert oracle.seen_nics(console) == ["52:54:00:00:00:01"]
    assert oracle.seen_config_drive(console) == {
        "uuid": "u-1", "device": "sr0", "meta_data": '{"uuid": "u-1"}'}
    assert oracle.seen_config_drive(FIRST) == {}


@pytest.mark.lab
def test_a_disk_without_the_file_is_an_error(lab_guest: GuestImages) -> None:
    with pytest.raises(LabError, match="no /counter"):
        oracle.counter(lab_guest.data_raw)
