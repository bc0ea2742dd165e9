"""Subcommands that change something: one function each, from the command line to an exit status."""

from __future__ import annotations

from collections.abc import Callable

from compute_worker import errors
from compute_worker.ctl import bootargs, placement
from compute_worker.ctl.context import Ctl, Send
from compute_worker.ctl.exits import Exit, NobodyAnswers, UsageError
from compute_worker.ctl.find import find_operation
from compute_worker.errors import ComputeError, InvalidCommand
from compute_worker.objects import Accepted, ExternalEvent
from compute_worker.rpc.options import CommandOptions


def boot(ctl: Ctl) -> Exit:
    """Make an instance: on ``--host``, else on the host with the most free memory that takes it."""
    args = ctl.args
    instance = bootargs.instance_of(args)
    files, password = bootargs.injected_of(args.file), bootargs.password_of(args.admin_password_file)
    options = ctl.options()
    options.pop("expires_at")

    def send(host: str, options: CommandOptions) -> Accepted:
        return ctl.client.api.build_and_run_instance(instance, files, password, host=host, **options)

    if args.host is not None:
        hosts = [args.host]
    else:
        states = ctl.client.hosts()
        if not states:
            raise NobodyAnswers(seconds=ctl.client.discover)
        hosts, left_out = placement.rank(states, instance.flavor)
        if not hosts:
            reasons = "; ".join(f"{host}: {reason}" for host, reason in left_out.items())
            raise errors.Unschedulable(f"no host can take it: {reasons}")
    accepted = _first_that_takes_it(ctl, hosts, send, options, f" --uuid {instance.uuid}")
    about = f"boot of {instance.name or 'instance'} {instance.uuid}"
    return ctl.finish(accepted, about, lambda: {"instance": instance.uuid, "host": accepted.host})


def _first_that_takes_it(
    ctl: Ctl, hosts: list[str], send: Send, options: CommandOptions, again: str
) -> Accepted:
    """Only a clear no leads to the next host: after silence the first may have it, and two would run."""
    for host in hosts[:-1]:
        try:
            return ctl.send(host, send, options, again)
        except ComputeError as exc:
            if not (exc.reschedulable and isinstance(exc, errors.Refused)):
                raise
            ctl.out.note(f"host {host} does not take it: {exc.message}")
    return ctl.send(hosts[-1], send, options, again)


def _simple(method: str, word: str) -> Callable[[Ctl], Exit]:
    def run(ctl: Ctl) -> Exit:
        host, uuid = ctl.target()
        call = getattr(ctl.client.api, method)
        return ctl.command(host, lambda h, o: call(uuid, host=h, **o), f"{word} of instance {uuid}")

    run.__doc__ = f"Send ``{method}``."
    return run


delete = _simple("terminate_instance", "delete")
start = _simple("start_instance", "start")
pause = _simple("pause_instance", "pause")
unpause = _simple("unpause_instance", "unpause")
suspend = _simple("suspend_instance", "suspend")
resume = _simple("resume_instance", "resume")


def stop(ctl: Ctl) -> Exit:
    """Ask the guest to shut down, then pull its plug; ``--hard`` does so at once."""
    host, uuid = ctl.target()

    def send(host: str, options: CommandOptions) -> Accepted:
        return ctl.client.api.stop_instance(uuid, not ctl.args.hard, ctl.args.grace, host=host, **options)

    return ctl.command(host, send, f"stop of instance {uuid}")


def reboot(ctl: Ctl) -> Exit:
    """Restart the guest."""
    host, uuid = ctl.target()

    def send(host: str, options: CommandOptions) -> Accepted:
        return ctl.client.api.reboot_instance(uuid, "HARD" if ctl.args.hard else "SOFT", host=host, **options)

    return ctl.command(host, send, f"reboot of instance {uuid}")


def event(ctl: Ctl) -> Exit:
    """Tell what happened to an instance elsewhere."""
    raw = {"name": ctl.args.event, "tag": ctl.args.tag, "status": ctl.args.status}
    told = bootargs.checked(raw, ExternalEvent, "event")
    host, uuid = ctl.target()

    def send(host: str, options: CommandOptions) -> Accepted:
        return ctl.client.api.external_instance_event(uuid, [told], host=host, **options)

    return ctl.command(host, send, f"event {told.name} for instance {uuid}")


def disable(ctl: Ctl) -> Exit:
    """Let a host take no new instances."""
    host, reason = _named_host(ctl), ctl.args.reason

    def send(host: str, options: CommandOptions) -> Accepted:
        return ctl.client.api.disable_host(reason, host=host, **options)

    return ctl.command(host, send, f"disable of host {host}")


def enable(ctl: Ctl) -> Exit:
    """Let a host take new instances again."""
    host = _named_host(ctl)
    return ctl.command(host, lambda h, o: ctl.client.api.enable_host(host=h, **o), f"enable of host {host}")


def _named_host(ctl: Ctl) -> str:
    host: str | None = ctl.args.named_host or ctl.args.host
    if host is None:
        raise UsageError("say which host")
    return host


def cancel(ctl: Ctl) -> Exit:
    """End an operation before its COMMIT, on every host that has a part of it. With ``--host`` and a whole uuid also
    one that the host never saw: it never will."""
    target = ctl.args.cancel
    if ctl.args.host is not None:
        return _cancel_on(ctl, ctl.args.host, target)
    parts = find_operation(ctl.client, target)
    open_parts = [part for part in parts if not part.state.final]
    if not open_parts:
        ended = parts[0]
        raise InvalidCommand(f"operation {ended.uuid} is {ended.state.value} already: there is nothing to cancel")
    return max(_cancel_on(ctl, part.host, part.uuid) for part in open_parts)


def _cancel_on(ctl: Ctl, host: str, uuid: str) -> Exit:
    def send(host: str, options: CommandOptions) -> Accepted:
        return ctl.client.api.cancel_operation(uuid, host=host, **options)

    return ctl.command(host, send, f"cancel of operation {uuid}")
