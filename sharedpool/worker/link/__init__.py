"""Everything of the worker that talks to the broker."""
