from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from compute_worker.ctl import bootargs
from compute_worker.ctl.exits import UsageError
from compute_worker.ctl.parser import make_parser
from compute_worker.objects import Instance, Vif


def instance(*argv: str) -> Instance:
    args = make_parser().parse_args(["boot", "web", "--flavor", "2/512/10", *argv])
    return bootargs.instance_of(args)


def test_the_least_that_is_needed() -> None:
    made = instance("--image", "cirros")
    assert (made.name, made.flavor.vcpus, made.flavor.memory_mb, made.flavor.root_gb) == ("web", 2, 512, 10)
    assert made.image.disk_format == "qcow2" and not made.config_drive and made.vifs == []
    assert made.uuid != instance("--image", "cirros").uuid


@pytest.mark.parametrize("text", ["2", "2/x/1", "a/b", "2/512/10/1", "-1/512", "2/512/", "٣/512", "0/512", "1/1"])
def test_a_flavor_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="--flavor"):
        bootargs.flavor_of(text)


def test_flavor_without_root_disk() -> None:
    assert bootargs.flavor_of("1/64").root_gb == 0


def test_ephemerals_and_swap_count_in_the_flavor() -> None:
    made = instance("--image", "x", "--ephemeral", "3:xfs", "--ephemeral", "2", "--swap", "128")
    assert made.flavor.ephemeral_gb == 5 and made.flavor.swap_mb == 128
    assert [d.guest_format for d in made.block_device_info.ephemerals] == ["xfs", None]


@pytest.mark.parametrize("text", ["", "x", "1.5", "0", "-1", ":ext4"])
def test_an_ephemeral_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="--ephemeral"):
        bootargs.ephemeral_of(text)


def test_vif() -> None:
    vif = bootargs.vif_of("bridge=br0,mac=52:54:00:aa:bb:cc,mtu=9000,wait", "x")
    assert (vif.bridge, vif.mac, vif.mtu, vif.wait_for_plug) == ("br0", "52:54:00:aa:bb:cc", 9000, True)
    made_up = bootargs.vif_of("bridge=br0", "x")
    assert isinstance(made_up, Vif) and made_up.mac.startswith("52:54:00:") and not made_up.wait_for_plug


@pytest.mark.parametrize("text", ["color=red", "bridge=../x", "mac=1", "mtu=big", "wait=maybe", "bridge=br0,=x"])
def test_a_vif_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="--vif"):
        bootargs.vif_of(text, "x")


def test_the_same_command_line_with_a_uuid_is_the_same_command() -> None:
    vifs = ("--vif", "bridge=br0") * 2
    argv = ("--image", "x", *vifs, "--uuid", "00000000-0000-4000-8000-00000000000a")
    once, again = instance(*argv), instance(*argv)
    assert once == again
    assert once.vifs[0].id != once.vifs[1].id and once.vifs[0].mac != once.vifs[1].mac
    other = instance(*argv[:-1], "00000000-0000-4000-8000-00000000000b")
    assert other.vifs[0].id != once.vifs[0].id


def test_files_turn_the_config_drive_on(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\0\xff")
    assert instance("--image", "x", "--file", f"/etc/f={tmp_path}/f").config_drive
    (made,) = bootargs.injected_of([f"/etc/f={tmp_path}/f"])
    assert (made.path, base64.b64decode(made.content_base64)) == ("/etc/f", b"\0\xff")


def test_files_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(60_000))
    for text in ("nopath", "=x", f"/etc/x={tmp_path}/absent", f"/x={tmp_path}/big"):
        with pytest.raises(UsageError, match="--file"):
            bootargs.injected_of([text])


def test_password_is_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("secret\nnot this\n")
    assert bootargs.password_of(f"{tmp_path}/p") == "secret"
    assert bootargs.password_of(None) is None


def test_image_json(tmp_path: Path) -> None:
    (tmp_path / "i").write_text(json.dumps({"id": "x", "disk_format": "raw", "os_type": "linux"}))
    assert instance("--image-json", f"{tmp_path}/i").image.os_type == "linux"


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "../x"}', '{"id": "x", "disk_format": "tar"}', "\udc80"])
def test_image_json_that_cannot_be(tmp_path: Path, text: str) -> None:
    (tmp_path / "i").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match="--image-json"):
        instance("--image-json", f"{tmp_path}/i")


def test_image_is_said_once() -> None:
    with pytest.raises(UsageError, match="say what to boot"):
        instance()
    with pytest.raises(UsageError, match="give one of them"):
        instance("--image", "x", "--image-json", "y")


@pytest.mark.parametrize("argv", [("--uuid", "X"), ("--hostname", "../x"), ("--kernel", "a/b"), ("--meta", "novalue")])
def test_other_values_are_checked_here(argv: tuple[str, str]) -> None:
    with pytest.raises(UsageError):
        instance("--image", "x", *argv)
