"""Short digests that tell names apart, the same in every process and every version of Python."""

try:
    # `hashlib` has the same function, but loads OpenSSL: half a megabyte in every worker.
    from _blake2 import blake2s
except ImportError:  # an interpreter that was built without it
    from hashlib import blake2s


def digest_of(data: bytes, size: int = 8) -> bytes:
    """Return `size` bytes, 32 at most, that hardly any other data gives."""
    return blake2s(data, digest_size=size).digest()
