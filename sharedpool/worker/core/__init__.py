"""The worker's decisions. Pure: no I/O, no clock."""
