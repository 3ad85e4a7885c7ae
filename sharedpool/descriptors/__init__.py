"""File descriptors: who owns them, how they are passed, polled and counted."""
