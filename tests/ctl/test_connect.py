from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.ctl.connect import PAGE, URL_VARIABLE, Client
from compute_worker.ctl.exits import NobodyAnswers
from compute_worker.objects import Operation
from compute_worker.states import OperationState
from tests.ctl.cell import CtlCell

SHOW = (
    "from compute_worker.ctl.connect import connect\n"
    "from compute_worker.ctl.exits import UsageError\n"
    "import sys\n"
    "try:\n"
    "    client = connect(sys.argv[1] or None, 2.0)\n"
    "    host = client.transport._driver._url.hosts[0]\n"
    "    print(host.hostname, client.exchange)\n"
    "except UsageError as exc:\n"
    "    print('usage:', exc)\n"
)


def connected(config_file: str = "", **environment: str) -> str:
    """Which broker a process of its own chooses: oslo.config keeps what it read for the whole process."""
    base = {k: v for k, v in os.environ.items() if k != URL_VARIABLE} | {"HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, config_file], env=base | environment, capture_output=True, text=True, timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_the_environment_names_the_broker() -> None:
    assert connected(**{URL_VARIABLE: "rabbit://u:p@from-environment:5672/v"}) == "from-environment compute_worker"


def test_a_file_that_is_named_wins_over_the_environment(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("[DEFAULT]\ntransport_url = rabbit://u:p@from-file:5672/v\n[rpc]\nexchange = mine\n")
    told = connected(f"{tmp_path}/c", **{URL_VARIABLE: "rabbit://u:p@from-environment:5672/v"})
    assert told == "from-file mine"


def test_nothing_names_a_broker() -> None:
    told = connected()
    assert told.startswith("usage: no broker") and URL_VARIABLE in told


@pytest.mark.parametrize("address", ["nonsense://u:hunter22@h/v", "rabbit://u:hunter22@h:port/v"])
def test_an_address_that_cannot_be_used_is_not_repeated(address: str) -> None:
    told = connected(**{URL_VARIABLE: address})
    assert told.startswith("usage: the broker's address cannot be used") and "hunter22" not in told


def test_a_wrong_option_is_named(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("[DEFAULT]\ntransport_url = rabbit://h\n[rpc]\nthreads = many\n")
    told = connected(f"{tmp_path}/c")
    assert told.startswith("usage: configuration") and "threads" in told


def test_everywhere_keeps_answers_and_errors_apart() -> None:
    def ask(host: str) -> str:
        if host == "b":
            raise errors.PeerUnavailable(host=host)
        return host.upper()

    api: Any = None
    answers, problems = Client(api, None).everywhere(["a", "b", "c"], ask)
    assert answers == {"a": "A", "c": "C"} and list(problems) == ["b"]


class Pages:
    """Stands for a host with more operations than fit into one answer."""

    def __init__(self, count: int) -> None:
        self.count = count

    def list_operations(
        self, since: int | None, instance: str | None, open_only: bool, *, host: str
    ) -> list[Operation]:
        first = (since or 0) + 1
        return [
            Operation(uuid=f"{n:08d}-0000-4000-8000-000000000000", kind="k", host=host, state=OperationState.DONE,
                      phase="done", created_at=0, updated_at=0, seq=n)
            for n in range(first, min(self.count, first + PAGE - 1) + 1)
        ]


@pytest.mark.parametrize("count", [0, 1, PAGE, 2 * PAGE + 1])
def test_operations_come_page_by_page(count: int) -> None:
    api: Any = Pages(count)
    assert [o.seq for o in Client(api, None).operations("h")] == list(range(1, count + 1))


def test_host_names(cell: CtlCell) -> None:
    assert cell.client().host_names("one") == ["one"]
    assert cell.client().host_names(None) == ["node1", "node2"]
    with pytest.raises(NobodyAnswers):
        Client(cell.api, cell.transport, "another-exchange", 0.1).host_names(None)
