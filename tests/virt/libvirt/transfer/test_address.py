from __future__ import annotations

import pytest

from compute_worker.virt.libvirt.transfer import address


@pytest.mark.parametrize("host", ["node1", "node-1.example.org", "192.0.2.7", "2001:db8::1", "n", "a_b"])
def test_hosts(host: str) -> None:
    assert address.is_host(host)


@pytest.mark.parametrize(
    "host",
    ["", "-oProxyCommand=id", "a b", "a;b", "root@a", "a:22", "a/b", "..", "a..b", "a\n", "$(id)", "fe80::1%e"],
)
def test_not_hosts(host: str) -> None:
    assert not address.is_host(host)


@pytest.mark.parametrize("path", ["/var/lib/compute-worker/instances/u/disk.part", "/a", "/a.b/c_d", "/.hidden/x"])
def test_paths(path: str) -> None:
    assert address.is_path(path)


@pytest.mark.parametrize(
    "path", ["", "a", "/", "/a/../b", "/a b", "/a;id", "/a$(id)", "/a`id`", "/a\n", "/a:b", "/a'b", "/..", "//a", "/a/"]
)
def test_not_paths(path: str) -> None:
    assert not address.is_path(path)


@pytest.mark.parametrize(("user", "good"), [("worker", True), ("_w", True), ("-l", False), ("a@b", False), ("", False)])
def test_users(user: str, good: bool) -> None:
    assert address.is_user(user) is good


def test_brackets() -> None:
    assert [address.in_url(host) for host in ("::1", "node1")] == ["[::1]", "node1"]
