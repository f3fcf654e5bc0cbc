"""The breakages of tests/mutants.py still apply to the package as it is; the command itself runs the tests on each."""

import ast

import pytest

from tests.mutants import MUTANTS, ROOT, TABLE


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_applies(mutant):
    ast.parse(mutant.applied())
    assert (ROOT / "tests" / mutant.tests.split()[0]).is_file()


def test_every_row_is_read_and_has_a_name_of_its_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) == TABLE.count(" | ")
