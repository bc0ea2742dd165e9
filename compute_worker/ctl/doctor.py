"""``doctor``: what is left over on the hosts, why, and what would be done; ``--repair`` does it where that is safe."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence

from compute_worker.ctl.context import EXPIRY_SECONDS, Ctl
from compute_worker.ctl.exits import Exit
from compute_worker.ctl.queries import told_problems
from compute_worker.ctl.wait import wait_for_end
from compute_worker.errors import ComputeError
from compute_worker.objects import Finding
from compute_worker.rpc.options import CommandOptions
from compute_worker.states import OperationState

COLUMNS = ("host", "what", "instance", "where", "reason", "what is done about it")

Found = Mapping[str, Sequence[Finding]]
"""Findings by host."""


def doctor(ctl: Ctl) -> Exit:
    """Findings of all hosts, or of one. ``Exit.OK`` when nothing is there that nobody needs."""
    names = ctl.client.host_names(ctl.args.named_host or ctl.args.host)
    found, problems = _look(ctl, names)
    if not ctl.args.repair:
        return _told(ctl, found, problems)
    failed: dict[str, str] = {}
    for host, instance in repairable(found):
        reason = _repair(ctl, host, instance)
        about = f"instance {instance}" if instance else "image locks"
        if reason is not None:
            failed[f"{host}: {about}"] = reason
        elif not ctl.out.as_json:
            ctl.out.line(f"{host}: {about}: removed")
    for about, reason in failed.items():
        ctl.out.note(f"{about}: {reason}")
    left, silent = _look(ctl, list(found))
    return _told(ctl, left, {**problems, **silent}, failed)


def repairable(found: Found) -> list[tuple[str, str | None]]:
    """Host and instance (``None``: image locks) of what is safe to repair: an instance only as a whole."""
    wanted: dict[tuple[str, str | None], bool] = {}
    for host, findings in found.items():
        for finding in findings:
            key = (host, finding.instance)
            if finding.kind not in ("operation", "move"):
                wanted[key] = wanted.get(key, True) and finding.safe
    return [key for key, safe in wanted.items() if safe]


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether everything is there on purpose."""
    return all(finding.kept for finding in findings)


def _look(ctl: Ctl, names: Sequence[str]) -> tuple[Found, Mapping[str, ComputeError]]:
    return ctl.client.everywhere(names, lambda host: ctl.client.api.list_leftovers(host=host))


def _repair(ctl: Ctl, host: str, instance: str | None) -> str | None:
    """Why it could not be; ``None``: it is done."""
    options: CommandOptions = {"expires_at": time.time() + EXPIRY_SECONDS, "operation": str(uuid.uuid4())}
    try:
        accepted = ctl.send(host, lambda h, o: ctl.client.api.repair_leftovers(instance, host=h, **o), options)
        ended = wait_for_end(ctl.client.api, accepted, ctl.args.timeout)
    except ComputeError as exc:
        return exc.message
    if ended.state is OperationState.DONE:
        return None
    return str((ended.error or {}).get("message", ended.state.value))


def _told(
    ctl: Ctl, found: Found, problems: Mapping[str, ComputeError], failed: Mapping[str, str] | None = None
) -> Exit:
    every = [finding for findings in found.values() for finding in findings]
    code = Exit.OK if healthy(every) and not failed else Exit.FAILED
    if ctl.out.as_json:
        ctl.out.document({"findings": found, "unreachable": sorted(problems), "failed": failed or {}})
        return Exit.UNREACHABLE if problems else code
    rows = [_row(host, finding) for host, findings in found.items() for finding in findings]
    if rows:
        ctl.out.table(COLUMNS, rows)
    hosts = ", ".join(found)
    if not rows and hosts:
        ctl.out.line(f"nothing is left over on {hosts}")
    elif code is Exit.FAILED and any(finding.safe for finding in every) and failed is None:
        ctl.out.note(f"  what is safe to remove: `{ctl.args.program} doctor --repair`")
    silent = told_problems(ctl, problems)
    return code if silent is Exit.OK else silent


def _row(host: str, finding: Finding) -> Sequence[object]:
    remedy = f"--repair: {finding.remedy}" if finding.safe else finding.remedy
    return (host, finding.kind, finding.instance, finding.where, finding.reason, remedy)
