"""Subcommands that move instances between hosts, and those that decide what a dead host can decide no more."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from compute_worker import errors
from compute_worker.ctl import bootargs, movelist, placement
from compute_worker.ctl.chain import Chain
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.exits import Exit, NobodyAnswers, UsageError
from compute_worker.ctl.wait import wait_for_end
from compute_worker.errors import InvalidState, NotFound
from compute_worker.objects import Accepted, Flavor, HostState, Instance, Migration
from compute_worker.rpc.options import CommandOptions
from compute_worker.states import VmState, allowed


@dataclass(frozen=True)
class Way:
    """Where a move goes: the destination, and who is asked next when it refuses."""

    to: str
    alternates: tuple[str, ...] = ()


def resize(ctl: Ctl) -> Exit:
    """Give an instance another size, on another host. It waits there for ``confirm`` or ``revert``."""
    found = ctl.find()
    flavor = resize_flavor(ctl.args.flavor, found.instance.flavor, ctl.args.swap, ctl.args.ephemeral)
    return _move(ctl, found.host, found.instance, flavor)


def migrate(ctl: Ctl) -> Exit:
    """Move an instance to another host as it is: shut down, sent, started there."""
    found = ctl.find()
    return _move(ctl, found.host, found.instance, None)


def resize_flavor(text: str, old: Flavor, swap_mb: int | None, ephemeral_gb: int | None) -> Flavor:
    """``VCPUS/MEMORY_MB[/ROOT_GB]``; what is not said stays as it is."""
    flavor = bootargs.flavor_of(
        text,
        old.swap_mb if swap_mb is None else swap_mb,
        old.ephemeral_gb if ephemeral_gb is None else ephemeral_gb,
    )
    root = flavor.root_gb if text.count("/") == 2 else old.root_gb
    return Flavor(
        vcpus=flavor.vcpus,
        memory_mb=flavor.memory_mb,
        root_gb=root,
        ephemeral_gb=flavor.ephemeral_gb,
        swap_mb=flavor.swap_mb,
        extra_specs=old.extra_specs,
    )


def require_movable(instance: Instance) -> None:
    """:raises InvalidState: the source would refuse it."""
    may, reason = allowed("resize_instance", instance.vm_state)
    if not may:
        raise InvalidState(f"instance {instance.uuid}: {reason}", instance=instance.uuid)


def choose(states: list[HostState], source: str, flavor: Flavor) -> Way:
    """The best host that can take ``flavor``, and the others in order.

    :raises Unschedulable: there is none; with the reason of each.
    """
    arch = next((s.machine_arch for s in states if s.host == source), "")
    others = [s for s in states if s.host != source]
    same = [s for s in others if not arch or not s.machine_arch or s.machine_arch == arch]
    ranked, left_out = placement.rank(same, flavor)
    if not ranked:
        left_out |= {s.host: f"it is {s.machine_arch}, host {source} is {arch}" for s in others if s not in same}
        reasons = "; ".join(f"{host}: {reason}" for host, reason in left_out.items())
        raise errors.Unschedulable(f"no other host can take it: {reasons or 'no other host answers'}")
    return Way(ranked[0], tuple(ranked[1:]))


def migration_for(operation: str, instance: Instance, source: str, way: Way, flavor: Flavor | None) -> Migration:
    """The move that an operation makes: the same one whenever the same operation is asked for."""
    return Migration(
        uuid=str(uuid.uuid5(uuid.UUID(operation), "migration")),
        instance=instance.uuid,
        migration_type="migration" if flavor is None else "resize",
        source_host=source,
        dest_host=way.to,
        new_flavor=flavor,
        alternates=list(way.alternates),
    )


def way_of(ctl: Ctl, source: str, flavor: Flavor) -> Way:
    """Where the command line says, else the best host and the others in order."""
    args = ctl.args
    if args.to is None:
        states = ctl.client.hosts()
        if not states:
            raise NobodyAnswers(seconds=ctl.client.discover)
        return choose(states, source, flavor)
    # A host that is off would get the command when it is back, up to an hour from now.
    ctl.client.api.get_host_state(host=args.to)
    return Way(args.to, tuple(getattr(args, "alternate", ())))


def _move(ctl: Ctl, source: str, instance: Instance, flavor: Flavor | None) -> Exit:
    options = ctl.options()
    options.pop("expires_at")
    operation = options["operation"]
    again = accepted_before(ctl, operation, ctl.args.to)
    if again is not None:
        return _follow(ctl, again, source, Way(again.host, tuple(ctl.args.alternate)), instance)
    require_movable(instance)
    way = way_of(ctl, source, flavor or instance.flavor)
    migration = migration_for(operation, instance, source, way, flavor)

    def send(host: str, options: CommandOptions) -> Accepted:
        return ctl.client.api.prep_resize(instance, migration, ctl.args.clean_shutdown, host=host, **options)

    accepted = ctl.send(way.to, send, options, to_option="--to")
    return _follow(ctl, accepted, source, way, instance)


def accepted_before(ctl: Ctl, operation: str, host: str | None) -> Accepted | None:
    """The same command repeated to ``host``. The record has changed since it began, so that the worker would see
    another one."""
    if ctl.args.operation is None or ctl.args.to is None or host is None:
        return None
    try:
        found = ctl.client.api.get_operation(operation, host=host)
    except NotFound:
        return None
    return Accepted(operation=found.uuid, host=found.host, state=found.state, repeated=True)


def _follow(ctl: Ctl, accepted: Accepted, source: str, way: Way, instance: Instance) -> Exit:
    word = "resize" if ctl.args.command == "resize" else "migration"
    about = f"{word} of instance {instance.uuid}"
    chain = Chain(accepted.operation or "", (way.to, *way.alternates), [source] if source != way.to else [])
    migration = str(uuid.uuid5(uuid.UUID(accepted.operation), "migration")) if accepted.operation else None
    also: dict[str, Any] = {"instance": instance.uuid, "migration": migration, "source": source, "destination": way.to}
    code = ctl.finish_chain(accepted, about, chain, lambda: also)
    if code is Exit.OK and accepted.operation and ctl.args.wait:
        program = ctl.args.program
        ctl.out.note(f"  decide: `{program} confirm {instance.uuid}` or `{program} revert {instance.uuid}`")
    return code


# --- the decision -----------------------------------------------------------------------------------------------------


def confirm(ctl: Ctl) -> Exit:
    """Keep a resized instance where it is; its copy at the source goes."""
    return _decide(ctl, "confirm_resize", "confirmation")


def revert(ctl: Ctl) -> Exit:
    """Give a resized instance back to the source as it was. What it wrote since is lost."""
    return _decide(ctl, "revert_resize", "revert")


def _decide(ctl: Ctl, method: str, word: str) -> Exit:
    found = ctl.find()
    instance = found.instance
    if instance.vm_state is not VmState.RESIZED or instance.migration is None:
        may, reason = allowed(method, instance.vm_state)
        reason = "no move of it is known" if may else reason
        raise InvalidState(f"instance {instance.uuid}: {reason}", instance=instance.uuid)
    migration = movelist.migration_of(ctl, found.host, instance.migration)
    call = getattr(ctl.client.api, method)
    uuid_ = migration.uuid
    accepted = ctl.send(found.host, lambda h, o: call(instance.uuid, uuid_, host=h, **o), ctl.options())
    source = [migration.source_host] if migration.source_host != found.host else []
    chain = Chain(accepted.operation or "", [found.host], source)
    also = {"instance": instance.uuid, "migration": uuid_}
    return ctl.finish_chain(accepted, f"{word} of instance {instance.uuid}", chain, lambda: also)


# --- a host that is off -----------------------------------------------------------------------------------------------


def take_back(ctl: Ctl) -> Exit:
    """Run an instance at its source again, because its destination is off for good."""
    side = movelist.find_source_side(ctl)
    migration, source = side.state.migration, side.host
    if not ctl.args.destination_is_off:
        raise UsageError(
            f"host {migration.dest_host} may have the instance, and run it: say --destination-is-off when it is"
            " powered off, and stays so until it has been told"
        )

    def send(host: str, options: CommandOptions) -> Accepted:
        return ctl.client.api.take_back_instance(migration.instance, migration.uuid, True, host=host, **options)

    accepted = ctl.send(source, send, ctl.options())
    about = f"taking back of instance {migration.instance}"
    if accepted.operation is None or not ctl.args.wait:
        return ctl.finish(accepted, about)
    return _await_back(ctl, accepted, side, about)


def _await_back(ctl: Ctl, accepted: Accepted, side: movelist.Side, about: str) -> Exit:
    """Until the source owns it: the operation that waited there for its destination is undone by this."""
    with ctl.out.following(about) as following:
        ended = wait_for_end(ctl.client.api, accepted, ctl.args.timeout, following)
        chain = Accepted(operation=side.state.operation, host=side.host)
        waited = wait_for_end(ctl.client.api, chain, ctl.args.timeout, following)
    uuid_ = side.state.migration.instance
    try:
        back = ctl.client.api.get_instance(uuid_, host=side.host)
    except NotFound as exc:
        raise errors.MigrationFailed(f"{about}: {exc.message}", migration=side.state.migration.uuid) from None
    if ctl.out.as_json:
        ctl.out.document({"accepted": accepted, "operation": ended, "operations": [ended, waited], "instance": back})
    else:
        ctl.out.line(f"{about}: host {side.host} has it, {back.vm_state.value} (operation {ended.uuid})")
    return Exit.OK


def forget_host(ctl: Ctl) -> Exit:
    """Let every host that answers (or ``--host``) wait no longer for a host that never returns."""
    gone = ctl.args.named_host
    names = [name for name in ctl.client.host_names(ctl.args.host) if name != gone]
    if not names:
        raise NobodyAnswers(f"no other host than {gone} answers", seconds=ctl.client.discover)
    options = ctl.options()
    answers, problems = ctl.client.everywhere(
        names,
        lambda host: ctl.send(host, lambda h, o: ctl.client.api.forget_host(gone, host=h, **o), options),
    )
    if ctl.out.as_json:
        refused = {host: exc.to_dict() for host, exc in problems.items()}
        ctl.out.document({"forgotten": gone, "accepted": list(answers.values()), "problems": refused})
    else:
        for host in answers:
            said = "would wait no longer" if ctl.args.check_only else "waits no longer"
            ctl.out.line(f"host {host} {said} for host {gone}")
        for host, exc in problems.items():
            ctl.out.note(f"host {host}: {exc.message}")
        ctl.out.note(f"  what is left of it: `{ctl.args.program} migrations`")
    return Exit.REFUSED if problems else Exit.OK
