"""The mutation gate: planted bugs that the tests must catch."""
