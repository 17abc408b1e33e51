"""The choice of few cases leaves nothing out that it promises."""

import itertools

import pytest

from tests.tools import conformance_of_twins as twins
from tests.tools.covering import combinations, cover

AXES = ((1, 2, 3, 4), "abc", (None, [5], [6]), (False, True))


@pytest.mark.parametrize("strength", [1, 2, 3, 4])
def test_any_few_axes_meet_in_every_combination(strength):
    rows = combinations(AXES, strength)
    for places in itertools.combinations(range(len(AXES)), strength):
        for wanted in itertools.product(*(AXES[place] for place in places)):
            assert any(all(row[p] is value for p, value in zip(places, wanted, strict=True)) for row in rows)
    assert len(rows) <= {1: 4, 2: 14, 3: 40, 4: 72}[strength]


def test_a_cover_has_every_part_and_no_item_in_vain():
    items = ["abc", "ab", "cd", "d", "e"]
    assert cover(items, set) == ["abc", "cd", "e"]


def test_the_second_jax_meets_every_feature_of_each_operation():
    cases = twins.select(twins.catalogue(), tiers=("core",))
    chosen = twins.one_for_every_feature(cases)
    assert len(chosen) < len(cases) / 2
    assert {case.op for case in chosen} == {case.op for case in cases}
    plain = [case for case in cases if case.relation is None]

    def features(cases):
        return {(case.op, f) for case in cases for f in case.features if ".layout:" not in f}

    assert features(chosen) == features(plain)
    assert {c.id for c in plain if c.axes.get("dim", 0) > 128} <= {c.id for c in chosen}


def test_the_first_jax_judges_every_core_case_of_the_kernels():
    judged = [case.id for name in ("pallas", "pallas-exact") for case in twins.cases_of(name)]
    assert sorted(judged) == sorted(case.id for case in twins.select(twins.catalogue(), tiers=("core",)))
