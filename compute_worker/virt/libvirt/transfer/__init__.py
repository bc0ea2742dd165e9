"""Disks from one host to another: transports at the source, a receiver at the destination."""
