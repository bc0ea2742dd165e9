"""The programs: ``compute-worker`` (the daemon), ``compute-workerctl`` (the operator's hands), the demo."""
