"""Connections: all that touches psycopg2."""
