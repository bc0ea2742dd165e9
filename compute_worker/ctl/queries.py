"""Subcommands that only look: one function each, from the command line to an exit status."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compute_worker.ctl import explain as explaining
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.exits import Exit, NobodyAnswers, UsageError
from compute_worker.ctl.find import find_instance, find_operation, is_uuid
from compute_worker.ctl.output import describe
from compute_worker.ctl.text import clock, number, safe, span
from compute_worker.errors import ComputeError
from compute_worker.objects import Capacity, HostState, Instance, Operation

HOST_COLUMNS = (
    "host", "state", "vcpus", "memory MiB", "disk GiB", "instances", "operations", "hypervisor", "clock", "up",
)


def hosts(ctl: Ctl) -> Exit:
    """Every host that answers, with its resources."""
    began = time.time()
    host = ctl.args.host
    states = ctl.client.hosts() if host is None else [ctl.client.api.get_host_state(host=host)]
    if not states:
        raise NobodyAnswers(seconds=ctl.client.discover)
    if ctl.out.as_json:
        ctl.out.document({"hosts": states})
        return Exit.OK
    ctl.out.table(HOST_COLUMNS, [_host_row(state, began) for state in states])
    return Exit.OK


def _host_row(state: HostState, now: float) -> Sequence[object]:
    return (
        state.host,
        condition(state),
        used(state.vcpus),
        used(state.memory_mb),
        used(state.disk_gb),
        state.instances,
        state.operations,
        f"{state.hypervisor_type} {version_words(state.hypervisor_version)}".strip(),
        skew_words(state.time - now),
        span(state.time - state.started_at),
    )


def condition(state: HostState) -> str:
    """Whether it takes instances, in words."""
    if not state.hypervisor_up:
        return "hypervisor down"
    if state.enabled:
        return "enabled"
    return f"disabled: {state.disabled_reason}" if state.disabled_reason else "disabled"


def used(capacity: Capacity) -> str:
    """``used of usable``."""
    return f"{number(capacity.used)} of {number(capacity.usable)}"


def version_words(version: int) -> str:
    """A version as libvirt counts: 9000000 is 9.0.0."""
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}" if version else ""


def skew_words(seconds: float) -> str:
    """How far a host's clock is off; what the answer's way here can explain is nothing."""
    if abs(seconds) < 5:
        return "ok"
    return f"{span(abs(seconds))} {'ahead' if seconds > 0 else 'behind'}"


def list_(ctl: Ctl) -> Exit:
    """Instances of all hosts, or of one."""
    names = ctl.client.host_names(ctl.args.host)
    answers, problems = ctl.client.everywhere(names, lambda host: ctl.client.api.list_instances(host=host))
    found = [instance for instances in answers.values() for instance in instances]
    if ctl.out.as_json:
        ctl.out.document({"instances": found, "unreachable": sorted(problems)})
    else:
        columns = ("uuid", "name", "host", "state", "task", "power", "flavor", "fault")
        ctl.out.table(columns, [_instance_row(i) for i in sorted(found, key=lambda i: (i.host or "", i.name, i.uuid))])
    return told_problems(ctl, problems)


def told_problems(ctl: Ctl, problems: Mapping[str, ComputeError]) -> Exit:
    """Say who did not answer; the exit status that goes with it."""
    for problem in problems.values():
        ctl.out.note(problem.message)
    return Exit.UNREACHABLE if problems else Exit.OK


def _instance_row(instance: Instance) -> Sequence[object]:
    return (
        instance.uuid,
        instance.name,
        instance.host,
        instance.vm_state.value,
        instance.task_state.value if instance.task_state else "",
        instance.power_state.value,
        flavor_words(instance),
        instance.fault,
    )


def flavor_words(instance: Instance) -> str:
    """``VCPUS/MEMORY_MB/ROOT_GB``, as ``boot --flavor`` takes it."""
    flavor = instance.flavor
    return f"{flavor.vcpus}/{flavor.memory_mb}/{flavor.root_gb}"


def show(ctl: Ctl) -> Exit:
    """One instance with all that its host records."""
    found = ctl.find()
    if ctl.out.as_json:
        ctl.out.document({"host": found.host, "instance": found.instance})
        return Exit.OK
    instance = found.instance
    facts: dict[str, object] = {
        "uuid": instance.uuid,
        "name": instance.name,
        "host": found.host,
        "vm state": instance.vm_state.value,
        "task state": instance.task_state.value if instance.task_state else "none",
        "power state": instance.power_state.value,
        "fault": instance.fault or "none",
        "flavor": f"{instance.flavor.name}: {flavor_words(instance)} (vcpus/memory MiB/root GiB)",
        "image": f"{instance.image.id} ({instance.image.disk_format})",
        "kernel, ramdisk": ", ".join(filter(None, (instance.image.kernel_id, instance.image.ramdisk_id))) or "none",
        "launched": clock(instance.launched_at) if instance.launched_at else "not yet",
        "config drive": "yes" if instance.config_drive else "no",
        "migration": instance.migration or "none",
        "generation": instance.generation,
    }
    facts |= {f"vif {vif.id}": f"{vif.mac} on {vif.bridge or 'no bridge'}" for vif in instance.vifs}
    facts |= {f"metadata {safe(key)}": value for key, value in instance.metadata.items()}
    ctl.out.table(("property", "value"), list(facts.items()))
    return Exit.OK


def diagnostics(ctl: Ctl) -> Exit:
    """What the hypervisor measures of the guest."""
    host, uuid = ctl.target()
    measured = ctl.client.api.get_diagnostics(uuid, host=host)
    if ctl.out.as_json:
        ctl.out.document({"host": host, "instance": uuid, "diagnostics": measured})
        return Exit.OK
    facts: list[tuple[str, object]] = [
        ("driver", measured.driver),
        ("state", measured.state.value),
        ("vcpus", measured.vcpus),
        ("processor time", span(measured.cpu_time_ns / 1e9) if measured.cpu_time_ns is not None else "unknown"),
        ("memory MiB", measured.memory_mb),
        ("memory used MiB", measured.memory_used_mb),
    ]
    facts += [(f"disk {n}", _pairs(disk)) for n, disk in enumerate(measured.disks)]
    facts += [(f"nic {n}", _pairs(nic)) for n, nic in enumerate(measured.nics)]
    ctl.out.table(("measure", "value"), facts)
    return Exit.OK


def _pairs(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def operations(ctl: Ctl) -> Exit:
    """Operations of all hosts, or of one, oldest change first."""
    args = ctl.args
    instance = args.instance
    names = [args.host] if args.host is not None else None
    if instance is not None and not is_uuid(instance):
        instance = find_instance(ctl.client, instance, args.host).instance.uuid
    names = names or ctl.client.host_names(None)
    answers, problems = ctl.client.everywhere(
        names, lambda host: ctl.client.operations(host, args.since, instance, args.open)
    )
    found = sorted((o for part in answers.values() for o in part), key=lambda o: o.updated_at)
    if ctl.out.as_json:
        ctl.out.document({"operations": found, "unreachable": sorted(problems)})
    else:
        columns = ("operation", "kind", "instance", "host", "state", "at", "accepted", "took")
        ctl.out.table(columns, [_operation_row(operation) for operation in found])
    return told_problems(ctl, problems)


def _operation_row(operation: Operation) -> Sequence[object]:
    return (
        operation.uuid,
        operation.kind,
        operation.instance,
        operation.host,
        operation.state.value,
        (operation.error or {}).get("message", "") if operation.state.final else describe(operation),
        clock(operation.created_at),
        span(operation.updated_at - operation.created_at),
    )


def explain(ctl: Ctl) -> Exit:
    """One operation, on every host that has a part of it: steps, decisions, what it waits for."""
    parts = find_operation(ctl.client, ctl.args.explained, ctl.args.host)
    if ctl.out.as_json:
        ctl.out.document(
            {"operations": parts, "verdicts": {part.host: explaining.verdict(part) for part in parts}}
        )
        return Exit.OK
    for number_, part in enumerate(parts):
        if number_:
            ctl.out.raw("\n")
        for line in explaining.head(part):
            ctl.out.line(line)
        if part.steps:
            ctl.out.raw("\n")
            ctl.out.table(explaining.COLUMNS, explaining.rows(part))
    return Exit.OK


def console(ctl: Ctl) -> Exit:
    """The end of the guest's serial console; ``--follow`` goes on until interrupted or the instance goes."""
    from compute_worker.ctl.follow import follow_console

    host, uuid = ctl.target()
    if ctl.args.follow:
        return follow_console(ctl, host, uuid)
    text = ctl.client.api.get_console_output(uuid, ctl.args.bytes, host=host)
    if ctl.out.as_json:
        ctl.out.document({"host": host, "instance": uuid, "console": text})
    else:
        ctl.out.raw(safe(text, keep="\n\t"))
        if text and not text.endswith("\n"):
            ctl.out.raw("\n")
    return Exit.OK


def watch(ctl: Ctl) -> Exit:
    """A live table of hosts and of what runs on them."""
    from compute_worker.ctl.watch import run

    if ctl.args.interval <= 0:
        raise UsageError("--interval: more than 0 seconds")
    return run(ctl)


Command = Callable[[Ctl], Exit]
