"""What this driver cannot do: snapshots. They are refused before anything is touched."""

from __future__ import annotations

from typing import NoReturn

from compute_worker.errors import NotSupported
from compute_worker.objects import Instance
from compute_worker.virt.driver import ComputeDriver, Part


def _refuse(what: str) -> NoReturn:
    raise NotSupported(what=f"{what} with the libvirt driver")


class Unsupported(ComputeDriver):
    """The refused part of the contract.

    :raises NotSupported: from every method.
    """

    def snapshot(self, instance: Instance, image_id: str, live: bool) -> list[Part]:
        """Refused."""
        _refuse("snapshots")
