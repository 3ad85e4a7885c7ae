"""The WSGI application under uWSGI, with or without its hook."""

import os

import uwsgidecorators
from wsgi_target import app

import sharedpool

__all__ = ["app"]

if "TARGET_POSTFORK" in os.environ:
    uwsgidecorators.postfork(sharedpool.reset_after_fork)
