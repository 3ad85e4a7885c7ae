"""Connections: everything in the worker that touches psycopg2."""
