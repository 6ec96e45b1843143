"""agent/context.py: what a request's head says of its trace."""

import pytest
from podspan.agent.context import read_context
from unit.context_rows import ROWS


def test_no_two_rows_have_the_same_name():
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_the_headers_say_what_the_table_says(row):
    assert read_context(row.headers) == row.says
