"""`python -m sharedpool.broker LOG`: the automatic broker, started by `automatic.ensure_running`."""

import sys

from sharedpool.broker.launch.run import run_detached

run_detached(sys.argv[1])
