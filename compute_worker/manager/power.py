"""Start, stop, reboot, pause, unpause, suspend, resume: one table of kinds. Their COMMIT is their acceptance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from compute_worker import errors
from compute_worker.config import Compute
from compute_worker.errors import ComputeError
from compute_worker.manager import peers, resize_destination
from compute_worker.manager.core import Core, begin, require_state, settle_record
from compute_worker.moves import Side
from compute_worker.objects import Instance
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Do, Kind, Step
from compute_worker.operations.run import Run
from compute_worker.states import EXPECTED_POWER, VmState, settled

Act = Callable[[Core, Instance, Run], None]


@dataclass(frozen=True)
class Power:
    """One power command: its steps in order, what the instance is afterwards, its name in notifications.

    A reboot is two steps, each harmless to repeat: done as one, a death before its record would reboot twice.
    """

    steps: Mapping[str, Act]
    becomes: VmState
    event: str


def patience(options: Compute, kind: str, args: Mapping[str, Any]) -> float:
    """Seconds that a guest has to shut itself down.

    What the caller left out is decided when it runs: it is no argument of the command, which is the same command after
    the configuration has changed.
    """
    if kind == "reboot_instance":
        return options.soft_reboot_timeout
    if kind == "reboot_instance_hard" or not args["clean_shutdown"]:
        return 0.0
    asked: float | None = args["shutdown_timeout"]
    return options.shutdown_timeout if asked is None else asked


def _off(core: Core, instance: Instance, run: Run) -> None:
    options = core.settings.compute
    seconds = patience(options, run.kind, run.args)
    clean = core.driver.power_off(instance, run, seconds, options.shutdown_retry_interval)
    run.explain("the guest shut itself down" if clean else "the guest was powered off")


def _on(core: Core, instance: Instance, run: Run) -> None:
    if instance.migration is not None:
        _guard(core, instance, run)
    core.driver.power_on(instance, run)


def _guard(core: Core, instance: Instance, run: Run) -> None:
    """Before a guest starts whose move is not closed (``protocol.md`` 8).

    :raises InstanceMoved: the other host has taken it over by force: this copy is set aside, and belongs to it.
    """
    for move in core.database.read(lambda tx: core.moves.of(tx, instance.uuid)):
        reason = peers.superseded_by(core, instance, move) if move.side is Side.DESTINATION else None
        if reason is None:
            continue
        for part in core.driver.set_aside(instance, move.migration):
            part.do(run)
        run.explain(f"{reason}: this copy is set aside")
        core.database.write(lambda tx, m=move, why=reason: resize_destination.surrender(core, tx, m, why))  # type: ignore[misc]
        raise errors.InstanceMoved(instance=instance.uuid, host=move.other)


def _pause(core: Core, instance: Instance, run: Run) -> None:
    core.driver.pause(instance)


def _unpause(core: Core, instance: Instance, run: Run) -> None:
    core.driver.unpause(instance)


def _suspend(core: Core, instance: Instance, run: Run) -> None:
    core.driver.suspend(instance, run)


def _resume(core: Core, instance: Instance, run: Run) -> None:
    core.driver.resume(instance, run)


_REBOOT = Power({"power_off": _off, "power_on": _on}, VmState.ACTIVE, "reboot")

POWER: dict[str, Power] = {
    "start_instance": Power({"power_on": _on}, VmState.ACTIVE, "power_on"),
    "stop_instance": Power({"power_off": _off}, VmState.STOPPED, "power_off"),
    "reboot_instance": _REBOOT,
    "reboot_instance_hard": _REBOOT,
    "pause_instance": Power({"pause": _pause}, VmState.PAUSED, "pause"),
    "unpause_instance": Power({"unpause": _unpause}, VmState.ACTIVE, "unpause"),
    "suspend_instance": Power({"suspend": _suspend}, VmState.SUSPENDED, "suspend"),
    "resume_instance": Power({"resume": _resume}, VmState.ACTIVE, "resume"),
}


def admit(core: Core, tx: Tx, uuid: str, command: str) -> bool:
    """Check the state and write the task. True when the wish is fulfilled already.

    :raises NotFound: it is not here.
    :raises InvalidState: not in this state.
    """
    instance = require_state(core.store, tx, uuid, command)
    if settled(command, instance.vm_state, instance.power_state):
        return True
    begin(core.store, tx, instance, command)
    return False


def kind(core: Core, command: str) -> Kind:
    """How one power command runs. When it cannot be done, the record is left to the next comparison."""
    power = POWER[command]

    def steps(run: Run) -> Sequence[Step]:
        return [Do(name, partial(_call, core, act)) for name, act in power.steps.items()]

    def finish(tx: Tx, run: Run) -> None:
        assert run.instance is not None
        settle_record(
            core.store,
            tx,
            run.instance,
            vm_state=VmState.RESIZED if _is_resized(core, tx, run) else power.becomes,
            power_state=EXPECTED_POWER[power.becomes],
            fault=None,
        )

    def abandon(tx: Tx, run: Run, error: ComputeError) -> None:
        assert run.instance is not None
        if not run.preempted:
            settle_record(core.store, tx, run.instance, fault=error.message)

    return Kind(
        name=command,
        steps=steps,
        finish=finish,
        abandon=abandon,
        limit="power",
        event=power.event,
        committed_at_accept=True,
        gives_up=True,
    )


def _is_resized(core: Core, tx: Tx, run: Run) -> bool:
    now = core.store.find(tx, run.instance or "")
    return now is not None and now.vm_state is VmState.RESIZED


def _call(core: Core, act: Act, run: Run) -> None:
    act(core, core.load(run), run)
