"""A source that can be killed: ``python -m ...sender SOCKET TRANSPORT ROOT FILE [OPTIONS]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compute_worker.virt.driver import NullJob
from compute_worker.virt.libvirt.transfer import base
from tests.virt.libvirt.transfer.peerserver import peer_at
from tests.virt.libvirt.transfer.support import UUID, migration, settings

SLOWLY = '{"nbd_plaintext": true, "bandwidth_mb": 16}'


def main(socket: str, transport: str, root: str, file: str, options: str = SLOWLY) -> None:
    chosen = base.load(transport, settings(Path(root), **json.loads(options)))
    chosen.send(base.Shipment(UUID, migration(), Path(file).name, Path(file)), peer_at(socket), NullJob())


if __name__ == "__main__":
    main(*sys.argv[1:])
