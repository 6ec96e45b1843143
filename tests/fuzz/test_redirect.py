"""The redirect engine's HTTP/1 against the scanner's reference, and conversations.

A stream that is found here gets a row in tests/unit/test_redirect_http1.py.
"""

import random

from fuzz.generator import cases
from podspan.agent.redirect.http1 import Http1
from podspan.agent.redirect.inject import Direction, Propagation
from podspan.agent.redirect.layer import Side
from unit.redirect_relay import Relay
from unit.redirect_streams import (
    Builder,
    edited_heads,
    heads_that_count,
    play,
)

# In Python one costs as much as this many of the scanner's.
COST = 100


def test_hostile_requests_are_edited_where_they_are_well_formed(request, say):
    count, seed = (request.config.getoption(name) for name in ("cases", "seed"))
    requests = 0
    for case in cases(f"redirect {seed}", count // COST):
        if not case.is_response:
            requests += 1
            assert edited_heads(case) == heads_that_count(case), case
    say(f"{requests} streams of requests through the redirect engine")


def test_any_conversation_arrives_as_the_model_says(request, say):
    count, seed = (request.config.getoption(name) for name in ("cases", "seed"))
    for number in range(count // COST):
        text = f"{seed} {number}"
        it = Builder(text).build()
        relay = Relay(Http1(Direction.OUTBOUND, it.give, Propagation()))
        play(it, relay, random.Random(text))
        relay.end(Side.DOWN)
        assert relay.arrived[Side.UP] == it.arrives, text
        assert relay.counts == it.counts, text
    say(f"{count // COST} conversations through the redirect engine")
