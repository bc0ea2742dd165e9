"""What an operation is made of: steps in reading order, one COMMIT, and what its ends write."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compute_worker.errors import ComputeError
from compute_worker.operations.database import Tx

if TYPE_CHECKING:
    from compute_worker.operations.run import Run

Result = Mapping[str, Any] | None


class Decided(Exception):
    """Raised by an undo: another host has decided for the operation, which therefore goes on from the step that failed.

    Only where the steps undone so far had nothing to put back, and those from there to the COMMIT ask that host again.
    """


class Step(abc.ABC):
    """One journalled piece of an operation.

    ``name`` is stable over releases. Both methods look at the world first and may be called any number of times, also
    on their own half-done work: the process may die at any instruction and the step is then run again.
    """

    name: str
    cancellable: bool = True
    """Whether a cancel may end the operation here. Without, the step itself asks whoever decides (another host)."""

    @abc.abstractmethod
    def do(self, run: Run) -> Result:
        """Do it. What is returned (JSON only) is journalled and found in ``run.results[name]`` by later steps.

        :raises Retryable: it is done again with backoff.
        :raises ComputeError: before COMMIT everything begun is undone; after it, it is done again with backoff.
        """

    @abc.abstractmethod
    def undo(self, run: Run) -> None:
        """Put back what :meth:`do` did wholly, partly or not at all. Repeated with backoff until it ends well.

        :raises Decided: it must not be: nothing that was done before it is undone either.
        """


class Do(Step):
    """A step from functions. Without ``undo`` there is nothing to put back."""

    def __init__(
        self,
        name: str,
        do: Callable[[Run], Result],
        undo: Callable[[Run], None] | None = None,
        *,
        cancellable: bool = True,
    ) -> None:
        self.name = name
        self.cancellable = cancellable
        self._do = do
        self._undo = undo

    def do(self, run: Run) -> Result:
        """Call the function."""
        return self._do(run)

    def undo(self, run: Run) -> None:
        """Call the other function, where there is one."""
        if self._undo is not None:
            self._undo(run)


class Commit(Step):
    """The point of no return, a row in the journal: before it failure undoes, after it only forward.

    ``record`` writes in the same transaction whatever becomes true with it; when it raises, the operation is undone.
    Not ``cancellable``: it only records what another host has decided.
    """

    name = "commit"

    def __init__(self, record: Callable[[Tx, Run], None], *, cancellable: bool = True) -> None:
        self.record = record
        self.cancellable = cancellable

    def do(self, run: Run) -> Result:
        """The runner writes the row itself, in one transaction with :attr:`record`."""
        raise AssertionError("a commit is recorded, not done")

    def undo(self, run: Run) -> None:
        """Never reached: what is committed is not undone."""
        raise AssertionError("a commit is never undone")


@dataclass(frozen=True)
class Kind:
    """How operations of one name run.

    :param name: the message that begins it.
    :param steps: the steps for one operation; the same again after a restart.
    :param finish: writes the final state, in the transaction that ends the operation ``done``.
    :param abandon: writes the state after an end that is not ``done``, in the transaction that ends it ``undone``.
    :param limit: admission class: how many of these run at once.
    :param committed_at_accept: accepting is its COMMIT (delete, power): no :class:`Commit` among its steps.
    :param gives_up: after COMMIT an error that trying again cannot help ends it ``undone`` with the truth on record
        (a guest that cannot start); otherwise it is tried for ever (a delete).
    :param preempts: does not wait for the instance: cancels what runs on it and runs next.
    :param locks: whether it needs the instance for itself at all.
    :param takes_over: its COMMIT takes the instance from another host, which may ask for it however late: that it was
        committed is remembered for ever.
    :param event: its name in notifications: ``instance.<event>.start``.
    :param secret_args: arguments that no log, notification or answer may show; journalled until the end, then dropped.
    """

    name: str
    steps: Callable[[Run], Sequence[Step]]
    finish: Callable[[Tx, Run], None]
    abandon: Callable[[Tx, Run, ComputeError], None]
    limit: str
    event: str
    committed_at_accept: bool = False
    gives_up: bool = False
    preempts: bool = False
    locks: bool = True
    takes_over: bool = False
    secret_args: frozenset[str] = frozenset()
