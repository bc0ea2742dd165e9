"""Images that are to leave a store which did not answer: remembered in the journal's file, withdrawn later, so that no
guest and no delete waits for a store."""

from __future__ import annotations

import logging
import threading

import msgspec

from compute_worker.errors import ComputeError, Retryable
from compute_worker.manager.core import Core
from compute_worker.objects import ORIGIN, ImageMeta
from compute_worker.operations.database import Closed, Tx

LOG = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS withdrawals (
    image TEXT NOT NULL,
    origin TEXT NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (image, origin)
) WITHOUT ROWID;
"""


def add(core: Core, image: ImageMeta) -> None:
    """Withdraw ``image`` (of the operation that its origin names) as soon as its store answers. Durable."""
    row = (image.id, image.properties.get(ORIGIN, ""), msgspec.json.encode(image))
    core.database.write(lambda tx: tx.execute("INSERT OR REPLACE INTO withdrawals VALUES (?, ?, ?)", row))


def waiting(core: Core) -> list[ImageMeta]:
    """Images that are still to be withdrawn."""

    def read(tx: Tx) -> list[bytes]:
        return [row["record"] for row in tx.execute("SELECT record FROM withdrawals ORDER BY image, origin")]

    return [msgspec.json.decode(record, type=ImageMeta) for record in core.database.read(read)]


class Withdrawer:
    """Asks the stores again, every ``compute.image_withdraw_interval`` seconds, in a thread of its own."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="withdrawer", daemon=True)

    def start(self) -> None:
        """Begin; what an earlier process left is tried at once."""
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End; a store that is being asked is left to the end of the process."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _loop(self) -> None:
        while True:
            try:
                for image in waiting(self._core):
                    if self._stopped.is_set():
                        return
                    self._withdraw(image)
            except Closed:
                return
            except Exception:
                LOG.exception("images that are to be withdrawn could not be looked at")
            if self._stopped.wait(self._core.settings.compute.image_withdraw_interval):
                return

    def _withdraw(self, image: ImageMeta) -> None:
        try:
            self._core.driver.image_store(image.store).withdraw(image)
        except Retryable as exc:
            LOG.debug("image %s is not withdrawn yet: %s", image.id, exc)
            return
        except ComputeError as exc:
            LOG.error("image %s could not be withdrawn, remove it by hand: %s", image.id, exc)
        else:
            LOG.info("image %s of a snapshot that did not end well is withdrawn", image.id)
        key = (image.id, image.properties.get(ORIGIN, ""))
        self._core.database.write(lambda tx: tx.execute("DELETE FROM withdrawals WHERE image = ? AND origin = ?", key))
