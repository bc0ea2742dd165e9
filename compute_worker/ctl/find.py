"""From what an operator types (a uuid, the beginning of one, a name) to the host that has it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compute_worker import errors
from compute_worker.ctl.connect import Client
from compute_worker.ctl.exits import NobodyAnswers, UsageError
from compute_worker.ctl.text import safe
from compute_worker.errors import ComputeError, InstanceMoved, InstanceNotFound, NotFound, OperationNotFound
from compute_worker.objects import HostState, Instance, Operation

MOST_HOPS = 4
SHORTEST_PREFIX = 4
_UUID_DASHES = (8, 13, 18, 23)


@dataclass(frozen=True)
class Found:
    """An instance and the host that owns it."""

    host: str
    instance: Instance


def is_uuid(word: str) -> bool:
    """Whether it is a whole uuid, in lower case and with dashes."""
    return (
        len(word) == 36
        and all(word[i] == "-" for i in _UUID_DASHES)
        and all(c in "0123456789abcdef" for i, c in enumerate(word) if i not in _UUID_DASHES)
    )


def matching(word: str, instances: Iterable[Instance]) -> list[Instance]:
    """Instances that ``word`` may mean: whole uuid, else exact name, else beginning of the uuid (4 characters or more).

    The first of the three that matches anything decides, so that a name is not hidden by a longer list of uuids.
    """
    everyone = list(instances)
    exact = [i for i in everyone if i.uuid == word]
    named = [i for i in everyone if i.name == word]
    begun = [i for i in everyone if i.uuid.startswith(word.lower())] if len(word) >= SHORTEST_PREFIX else []
    return exact or named or begun


def find_instance(client: Client, word: str, host: str | None = None) -> Found:
    """The instance that ``word`` means.

    :raises NotFound: no host that answers has it.
    :raises UsageError: several match.
    """
    if is_uuid(word):
        return _by_uuid(client, word, host)
    answers, problems = client.everywhere(client.host_names(host), lambda h: client.api.list_instances(host=h))
    where = {instance.uuid: h for h, instances in answers.items() for instance in instances}
    matches = matching(word, (i for instances in answers.values() for i in instances))
    if len(matches) == 1:
        return Found(where[matches[0].uuid], matches[0])
    if matches:
        listed = ", ".join(f"{i.uuid} on {where[i.uuid]}" for i in matches[:8])
        raise UsageError(f"{safe(word)!r} means {len(matches)} instances: {listed}; give more of the uuid")
    if host is not None and problems:
        raise problems[host]
    silent = f"; {', '.join(problems)} could not be asked" if problems else ""
    raise InstanceNotFound(f"no instance is called {safe(word)!r} or has a uuid that begins so{silent}", instance=word)


def _by_uuid(client: Client, uuid: str, host: str | None) -> Found:
    if host is not None:
        return follow(client, uuid, host)
    hit: list[Found] = []
    asked: dict[str, ComputeError | None] = {}

    def ask_new(found: list[HostState]) -> bool:
        for state in found:
            if state.host not in asked and not hit:
                try:
                    hit.append(follow(client, uuid, state.host))
                    asked[state.host] = None
                except ComputeError as exc:
                    asked[state.host] = exc
        return bool(hit)

    found = client.hosts(ask_new)
    if ask_new(found):
        return hit[0]
    if not found:
        raise NobodyAnswers(seconds=client.discover)
    deleted = [exc for exc in asked.values() if isinstance(exc, errors.InstanceDeleted)]
    silent = [h for h, exc in asked.items() if not isinstance(exc, NotFound | errors.InstanceDeleted)]
    if silent:
        raise errors.PeerUnavailable(
            f"instance {uuid}: no other host has it, and {', '.join(silent)} did not answer", host=silent[0]
        )
    what = "was deleted" if deleted else f"is known to none of {', '.join(asked)}"
    raise InstanceNotFound(f"instance {uuid} {what}", instance=uuid)


def follow(client: Client, uuid: str, host: str) -> Found:
    """The instance as ``host`` has it, or the host it moved to, and so on.

    :raises NotFound: the trail ends.
    """
    for _ in range(MOST_HOPS):
        try:
            return Found(host, client.api.get_instance(uuid, host=host))
        except InstanceMoved as exc:
            host = exc.kwargs["host"]
    raise InstanceNotFound(f"instance {uuid}: {MOST_HOPS} hosts name one another; try again", instance=uuid)


def find_operation(client: Client, word: str, host: str | None = None) -> list[Operation]:
    """The operation that ``word`` (a uuid, or the beginning of one) means, as each host that has a part of it tells.

    :raises OperationNotFound: no host that answers has it.
    :raises UsageError: several match.
    """
    hosts = client.host_names(host)
    if not is_uuid(word):
        word = _whole(client, word, hosts)
    answers, problems = client.everywhere(hosts, lambda h: client.api.get_operation(word, host=h))
    if answers:
        return list(answers.values())
    for problem in problems.values():
        if not isinstance(problem, OperationNotFound):
            raise problem
    raise OperationNotFound(f"operation {word} is known to none of {', '.join(hosts)}", operation=word)


def _whole(client: Client, word: str, hosts: list[str]) -> str:
    if len(word) < SHORTEST_PREFIX:
        raise UsageError(f"{safe(word)!r}: give at least {SHORTEST_PREFIX} characters of the operation's uuid")
    answers, _ = client.everywhere(hosts, client.operations)
    uuids = sorted({o.uuid for found in answers.values() for o in found if o.uuid.startswith(word.lower())})
    if len(uuids) > 1:
        raise UsageError(f"{safe(word)!r} means {len(uuids)} operations: {', '.join(uuids[:8])}; give more of the uuid")
    if not uuids:
        raise OperationNotFound(f"no operation has a uuid that begins with {safe(word)!r}", operation=word)
    return uuids[0]
