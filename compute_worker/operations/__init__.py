"""Durable operations: journal, runner, undo, COMMIT, resume. Knows nothing of virtual machines."""
