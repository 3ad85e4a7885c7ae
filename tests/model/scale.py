"""The world's measures: small, so that every limit is met often."""

from sharedpool.broker.core.group_terms import GroupTerms

TTL_S = 15.0
BEAT_S = 5.0
SILENCE_S = 2.5 * BEAT_S + 1.0  # as `Link._serve`
HELLO_RETRY_S = 1.0
EXPIRATION_S = 40.0
LIMITS = {"a": 3, "bé": 2}  # the second is shown otherwise in a tag
MAX_WAITING = {"a": 0, "bé": 4}
INSTANCE = "model"
# Of a cap of 3 or 4: a group with a reservation and priority, beside one with a limit; or all in
# one group.
GROUPS: list[dict[str, GroupTerms]] = [
    {"web": GroupTerms(1, None, 1), "jobs": GroupTerms(0, 1)},
    {"web": GroupTerms(1, 2), "jobs": GroupTerms(1)},
    {"all": GroupTerms(0, 2)},
]
GROUP_OF = [{"a": "web", "bé": "jobs"}, {"a": "web", "bé": "jobs"}, {"a": "all", "bé": "all"}]
