"""Several hosts and one limit: bugs of the shares."""

from __future__ import annotations

from tests.mutations.mutant import Mutant

SHARING_BUGS = (
    Mutant(
        "a host's share grows by more than is free",
        (
            (
                "sharedpool/broker/core/shares.py",
                "taken = max(0, min(fair[mine] - now_held, free))",
                "taken = max(0, fair[mine] - now_held)",
            ),
        ),
        ("tests/unit/test_shares.py",),
    ),
    Mutant(
        "a host gives back slots that are in use",
        (
            (
                "sharedpool/broker/core/shares.py",
                "now_held = min(held, claim.least)",
                "now_held = min(held, claim.wanted)",
            ),
        ),
        ("tests/unit/test_shares.py",),
    ),
    Mutant(
        "a host whose session has ended is taken for gone at once",
        (("sharedpool/broker/core/host_presence.py", "GONE_S = 1.0", "GONE_S = 0.0"),),
        ("tests/unit/test_host_presence.py",),
    ),
    Mutant(
        "the outcome of an older sync counts",
        (
            (
                "sharedpool/broker/core/sharing.py",
                "if share is None or share.pending != serial:",
                "if share is None:",
            ),
        ),
        ("tests/unit/test_share_outcomes.py",),
    ),
    Mutant(
        "backends of brokers without a row are not counted",
        (
            (
                "sharedpool/broker/core/host_presence.py",
                "if instance not in rows",
                "if instance in rows",
            ),
        ),
        ("tests/unit/test_host_presence.py",),
    ),
    Mutant(
        "a broker opens connections after it was suspended",
        (
            (
                "sharedpool/broker/core/share_trust.py",
                'self.freeze(share, now, "")',
                "pass",
            ),
        ),
        ("tests/unit/test_share_outcomes.py",),
    ),
    Mutant(
        "whoever sends a NOTIFY is believed",
        (
            (
                "sharedpool/broker/core/share_terms.py",
                "return row.pid == self.pid and",
                "return",
            ),
        ),
        ("tests/unit/test_share_returns.py",),
    ),
    Mutant(
        "a wake-up in the middle of a sync is lost",
        (
            (
                "sharedpool/broker/core/share_returns.py",
                "if share.pending:\n",
                "if share.pending:\n                self._woken.clear()\n",
            ),
        ),
        ("tests/unit/test_share_returns.py",),
    ),
    Mutant(
        "a share is given back that is unused for a moment",
        (
            (
                "sharedpool/broker/core/sharing.py",
                " or now < share.emptied_at + _UNUSED_S:",
                ":",
            ),
        ),
        ("tests/unit/test_share_outcomes.py",),
    ),
    Mutant(
        "a host is found to be gone at the next turn only",
        (
            (
                "sharedpool/broker/core/sharing.py",
                "(min(POLL_S, again_s) if contended",
                "(POLL_S if contended",
            ),
        ),
        ("tests/unit/test_share_outcomes.py", "-k", "found_gone"),
    ),
    Mutant(
        "hosts whose settings differ meet in different databases",
        (
            (
                "sharedpool/broker/postgres/share_table.py",
                "            if home:\n                raise SharedElsewhere(home)\n",
                "",
            ),
        ),
        ("tests/integration/test_shares_database.py", "-k", "names_no_database"),
    ),
    Mutant(
        "what one limit has shown of a host counts for another database's",
        (
            (
                "sharedpool/broker/core/share_sync.py",
                'presence.judge("\\0".join(order.key),',
                "presence.judge(order.key.scope,",
            ),
        ),
        ("tests/unit/test_share_outcomes.py", "-k", "judged_apart"),
    ),
)
