"""`python -m sharedpool.broker LOG`: the automatic broker, as `ensure_running` starts it."""

import sys

from sharedpool.broker.launch.run import run_detached

run_detached(sys.argv[1])
