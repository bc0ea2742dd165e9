"""What every family of the manager works with, put together once by :mod:`compute_worker.manager.service`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compute_worker import errors
from compute_worker.claims import Claims
from compute_worker.config import Settings
from compute_worker.manager.downtimes import Downtimes
from compute_worker.messages import Context
from compute_worker.moves import Moves
from compute_worker.objects import Accepted, Instance
from compute_worker.operations.database import Database, Tx
from compute_worker.operations.kinds import Do
from compute_worker.operations.run import Run
from compute_worker.operations.service import Admit, Command, Operations
from compute_worker.states import COMMANDS, TaskState, allowed
from compute_worker.store import Store
from compute_worker.virt.driver import ComputeDriver, Part

if TYPE_CHECKING:
    from compute_worker.manager.peers import Peers


@dataclass(frozen=True)
class Core:
    """One host's parts, handed to endpoints and steps."""

    settings: Settings
    database: Database
    store: Store
    claims: Claims
    driver: ComputeDriver
    moves: Moves
    peers: Peers
    quick_peers: Peers
    """The same with an answer within 2 s or none."""
    downtimes: Downtimes = field(default_factory=Downtimes)

    @property
    def host(self) -> str:
        """This worker's name."""
        return self.settings.host

    def load(self, run: Run) -> Instance:
        """The instance of a running operation, as the store has it now."""
        assert run.instance is not None
        return self.store.get(run.instance)


@dataclass(frozen=True)
class Wish:
    """The trailing arguments that every command has.

    :param operation: the caller's uuid for it: the same uuid is the same operation, however often it is sent.
    :param expires_at: seconds since the epoch after which it must not begin.
    :param check_only: say whether it would be accepted, and change nothing.
    """

    operation: str | None
    expires_at: float | None
    check_only: bool


def accept(
    operations: Operations,
    context: Context,
    kind: str,
    wish: Wish,
    admit: Admit,
    *,
    instance: str | None = None,
    args: dict[str, Any] | None = None,
    message: str | None = None,
    chain: str | None = None,
    attempt: int = 1,
) -> Accepted:
    """Accept one command: everything an endpoint method does after it has looked at its arguments."""
    command = Command(
        kind=kind,
        context=context,
        instance=instance,
        args=args or {},
        message=message,
        operation=wish.operation,
        chain=chain,
        attempt=attempt,
        expires_at=wish.expires_at,
        check_only=wish.check_only,
    )
    return operations.accept(command, admit)


def require_state(store: Store, tx: Tx, uuid: str, command: str) -> Instance:
    """The instance, when ``command`` may come in its state.

    :raises NotFound: it is not here; :class:`~compute_worker.errors.InstanceMoved` says where it is.
    :raises InvalidState: naming the state and what it would have to be.
    """
    instance = store.require(tx, uuid)
    may, reason = allowed(command, instance.vm_state)
    if not may:
        raise errors.InvalidState(
            f"instance {uuid}: {reason}",
            instance=uuid,
            command=command,
            attribute="vm_state",
            state=instance.vm_state.value,
        )
    return instance


def begin(store: Store, tx: Tx, instance: Instance, command: str) -> None:
    """Write the task state that goes with an accepted command."""
    store.change(tx, instance.uuid, task_state=COMMANDS[command].task_state)


def as_step(part: Part) -> Do:
    """A driver's part as a journalled step."""
    return Do(part.name, part.do, part.undo)


def settle_record(store: Store, tx: Tx, uuid: str, **changes: Any) -> None:
    """The end of an operation: the record has no task any more, unless a delete began meanwhile."""
    now = store.find(tx, uuid)
    if now is not None:
        task = now.task_state if now.task_state is TaskState.DELETING else None
        store.change(tx, uuid, task_state=task, **changes)
