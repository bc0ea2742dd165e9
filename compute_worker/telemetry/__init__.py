"""What the worker tells about itself: notifications, metrics, health, logs, and systemd's ear.

Nothing here is imported by what it observes: ``cmd`` hands out the callables.
"""
