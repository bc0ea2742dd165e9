"""``drain``: everything off a host, by a plan that is shown first; what it did and what is left at the end."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from compute_worker import errors
from compute_worker.ctl import livemoves
from compute_worker.ctl.chain import Chain, Follower
from compute_worker.ctl.context import EXPIRY_SECONDS, Ctl
from compute_worker.ctl.drainplan import How, Left, Move, Plan, plan, verdict
from compute_worker.ctl.exits import Exit, UsageError
from compute_worker.ctl.moves import migration_for
from compute_worker.ctl.output import Following, describe
from compute_worker.ctl.queries import flavor_words
from compute_worker.ctl.text import span
from compute_worker.ctl.wait import wait_for_end
from compute_worker.errors import ComputeError
from compute_worker.objects import Accepted, Instance, Operation
from compute_worker.rpc.options import CommandOptions
from compute_worker.states import OperationState

LOOK_SECONDS = 1.0
REASON = "being drained"
PLAN_COLUMNS = ("instance", "name", "flavor", "state", "goes to", "how", "why")
DONE_COLUMNS = ("instance", "name", "went to", "result", "took", "reason")


@dataclass(frozen=True)
class Result:
    """What became of one instance. ``host``: where it is now, as far as that is known."""

    instance: Instance
    host: str
    moved: bool
    confirmed: bool
    seconds: float
    reason: str = ""
    how: How | None = None

    @property
    def word(self) -> str:
        """The result in a word or two."""
        if not self.moved:
            return "stays"
        if self.how is How.LIVE:
            return "moved live"
        return "moved, confirmed" if self.confirmed else "moved"


def run(ctl: Ctl) -> Exit:
    """Plan, tell, and unless ``--dry-run`` do it. ``Exit.OK`` only when the host is empty."""
    if ctl.args.parallel < 1:
        raise UsageError("--parallel: at least 1")
    host = ctl.args.named_host
    made = _plan(ctl, host, frozenset())
    if ctl.args.dry_run:
        return _told_plan(ctl, host, made)
    if not ctl.out.as_json:
        _show_plan(ctl, host, made)
    _disable(ctl, host)
    results = _work(ctl, host)
    problems = _confirm_earlier(ctl, host) if ctl.args.confirm else {}
    return _told_result(ctl, host, results, problems)


# --- before -----------------------------------------------------------------------------------------------------------


def _plan(ctl: Ctl, host: str, tried: frozenset[str]) -> Plan:
    api = ctl.client.api
    instances = [i for i in api.list_instances(host=host) if i.uuid not in tried]
    states = {state.host: state for state in ctl.client.hosts()}
    states[host] = api.get_host_state(host=host)

    def refuses(instance: Instance, dest: str) -> str | None:
        return livemoves.why_not(api, instance, livemoves.migration_to(str(uuid.uuid4()), instance, host, dest))

    return plan(host, instances, list(states.values()), ctl.args.how, refuses)


def _told_plan(ctl: Ctl, host: str, made: Plan) -> Exit:
    if ctl.out.as_json:
        ctl.out.document({"host": host, "plan": _as_document(made)})
    else:
        _show_plan(ctl, host, made)
        ctl.out.line(f"{len(made.moves)} instances would leave host {host}, {len(made.stuck)} would stay")
    return Exit.FAILED if made.stuck else Exit.OK


def _show_plan(ctl: Ctl, host: str, made: Plan) -> None:
    rows: list[Sequence[object]] = [
        (*_who(move.instance), move.way.to, move.how.value, move.reason) for move in made.moves
    ]
    rows += [(*_who(stuck.instance), "", "", stuck.reason) for stuck in made.stuck]
    if rows:
        ctl.out.table(PLAN_COLUMNS, rows)
    else:
        ctl.out.line(f"host {host} has no instance")


def _who(instance: Instance) -> tuple[object, ...]:
    return instance.uuid, instance.name, flavor_words(instance), instance.vm_state.value


def _as_document(made: Plan) -> dict[str, Any]:
    return {
        "moves": [
            {"instance": m.instance.uuid, "to": m.way.to, "alternates": list(m.way.alternates), "how": m.how.value,
             "reason": m.reason}
            for m in made.moves
        ],
        "stuck": [{"instance": s.instance.uuid, "reason": s.reason, "passing": s.passing} for s in made.stuck],
    }


def _disable(ctl: Ctl, host: str) -> None:
    """Nothing new comes while the rest leaves. A reason that somebody gave before stays."""
    if not ctl.client.api.get_host_state(host=host).enabled:
        return
    options = _options()
    ctl.send(host, lambda h, o: ctl.client.api.disable_host(ctl.args.reason, host=h, **o), options)
    ctl.out.note(f"host {host} is disabled: {ctl.args.reason}")


# --- moving -----------------------------------------------------------------------------------------------------------


def _work(ctl: Ctl, host: str) -> list[Result]:
    """Move in rounds: what was busy in one may leave in the next. Nothing is tried twice; ``--timeout`` is for each
    move, and for the wait for busy ones."""
    results: list[Result] = []
    idle_since: float | None = None
    while True:
        made = _plan(ctl, host, frozenset(r.instance.uuid for r in results))
        if made.moves:
            idle_since = None
            results += _round(ctl, host, made.moves)
            continue
        passing = [stuck for stuck in made.stuck if stuck.passing]
        if idle_since is None:
            idle_since = time.monotonic()
            if passing:
                ctl.out.note(f"waiting for {len(passing)} instances that are busy")
        left = idle_since + ctl.args.timeout - time.monotonic()
        if not passing or left <= 0:
            return results + [_stays(host, stuck.instance, stuck.reason) for stuck in made.stuck]
        time.sleep(min(LOOK_SECONDS, left))


def _stays(host: str, instance: Instance, reason: str) -> Result:
    return Result(instance, host, moved=False, confirmed=False, seconds=0.0, reason=reason)


def _round(ctl: Ctl, host: str, moves: Sequence[Move]) -> list[Result]:
    with ctl.out.following(f"drain of host {host}", by=lambda o: f"{(o.instance or '')[:8]} on {o.host}") as following:
        tell = Teller(following)
        pool = ThreadPoolExecutor(max_workers=ctl.args.parallel, thread_name_prefix="drain")
        try:
            futures = [pool.submit(_leave, ctl, host, move, tell) for move in moves]
            return [future.result() for future in futures]
        except BaseException:
            # Ctrl-C: what was sent goes on, nothing more is sent, and nobody waits.
            tell.stopped = True
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Teller:
    """Passes on what is told; once stopped, ends whoever tells."""

    def __init__(self, following: Following) -> None:
        self._following = following
        self.stopped = False

    def __call__(self, operation: Operation) -> None:
        """:raises Cancelled: nobody listens any more."""
        if self.stopped:
            raise errors.Cancelled(f"operation {operation.uuid} goes on")
        self._following(operation)


def _leave(ctl: Ctl, host: str, move: Move, tell: Teller) -> Result:
    began = time.monotonic()
    try:
        ended, migration = WAYS[move.how](ctl, host, move, tell)
    except ComputeError as exc:
        return Result(move.instance, host, False, False, time.monotonic() - began, exc.message, move.how)
    reason, confirmed, moved = "", False, ended.state is OperationState.DONE
    if ended.state is not OperationState.DONE:
        reason = (ended.error or {}).get("message", describe(ended))
    elif move.how is How.LIVE:
        reason = livemoves.stood_still(ended)
    elif ctl.args.confirm:
        try:
            _confirm(ctl, ended.host, move.instance.uuid, migration)
            confirmed = True
        except ComputeError as exc:
            reason = exc.message
    # A live migration is decided at the source, a cold one where the instance then is.
    where = host if not moved else move.way.to if move.how is How.LIVE else ended.host
    return Result(move.instance, where, moved, confirmed, time.monotonic() - began, reason, move.how)


def _cold(ctl: Ctl, host: str, move: Move, tell: Teller) -> tuple[Operation, str]:
    """Shut down, sent, started at the destination; or as it was, with the reason. The operation and the migration."""
    options = _options()
    options.pop("expires_at")
    instance = ctl.client.api.get_instance(move.instance.uuid, host=host)
    migration = migration_for(options["operation"], instance, host, move.way, None)

    def send(to: str, options: CommandOptions) -> Accepted:
        return ctl.client.api.prep_resize(instance, migration, ctl.args.clean_shutdown, host=to, **options)

    ctl.send(move.way.to, send, options, to_option="--to")
    chain = Chain(options["operation"], (move.way.to, *move.way.alternates), [host])
    follower = Follower(ctl.client.api, chain, tell)
    ended = follower.until_end(ctl.args.timeout)
    follower.until_witnessed()
    return ended, migration.uuid


def _live(ctl: Ctl, host: str, move: Move, tell: Teller) -> tuple[Operation, str]:
    """While it runs; or as it was, with the reason. The operation and the migration."""
    options = _options()
    options.pop("expires_at")
    operation = options["operation"]
    migration = livemoves.migration_to(operation, move.instance, host, move.way.to)
    livemoves.send(ctl, host, migration, options)
    follower = Follower(ctl.client.api, livemoves.chain_of(operation, host, move.way.to), tell)
    ended = follower.until_end(ctl.args.timeout)
    follower.until_witnessed()
    return ended, migration.uuid


WAYS: Mapping[How, Callable[[Ctl, str, Move, Teller], tuple[Operation, str]]] = {How.COLD: _cold, How.LIVE: _live}


def _confirm(ctl: Ctl, host: str, instance: str, migration: str) -> None:
    """:raises ComputeError: it could not be confirmed."""
    options = _options()
    api = ctl.client.api
    accepted = ctl.send(host, lambda h, o: api.confirm_resize(instance, migration, host=h, **o), options)
    ended = wait_for_end(api, accepted, ctl.args.timeout)
    if ended.state is not OperationState.DONE:
        raise errors.from_dict(ended.error or {})


def _confirm_earlier(ctl: Ctl, host: str) -> dict[str, str]:
    """Moves away from the host that were left to be confirmed by an earlier run. Returns why some could not be."""
    problems = {}
    for state in _left(ctl, host).to_confirm:
        migration = state.migration
        try:
            _confirm(ctl, migration.dest_host, migration.instance, migration.uuid)
        except ComputeError as exc:
            problems[migration.instance] = exc.message
    return problems


def _options() -> CommandOptions:
    """What every command of a drain is sent with: each is an operation of its own."""
    return {"operation": str(uuid.uuid4()), "expires_at": time.time() + EXPIRY_SECONDS}


# --- after ------------------------------------------------------------------------------------------------------------


def _left(ctl: Ctl, host: str) -> Left:
    api = ctl.client.api
    return Left(api.list_instances(host=host), api.list_migrations(host=host))


def _told_result(ctl: Ctl, host: str, results: Sequence[Result], problems: Mapping[str, str]) -> Exit:
    left = _settled(ctl, host)
    if ctl.out.as_json:
        told = [
            {"instance": r.instance.uuid, "host": r.host, "moved": r.moved, "confirmed": r.confirmed,
             "how": r.how.value if r.how else None, "seconds": r.seconds, "reason": r.reason}
            for r in results
        ]
        listed = {"instances": [i.uuid for i in left.instances], "migrations": left.moves}
        ctl.out.document({"host": host, "empty": left.empty, "results": told, "problems": problems, "left": listed})
        return Exit.OK if left.empty else Exit.FAILED
    if results:
        ctl.out.raw("\n")
        rows = [(r.instance.uuid, r.instance.name, r.host if r.moved else "", r.word, span(r.seconds), r.reason)
                for r in results]
        ctl.out.table(DONE_COLUMNS, rows)
    for instance, reason in problems.items():
        ctl.out.note(f"instance {instance} is not confirmed: {reason}")
    ctl.out.line(verdict(host, left))
    if left.to_confirm:
        program = ctl.args.program
        ctl.out.note(f"  confirm each (`{program} migrations --host {host}`), or `{program} drain {host} --confirm`")
    return Exit.OK if left.empty else Exit.FAILED


def _settled(ctl: Ctl, host: str) -> Left:
    """What is left, once the source has recorded what was confirmed: it hears of it a moment later."""
    deadline = time.monotonic() + 10.0
    left = _left(ctl, host)
    while ctl.args.confirm and not left.empty and not left.instances and time.monotonic() < deadline:
        time.sleep(0.1)
        left = _left(ctl, host)
    return left
