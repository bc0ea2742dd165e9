"""Images of guests' root disks: how a point in time is frozen, read, and written as an image in one pass."""
