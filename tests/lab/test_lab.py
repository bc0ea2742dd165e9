"""The lab itself: that it is what it claims to be, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import amqp
import kombu
import pytest

from tests.lab import faults, oracle
from tests.lab.cell import Cell
from tests.lab.domain_xml import GuestDomain
from tests.lab.guest_images import GuestImages
from tests.lab.namespaces import LabError
from tests.lab.node import Node
from tests.lab.rabbit import Permissions, Rabbit, User
from tests.lab.settings import INSTANCES_PATH, STATE_PATH, WORKER_UID, WORKER_USER, Settings
from tests.lab.worker import REPOSITORY
from tests.waiting import wait_for

pytestmark = pytest.mark.lab

UUID = "5e0d7c3a-9a55-4c2e-8c4d-0b4f6a1f0c01"
DIRECTORY = f"{INSTANCES_PATH}/{UUID}"

# A stand-in for the worker: answers /healthz, says what it is, ends on SIGTERM with 0.
WORKER_SCRIPT = """
import http.server, os, signal, socket, sys
import msgspec
print("user", os.getuid(), "groups", os.getgroups(), "config", open(sys.argv[2]).read())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(socket.gethostname().encode())
http.server.HTTPServer(("127.0.0.1", int(os.environ["HEALTH"])), Health).serve_forever()
"""


def links_and_mounts() -> tuple[list[str], str]:
    return sorted(os.listdir("/sys/class/net")), Path("/proc/self/mountinfo").read_text()


def lab_processes(state: Path) -> list[str]:
    """Processes of the machine that know of a cell's directory."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
            mounts = Path(f"/proc/{entry}/mounts").read_text(errors="replace")
        except OSError:
            continue
        if (str(state) in command or str(state) in mounts) and int(entry) != os.getpid():
            found.append(f"{entry} {command}")
    return found


@contextmanager
def guest(node: Node, domain: GuestDomain, disk: Path) -> Iterator[GuestDomain]:
    """A defined and started guest on its own copy of `disk`; removed on leaving."""
    node.run("mkdir", "-p", DIRECTORY, user=WORKER_USER)
    copy = node.path(domain.disk)
    subprocess.run(["cp", "--sparse=always", str(disk), str(copy)], check=True)
    os.chown(copy, WORKER_UID, WORKER_UID)
    definition = node.path("/tmp/domain.xml")
    definition.write_text(domain.xml())
    try:
        node.virsh("define", str(definition))
        node.virsh("start", domain.name)
        yield domain
    finally:
        node.virsh("destroy", domain.name, check=False)
        node.virsh("undefine", domain.name, check=False)
        node.run("rm", "-rf", DIRECTORY)


def wait_for_ticks(node: Node, count: int, boot: int = 1, deadline: float = 60.0) -> str:
    """The console once the guest has ticked `count` times in this boot the console shows."""

    def ticked() -> str | None:
        console = oracle.read_console(node, UUID)
        found = oracle.boots(console)
        return console if len(found) >= boot and len(found[boot - 1].ticks) >= count else None

    return wait_for(ticked, deadline, f"{count} ticks on {node.name}") or ""


def direct_boot(cell: Cell, images: GuestImages, **other: str) -> GuestDomain:
    return GuestDomain(
        "lab-guest", UUID, f"{DIRECTORY}/disk", f"{DIRECTORY}/console.log",
        kernel=cell.add_image(images.kernel), initrd=cell.add_image(images.initrd), **other,
    )


def test_up_in_seconds_and_down_leaves_nothing(lab_machine: None) -> None:
    """Five times: the machine's links and mounts are as before, no process, no directory."""
    before = links_and_mounts()
    for _ in range(5):
        started = time.monotonic()
        with Cell(nodes=2, rabbit=False) as made:
            up_seconds = time.monotonic() - started
            assert links_and_mounts() == before
            assert all(node.ns.alive for node in made.nodes.values())
            assert lab_processes(made.state)
            started = time.monotonic()
        down_seconds = time.monotonic() - started
        assert links_and_mounts() == before
        assert not made.state.exists()
        assert lab_processes(made.state) == []
        assert up_seconds < 15 and down_seconds < 10, (up_seconds, down_seconds)


def test_two_labs_side_by_side(cell: Cell) -> None:
    """The same network and names twice, and neither sees the other."""
    with Cell(nodes=1, rabbit=False) as other:
        assert other["node1"].address == cell["node1"].address
        other["node1"].path("/etc/mark").write_text("other")
        assert not cell["node1"].path("/etc/mark").exists()
        assert other["node1"].run("hostname").stdout.strip() == "node1"
        with pytest.raises(LabError):
            other["node1"].run("ssh", "node2", "hostname")
    assert cell["node1"].run("ssh", "node2", "hostname").stdout.strip() == "node2"


def test_failed_up_leaves_nothing(lab_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = links_and_mounts()
    made = Cell(nodes=2, rabbit=False)
    monkeypatch.setattr(made["node2"], "_mounts", lambda: [["bind", "/nowhere", "/also-nowhere"]])
    with pytest.raises(LabError, match="also-nowhere is missing"):
        made.up()
    assert not made.state.exists()
    assert lab_processes(made.state) == []
    assert links_and_mounts() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_cell_dies_with_its_maker(lab_machine: None, tmp_path: Path, number: int) -> None:
    """However the process that made the cell ends, hosts and directory go with it."""
    script = (
        "from tests.lab.cell import Cell, interrupt_as_exit\n"
        "import signal\n"
        "interrupt_as_exit()\n"
        "with Cell(nodes=1, rabbit=False) as cell:\n"
        "    print(cell.state, cell['node1'].ns.pid, flush=True)\n"
        "    signal.pause()\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert maker.stdout is not None
    state, pid = maker.stdout.readline().split()
    assert Path(f"/proc/{pid}").exists()
    maker.send_signal(number)
    maker.wait(20)
    maker.stdout.close()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 20, "the end of the host")
    wait_for(lambda: not Path(state).exists(), 20, "the removal of the state directory")
    wait_for(lambda: lab_processes(Path(state)) == [], 20, "the end of the cell's processes")


def test_hosts_have_their_own_everything(cell: Cell) -> None:
    one, two = cell["node1"], cell["node2"]
    for node in (one, two):
        assert node.run("hostname").stdout.strip() == node.name
        assert node.path("/etc/hostname").read_text().strip() == node.name
        assert not node.path("/dev/kvm").exists()
        assert node.path("/dev/net/tun").exists()
    uuids = [re.search("<uuid>(.*)</uuid>", n.virsh("capabilities").stdout) for n in (one, two)]
    assert all(uuids) and uuids[0].group(1) != uuids[1].group(1)  # type: ignore[union-attr]
    for path in ("/etc/only-here", "/var/only-here", "/tmp/only-here", "/run/only-here"):
        one.path(path).write_text("x")
        assert not two.path(path).exists() and not Path(path).exists()


def test_accounts_exist_in_the_hosts_only(cell: Cell) -> None:
    node = cell["node1"]
    said = node.run("id", user=WORKER_USER).stdout
    assert f"uid={WORKER_UID}({WORKER_USER})" in said and "(libvirt)" in said
    assert WORKER_USER not in Path("/etc/passwd").read_text()
    assert node.run("cat", "/etc/shadow", user=WORKER_USER, check=False).returncode != 0
    assert node.run("virsh", "-c", "qemu:///system", "hostname",
                    user=WORKER_USER).stdout.strip() == "node1"
    assert node.path(STATE_PATH).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("user", ["root", WORKER_USER])
def test_ssh_between_hosts(cell: Cell, user: str) -> None:
    for here, there in (("node1", "node2"), ("node2", "node1")):
        said = cell[here].run("ssh", there, "hostname; id -un", user=user).stdout
        assert said.split() == [there, user]


def test_source_and_interpreter_are_reachable_for_the_worker(cell: Cell) -> None:
    """Under their own names, although they may lie in a directory that only root can enter."""
    node = cell["node1"]
    script = "import sys, msgspec; sys.path.insert(0, sys.argv[1]); import tests; print(sys.prefix)"
    said = node.run(sys.executable, "-c", script, str(REPOSITORY), user=WORKER_USER).stdout
    assert said.strip() == sys.prefix
    assert node.run("ls", "/root/.ssh", user=WORKER_USER, check=False).returncode != 0


def test_power_failure_and_return(cell: Cell) -> None:
    """Every process of the host is gone at once; its disk is as it was, /run is fresh."""
    node = cell["node2"]
    victim = node.ns.popen(["sleep", "1000"], user=WORKER_USER)
    wait_for(lambda: node.ns.processes("^sleep 1000$"), what="the victim")
    node.path(f"{STATE_PATH}/kept").write_text("x")
    node.path("/run/lost").write_text("x")
    started = time.monotonic()
    cell.kill_node("node2")
    assert time.monotonic() - started < 5
    assert victim.wait(5) == -signal.SIGKILL
    assert not node.ns.alive
    with pytest.raises(LabError, match="not up"):
        node.run("true")
    with pytest.raises(LabError):
        cell["node1"].run("ssh", "node2", "true")
    cell.start_node("node2")
    assert node.path(f"{STATE_PATH}/kept").exists() and not node.path("/run/lost").exists()
    node.path(f"{STATE_PATH}/kept").unlink()
    assert cell["node1"].run("ssh", "node2", "hostname").stdout.strip() == "node2"


def test_power_failure_of_a_host_with_a_stopped_process(cell: Cell) -> None:
    """nsenter stops with its child and would never reap it."""
    node = cell["node2"]
    victim = node.ns.popen(["sleep", "1000"])
    wait_for(lambda: node.ns.processes("^sleep 1000$"), what="the victim")
    faults.signal_processes(node, "^sleep 1000$", signal.SIGSTOP)
    stat = Path(f"/proc/{victim.pid}/stat")
    wait_for(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", what="nsenter's stop")
    cell.kill_node("node2")
    assert victim.wait(5) == -signal.SIGKILL
    cell.start_node("node2")


@pytest.mark.parametrize("name", ["libvirtd", "virtlogd", "sshd"])
def test_daemon_killed_frozen_and_started(cell: Cell, name: str) -> None:
    daemon = cell["node1"].daemons[name]
    first = daemon.process()
    assert first is not None
    daemon.freeze()
    stat = Path(f"/proc/{first.pid}/stat")
    wait_for(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", what="the stop")
    daemon.thaw()
    daemon.kill()
    assert daemon.process() is None
    daemon.start()
    second = daemon.process()
    assert second is not None and second.pid != first.pid


def test_link_and_port_faults(cell: Cell) -> None:
    one = cell["node1"]

    def reaches(port: int) -> bool:
        with one.ns.socket() as sock:
            sock.settimeout(0.5)
            return sock.connect_ex((cell["node2"].address, port)) == 0

    assert reaches(22) and reaches(16509)
    with faults.ports_dropped(cell["node2"], 22):
        assert not reaches(22) and reaches(16509)
    assert reaches(22)
    with faults.link_down(cell["node2"]):
        assert not reaches(22) and not reaches(16509)
    wait_for(lambda: reaches(22), what="the cable to work again")


def test_full_disk_and_heal(cell: Cell) -> None:
    node = cell["node1"]
    with faults.disk_of(node, 2):
        done = node.run("dd", "if=/dev/zero", f"of={INSTANCES_PATH}/big", "bs=1M", "count=3",
                        user=WORKER_USER, check=False)
        assert "No space left" in done.stderr
    assert not (node.instances / "big").exists()
    faults.small_disk(node, 2)
    faults.set_link(node, False)
    faults.set_rate(node, 1000)
    faults.set_loss(node, 10)
    faults.drop_ports(node, [22, 5672])
    assert sorted(fault.split()[0] for fault in faults.heal(node)) == [
        "link", "rate", "small", "table", "table"]
    assert faults.heal(node) == []


def test_worker_process(cell: Cell) -> None:
    """As its own user, with its configuration; ready, frozen, ended, killed and restarted."""
    port = 9478
    argv = [sys.executable, "-c", WORKER_SCRIPT, "--config-file",
            "/etc/compute-worker/compute-worker.conf"]
    worker = cell.start_worker("node1", {"DEFAULT": {"debug": True}}, {"HEALTH": str(port)},
                               argv=argv, health_port=port)
    worker.wait_ready()
    assert worker.http() == (200, "node1")
    said = worker.tail()
    assert f"user {WORKER_UID}" in said and "debug = true" in said and "host = node1" in said
    assert cell["node1"].path(f"/proc/{worker.process().inner_pid}/status").exists()
    worker.freeze()
    with pytest.raises(OSError):
        worker.http(timeout=0.5)
    worker.thaw()
    assert worker.http()[0] == 200
    assert worker.terminate() == 0
    worker.start()
    worker.wait_ready()
    worker.freeze()
    worker.kill()
    assert not worker.running
    worker.restart()
    worker.wait_ready()
    assert worker.terminate() == 0


def test_worker_that_does_not_start_says_why(cell: Cell) -> None:
    worker = cell.start_worker("node1", argv=[sys.executable, "-c", "raise SystemExit('no luck')"])
    with pytest.raises(LabError, match="no luck"):
        worker.wait_ready()
    assert worker.wait() == 1


def test_configuration_is_not_for_the_world(cell: Cell) -> None:
    node = cell["node1"]
    cell.write_config("node1", {"libvirt": {"virt_type": "qemu"}})
    path = "/etc/compute-worker/compute-worker.conf"
    assert "virt_type = qemu" in node.run("cat", path, user=WORKER_USER).stdout
    assert node.run("cat", path, user="nobody", check=False).returncode != 0


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


@pytest.mark.lab_full
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


def connects(url: str, timeout: float = 2.0) -> bool:
    try:
        with kombu.Connection(url, connect_timeout=timeout) as connection:
            connection.connect()
            return True
    except (OSError, amqp.AccessRefused):
        return False


def test_rabbit_killed_stopped_and_frozen(cell: Cell) -> None:
    rabbit = cell.rabbit
    assert rabbit.ready()
    rabbit.freeze()
    assert not rabbit.ready()
    rabbit.thaw()
    wait_for(rabbit.ready, what="the thawed broker")
    rabbit.kill()
    assert not rabbit.ready()
    rabbit.start()
    rabbit.stop()
    assert rabbit.process() is None
    rabbit.start()
    assert rabbit.ready()


def test_relay_reaches_the_hub_from_this_process(cell: Cell) -> None:
    relay = cell.relay()
    assert connects(f"amqp://lab:lab@127.0.0.1:{relay.port}/lab")
    assert not connects(f"amqp://lab:wrong@127.0.0.1:{relay.port}/lab")
    relay.close()
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", relay.port)) != 0


@pytest.mark.lab_full
def test_local_broker_with_users_and_permissions(lab_machine: None, tmp_path: Path) -> None:
    """On 127.0.0.1 beside everything else; a user may use only what it was given."""
    rabbit = Rabbit.local(tmp_path / "mq")
    only_mine = Permissions("^mine$", "^mine$", "^mine$")
    try:
        rabbit.up([User("one", "s3cret@/", only_mine)], vhosts=["lab", "other"])
        user = User("one", "s3cret@/")
        assert connects(rabbit.url(user, "amqp")) and connects(rabbit.url(user, "amqp", "other"))
        with kombu.Connection(rabbit.url(user, "amqp")) as connection:
            assert connection.channel().queue_declare("mine").queue == "mine"
            with pytest.raises(amqp.AccessRefused):
                connection.channel().queue_declare("yours")
        rabbit.set_permissions("one", Permissions())
        with kombu.Connection(rabbit.url(user, "amqp")) as connection:
            assert connection.channel().queue_declare("yours").queue == "yours"
        rabbit.stop()
        rabbit.start()
        assert connects(rabbit.url(user, "amqp"))
        pid = rabbit.ns.pid
    finally:
        rabbit.down()
    assert not Path(f"/proc/{pid}").exists() and not rabbit.directory.exists()


def test_tls_listeners(lab_machine: None) -> None:
    with Cell(settings=Settings(nodes=2, tls=True), rabbit=False) as made:
        said = made["node1"].run("virsh", "-c", "qemu+tls://node2/system", "hostname").stdout
        assert said.strip() == "node2"


def test_person_s_tool(lab_machine: None, tmp_path: Path) -> None:
    """tools/lab: a cell that outlives the command that made it, until down."""
    state = Path(f"/tmp/cwlab-cli-{os.getpid()}")
    tool = [sys.executable, str(REPOSITORY / "tools" / "lab"), "--state", str(state)]

    def lab(*arguments: str, status: int = 0) -> str:
        done = subprocess.run([*tool, *arguments], capture_output=True, text=True,
                              timeout=60, check=False)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    assert "no cell is up" in lab("env", status=1)
    try:
        assert "node2" in lab("up", "2", "--no-mq")
        assert lab("exec", "node1", "ssh", "node2", "hostname").strip() == "node2"
        lab("exec", "node1", "sh", "-c", "exit 3", status=3)
        lab("kill", "node1")
        assert "not up" in lab("exec", "node1", "true", status=1)
        lab("start", "node1")
        lab("daemon", "node1", "libvirtd", "kill")
        lab("daemon", "node1", "libvirtd", "start")
        lab("fault", "node2", "link", "down")
        assert "link" in lab("fault", "node2", "heal")
        assert "NODE1_IP=10.77.0.11" in lab("env")
    finally:
        lab("down")
    assert not state.exists() and lab_processes(state) == []
