"""The script: scenes in order. A family of scenes has a module of its own, whose ``SCENES`` stand in the list here."""

from __future__ import annotations

import time

from compute_worker.ctl.queries import condition, used
from compute_worker.demo import imaging, living, moving
from compute_worker.demo.stage import FIRST, SECOND, THIRD, Scene, Stage
from compute_worker.states import OperationState


def hosts(stage: Stage) -> str:
    """Every host of the cell answers a fanout."""
    wanted = set(stage.cell.hosts)
    client = stage.cell.client
    found = client.hosts(lambda states: {s.host for s in states} >= wanted)
    for state in found:
        resources = f"{used(state.vcpus)} vcpus, {used(state.memory_mb)} MiB"
        stage.say(f"{state.host}: {condition(state)}, {resources}, {state.hypervisor_type} on {state.machine_arch}")
    stage.require({s.host for s in found} >= wanted, f"only {', '.join(s.host for s in found) or 'nobody'} answered")
    return f"{len(found)} hosts: {', '.join(s.host for s in found)}"


def boot_with_kernel(stage: Stage) -> str:
    """A qcow2 overlay over a cached base image; kernel and ramdisk beside it."""
    host = stage.cell.hosts[0]
    stage.end_of(stage.send_boot(host, stage.make(FIRST, stage.cell.kernel_image)))
    return f"{FIRST} runs on {host}"


def boot_from_disk(stage: Stage) -> str:
    """A guest that finds its boot loader on its own disk."""
    host = stage.cell.hosts[1]
    stage.end_of(stage.send_boot(host, stage.make(SECOND, stage.cell.disk_image)))
    return f"{SECOND} runs on {host}"


def consoles(stage: Stage) -> str:
    """Both guests count on their serial consoles."""
    seen = []
    for name in (FIRST, SECOND):
        first = stage.booted(name, 1)
        later = stage.tick_after(name, first, f"{name} to go on ticking")
        stage.say(f"{name}: {stage.console(name).splitlines()[-1].strip()}")
        seen.append(f"{name} ticks ({first}, then {later})")
    return "; ".join(seen)


def stop(stage: Stage) -> str:
    """The guest is asked, and says on its own console that it shuts down."""
    stage.command(FIRST, "stop_instance")
    said = stage.cell.guest.clean_shutdowns(stage.console(FIRST))
    stage.require(said == 1, f"the guest's console tells of {said} clean shutdowns, not 1")
    return "the guest shut itself down: its own console says so"


def start(stage: Stage) -> str:
    """From its disks, on the host that they came to: it sees the larger one, and goes on counting."""
    stage.command(FIRST, "start_instance")
    return moving.as_it_was(stage, FIRST, stage.booted(FIRST, 1))


def reboot(stage: Stage) -> str:
    """Soft: the guest goes down by itself."""
    stage.command(FIRST, "reboot_instance")
    stage.booted(FIRST, 2)
    said = stage.cell.guest.clean_shutdowns(stage.console(FIRST))
    stage.require(said == 1, f"the guest's console tells of {said} clean shutdowns here, not 1")
    return "booted again, after a clean shutdown"


def pause(stage: Stage) -> str:
    """Processors stop, memory stays: the counter stands still and then goes on."""
    stage.command(FIRST, "pause_instance")
    first = stage.cell.guest.last_tick(stage.console(FIRST))
    time.sleep(stage.cell.guest.still)
    second = stage.cell.guest.last_tick(stage.console(FIRST))
    stage.require(first == second, f"the paused guest ticked from {first} to {second}")
    stage.command(FIRST, "unpause_instance")
    later = stage.tick_after(FIRST, second, "the guest to go on")
    return f"stood at tick {first} for {stage.cell.guest.still:g} s, went on to {later}"


def suspend(stage: Stage) -> str:
    """Memory to disk and back: the same boot goes on."""
    before = stage.cell.guest.last_tick(stage.console(FIRST))
    stage.command(FIRST, "suspend_instance")
    stage.command(FIRST, "resume_instance")
    later = stage.tick_after(FIRST, before, "the guest to go on from its saved memory")
    boots = stage.cell.guest.boots(stage.console(FIRST))
    stage.require(boots == 2, f"the guest booted {boots} times here, not 2: its memory was lost")
    return f"tick {before}, then {later}, of the same boot"


def kill_worker(stage: Stage) -> str:
    """The worker dies in the middle of a build; started again, it ends the build."""
    host, cell = stage.cell.hosts[0], stage.cell
    instance = stage.make(THIRD, cell.kernel_image)
    cell.arm(host, instance.uuid)
    accepted = stage.send_boot(host, instance)
    assert accepted.operation is not None
    cell.until_under_way(host, accepted.operation)
    cell.kill_worker(host)
    stage.say(f"{host}: {cell.killing}")
    cell.start_worker(host)
    stage.say(f"{host}: the worker is back")
    ended = stage.end_of(accepted)
    repeated = [f"{step.name} ({step.attempts} attempts)" for step in ended.steps if step.attempts > 1]
    stage.require(ended.state is OperationState.DONE and bool(repeated), "no step of the build was cut")
    stage.booted(THIRD, 1)
    return f"cut in {', '.join(repeated)}; ended by itself, the guest booted once"


def delete(stage: Stage) -> str:
    """All of them, at once."""
    sent = []
    for name in list(stage.memory.guests):
        uuid, host = stage.guest(name)
        sent.append(stage.api.terminate_instance(uuid, host=host))
    for accepted in sent:
        stage.end_of(accepted)
    return f"{len(sent)} instances deleted"


def nothing_left(stage: Stage) -> str:
    """Looked at from outside, not by asking the workers."""
    left = stage.cell.leftovers()
    stage.require(not left, "; ".join(left))
    for host in stage.cell.hosts:
        state = stage.api.get_host_state(host=host)
        stage.require(state.instances == 0 and state.memory_mb.used == 0, f"{host} still claims resources")
    return "no guest, domain, file or interface; no claim"


SCENES = (
    Scene("hosts found by announce", hosts),
    Scene("boot: qcow2 over a base image, with kernel and initrd", boot_with_kernel),
    Scene("boot: from its own disk", boot_from_disk),
    Scene("consoles tick", consoles),
    Scene("stop, clean", stop),
    Scene("resize while it is off: every byte compared, confirm", moving.of_one_that_is_off),
    Scene("start where it came to", start),
    Scene("reboot, soft", reboot),
    Scene("pause and unpause", pause),
    Scene("suspend and resume", suspend),
    *moving.SCENES,
    *living.SCENES,
    *imaging.SCENES,
    Scene("kill -9 of the worker in the middle of a build", kill_worker),
    Scene("delete", delete),
    Scene("nothing left over", nothing_left),
)
