"""The ways to start a broker."""
