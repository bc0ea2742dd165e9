"""The lab's guest on bare libvirt: it boots, ticks, tells what it sees, moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import oracle
from tests.lab.bare_guest import DIRECTORY, UUID, direct_boot, guest, wait_for_ticks
from tests.lab.cell import Cell
from tests.lab.domain_xml import GuestDomain
from tests.lab.guest_images import GuestImages
from tests.lab.settings import WORKER_UID, WORKER_USER, Settings
from tests.waiting import wait_for

pytestmark = pytest.mark.lab


def test_guest_boots_ticks_and_shuts_down(cell: Cell, lab_guest: GuestImages) -> None:
    """From kernel and initrd, as the worker's user; twice, its counter going on."""
    node = cell["node1"]
    domain = direct_boot(cell, lab_guest)
    with guest(node, domain, lab_guest.data_raw):
        console = wait_for_ticks(node, 3)
        assert oracle.where_running(cell.nodes.values()) == {UUID: ["node1"]}
        assert oracle.domains(node)[UUID].state == "running"
        assert f"{UUID}/disk" in oracle.files(node, UUID)
        assert oracle.seen_nics(console) == [domain.mac]
        assert oracle.seen_disks(console)["vda"]["label"] == "LABDATA"
        assert len(oracle.leftovers(node)) >= 3
        owner = Path(f"/proc/{oracle.qemu_processes(node)[0].pid}").stat().st_uid
        assert owner == WORKER_UID
        node.virsh("shutdown", domain.name)
        wait_for(lambda: not oracle.qemu_processes(node), 20, "the guest's clean end")
        assert oracle.domains(node)[UUID].state == "shut off"
        node.virsh("start", domain.name)
        console = wait_for_ticks(node, 2, boot=2)
        first, second = oracle.boots(console)
        assert first.clean_shutdown and (first.number, second.number) == (1, 2)
        assert oracle.continuity_problems(console) == []
        assert oracle.counter_on(node, domain.disk, "raw") >= second.ticks[-1]
        node.virsh("destroy", domain.name)
        assert oracle.counter(node.instances / UUID / "disk") >= second.ticks[-1]


def test_guest_boots_from_its_own_disk(cell: Cell, lab_guest: GuestImages) -> None:
    node = cell["node1"]
    domain = GuestDomain("lab-guest", UUID, f"{DIRECTORY}/disk", f"{DIRECTORY}/console.log",
                         disk_format="qcow2")
    with guest(node, domain, lab_guest.boot_qcow2):
        console = wait_for_ticks(node, 2)
        assert "disk=/dev/vda2" in console
        node.virsh("destroy", domain.name)
        disk = node.instances / UUID / "disk"
        assert oracle.counter(disk, "qcow2") >= oracle.boots(console)[-1].ticks[-1]
        assert oracle.read_guest_file(disk, "/boots", "qcow2").strip() == "1"


def test_guest_tells_what_it_was_given(cell: Cell, lab_guest: GuestImages) -> None:
    """Config drive, swap, a labelled disk: by size, label and serial."""
    node = cell["node1"]
    node.run("mkdir", "-p", DIRECTORY, user=WORKER_USER)
    node.run("sh", "-ec", f"""cd {DIRECTORY}
        mkdir -p tree/openstack/latest
        printf '{{\\n "uuid": "{UUID}",\\n "hostname": "h"}}' > tree/openstack/latest/meta_data.json
        xorriso -no_rc -as mkisofs -quiet -J -r -V config-2 -o disk.config tree
        rm -r tree
        truncate -s 16M disk.swap; mkswap -q disk.swap
        truncate -s 20M disk.eph0; mkfs.ext4 -q -L ephemeral0 disk.eph0""", user=WORKER_USER)
    extra = "".join(
        f"<disk type='file' device='{device}'><driver name='qemu' type='raw'/>"
        f"<source file='{DIRECTORY}/{name}'/><target dev='{target}' bus='{bus}'/>{more}</disk>"
        for device, name, target, bus, more in (
            ("cdrom", "disk.config", "hda", "ide", "<readonly/>"),
            ("disk", "disk.swap", "vdb", "virtio", ""),
            ("disk", "disk.eph0", "vdc", "virtio", "<serial>lab-serial</serial>"),
        )
    )
    with guest(node, direct_boot(cell, lab_guest, extra_devices=extra), lab_guest.data_raw):
        console = wait_for_ticks(node, 1)
    disks = oracle.seen_disks(console)
    assert (disks["vdb"]["fs"], disks["vdb"]["size"]) == ("swap", str(16 << 20))
    assert (disks["vdc"]["label"], disks["vdc"]["serial"]) == ("ephemeral0", "lab-serial")
    drive = oracle.seen_config_drive(console)
    assert drive["uuid"] == UUID and '"hostname": "h"' in drive["meta_data"]


def test_console_log_made_by_the_worker_stays_readable(
    cell: Cell, lab_guest: GuestImages
) -> None:
    """virtlogd keeps the owner of a console.log that is there; its own are root's alone."""
    node = cell["node1"]
    node.run("mkdir", "-p", DIRECTORY, user=WORKER_USER)
    node.run("sh", "-c", f"umask 077; : > {DIRECTORY}/console.log", user=WORKER_USER)
    with guest(node, direct_boot(cell, lab_guest), lab_guest.data_raw):
        wait_for_ticks(node, 1)
        assert "LAB: BOOT OK" in node.run("cat", f"{DIRECTORY}/console.log",
                                          user=WORKER_USER).stdout


def test_console_log_after_roll_over(lab_machine: None, lab_guest: GuestImages) -> None:
    """The new console.log is root's alone; the worker's user still gets it, by libvirt's word."""
    with Cell(settings=Settings(nodes=1, console_log_bytes=64 * 1024), rabbit=False) as made:
        node = made["node1"]
        domain = direct_boot(made, lab_guest, cmdline="lab.chatter=20")
        virsh = ("virsh", "-q", "-c", "qemu:///system")
        with guest(node, domain, lab_guest.data_raw):
            rolled = node.instances / UUID / "console.log.0"
            wait_for(rolled.exists, 60, "the console log to roll over")
            refused = node.run("cat", domain.console, user=WORKER_USER, check=False)
            assert "Permission denied" in refused.stderr
            node.run(*virsh, "pool-create-as", "console", "dir", "--target", DIRECTORY,
                     user=WORKER_USER)
            node.run(*virsh, "vol-download", "--pool", "console", "console.log.0", "/tmp/console",
                     user=WORKER_USER)
            node.run(*virsh, "pool-destroy", "console", user=WORKER_USER)
            assert node.path("/tmp/console").read_bytes() == rolled.read_bytes()
            assert oracle.continuity_problems(oracle.read_console(node, UUID)) == []


def test_bare_live_migration(cell: Cell, lab_guest: GuestImages) -> None:
    """Bare virsh migrate with its disk: the counter goes on at the other host, no tick twice."""
    one, two = cell["node1"], cell["node2"]
    two.run("mkdir", "-p", DIRECTORY, user=WORKER_USER)
    two.run("truncate", "-s", "64M", f"{DIRECTORY}/disk", user=WORKER_USER)
    with guest(one, direct_boot(cell, lab_guest), lab_guest.data_raw) as domain:
        wait_for_ticks(one, 2)
        try:
            one.virsh("migrate", "--live", "--p2p", "--persistent", "--undefinesource",
                      "--copy-storage-all", domain.name, "qemu+tcp://node2/system")
            assert oracle.where_running(cell.nodes.values()) == {UUID: ["node2"]}
            there = wait_for_ticks(two, 2)
            here = oracle.read_console(one, UUID)
            assert oracle.double_run(here, there) == []
            last = oracle.boots(here)[-1].ticks[-1]
            assert oracle.boots(there)[0].ticks[0] == last + 1
        finally:
            two.virsh("destroy", domain.name, check=False)
            two.virsh("undefine", domain.name, check=False)
            two.run("rm", "-rf", DIRECTORY)
