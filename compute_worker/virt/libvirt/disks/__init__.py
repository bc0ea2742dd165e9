"""Disk backends, base cache, qemu-img under limits."""
