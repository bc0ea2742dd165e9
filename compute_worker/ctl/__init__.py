"""The operator's hands: what ``compute-workerctl`` is made of. :mod:`compute_worker.cmd.ctl` reads the command line."""
