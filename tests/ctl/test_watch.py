from __future__ import annotations

import signal
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.ctl import watch
from compute_worker.ctl.connect import Client
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.exits import Exit
from compute_worker.ctl.parser import make_parser
from compute_worker.ctl.watch import KEEP_ENDED, Board, Watcher, draw
from compute_worker.objects import Operation, Progress
from compute_worker.states import OperationState
from tests.ctl.cell import CtlCell
from tests.ctl.test_output import output
from tests.ctl.test_placement import host


def operation(number: int, state: str = "running", seq: int = 0, **facts: Any) -> Operation:
    return Operation(
        uuid=f"{number:08d}-0000-4000-8000-000000000000", kind="build_and_run_instance", host="h", phase="define",
        state=OperationState(state), created_at=float(number), updated_at=float(number), seq=seq, **facts,
    )


def drawn(board: Board) -> str:
    out, stdout, _ = output()
    out.show(draw(board))
    return stdout.getvalue()


def test_ended_operations_stay_a_while() -> None:
    board = Board()
    board.learn(host(), [operation(1, seq=4)], now=10.0)
    board.learn(host(), [operation(1, "done", seq=9)], now=11.0)
    board.forget(now=11.0 + KEEP_ENDED)
    assert [o.state for o in board.shown()] == ["done"] and board.seqs == {"h": 9}
    board.forget(now=11.1 + KEEP_ENDED)
    assert board.shown() == [] and board.ended_at == {}


def test_open_ones_come_first_and_the_newest_of_them() -> None:
    board = Board()
    board.learn(host(), [operation(1), operation(3, "done"), operation(2), operation(4, "undone")], now=5.0)
    assert [int(o.created_at) for o in board.shown()] == [2, 1, 4, 3]


def test_the_table_has_bars_errors_and_silent_hosts() -> None:
    board = Board()
    half = Progress(phase="fetch_images", done_bytes=50, total_bytes=100, rate=10.0, eta=5.0)
    failed = operation(2, "undone", error={"message": "no \x1b[2Jspace [red]x"})
    board.learn(host(memory=4096), [operation(1, progress=half), failed], now=9.0)
    board.silent["h"] = "host h does not answer"
    told = drawn(board)
    assert "━━━━━━━━" in told and "fetch_images 50 B of 100 B, 10 B/s, 5.0 s left" in told
    assert r"no \x1b[2Jspace [red]x" in told
    assert "no answer" in told and "host h does not answer" in told
    assert "8.0 s" in told


def test_an_empty_board_says_so() -> None:
    board = Board()
    board.learn(host(), [], now=1.0)
    assert "no operation runs" in drawn(board)


def test_a_watcher_sees_what_begins_and_ends_between_two_looks(cell: CtlCell) -> None:
    watcher = Watcher(cell.client(), None)
    cell.boot("before")
    assert [o for o in watcher.look(0.0).shown() if o.state.final] == []
    uuid_ = cell.boot("between")
    seen = watcher.look(1.0).shown()
    assert [(o.kind, o.instance, o.state) for o in seen] == [("build_and_run_instance", uuid_, "done")]
    assert sorted(watcher.board.hosts) == ["node1", "node2"]


def test_a_host_that_falls_silent_stays_in_the_table(cell: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher(cell.client(), None)
    watcher.look(0.0)
    real = cell.api.get_host_state

    def silent(*, host: str) -> Any:
        if host == "node2":
            raise errors.PeerUnavailable(host=host)
        return real(host=host)

    monkeypatch.setattr(cell.api, "get_host_state", silent)
    board = watcher.look(1.0)
    assert sorted(board.hosts) == ["node1", "node2"] and list(board.silent) == ["node2"]
    monkeypatch.undo()
    assert watcher.look(2.0).silent == {}


def ctl_of(cell: CtlCell, *argv: str, client: Client | None = None) -> tuple[Ctl, Any]:
    out, stdout, _ = output()
    args = make_parser().parse_args(["watch", *argv])
    return Ctl(client or cell.client(), args, out), stdout


def test_an_interrupt_and_sigterm_end_it_well(cell: CtlCell) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        ctl, stdout = ctl_of(cell)
        assert watch.run(ctl, sleep=lambda seconds, n=number: signal.raise_signal(n)) is Exit.OK  # type: ignore[misc]
        assert "node1" in stdout.getvalue()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_broker_that_goes_away_does_not_end_it(cell: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl, stdout = ctl_of(cell, "--count", "2")

    def gone(*args: Any) -> Any:
        raise errors.PeerUnavailable("no broker", host="*")

    def cut(seconds: float) -> None:
        monkeypatch.setattr(Client, "everywhere", gone)

    assert watch.run(ctl, sleep=cut) is Exit.OK
    assert "broker: no broker" in stdout.getvalue()
