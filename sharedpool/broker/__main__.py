"""`python -m sharedpool.broker LOG`: the automatic broker, as `ensure_running` starts it."""

import sys

from sharedpool.loading import load

load("sharedpool.broker.launch.run").run_detached(sys.argv[1])
