"""The worker's line to the broker."""
