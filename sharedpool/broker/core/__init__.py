"""The broker's decisions. Pure: no I/O, no clock."""
