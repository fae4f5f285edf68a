"""The choice among proposed answers: what is known of them, drawing, learning, acceptance.

Tests name the breakage they are there for (`Breaks:`); `tests/faults/wiring_mutants.py` puts it in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypotheses import N_PROPOSAL_FACTS, PROPOSAL_FACTS, VERDICTS
from proposal_policy import (
    ARM_FACTS,
    N_GROUP,
    OWN_PRIOR,
    PRIOR,
    RELATION,
    Candidates,
    Choice,
    ProposalPolicy,
    acceptable,
    candidates_of,
)

STATE = 6
CELLS = PROPOSAL_FACTS.index("cells_right")


def generator(seed: Any = 0) -> Any:
    return torch.Generator().manual_seed(seed)


def facts_of(*rows: Any) -> Any:
    """(Q, A, F): per query the verdicts' names, None = no proposal."""
    facts = torch.zeros(len(rows), max(map(len, rows)), N_PROPOSAL_FACTS)
    for q, names in enumerate(rows):
        for a, name in enumerate(names):
            if name is not None:
                facts[q, a, VERDICTS.index(name)] = 1.0
    return facts


def candidates(*rows: Any) -> Any:
    facts = facts_of(*rows)
    there = facts[..., : len(VERDICTS)].any(-1)
    mask = torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), there], 1)
    relation = torch.zeros(*mask.shape, len(RELATION))
    relation[:, 0, 0] = 1.0
    return Candidates(facts, relation, torch.zeros(len(rows), STATE), mask)


def policy(seed: Any = 0, **options: Any) -> Any:
    return ProposalPolicy(STATE, generator=generator(seed), **options)


# ---------------------------------------------------------------- what is known


def two_queries() -> Any:
    """Own answers of 2 x 2 and 1 x 3 on a canvas of 3 x 3; three proposals for the first."""
    own = torch.full((2, 3, 3), -1)
    own[0, :2, :2] = torch.tensor([[1, 2], [3, 4]])
    own[1, :1, :3] = 5
    proposed = torch.full((2, 3, 3, 3), 255, dtype=torch.uint8)
    size = torch.zeros(2, 3, 2, dtype=torch.long)
    proposed[0, 0, :2, :2] = torch.tensor([[1, 2], [3, 4]])
    proposed[0, 1, :2, :2] = torch.tensor([[1, 2], [3, 9]])
    proposed[0, 2, :3, :2] = 1
    size[0] = torch.tensor([[2, 2], [2, 2], [3, 2]])
    chances = torch.full((2, 3, 3, 10), 0.01)
    chances.scatter_(-1, own.clamp(min=0).unsqueeze(-1), 0.5)
    facts = facts_of(("full", "half", "none"), (None, None, None))
    facts[0, 0, ARM_FACTS.start + 2] = facts[0, 1, ARM_FACTS.start] = 1.0
    recalled = torch.full((2, N_PROPOSAL_FACTS - ARM_FACTS.start), -1.0)
    recalled[0, 2], recalled[0, 0] = 0.75, 0.25
    return proposed, size, facts, own, chances.log(), torch.zeros(2, STATE), recalled


def test_candidates_compare_each_proposal_with_the_own_answer() -> None:
    """Breaks: one figure in another's place, padding counted as cells, another query's recall."""
    found = candidates_of(*two_queries())
    assert found.mask.tolist() == [[True] * 4, [True, False, False, False]]
    known = {name: found.relation[..., i] for i, name in enumerate(RELATION)}
    assert known["is_kept"].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert known["same_size"][0].tolist() == [1, 1, 1, 0]
    assert known["same_cells"][0].tolist() == pytest.approx([1, 1, 0.75, 1 / 6])
    assert known["same_grid"][0].tolist() == [1, 1, 0, 0]
    half, low = torch.tensor([0.5, 0.01]).log() / 5
    assert known["log_probability"][0, :3].tolist() == pytest.approx(
        [float(half), float(half), float(0.75 * half + 0.25 * max(low, -1.0))], abs=0.05
    )
    assert known["own_probability"][0].tolist() == pytest.approx([0.5] * 4)
    assert known["own_least"][0].tolist() == pytest.approx([0.5] * 4)
    assert known["recalled"][0].tolist() == pytest.approx([0, 0.75, 0.25, 0])
    assert known["recall_known"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]
    assert (found.relation[1, 1:] == 0).all()


def test_more_proposals_for_a_neighbour_change_no_bit() -> None:
    """Breaks: sums over cells in an order that the number of proposals decides."""
    torch.manual_seed(0)
    given = list(two_queries())
    given[4] = torch.randn(2, 3, 3, 10).log_softmax(-1)
    few = candidates_of(*given)
    wide = list(given)
    wide[0] = torch.cat([given[0], torch.full((2, 2, 3, 3), 255, dtype=torch.uint8)], 1)
    wide[1] = torch.cat([given[1], torch.zeros(2, 2, 2, dtype=torch.long)], 1)
    wide[2] = torch.cat([given[2], torch.zeros(2, 2, N_PROPOSAL_FACTS)], 1)
    many = candidates_of(*wide)
    assert torch.equal(many.relation[:, :4], few.relation)


# ---------------------------------------------------------------- acceptance


def test_acceptance_by_what_the_demonstrations_say() -> None:
    """Breaks: everything accepted, nothing but full accepted, the comparison turned round, or
    an unmeasured network beaten by anything."""
    facts = facts_of(("full", "half", "some"), ("none", "half", None), ("half", "full", None))
    facts[0, :, CELLS] = torch.tensor([0.2, 0.61, 0.6])
    facts[1, :2, CELLS] = torch.tensor([0.9, 0.3])
    facts[2, :2, CELLS] = torch.tensor([0.99, 1.0])
    found = acceptable(facts, torch.tensor([0.6, 0.6, float("nan")]))
    assert found.tolist() == [[True, True, False], [True, False, False], [False, True, False]]
    only_full = [[True, False, False], [False] * 3, [False, True, False]]
    assert acceptable(facts, None).tolist() == only_full


def test_what_is_not_allowed_is_not_chosen() -> None:
    """Breaks: `allowed` not asked, or asked of the neighbour's number."""
    asked = candidates(("full", "full"), ("full", "none"), ("full", "full"))
    allowed = torch.tensor([[False, True], [False, False], [True, False]])
    choice = policy().choose(asked, deterministic=True, allowed=allowed)
    assert choice.taken.tolist() == [2, 0, 1]
    draws = torch.cat(
        [
            policy().choose(asked, generator(s), mode="random", allowed=allowed).drawn
            for s in range(9)
        ],
        1,
    )
    assert [sorted(set(row.tolist())) for row in draws] == [[0, 2], [0], [0, 1]]


# ---------------------------------------------------------------- drawing


def test_modes_generators_and_masks() -> None:
    """Breaks: masked candidates drawn, off that takes, random that prefers,
    draws from elsewhere."""
    asked = candidates(*[("full", None, "none")] * 200)
    on = policy().choose(asked, generator(1))
    assert on.drawn.shape == (200, N_GROUP)
    assert torch.equal(on.drawn, policy().choose(asked, generator(1)).drawn)
    assert not torch.equal(on.drawn, policy().choose(asked, generator(2)).drawn)
    assert torch.equal(on.taken, on.drawn[:, 0])
    counts = torch.bincount(on.drawn.flatten(), minlength=4)
    assert counts[2] == 0
    assert counts[1] > 5 * counts[0] > counts[3]
    alike = (
        policy().choose(asked, generator(1), mode="random").drawn.flatten().bincount(minlength=4)
    )
    assert alike[2] == 0
    assert all(200 < alike[i] < 340 for i in (0, 1, 3))
    assert policy().choose(asked, generator(1), mode="off").drawn.eq(0).all()
    best = policy().choose(asked, deterministic=True)
    assert best.taken.tolist() == [1] * 200
    assert best.drawn.shape == (200, 1)
    with pytest.raises(ValueError, match=r"needs a torch\.Generator"):
        policy().choose(asked)


def test_before_it_has_learnt_it_is_as_sure_as_was_measured() -> None:
    """Breaks: priors of one verdict at another's place, or none."""
    (chance,) = policy().choose(candidates(VERDICTS), deterministic=True).chance
    wanted = [OWN_PRIOR, *(PRIOR[name] for name in VERDICTS)]
    assert chance.tolist() == pytest.approx(wanted, abs=0.05)


# ---------------------------------------------------------------- learning


def learn(
    model: Any,
    n_updates: Any,
    verdicts: Any,
    paying: Any,
    seed: Any = 0,
    chance_of_exact: Any = None,
) -> Any:
    g = generator(seed)
    for _ in range(n_updates):
        asked = candidates(*[verdicts] * 16)
        choice = model.choose(asked, g)
        rewards = torch.zeros(16, len(verdicts) + 1)
        rewards[:, 1:] = -0.5
        rewards[:, 1 + verdicts.index(paying)] = 1.0
        right = rewards > 0
        if chance_of_exact is not None:
            right = torch.rand(rewards.shape, generator=g) < torch.tensor(chance_of_exact)
        figures = model.learn(choice, rewards, right)
    return figures


@pytest.mark.parametrize("paying", ["none", "some"])
def test_a_bandit_where_one_verdict_pays_is_learnt(paying: Any) -> None:
    """Breaks: the choice never learns, learns the opposite,
    or sums advantages without the rewards."""
    model = policy()
    verdicts = ("full", "some", "none")
    before = model.choose(candidates(verdicts), deterministic=True)
    assert before.taken.tolist() == [1]
    figures = learn(model, 150, verdicts, paying)
    after = model.choose(candidates(verdicts), deterministic=True)
    assert after.taken.tolist() == [1 + verdicts.index(paying)]
    assert float(figures["proposal_best_frac"]) > 0.8
    assert float(model(after.candidates)[0].exp().max().detach()) > 0.8


@pytest.mark.parametrize("part", ["group", "hindsight"])
def test_group_advantage_and_hindsight_teach_each_by_itself(
    part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: one of the two terms missing, or its sign turned."""
    monkeypatch.setattr("proposal_policy.REWARD_SCALE" if part == "hindsight" else
                        "proposal_policy.HINDSIGHT_WEIGHT", 0.0)  # fmt: skip
    model = policy()
    verdicts = ("full", "some", "none")
    asked = candidates(verdicts)
    p = [float(model(asked)[0][0, 2].exp().detach())]
    for _ in range(3):
        learn(model, 60, verdicts, "some", seed=len(p))
        p.append(float(model(asked)[0][0, 2].exp().detach()))
    assert p == sorted(p)
    assert p[-1] > 0.6 > p[0]  # entropy alone makes no candidate better than the others


def test_rewards_that_do_not_differ_teach_no_choice() -> None:
    """Breaks: zero-spread groups that teach; entropy aside, preferences stay where they are."""
    model = policy(lr=1e-2)
    asked = candidates(*[("full", "none")] * 8)
    choice = Choice(asked, torch.tensor([[0, 1, 2, 1]] * 8), torch.zeros(8, 3))
    flat = torch.where(
        asked.mask, 0.0, 7.0
    )  # what a masked candidate would earn counts for nothing
    figures = model.learn(choice, flat, torch.zeros_like(asked.mask))
    assert float(figures["group_zero_frac"]) == 1.0
    assert float(figures["proposal_loss"]) == 0.0
    assert float(figures["proposal_best_frac"]) == 1.0
    live = flat.clone()
    live[:, 1] = 1.0
    figures = model.learn(choice, live, torch.zeros_like(asked.mask))
    assert float(figures["group_zero_frac"]) == 0.0
    assert float(figures["proposal_loss"]) != 0.0


def test_masked_candidates_teach_nothing() -> None:
    """Breaks: the best of all, masked ones counted; exactness of what is not there."""
    model = policy()
    asked = candidates(*[("some", None)] * 8)
    choice = Choice(asked, torch.tensor([[0, 1, 1, 0]] * 8), torch.zeros(8, 3))
    rewards = torch.tensor([[0.0, 1.0, 99.0]] * 8)
    figures = model.learn(choice, rewards, torch.zeros(8, 3, dtype=torch.bool))
    exact = torch.tensor([[False, False, True]] * 8)
    same = policy().learn(choice, torch.tensor([[0.0, 1.0, -7.0]] * 8), exact)
    for name, value in figures.items():
        assert torch.equal(value, same[name]), name
    assert float(figures["proposal_loss"]) < 20


def test_exactness_is_told_as_often_as_it_happens() -> None:
    """Breaks: the exactness head never trained, or on rewards; one figure for all candidates."""
    model = policy(lr=1e-2)
    verdicts = ("full", "some", "none")
    wanted = [0.6, 0.5, 0.9, 0.05]  # own, full, some, none: far from where it starts
    learn(model, 180, verdicts, "full", chance_of_exact=wanted)
    (chance,) = model.choose(candidates(verdicts), deterministic=True).chance
    assert chance.tolist() == pytest.approx(wanted, abs=0.09)


def test_a_loss_that_is_not_finite_moves_no_weight() -> None:
    """Breaks: NaN rewards written into the weights."""
    model = policy()
    before = [p.detach().clone() for p in model.parameters()]
    asked = candidates(*[("full", "none")] * 4)
    choice = model.choose(asked, generator())
    model.learn(choice, torch.full((4, 3), float("nan")), torch.zeros(4, 3, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_weights_are_a_function_of_the_generator() -> None:
    a, b, c = policy(1), policy(1), policy(2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.candidate.weight, c.candidate.weight)
