from __future__ import annotations

import uuid
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.ctl.connect import Client
from compute_worker.ctl.exits import NobodyAnswers, UsageError
from compute_worker.ctl.find import find_instance, find_operation, follow, is_uuid, matching
from compute_worker.objects import Flavor, ImageMeta, Instance
from tests.ctl.cell import CtlCell

FLAVOR, IMAGE = Flavor(vcpus=1, memory_mb=64), ImageMeta(id="x")


def instance(uuid_: str, name: str = "") -> Instance:
    return Instance(uuid=uuid_, name=name, flavor=FLAVOR, image=IMAGE)


A = instance("aaaa0000-0000-4000-8000-000000000001", "web")
B = instance("aaaa1111-0000-4000-8000-000000000002", "aaaa")
C = instance("cccc0000-0000-4000-8000-000000000003", "web")


@pytest.mark.parametrize(
    ("word", "found"),
    [
        (A.uuid, [A]), ("web", [A, C]), ("aaaa", [B]), ("aaaa0", [A]), ("AAAA0", [A]), ("cccc", [C]), ("ccc", []),
        ("", []), ("none", []),
    ],
)
def test_matching(word: str, found: list[Instance]) -> None:
    assert matching(word, [A, B, C]) == found


@pytest.mark.parametrize(
    ("word", "is_one"),
    [(A.uuid, True), (A.uuid.upper(), False), (A.uuid.replace("-", ""), False), ("x" * 36, False)],
)
def test_is_uuid(word: str, is_one: bool) -> None:
    assert is_uuid(word) is is_one


class Trail:
    """Stands for hosts that name one another."""

    def __init__(self, moved: dict[str, str]) -> None:
        self.moved = moved

    def get_instance(self, instance: str, *, host: str) -> Instance:
        if host in self.moved:
            raise errors.InstanceMoved(instance=instance, host=self.moved[host])
        return A


def test_follow_goes_from_host_to_host() -> None:
    api: Any = Trail({"node1": "node2", "node2": "node3"})
    assert follow(Client(api, None), A.uuid, "node1").host == "node3"


def test_follow_ends_when_hosts_name_one_another() -> None:
    api: Any = Trail({"node1": "node2", "node2": "node1"})
    with pytest.raises(errors.InstanceNotFound, match="name one another"):
        follow(Client(api, None), A.uuid, "node1")


def test_by_uuid_prefix_and_name(cell: CtlCell) -> None:
    uuid_ = cell.boot("needle", "--host", "node2")
    for word in (uuid_, uuid_[:13], "needle"):
        found = find_instance(cell.client(), word)
        assert (found.host, found.instance.uuid) == ("node2", uuid_)
    with pytest.raises(errors.InstanceNotFound, match="is not known on host node1"):
        find_instance(cell.client(), uuid_, "node1")
    with pytest.raises(errors.InstanceNotFound, match="no instance is called"):
        find_instance(cell.client(), "needle", "node1")


def test_a_deleted_one_is_told_as_such(cell: CtlCell) -> None:
    uuid_ = cell.boot("gone")
    assert cell.ctl("delete", uuid_).code == 0
    with pytest.raises(errors.InstanceNotFound, match="was deleted"):
        find_instance(cell.client(), uuid_)


def test_what_a_silent_host_may_have_is_not_called_absent(cell: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cell.api.get_instance

    def silent(instance: str, *, host: str) -> Instance:
        if host == "node2":
            raise errors.PeerUnavailable(host=host)
        return real(instance, host=host)

    monkeypatch.setattr(cell.api, "get_instance", silent)
    with pytest.raises(errors.PeerUnavailable, match="node2 did not answer"):
        find_instance(cell.client(), str(uuid.uuid4()))


def test_no_host_at_all(cell: CtlCell) -> None:
    nobody = Client(cell.api, cell.transport, "another-exchange", 0.1)
    for word in (A.uuid, "name"):
        with pytest.raises(NobodyAnswers):
            find_instance(nobody, word)


def test_operations_by_uuid_and_prefix(cell: CtlCell) -> None:
    uuid_ = cell.boot("op", "--host", "node1")
    operation = cell.client().operations("node1", instance=uuid_)[0]
    for word in (operation.uuid, operation.uuid[:12]):
        (found,) = find_operation(cell.client(), word)
        assert found.uuid == operation.uuid and found.steps
    with pytest.raises(UsageError, match="at least 4"):
        find_operation(cell.client(), "abc")
    with pytest.raises(errors.OperationNotFound):
        find_operation(cell.client(), "zzzzzzzz")
