"""Whose turn it is at a full replica. Counts seats, turns and tokens; knows nothing of clocks, sockets or text.

The replica is where all gateways meet, so it decides. Gateways advertise what waits with them, per flow (a tenant in
one priority class); while somebody waits, a request may come only on a turn that the replica granted. The order is
that of virtual tokens (Sheng et al. 2024, "Fairness in Serving Large Language Models"): the next turn goes to whoever
has had the least per weight (`springtide.policy.shares`), and among the gateways where a flow waits turns go round in
proportion to how many wait.

- *What was had* is counted over all replicas: what this one serves, exactly; what others serve, as the gateways saw
  it, a little later. So any number of gateways and replicas and any skew of arrivals give the same shares.
- *A turn is charged when it is granted*, with what requests of the flow used lately, and settled when the request has
  left: else all free seats would go to one flow before its first token counts.
- *No seat idles for fairness.* Turns go out while there is room and somebody waits. A few more than can run are let
  in, as many as leave while a turn is on its way, so that their successors are there in time. And where many turns
  are declined, because several replicas call the same few, more are sent than there is room for.
- *No turn is lost for good.* It is taken, declined or expires; then the next gets it at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple, Protocol

from springtide.core.request import PriorityClass, TokenCounts
from springtide.policy.shares import Flow, FlowAccount, GatewayTurns, Line, RunningMean, Shares

PROMPT_TOKEN_COST = 0.25
"""What a prompt token costs, in output tokens. Prompt tokens run side by side and fill the arithmetic; each output
token waits for a step that reads all weights. Price lists say how the two compare on real machines: half for the prompt
(so Sheng et al.) down to a fifth; DeepSeek's R1, at 0.55 and 2.19 dollars a million, takes a quarter."""

TURN_S = 1.0
"""Seconds until a turn that nobody took goes to the next."""

_LEAST_TAKEN = 0.5  # of the turns that are out, so many at least are expected to be taken
_MAX_IDLE_FLOWS = 4096


class Backlog(Protocol):
    """What waits for one flow at one gateway.

    `waiting` counts sequences. `served_elsewhere` is what the gateway saw served to the flow by other replicas of the
    deployment since the gateway started, measured by `cost`.
    """

    @property
    def tenant(self) -> str: ...
    @property
    def priority_class(self) -> PriorityClass: ...
    @property
    def weight(self) -> float: ...
    @property
    def waiting(self) -> int: ...
    @property
    def served_elsewhere(self) -> float: ...


class Turn(NamedTuple):
    """Leave to send one request of this flow."""

    serial: int
    tenant: str
    priority_class: PriorityClass


def cost(counts: TokenCounts) -> float:
    """What a request has used, in output tokens. What was found in the prefix cache costs nothing."""
    return PROMPT_TOKEN_COST * max(0, counts.prompt - counts.cached) + counts.completion


@dataclass(slots=True)
class _Called:
    """A turn that is out, or was."""

    flow: FlowAccount
    line: Line
    seats: int
    tokens: float  # charged for it
    granted: float  # when
    told: int  # how often its gateway had spoken of the flow by then
    num_left: int  # sequences that had left when turns were granted the time before


@dataclass(slots=True)
class _Guest:
    """A request that is here."""

    flow: FlowAccount
    sequences: int
    tokens: float  # charged for it so far


class TurnKeeper:
    """The turns of one replica that can run `capacity` sequences at once.

    One owner tells it what happens, and asks `grants` after each step, whenever something came in, and now and then
    while `by_turn`: turns expire only if somebody asks. `now` is in seconds, of any clock that only goes forward.

    `counters`: granted, taken, returned (declined, or their gateway was lost), expired, late (expired turns that were
    taken after all), crowded (turns that came when the house was more than full). At any time granted = taken +
    returned + expired + crowded + those that are out.
    """

    def __init__(self, capacity: int, *, max_idle_flows: int = _MAX_IDLE_FLOWS) -> None:
        assert capacity > 0 and max_idle_flows > 0
        self.counters: Counter[str] = Counter()
        self._capacity = capacity
        self._reach = capacity  # sequences that the engine's memory holds, as far as seen
        self._shares = Shares(capacity, max_idle_flows)
        self._gateways: dict[str, GatewayTurns] = {}
        self._guests: dict[Hashable, _Guest] = {}
        self._turns: dict[int, _Called] = {}  # that are out, the oldest first
        self._late: dict[int, _Called] = {}  # that have expired, the oldest first
        self._serial = 0
        self._held = 0  # sequences that are here
        self._called = 0  # sequences that have a turn
        self._num_left = 0  # sequences that have left, ever
        self._taken = RunningMean(1.0)  # the share of turns that are taken
        self._left_before = 0  # sequences that had left when turns were last granted
        self._left_meanwhile = RunningMean(0.0)  # sequences that left while a turn was on its way, see `slack`
        self._left_squared = RunningMean(0.0)  # the same, squared: they may leave many at a time

    @property
    def by_turn(self) -> bool:
        """Whether a request that has no turn would have to wait: there is no room, or others wait."""
        return self._room() < 1 or self._shares.anybody_waits()

    @property
    def num_flows(self) -> int:
        """How many flows are remembered."""
        return len(self._shares.flows)

    @property
    def slack(self) -> int:
        """How many sequences may wait inside, so that no seat idles while a turn is on its way.

        As many as leave from the step that made room for it until it is taken, with a standard deviation to be safe;
        at least a sixteenth of the seats, which is what leaves in a step if answers have some sixteen steps.
        """
        mean = self._left_meanwhile.value
        deviation = sqrt(max(0.0, self._left_squared.value - mean * mean))
        return min(self._capacity, max(1, self._capacity // 16, round(mean + deviation)))

    # -- what gateways say ---------------------------------------------------------------------------------

    def backlog(self, gateway: str, backlogs: Iterable[Backlog], now: float) -> None:
        """All that waits at a gateway: what it doesn't name does not wait there. If it declines turns in the same
        breath, `declined` comes first."""
        self._expire(now)
        known = self._gateways.setdefault(gateway, GatewayTurns(gateway))
        before, known.named = known.named, set()
        for backlog in backlogs:
            flow = self._shares.flow((backlog.tenant, backlog.priority_class), backlog.weight)
            known.named.add(flow.key)
            self._note(flow, known, backlog)
        for key in before - known.named:
            if key in self._shares.flows:
                self._empty(self._shares.flows[key], gateway)
        self._shares.forgive()

    def _note(self, flow: FlowAccount, gateway: GatewayTurns, backlog: Backlog) -> None:
        line = flow.lines.setdefault(gateway.name, Line(gateway))
        flow.charge(_growth(line.served_elsewhere, backlog.served_elsewhere))
        line.served_elsewhere = backlog.served_elsewhere
        line.waiting = max(0, backlog.waiting)
        line.told += 1
        self._shares.place(flow)

    def declined(self, gateway: str, serial: int, now: float) -> None:
        """Nobody of that flow waits there any more."""
        self._expire(now)
        turn = self._turns.get(serial)
        if turn is not None and turn.line.gateway.name == gateway:
            self._withdraw(serial, "returned")
            self._taken.add(0.0)
            self._suspect(turn.line.gateway, False)

    def gateway_lost(self, gateway: str) -> None:
        """Nobody waits there any more, and nobody will come. Those of its requests that are here stay."""
        for serial in [serial for serial, turn in self._turns.items() if turn.line.gateway.name == gateway]:
            self._withdraw(serial, "returned")
        self._late = {serial: turn for serial, turn in self._late.items() if turn.line.gateway.name != gateway}
        self._gateways.pop(gateway, None)
        for flow in list(self._shares.flows.values()):
            if flow.lines.pop(gateway, None) is not None:
                self._shares.place(flow)

    # -- what requests do ----------------------------------------------------------------------------------

    def arrived(
        self, key: Hashable, flow: Flow, weight: float, sequences: int, now: float, turn: int | None = None
    ) -> bool:
        """Whether a request may stay. If not, it must wait at its gateway: there is no room, or others wait and it has
        no turn.

        Without a turn it needs a seat for each of its sequences, or an empty replica. With a turn one seat will do:
        what doesn't fit waits inside, and nobody is called before that has found seats, so none idles until there are
        enough of them. A turn that has expired is still good: its seat was given to the next, but who comes late,
        perhaps with a long prompt over a slow line, would come late again.
        """
        assert key not in self._guests, f"{key} is already here"
        self._expire(now)
        account = self._shares.flow(flow, weight)
        account.sequences.add(sequences)
        charged = self._admit(account, sequences, turn)
        if charged is not None:
            self._guests[key] = _Guest(account, sequences, charged)
            account.guests += 1
            self._held += sequences
        self._shares.place(account)
        return charged is not None

    def served(self, key: Hashable, tokens: float) -> None:
        """What a request has used until now, by `cost`. Beyond what was expected of it, it is charged at once."""
        guest = self._guests.get(key)
        if guest is not None and tokens > guest.tokens:
            guest.flow.charge(tokens - guest.tokens)
            guest.tokens = tokens

    def left(self, key: Hashable, tokens: float) -> None:
        """A request is over, however it ended; it has used `tokens`, by `cost`. Unknown ones are ignored."""
        guest = self._guests.pop(key, None)
        if guest is None:
            return
        flow = guest.flow
        flow.charge(tokens - guest.tokens)
        flow.guests -= 1
        flow.tokens.add(tokens)
        self._shares.tokens.add(tokens)
        self._shares.place(flow)
        self._held -= guest.sequences
        self._num_left += guest.sequences

    def _admit(self, flow: FlowAccount, sequences: int, serial: int | None) -> float | None:
        """What a request that may stay has been charged; None if it may not."""
        turn, in_time = self._redeem(flow, serial)
        if turn is None:
            may_stay = not self._shares.anybody_waits() and self._fits(sequences)
            return self._shares.let_in(flow) if may_stay else None
        if turn.line.told == turn.told:  # else it may be, and mostly is, counted out already
            turn.line.waiting = max(0, turn.line.waiting - sequences)
        self._suspect(turn.line.gateway, False)
        if not in_time:
            self.counters["late"] += 1
            return flow.charge_request()
        if self._held >= 2 * self._capacity:  # those before it were much larger than expected
            self.counters["crowded"] += 1
            flow.charge(-turn.tokens)
            return None
        self.counters["taken"] += 1
        self._taken.add(1.0)
        self._left_meanwhile.add(self._num_left - turn.num_left)
        self._left_squared.add((self._num_left - turn.num_left) ** 2)
        return turn.tokens

    def _redeem(self, flow: FlowAccount, serial: int | None) -> tuple[_Called | None, bool]:
        """The turn of this number, and whether it comes in time. A number that is another flow's is none: it is from
        a former life of this replica."""
        if serial is None:
            return None, False
        turn = self._turns.get(serial) or self._late.get(serial)
        if turn is None or turn.flow is not flow:
            return None, False
        if self._late.pop(serial, None):
            return turn, False
        self._take_back(serial)
        return turn, True

    # -- turns ---------------------------------------------------------------------------------------------

    def grants(self, running: int, waiting: int, now: float) -> list[tuple[str, Turn]]:
        """The turns to send now, each with its gateway: as many as there is room for, if so many wait.

        Args:
            running: sequences that the engine runs, after its last step.
            waiting: sequences that it did not admit to that step.
        """
        self._expire(now)
        self._learn_reach(running, waiting)
        turns = []
        while self._room() > 0 and self._shares.anybody_waits():
            turns.append(self._grant(self._shares.next(), now))
        self._left_before = self._num_left
        return turns

    def _grant(self, flow: FlowAccount, now: float) -> tuple[str, Turn]:
        line = flow.next_line()
        seats = max(1, min(round(flow.sequences.value), line.uncalled))
        self._serial += 1
        charged = self._shares.let_in(flow)
        self._turns[self._serial] = _Called(flow, line, seats, charged, now, line.told, self._left_before)
        self._count_out(flow, line, 1, seats)
        self.counters["granted"] += 1
        return line.gateway.name, Turn(self._serial, *flow.key)

    def _expire(self, now: float) -> None:
        while self._turns:
            serial, turn = next(iter(self._turns.items()))
            if now - turn.granted < TURN_S:
                return
            self._withdraw(serial, "expired")
            self._suspect(turn.line.gateway, True)
            self._late[serial] = turn
            if len(self._late) > self._capacity:
                del self._late[next(iter(self._late))]

    def _withdraw(self, serial: int, why: str) -> None:
        """Nobody took this turn. Until its gateway speaks again, nobody of the flow is expected from there."""
        turn = self._take_back(serial)
        turn.flow.charge(-turn.tokens)
        self.counters[why] += 1
        self._empty(turn.flow, turn.line.gateway.name)

    def _take_back(self, serial: int) -> _Called:
        turn = self._turns.pop(serial)
        self._count_out(turn.flow, turn.line, -1, -turn.seats)
        return turn

    def _count_out(self, flow: FlowAccount, line: Line, turns: int, seats: int) -> None:
        """So many turns more (or less) are out."""
        flow.turns += turns
        line.gateway.turns += turns
        line.called += seats
        self._called += seats
        self._shares.place(flow)
        if line.gateway.suspect:
            self._place_all(line.gateway)

    def _suspect(self, gateway: GatewayTurns, suspect: bool) -> None:
        if gateway.suspect != suspect:
            gateway.suspect = suspect
            self._place_all(gateway)

    def _place_all(self, gateway: GatewayTurns) -> None:
        for key in gateway.named:
            if key in self._shares.flows:
                self._shares.place(self._shares.flows[key])

    def _empty(self, flow: FlowAccount, gateway: str) -> None:
        """Nobody of this flow waits at this gateway. What it was told of other replicas stays known."""
        line = flow.lines.get(gateway)
        if line is not None:
            line.waiting, line.credit = 0, 0.0
        self._shares.place(flow)

    # -- room ----------------------------------------------------------------------------------------------

    def _room(self) -> int:
        coming = self._called * max(_LEAST_TAKEN, self._taken.value)
        return self._reach + self.slack - self._held - round(coming)

    def _fits(self, sequences: int) -> bool:
        return sequences <= self._room() or not (self._held or self._called)

    def _learn_reach(self, running: int, waiting: int) -> None:
        """Long sequences may fill the engine's memory before its seats. If more wait inside than we meant to have, it
        holds what runs now; if none waits, it may hold a few more."""
        if waiting > self.slack:
            self._reach = max(1, min(running, self._capacity))
        elif not waiting:
            self._reach = max(self._reach, min(running + self.slack, self._capacity))


def _growth(before: float | None, now: float) -> float:
    """How much a counter has grown. Nothing is known of the time before the first word. One that went back has started
    anew, with its gateway."""
    if before is None:
        return 0.0
    return now - before if now >= before else now
