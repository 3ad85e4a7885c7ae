"""The broker's own connection to PostgreSQL."""
