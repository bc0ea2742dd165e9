"""The journal's tables. JSON columns hold what only the operation itself reads."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS operations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    derived_key INTEGER NOT NULL,
    digest TEXT NOT NULL,
    uuid TEXT NOT NULL,
    chain TEXT NOT NULL,
    kind TEXT NOT NULL,
    instance TEXT,
    args TEXT NOT NULL,
    state TEXT NOT NULL,
    committed INTEGER NOT NULL,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    preempted INTEGER NOT NULL DEFAULT 0,
    phase TEXT NOT NULL,
    error TEXT,
    result TEXT NOT NULL DEFAULT '{}',
    notified INTEGER NOT NULL DEFAULT 0,
    request_id TEXT,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    seq INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS operations_uuid ON operations (uuid);
CREATE INDEX IF NOT EXISTS operations_open ON operations (instance) WHERE state IN ('queued', 'running', 'undoing');
CREATE INDEX IF NOT EXISTS operations_seq ON operations (seq);
CREATE TABLE IF NOT EXISTS steps (
    operation INTEGER NOT NULL REFERENCES operations (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    direction TEXT NOT NULL,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    started_at REAL NOT NULL,
    ended_at REAL,
    attempts INTEGER NOT NULL DEFAULT 1,
    result TEXT,
    error TEXT,
    reason TEXT,
    PRIMARY KEY (operation, position, direction)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tombstones (
    name TEXT PRIMARY KEY,
    outcome TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS inbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id TEXT NOT NULL UNIQUE,
    body BLOB NOT NULL,
    received_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    operation TEXT,
    sequence INTEGER NOT NULL,
    event_type TEXT NOT NULL,
    priority TEXT NOT NULL,
    payload TEXT NOT NULL,
    created_at REAL NOT NULL
);
"""

OPEN_STATES = ("queued", "running", "undoing")
"""An operation in one of these goes on after a restart."""
OPEN_SQL = "state IN ('queued', 'running', 'undoing')"
"""The same as a condition; spelled as in the partial index, so that SQLite uses it."""
