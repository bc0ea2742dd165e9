"""Plugging virtual interfaces and waiting for plug events."""
