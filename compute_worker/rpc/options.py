"""What a caller says of a command beside its arguments."""

from __future__ import annotations

from typing import TypedDict


class CommandOptions(TypedDict, total=False):
    """What every command takes beside its arguments."""

    operation: str
    """The operation's uuid, so that the same command sent twice is done once. Absent: a new one."""
    expires_at: float | None
    """Seconds since the epoch after which the command is refused. Absent: an hour from now for builds, else never."""
    check_only: bool
    """Only say whether the command would be accepted."""
    cast: bool
    """Do not wait for the worker: the command is accepted when the broker has it, and a refusal is a notification."""
