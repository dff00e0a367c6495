"""The plan is pure: given what is wanted and what is there, what to do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.control.plan import Action, Load, Unload, Verify, plan

A, B, C = (f"a-{letter * 12}" for letter in "abc")


@pytest.mark.parametrize(
    ("desired", "observed", "verified", "held_back", "actions"),
    [
        ([], [], [], [], []),
        ([A, B], [], [], [], [Load(A), Load(B)]),
        ([A], [A], [], [], [Verify(A)]),
        ([A], [A], [A], [], []),
        ([], [A], [A], [], [Unload(A)]),
        ([B], [A], [A], [], [Unload(A), Load(B)]),
        ([A, B, C], [C], [], [], [Verify(C), Load(A), Load(B)]),
        ([A, B], [], [], [A], [Load(B)]),
        ([A], [A], [], [A], []),
        ([], ["someone-elses", "base"], [], [], []),
    ],
)
def test_plan(
    desired: list[str], observed: list[str], verified: list[str], held_back: list[str], actions: list[Action]
) -> None:
    assert plan(desired, observed, verified, held_back) == actions


IDS = st.lists(st.sampled_from([f"a-{digit * 12}" for digit in "0123456789"]), unique=True)


@given(desired=IDS, observed=IDS, verified=IDS)
def test_doing_the_first_action_again_and_again_arrives(
    desired: list[str], observed: list[str], verified: list[str]
) -> None:
    loaded, answered = set(observed), set(verified) & set(observed)
    for _ in range(len(desired) + len(observed) + 1):
        actions = plan(desired, loaded, answered, [])
        if not actions:
            break
        if isinstance(actions[0], Unload):
            loaded.remove(actions[0].content_id)
            answered.discard(actions[0].content_id)
        else:
            loaded.add(actions[0].content_id)
            answered.add(actions[0].content_id)
    assert loaded == answered == set(desired)
