"""The world's measures: small, so that every limit is met often."""

TTL_S = 15.0
BEAT_S = 5.0
SILENCE_S = 2.5 * BEAT_S + 1.0  # as `Link._serve`
HELLO_RETRY_S = 1.0
EXPIRATION_S = 40.0
LIMITS = {"a": 3, "bé": 2}  # the second is shown otherwise in a tag
MAX_WAITING = {"a": 0, "bé": 4}
INSTANCE = "model"
