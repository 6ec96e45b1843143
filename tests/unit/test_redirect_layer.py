"""What a layer and the relay say to each other."""

from podspan.agent.redirect.layer import Side


def test_each_side_is_the_others_other():
    assert Side.DOWN.other is Side.UP
    assert Side.UP.other is Side.DOWN
