"""sd_notify against a socket that stands in for systemd's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_worker.telemetry.systemd import SystemdNotifier, Watchdog
from tests.waiting import wait_for


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = str(tmp_path / "s") if request.param == "path" else f"@cw-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1) if request.param == "abstract" else name)
        listener.settimeout(5)
        yield listener, name


def heard(listener: socket.socket) -> list[str]:
    return listener.recv(4096).decode().splitlines()


def test_the_life_of_a_service(systemd: tuple[socket.socket, str]) -> None:
    listener, name = systemd
    notifier = SystemdNotifier({"NOTIFY_SOCKET": name})
    assert notifier.present
    assert notifier.ready("takes commands as\nnode1")
    assert heard(listener) == ["READY=1", "STATUS=takes commands as node1"]
    assert notifier.stopping(30)
    assert heard(listener) == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=30000000"]


def test_the_watchdog_is_put_off_only_while_alive(systemd: tuple[socket.socket, str]) -> None:
    listener, name = systemd
    alive, asked = [True], []

    def is_alive() -> bool:
        asked.append(1)
        if len(asked) == 3:
            raise OSError("journal is gone")
        return bool(alive)

    watchdog = Watchdog(SystemdNotifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "40000"}), is_alive)
    assert watchdog.start()
    assert heard(listener) == heard(listener) == ["WATCHDOG=1"]
    wait_for(lambda: len(asked) > 4, what="it to go on after an error")
    assert heard(listener) == ["WATCHDOG=1"]
    alive.clear()
    count = len(asked)
    wait_for(lambda: len(asked) > count + 1, what="it to see that the worker is not alive")
    listener.setblocking(False)
    while True:
        try:
            listener.recv(4096)
        except BlockingIOError:
            break
    count = len(asked)
    wait_for(lambda: len(asked) > count + 2, what="three more looks")
    with pytest.raises(BlockingIOError):
        listener.recv(4096)
    watchdog.stop()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_watchdog_seconds(environment: dict[str, str], seconds: float | None) -> None:
    assert SystemdNotifier(environment).watchdog_seconds == seconds


def test_without_systemd_nothing_happens(tmp_path: Path) -> None:
    nobody = SystemdNotifier({})
    assert not nobody.present
    assert not nobody.ready("x")
    assert not Watchdog(nobody, lambda: True).start()
    assert not SystemdNotifier({"NOTIFY_SOCKET": str(tmp_path / "absent")}).alive()
