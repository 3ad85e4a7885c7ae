"""What the oracles say about a run: pure, so that planted violations can show that each of them can
fail."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tests.faults.events import Checkout, overlaps
from tests.faults.server_log import Depth

SHOWN = 3  # of each kind, in words


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was seen of one run.

    `killed` tells when which worker was; `took` how many slots could be had when all was over,
    `took_s` how fast.
    """

    max_conn: int
    log: Depth
    sampled_peak: int
    found: list[Checkout]
    killed: Mapping[str, float]
    took: int
    took_s: float

    @property
    def overshoot(self) -> int:
        """By how much the limit was exceeded, by the log or by the sampler."""
        return max(0, self.log.peak - self.max_conn, self.sampled_peak - self.max_conn)

    @property
    def leaked(self) -> int:
        """How many slots could not be had when all faults were over."""
        return self.max_conn - self.took

    @property
    def double_use(self) -> int:
        """How many pairs of checkouts had one backend at the same time."""
        return len(overlaps(self.found, self.killed))


def violations(seen: Evidence, within_s: float) -> list[str]:
    """Return what is wrong in words; nothing when the run kept every promise."""
    lent = {checkout.backend for checkout in seen.found if checkout.backend is not None}
    wrong = []
    if seen.overshoot:
        wrong.append(
            f"more than {seen.max_conn} backends: {seen.log.at_peak}, sampler {seen.sampled_peak}"
        )
    if seen.leaked:
        wrong.append(f"only {seen.took} of {seen.max_conn} slots could be had")
    if seen.took_s > within_s:
        wrong.append(f"all slots only after {seen.took_s:.2f} s")
    if double := overlaps(seen.found, seen.killed):
        wrong.append(f"used twice at a time: {double[:SHOWN]}")
    if dirty := [checkout for checkout in seen.found if checkout.dirty]:
        wrong.append(f"handed out in a transaction: {dirty[:SHOWN]}")
    if hung := _hung(seen.found, seen.killed):
        wrong.append(f"never answered: {hung[:SHOWN]}")
    # An oracle that sees nothing agrees with everything.
    if not lent:
        wrong.append("nobody was lent anything")
    if seen.log.backends < len(lent):
        wrong.append(f"the log tells of {seen.log.backends} backends, the workers of {len(lent)}")
    if lent and not seen.sampled_peak:
        wrong.append("the sampler has seen no backend")
    return wrong


def _hung(found: Iterable[Checkout], killed: Mapping[str, float]) -> list[Checkout]:
    return [
        checkout
        for checkout in found
        if checkout.answered is None and checkout.worker not in killed
    ]
