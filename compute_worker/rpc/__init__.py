"""Messages in and out: transport, the worker's server, the client, the wire form and its description."""

from __future__ import annotations

from compute_worker.threads import use_threads

use_threads()  # before anything of oslo.messaging is imported
