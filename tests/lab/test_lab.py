"""The lab itself: that it is what it claims to be, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab import faults
from tests.lab.cell import Cell
from tests.lab.namespaces import LabError
from tests.lab.settings import INSTANCES_PATH, STATE_PATH, WORKER_UID, WORKER_USER, Settings
from tests.lab.worker import REPOSITORY
from tests.waiting import wait_for

pytestmark = pytest.mark.lab

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
