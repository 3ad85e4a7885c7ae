"""Metrics and status page by HTTP."""
