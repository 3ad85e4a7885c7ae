"""The world's measures: small, so that every limit is met often."""

TTL_S = 15.0
BEAT_S = 5.0
SILENCE_S = 2.5 * BEAT_S + 1.0  # as `Link._silence_limit_s`
HELLO_RETRY_S = 1.0
EXPIRATION_S = 40.0
LIMITS = {"a": 3, "b": 2}
MAX_WAITING = {"a": 0, "b": 4}
INSTANCE = "model"
