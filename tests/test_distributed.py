"""DTensors: the bits of the whole tensor. Ranks are processes; lib.shards has what they run."""

import os

import pytest
from lib.ranks import Ranks

SEED = int(os.environ["QUANTKIT_SEED"])


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def test_the_table_of_placements_and_operators(two):
    found = two.run("table", seed=SEED, cases=150, world=2)
    print(found)
