"""How one limit is divided among hosts: pure arithmetic over the rows of the shares' table.

Each host's broker holds a *share* of the limit: the slots that it may have in use. In a *sync*, one
transaction, a broker reads all shares, decides with `decide` what it holds from then on, and writes
its own row. The sum of all shares never exceeds the limit, because a share grows only by what is
free, and a host lowers its own share only to what it has in use.

The division is fair in the sense of max-min: nobody gets more than it wants while another one
wants more than it has, and those who get less than they want get the same. What nobody wants is
spread, so that hosts seldom have to ask: in proportion to what each wants, and one more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# As many hosts are all woken by one that wants more; of more than that, those that have too much.
_FEW = 16
# How long after its last sync a broker may still open connections.
TRUST_S = 15.0


@dataclass(frozen=True, slots=True)
class HostShare:
    """One host's row."""

    instance: str  # of the host's broker
    held: int
    wanted: int  # what it has in use, and its waiters
    answered: int = 0  # the newest question after which it has found nothing idle


@dataclass(frozen=True, slots=True)
class Claim:
    """What a host brings to a sync."""

    wanted: int
    # It cannot hold less: what it has in use, and what it may grant before it knows the outcome.
    least: int
    asks: bool = False  # a request that does not wait must know whether the others have any idle
    checked: int = 0  # the newest question after which all its workers have said what is idle
    has_idle: bool = False  # connections that it could still give back
    giving: bool = False  # it has begun to give slots back, and goes on


@dataclass(frozen=True, slots=True)
class Division:
    """The outcome of a sync for one host."""

    held: int
    owed: int = 0  # how many of these it is to give back, because others lack slots
    lacking: int = 0  # how many more would be fair
    asked: int = 0  # the newest question of any host
    answered: int = 0  # the newest question that this host has answered
    question: int = 0  # the newest question of this host
    contended: bool = False  # somebody wants more than it holds
    alone: bool = False
    # The other hosts have answered this host's question: they have nothing idle that they owe it.
    exhausted: bool = False
    to_wake: tuple[str, ...] = ()  # hosts that can now take or should give, or have an answer


def fair_shares(limit: int, wanted: Sequence[int]) -> list[int]:
    """Divide `limit` max-min fair; of two that want the same, the later gets the odd slot."""
    shares = [0] * len(wanted)
    left = max(limit, 0)
    by_want = sorted(range(len(wanted)), key=wanted.__getitem__)
    for place, index in enumerate(by_want):
        shares[index] = min(wanted[index], left // (len(wanted) - place))
        left -= shares[index]
    return shares


def spread(limit: int, fair: Sequence[int]) -> list[int]:
    """Return the shares with what nobody wants spread over them: they add up to `limit`.

    One that grows slot by slot soon has much, and one that is not used has some.
    """
    rest = max(limit - sum(fair), 0)
    weights = [share + 1 for share in fair]
    total = sum(weights)
    extra = [divmod(rest * weight, total) for weight in weights]
    odd = rest - sum(whole for whole, _ in extra)
    # What is left by the divisions goes to those who have lost most by them.
    lucky = sorted(range(len(fair)), key=lambda index: -extra[index][1])[:odd]
    shares = [share + whole for share, (whole, _) in zip(fair, extra, strict=True)]
    for index in lucky:
        shares[index] += 1
    return shares


def decide(
    limit: int,
    me: str,
    held: int,
    claim: Claim,
    others: Mapping[str, HostShare],
    *,
    told: int = 0,
    asked: int = 0,
    answered: int = 0,
    question: int = 0,
    most: int | None = None,
) -> Division:
    """Return what the host `me`, which has held `held`, holds from now on.

    `told` is what `me` has wanted so far, `asked` the newest question of any host, `answered` the
    newest that `me` has answered, and `question` the newest that `me` has asked. With `most`, `me`
    takes nothing beyond that.
    """
    names = sorted([me, *others])
    mine = names.index(me)
    wanted = [claim.wanted if name == me else others[name].wanted for name in names]
    fair = fair_shares(limit, wanted)
    target = spread(limit, fair)
    before = {name: others[name].held for name in others}
    lack = {
        name: max(0, share - before[name])
        for name, share in zip(names, fair, strict=True)
        if name != me
    }
    lacked = sum(lack.values())

    # 1. Give back what the host can do without, if it was asked to.
    now_held = min(held, claim.least)
    free = limit - sum(before.values()) - now_held
    # 2. Take what is fair, as far as it is free.
    taken = max(0, min(fair[mine] - now_held, free))
    # 3. Take of the rest, unless others lack it.
    taken += max(0, min(target[mine] - now_held - taken, free - taken - lacked))
    if most is not None:
        taken = min(taken, max(0, most - now_held))
    now_held += taken
    free -= taken

    # All that it has beyond its target, and not only what is lacked now: who wants one slot more
    # will soon want another.
    owed = max(0, now_held - target[mine]) if lacked > free or claim.giving else 0
    lacking = max(0, fair[mine] - now_held)
    if claim.asks:
        asked = question = asked + 1
    was_answered = answered >= asked
    if not now_held:
        answered = asked
    elif not (owed and claim.has_idle):
        answered = max(answered, min(claim.checked, asked))
    has_answered = answered >= asked and not was_answered
    # What others want may be less by now than their rows say: their workers are asked what is idle.
    few = len(others) <= _FEW
    return Division(
        held=now_held,
        owed=owed,
        lacking=lacking,
        asked=asked,
        answered=answered,
        question=question,
        contended=lacked > 0 or sum(wanted) > limit or free < 0,
        alone=not others,
        exhausted=question > 0
        and not claim.asks
        and all(other.answered >= question or not other.held for other in others.values()),
        to_wake=tuple(
            name
            for name, share in zip(names, target, strict=True)
            if name != me
            and (
                (lack[name] and free > 0)
                or (claim.wanted > max(told, now_held) and before[name] > (0 if few else share))
                or (claim.asks and before[name])
                or (has_answered and others[name].wanted > before[name])
            )
        ),
    )
