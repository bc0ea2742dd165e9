"""Start, stop, reboot, pause, unpause, suspend, resume: one table of kinds. Their COMMIT is their acceptance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compute_worker.errors import ComputeError
from compute_worker.manager.core import Core, begin, require_state
from compute_worker.objects import Instance
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Do, Kind
from compute_worker.operations.run import Run
from compute_worker.states import EXPECTED_POWER, VmState, settled
from compute_worker.virt.driver import ComputeDriver

Act = Callable[[ComputeDriver, Instance, Run], None]


@dataclass(frozen=True)
class Power:
    """One power command: what it asks of the driver, what the instance is afterwards, its name in notifications."""

    act: Act
    becomes: VmState
    event: str


def _stop(driver: ComputeDriver, instance: Instance, run: Run) -> None:
    timeout, interval = run.args["timeout"], run.args["retry_interval"]
    clean = driver.power_off(instance, run, timeout, interval)
    run.explain("the guest shut itself down" if clean else "the guest was powered off")


def _reboot(driver: ComputeDriver, instance: Instance, run: Run) -> None:
    driver.reboot(instance, run, hard=run.kind.endswith("_hard"), timeout=run.args["timeout"])


POWER: dict[str, Power] = {
    "start_instance": Power(lambda d, i, run: d.power_on(i, run), VmState.ACTIVE, "power_on"),
    "stop_instance": Power(_stop, VmState.STOPPED, "power_off"),
    "reboot_instance": Power(_reboot, VmState.ACTIVE, "reboot"),
    "reboot_instance_hard": Power(_reboot, VmState.ACTIVE, "reboot"),
    "pause_instance": Power(lambda d, i, run: d.pause(i), VmState.PAUSED, "pause"),
    "unpause_instance": Power(lambda d, i, run: d.unpause(i), VmState.ACTIVE, "unpause"),
    "suspend_instance": Power(lambda d, i, run: d.suspend(i, run), VmState.SUSPENDED, "suspend"),
    "resume_instance": Power(lambda d, i, run: d.resume(i, run), VmState.ACTIVE, "resume"),
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
    """How one power command runs: one step. When it cannot be done, the record is left to the next comparison."""
    power = POWER[command]

    def act(run: Run) -> None:
        power.act(core.driver, core.load(run), run)

    def finish(tx: Tx, run: Run) -> None:
        assert run.instance is not None
        core.store.change(
            tx,
            run.instance,
            vm_state=power.becomes,
            power_state=EXPECTED_POWER[power.becomes],
            task_state=None,
            fault=None,
        )

    def abandon(tx: Tx, run: Run, error: ComputeError) -> None:
        assert run.instance is not None
        if not run.preempted:
            core.store.change(tx, run.instance, task_state=None, fault=error.message)

    return Kind(
        name=command,
        steps=lambda run: [Do(power.event, act)],
        finish=finish,
        abandon=abandon,
        limit="power",
        event=power.event,
        committed_at_accept=True,
        gives_up=True,
    )
