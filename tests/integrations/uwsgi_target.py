"""The WSGI application under uWSGI: with its hook, or with a pool that the master has used before it forks."""

import os

import uwsgi
import uwsgidecorators
import wsgi_target

import sharedpool

app = wsgi_target.app

if "TARGET_POSTFORK" in os.environ:
    uwsgidecorators.postfork(sharedpool.reset_after_fork)

if "TARGET_IN_MASTER" in os.environ:
    assert uwsgi.worker_id() == 0
    with wsgi_target.pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT 1")
