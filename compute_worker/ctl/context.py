"""What a subcommand is handed, and how one command is sent, followed and told."""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compute_worker import errors
from compute_worker.ctl.chain import Chain, Follower
from compute_worker.ctl.connect import Client
from compute_worker.ctl.exits import Exit
from compute_worker.ctl.find import Found, find_instance, is_uuid
from compute_worker.ctl.output import Output
from compute_worker.ctl.text import span
from compute_worker.ctl.wait import wait_for_end
from compute_worker.objects import Accepted, Operation
from compute_worker.rpc.options import CommandOptions
from compute_worker.states import OperationState

EXPIRY_SECONDS = 600.0
"""A command that its worker gets later than this is no longer meant: it must not stop a guest next week."""
ATTEMPTS = 2
MOST_HOPS = 4

Send = Callable[[str, CommandOptions], Accepted]
"""Sends a command to a host."""


@dataclass(frozen=True)
class Ctl:
    """One run of the program."""

    client: Client
    args: argparse.Namespace
    out: Output

    def find(self) -> Found:
        """The instance of the command line."""
        return find_instance(self.client, self.args.instance, self.args.host)

    def target(self) -> tuple[str, str]:
        """Host and uuid of the instance: not looked for where the command line says both."""
        if self.args.host is not None and is_uuid(self.args.instance):
            return self.args.host, self.args.instance
        found = self.find()
        return found.host, found.instance.uuid

    def options(self) -> CommandOptions:
        """What every command is sent with."""
        return {
            "operation": self.args.operation or str(uuid.uuid4()),
            "expires_at": time.time() + EXPIRY_SECONDS,
            "check_only": self.args.check_only,
        }

    def send(
        self, host: str, send: Send, options: CommandOptions, again: str = "", to_option: str = "--host"
    ) -> Accepted:
        """Send a command, to wherever its instance is. No answer: once more, which does nothing twice.

        :param again: what else the command line needs so that it is the same command when an operator repeats it.
        :param to_option: how the command line names the host.
        :raises PeerUnavailable: no answer; says how to repeat it.
        """
        hops = attempts = 0
        while True:
            try:
                return send(host, options)
            except errors.InstanceMoved as exc:
                hops += 1
                if hops >= MOST_HOPS:
                    raise
                host = exc.kwargs["host"]
                self.out.note(f"the instance has moved to host {host}")
            except errors.PeerUnavailable as exc:
                attempts += 1
                if attempts >= ATTEMPTS:
                    raise errors.PeerUnavailable(
                        f"{exc.message}; whether the command was accepted is not known: repeat it with"
                        f" {to_option} {host} --operation {options['operation']}{again}, and it is done once",
                        host=host,
                    ) from None

    def command(self, host: str, send: Send, about: str, also: Callable[[], dict[str, Any]] = dict) -> Exit:
        """Send a command, wait for its end unless told not to, and tell the outcome."""
        return self.finish(self.send(host, send, self.options()), about, also)

    def finish(self, accepted: Accepted, about: str, also: Callable[[], dict[str, Any]] = dict) -> Exit:
        """The rest of :meth:`command`; ``also`` adds to the document."""
        ended = self._await_end(accepted, about)
        code = Exit.OK if ended is None or ended.state is OperationState.DONE else Exit.FAILED
        if self.out.as_json:
            self.out.document({"accepted": accepted, "operation": ended, **also()})
        else:
            self._say(accepted, ended, about, code)
        return code

    def finish_chain(
        self, accepted: Accepted, about: str, chain: Chain, also: Callable[[], dict[str, Any]] = dict
    ) -> Exit:
        """:meth:`finish` for a command that runs on several hosts under one uuid: each host's part is shown."""
        if accepted.operation is None or not self.args.wait:
            return self.finish(accepted, about, also)
        with self.out.following(about, by=lambda part: part.host) as following:
            follower = Follower(self.client.api, chain, following)
            ended = follower.until_end(self.args.timeout)
            late = follower.until_witnessed()
        for host in late:
            self.out.note(f"host {host} has not recorded it yet: it does so by itself")
        code = Exit.OK if ended.state is OperationState.DONE else Exit.FAILED
        if self.out.as_json:
            parts = list(follower.view.parts.values())
            self.out.document({"accepted": accepted, "operation": ended, "operations": parts, **also()})
        else:
            self._say(accepted, ended, about, code)
        return code

    def _await_end(self, accepted: Accepted, about: str) -> Operation | None:
        if accepted.operation is None or not self.args.wait:
            return None
        with self.out.following(about) as following:
            return wait_for_end(self.client.api, accepted, self.args.timeout, following)

    def _say(self, accepted: Accepted, ended: Operation | None, about: str, code: Exit) -> None:
        if accepted.operation is None:
            self.out.line(f"{about}: would be accepted by host {accepted.host}")
        elif ended is None:
            again = " (it had been accepted before)" if accepted.repeated else ""
            self.out.line(f"{about}: accepted by host {accepted.host} as operation {accepted.operation}{again}")
        elif code is Exit.OK:
            took = span(ended.updated_at - ended.created_at)
            self.out.line(f"{about}: done on host {ended.host} in {took} (operation {ended.uuid})")
        else:
            message = (ended.error or {}).get("message", "no reason was recorded")
            self.out.note(f"{about}: {ended.state.value} on host {ended.host}: {message}")
            self.out.note(f"  see `{self.args.program} explain {ended.uuid} --host {ended.host}`")
