"""The five modules together: building, ablations, refinement, prediction without targets."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from conftest import differing, lively_system, taking

import arc_system
import dataset_arc
from arc_agent import AgentOutput
from arc_system import SystemConfig, answer_stats, build_system
from batches import View, evaluation_batches
from hypotheses import N_ARM_SLOTS, PROPOSAL_FACTS
from language_model import ModelError
from model_persistence import ModelPersistence
from policy_refined import N_STATS
from proposal_policy import ARM_FACTS, RELATION


@pytest.fixture
def batch(whole_batch: Any) -> Any:
    return whole_batch


@torch.no_grad()
def final_logits(system: Any, batch: Any, seed: Any = 0) -> Any:
    """Of the answer after a refinement, as training sees it: tokens changed, a proposal taken."""
    reading = system.read(batch)
    before = system.answer(reading)
    generator = torch.Generator().manual_seed(seed)
    refinement = system.refine(reading, before, generator, deterministic=True)
    return system.answer(reading, refinement).logits


def test_the_modules_have_the_names_and_the_order_of_a_checkpoint(system: Any) -> None:
    """They are saved and loaded by position."""
    names = list(system.modules())
    assert names == ["agent", "qwen", "solver2", "efe_loss", "policy_rl"]
    for call in (ModelPersistence.save_checkpoint, ModelPersistence.save_best_model):
        assert list(inspect.signature(call).parameters)[1:6] == names
    assert all(module is getattr(system, name) for name, module in system.modules().items())
    assert all(module.training is False for module in system.modules().values())


def test_weights_are_a_function_of_the_seed_and_leave_global_randomness_alone() -> None:
    before = torch.random.get_rng_state()
    config = SystemConfig(width=32, heads=2, n_tasks=3, seed=5)
    a = build_system(config)
    torch.rand(3)
    b = build_system(config)
    torch.random.set_rng_state(before)
    other = build_system(dataclasses.replace(config, seed=6))
    assert torch.equal(torch.random.get_rng_state(), before)
    states = [{n: m.state_dict() for n, m in s.modules().items()} for s in (a, b, other)]
    assert differing(states[0], states[1]) == []
    assert {path.split(".")[1] for path in differing(states[0], states[2])} >= {
        "agent", "qwen", "solver2", "policy_rl",
    }  # fmt: skip


def test_a_model_that_is_none_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="neither 'auto', 'tiny'"):
        build_system(SystemConfig(width=32, heads=2, qwen_model="no such model"))


def test_policy_off_leaves_the_answer_and_the_tokens_alone(batch: Any) -> None:
    system = lively_system(policy="off")
    with torch.no_grad():
        reading = system.read(batch)
        before = system.answer(reading)
        refinement = system.refine(reading, before, torch.Generator())
        assert torch.equal(refinement.tokens, reading.prompt.tokens)
        assert refinement.info.step is None
        assert refinement.choice.taken.tolist() == [0] * batch.n_queries
        assert torch.equal(final_logits(system, batch), before.logits)
        answered = system.predict(batch, torch.Generator())
    assert answered.refinement is None
    assert answered.after is answered.before


def test_policy_on_changes_the_answer_and_random_does_so_by_the_generator(batch: Any) -> None:
    system = lively_system()
    with torch.no_grad():
        before = system.answer(system.read(batch))
    assert not torch.equal(final_logits(system, batch), before.logits)
    assert torch.equal(final_logits(system, batch), final_logits(system, batch))
    noisy = lively_system(policy="random")
    a, b = (final_logits(noisy, batch, seed) for seed in (1, 2))
    assert not torch.equal(a, b)


def test_the_prompt_reaches_the_answer_through_every_part(batch: Any) -> None:
    """Qwen, control features, task tokens, views: each one changes the logits."""
    system = lively_system()
    base = final_logits(system, batch)
    parts = {
        "qwen": lambda s: next(iter(s.qwen.backbone.parameters())),
        "control": lambda s: next(iter(s.qwen.control.parameters())),
        "task tokens": lambda s: s.solver2.task_tokens.weight,
        "views": lambda s: s.solver2.view_tokens.weight,
        "basis of the refinement": lambda s: s.policy_rl.basis,
    }
    for name, part in parts.items():
        changed = lively_system()
        with torch.no_grad():
            part(changed).mul_(-1.0)
        assert not torch.equal(final_logits(changed, batch), base), name


def test_a_batch_without_proposals_answers_again_in_training_alone(batch: Any) -> None:
    """Breaks: a prediction that no demonstration accepted; a second answer that learns twice
    over."""
    system = lively_system()
    reading = system.read(batch)
    generator = torch.Generator().manual_seed(0)
    passed = system.answer_twice(reading, generator)
    assert passed.everyone
    assert not len(passed.again)
    assert not passed.before.logits.requires_grad
    assert passed.after.logits.requires_grad
    assert not torch.equal(passed.after.logits, passed.before.logits)
    stands = system.answer_twice(reading, generator, prompt_alone=False)
    assert not stands.everyone
    assert stands.after is stands.before
    assert stands.before.logits.requires_grad


def test_without_backward_readings_the_reward_leaves_their_part_out(proposing: Any) -> None:
    """Breaks: test-time training paid by d_rev, or its soft reward in the loss."""
    batch, targets = proposing
    system = lively_system(policy="random")
    with torch.no_grad():
        reading = system.read(batch)
        passed = system.answer_twice(reading, torch.Generator().manual_seed(0))
        bare = system.reward(reading, passed, targets)
        whole = system.reward(reading, passed, targets, system.backward_both(reading, passed))
    assert 0 < len(passed.again) < batch.n_queries
    assert (bare.parts["d_rev"] == 0).all()
    assert (bare.soft == 0).all()
    assert (whole.parts["d_rev"] != 0).any()
    assert (whole.soft != 0).any()
    torch.testing.assert_close(bare.hard + 0.5 * whole.parts["d_rev"], whole.hard)
    for name in ("target", "logits", "shown", "size_right"):
        assert torch.equal(getattr(bare, name), getattr(whole, name)), name


def test_stored_memory_reaches_the_answer_of_other_tasks(batch: Any) -> None:
    system = lively_system()
    base = final_logits(system, batch)
    with torch.no_grad():
        reading = system.read(batch)
        n = 1
        system.solver2.store(
            reading.summary[:n], torch.tensor([-1]), torch.ones(n), torch.ones(n).bool()
        )
    assert not torch.equal(final_logits(system, batch), base)


def other_demonstrations(batch: Any) -> Any:
    """The batch with other outputs in the demonstrations of its first task;
    which queries are its."""
    shown = (batch.demo_task == 0)[:, None, None]
    other = torch.where(shown & (batch.demo_output >= 0), 9 - batch.demo_output, batch.demo_output)
    return dataclasses.replace(batch, demo_output=other), batch.query_task == 0


@pytest.mark.parametrize("prompt", ["null", "shuffled"])
def test_null_and_shuffled_prompts_take_away_the_tokens_and_nothing_else(
    batch: Any, prompt: Any
) -> None:
    """The prompt says nothing of the query's demonstrations; the agent still sees them."""
    system = lively_system(prompt=prompt)
    changed, own = other_demonstrations(batch)
    with torch.no_grad():
        a, b = system.read(batch), system.read(changed)
        full_a, full_b = (lively_system().read(x).prompt.tokens for x in (batch, changed))
    assert torch.equal(a.prompt.tokens[own], b.prompt.tokens[own])
    assert not torch.equal(full_a[own], full_b[own])
    assert not torch.equal(a.sight.evidence[own], b.sight.evidence[own])
    assert torch.equal(a.batch.size_support, batch.size_support)
    assert torch.equal(a.batch.size_candidates, batch.size_candidates)
    assert torch.equal(a.batch.context, batch.context)
    a, b = final_logits(system, batch), final_logits(system, changed)
    assert not torch.equal(a[:, own], b[:, own])


@pytest.mark.parametrize("demonstrations", ["off", "shuffled"])
def test_without_demonstrations_or_with_others_they_reach_nothing(
    batch: Any, demonstrations: Any
) -> None:
    """What a query's own demonstrations show changes nothing any more."""
    system = lively_system(demonstrations=demonstrations)
    changed, own = other_demonstrations(batch)
    a, b = final_logits(system, batch), final_logits(system, changed)
    assert torch.equal(a[:, own], b[:, own])
    full = lively_system()
    a, b = final_logits(full, batch), final_logits(full, changed)
    assert not torch.equal(a[:, own], b[:, own])


@pytest.mark.parametrize("demonstrations", ["off", "shuffled"])
def test_without_demonstrations_no_proposal_can_be_taken(
    proposing: Any, demonstrations: Any
) -> None:
    """They are fitted to the demonstrations: a run without those must not see them through the
    policy."""
    batch, _ = proposing
    generator = torch.Generator().manual_seed(0)
    assert (batch.proposed_size > 0).all(-1).any()
    answered = lively_system(demonstrations=demonstrations).predict(batch, generator, accept=False)
    assert not len(answered.again)
    assert (answered.refinement.choice.taken == 0).all()


def test_no_qwen_drops_the_language_model_and_no_task_tokens_the_table(batch: Any) -> None:
    system = lively_system(prompt="no_qwen")
    base = final_logits(system, batch)
    with torch.no_grad():
        next(iter(system.qwen.backbone.parameters())).mul_(-1.0)
    assert torch.equal(final_logits(system, batch), base)
    system = lively_system(task_tokens=False)
    base = final_logits(system, batch)
    with torch.no_grad():
        system.solver2.task_tokens.weight.mul_(-1.0)
    assert torch.equal(final_logits(system, batch), base)


def test_dropping_the_task_tokens_is_per_query(system: Any, batch: Any) -> None:
    keep = torch.zeros_like(batch.task_index, dtype=torch.bool)
    unseen = dataclasses.replace(batch, task_index=torch.full_like(batch.task_index, -1))
    with torch.no_grad():
        dropped, never = system.read(batch, keep), system.read(unseen)
        kept = system.read(batch)
    assert torch.equal(dropped.prompt.tokens, never.prompt.tokens)
    assert not torch.equal(kept.prompt.tokens, never.prompt.tokens)


def test_the_policy_s_state_is_eight_finite_figures(system: Any, batch: Any) -> None:
    stats = answer_stats(system.answer(system.read(batch)))
    assert stats.shape == (batch.n_queries, N_STATS)
    assert ((stats >= 0) & (stats <= 1.0001)).all()
    assert not stats.requires_grad


def test_the_figures_of_an_answer_are_of_the_cells_inside_it() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 4, 4, 10, generator=g)
    size = torch.tensor([[2, 3], [0, 0]])
    size_logits = torch.randn(2, 2, 30, generator=g)
    size_logits[:, :, 20:] = -torch.inf  # sizes that were ruled out
    output = AgentOutput(
        logits, size_logits, size, torch.randn(3, 2, generator=g), torch.tensor([3, 3])
    )
    stats = answer_stats(output)
    assert stats.shape == (2, N_STATS)
    assert torch.isfinite(stats).all()
    assert stats.min() >= 0
    assert stats.max() <= 1 + 1e-6
    cells = logits[:, 0, :2, :3].reshape(3, 6, 10)
    entropy = torch.distributions.Categorical(logits=cells[-1]).entropy().mean()
    changed = (cells[-1].argmax(-1) != cells[-2].argmax(-1)).float().mean()
    torch.testing.assert_close(stats[0, 1], entropy / torch.tensor(10.0).log())
    torch.testing.assert_close(stats[0, 2], cells[-1].softmax(-1).amax(-1).mean())
    torch.testing.assert_close(stats[0, 3], changed)
    torch.testing.assert_close(stats[:, 0], output.confidence[-1].sigmoid())
    torch.testing.assert_close(stats[0, 5:7], torch.tensor([2.0, 3.0]) / 30)
    torch.testing.assert_close(stats[0, 7], entropy_of_sizes(size_logits[0]))
    assert stats[1, 1:4].eq(0).all()
    outside = torch.ones(2, 4, 4, 1, dtype=torch.bool)
    outside[0, :2, :3] = False
    noisy = logits + 5 * torch.rand(logits.shape, generator=g) * outside
    moved = answer_stats(dataclasses.replace(output, logits=noisy))
    torch.testing.assert_close(moved, stats)


def entropy_of_sizes(size_logits: Any) -> Any:
    """Mean over rows and cols (2, 30), as a share of the largest possible."""
    entropy = torch.distributions.Categorical(logits=size_logits[:, :20]).entropy().mean()
    return entropy / torch.tensor(30.0).log()


def test_reading_twice_gives_the_same_bits(system: Any, batch: Any) -> None:
    with torch.no_grad():
        a, b = system.read(batch), system.read(batch)
    assert torch.equal(a.prompt.tokens, b.prompt.tokens)
    assert torch.equal(system.answer(a).logits.detach(), system.answer(b).logits.detach())


def test_no_module_of_the_prediction_path_takes_targets() -> None:
    names = {f.name for f in dataclasses.fields(arc_system.Batch)}
    assert not {name for name in names if "target" in name or "query_output" in name}


# ---------------------------------------------------------------- proposals


@torch.no_grad()
def answers(system: Any, batch: Any, taken: Any) -> Any:
    """Before, and after the proposals of these numbers (0 = none) with the prompt as it was."""
    reading = system.read(batch)
    return system.answer(reading), system.answer(reading, taking(system, reading, taken))


def test_a_proposal_reaches_cells_size_and_prompt(proposing: Any) -> None:
    """Breaks: no share of cells, of sizes, or no token in the prompt."""
    batch, targets = proposing
    system = lively_system()
    reading = system.read(batch)
    answer = system.answer(reading, taking(system, reading, [1] * batch.n_queries))
    log_p = answer.logits[-1].gather(-1, targets.output.clamp(min=0).unsqueeze(-1)).sum()
    size = answer.size_logits.gather(-1, (targets.size - 1).unsqueeze(-1)).sum()
    (log_p + size).backward()
    agent = system.agent
    verdicts = batch.proposed_facts[:, 0, :5].argmax(-1).unique()
    for gain in (agent.proposal_gain, agent.proposal_size_gain):
        assert (gain.grad[verdicts] != 0).all()
        others = torch.ones(5, dtype=torch.bool)
        others[verdicts] = False
        assert (gain.grad[others] == 0).all()
    assert agent.proposal_token.weight.grad.abs().sum() > 0
    assert agent.pointer.to_proposed.weight.grad.abs().sum() > 0


def test_the_token_of_a_proposal_alone_changes_the_answer(proposing: Any) -> None:
    """Breaks: the prompt says nothing of what is proposed, or says it to the other queries."""
    batch, _ = proposing
    system = lively_system()
    with torch.no_grad():
        system.agent.proposal_gain.fill_(-60.0)  # no share of cells or sizes
        system.agent.proposal_size_gain.fill_(-60.0)
        system.agent.pointer.to_proposed.weight.zero_()
    taken = [1, 0, 1, 0, 0, 1]
    before, after = answers(system, batch, taken)
    changed = (before.logits != after.logits).flatten(2).any(-1).any(0)
    assert changed.tolist() == [bool(t) for t in taken]


def test_keeping_the_own_answer_changes_no_bit(proposing: Any) -> None:
    """Breaks: a proposal that was not taken has a share, a size or a token; a query's taken by its
    neighbours."""
    batch, _ = proposing
    system = lively_system()
    with torch.no_grad():
        system.agent.proposal_gain.fill_(9.0)
    before, after = answers(system, batch, [0] * batch.n_queries)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.size_logits, after.size_logits)
    before, after = answers(system, batch, [0, 1, 0, 0, 0, 1])
    kept = [0, 2, 3, 4]
    assert torch.equal(before.logits[:, kept], after.logits[:, kept])
    assert torch.equal(before.size[kept], after.size[kept])
    assert not torch.equal(before.logits[:, [1, 5]], after.logits[:, [1, 5]])


def test_a_full_verdict_that_is_accepted_decides_answer_and_size(proposing: Any) -> None:
    """Breaks: gain or size gain not applied, of another verdict,
    or another query's proposal taken."""
    batch, _ = proposing
    system = lively_system()
    with torch.no_grad():
        system.agent.proposal_gain[0], system.agent.proposal_size_gain[0] = 12.0, 12.0
        system.policy_rl.proposals.wide.weight[0, 0] = 20.0  # a full verdict is preferred
    answered = system.predict(batch, torch.Generator())
    full = batch.proposed_facts[:, 0, 0] > 0
    assert 2 <= int(full.sum()) < batch.n_queries
    assert (answered.refinement.choice.taken > 0).tolist() == full.tolist()
    changed = []
    for row in full.nonzero().flatten().tolist():
        rows, cols = batch.proposed_size[row, 0].tolist()
        assert answered.after.size[row].tolist() == [rows, cols]
        shown = answered.after.grids()[row, :rows, :cols]
        assert torch.equal(shown, batch.proposed[row, 0, :rows, :cols].long())
        changed.append(not torch.equal(shown, answered.before.grids()[row, :rows, :cols]))
    assert sum(changed) >= 2  # where the own answer was not that one already
    kept = ~full
    assert torch.equal(answered.after.logits[:, kept], answered.before.logits[:, kept])
    assert torch.equal(answered.after.size[kept], answered.before.size[kept])


def test_the_demonstrations_accept_and_refuse(proposing: Any) -> None:
    """Breaks: acceptance always true, never, or blind to the network's own score."""
    batch, _ = proposing
    facts = batch.proposed_facts.clone()
    facts[..., :5] = 0.0
    facts[..., 1] = 1.0  # half a verdict
    facts[..., PROPOSAL_FACTS.index("cells_right")] = 0.7
    batch = dataclasses.replace(batch, proposed_facts=facts)
    system = lively_system()
    with torch.no_grad():
        system.policy_rl.proposals.wide.weight[0, 1] = 20.0

    def taken(**options: Any) -> Any:
        answered = system.predict(batch, torch.Generator(), **options)
        return (answered.refinement.choice.taken > 0).tolist()

    nan = float("nan")
    own = torch.tensor([0.69, 0.71, 0.0, 1.0, 0.7, nan])
    assert taken(own_score=own) == [True, False, True, False, False, False]
    assert taken() == [False] * 6
    assert taken(own_score=own, accept=False) == [True] * 6


def test_a_refused_refinement_leaves_the_prediction_as_it_was(batch: Any) -> None:
    """Breaks: changed tokens in an answer that no demonstration accepted."""
    system = lively_system()
    answered = system.predict(batch, torch.Generator())
    assert answered.after is answered.before
    assert len(answered.again) == 0
    assert answered.backward_before is None
    assert answered.backward_after is None
    assert not answered.before.logits.requires_grad
    assert not torch.equal(final_logits(system, batch), answered.before.logits)


def test_both_answers_of_a_prediction_are_read_backwards(proposing: Any) -> None:
    """Breaks: the backward reading of the answer before in place of the one after."""
    batch, _ = proposing
    system = lively_system()
    with torch.no_grad():
        system.agent.proposal_gain[0], system.agent.proposal_size_gain[0] = 12.0, 12.0
        system.policy_rl.proposals.wide.weight[0, 0] = 20.0
    answered = system.predict(batch, torch.Generator())
    reading = system.read(batch)
    assert len(answered.again)
    with torch.no_grad():
        for output, told in (
            (answered.before, answered.backward_before),
            (answered.after, answered.backward_after),
        ):
            whole = system.backward_of(reading, output.grids(), output.size)
            assert torch.allclose(told, whole[answered.again], atol=1e-5)
    assert not torch.allclose(answered.backward_after, answered.backward_before, atol=1e-3)


def test_queries_answer_again_alone_as_they_would_together(proposing: Any) -> None:
    """Breaks: cells, prompt, proposal or size rules of another query;
    answers put back under another."""
    batch, _ = proposing
    system = lively_system(stop_confidence=1.0)
    with torch.no_grad():
        system.policy_rl.proposals.wide.weight[0, 0] = 20.0
        answered = system.predict(batch, torch.Generator())
        whole = system.answer(system.read(batch), answered.refinement)
    taken = answered.refinement.choice.taken > 0
    assert answered.again.tolist() == taken.nonzero().flatten().tolist()
    assert 2 <= len(answered.again) < batch.n_queries
    for name, axis in (("logits", 1), ("size_logits", 0), ("size", 0), ("confidence", 1)):
        after, together, before = (
            getattr(x, name).movedim(axis, 0) for x in (answered.after, whole, answered.before)
        )
        torch.testing.assert_close(after[taken], together[taken], atol=1e-4, rtol=1e-4)
        assert torch.equal(after[~taken], before[~taken])


def test_what_is_recalled_reaches_the_choice(proposing: Any) -> None:
    """Breaks: recall of another fingerprint, or not handed to the candidates."""
    batch, _ = proposing
    system = lively_system()
    index = torch.tensor([90])
    prints = arc_system.fingerprint(batch)

    def recalled() -> Any:
        reading = system.read(batch)
        with torch.no_grad():
            before = system.answer(reading)
        choice = system.refine(reading, before, None, deterministic=True).choice
        return choice.candidates.relation[..., RELATION.index("recalled")]

    assert (recalled() == 0).all()
    system.solver2.store_arms(prints[:1], index, torch.full((1, N_ARM_SLOTS), 0.625))
    there = batch.proposed_size[:, 0, 0] > 0
    assert (recalled()[there, 1] == 0.625).all()


def test_fingerprints_are_blind_to_colours_and_to_the_query(task_set: Any) -> None:
    """Breaks: colours in the fingerprint (memory would know a task in one view only),
    the query in it."""
    task = task_set.train[0]
    shifted = View(0, (0, 4, 5, 6, 7, 8, 9, 3, 1, 2))
    a, b = (next(evaluation_batches([task], view)) for view in (View(), shifted))
    assert torch.equal(arc_system.fingerprint(a), arc_system.fingerprint(b))
    other = dataset_arc.Pair(np.zeros((9, 9), np.uint8), None)
    c = next(evaluation_batches([dataclasses.replace(task, tests=(other,))]))
    assert torch.equal(arc_system.fingerprint(a), arc_system.fingerprint(c))
    another = next(evaluation_batches([task_set.train[1]]))
    assert not torch.equal(arc_system.fingerprint(a), arc_system.fingerprint(another))


def test_memory_is_told_per_task_and_arm_the_share_that_was_right(proposing: Any) -> None:
    """Breaks: right over all queries in place of those where the arm proposed; tasks mixed up."""
    batch, _ = proposing
    facts = torch.zeros_like(batch.proposed_facts)
    right = torch.zeros(facts.shape[:2], dtype=torch.bool)
    first = batch.query_task == 0
    q = first.nonzero().flatten().tolist()
    facts[q[0], 0, ARM_FACTS.start] = facts[q[1], 0, ARM_FACTS.start] = 1.0
    right[q[0], 0] = True
    facts[~first, 0, ARM_FACTS.start + 1] = 1.0
    right[~first, 0] = True
    prints = torch.rand(batch.n_queries, 3)
    batch = dataclasses.replace(batch, proposed_facts=facts)
    mean, owner, share = arc_system.arms_right(batch, prints, right)
    assert owner.tolist() == [int(batch.task_index[q[0]]), int(batch.task_index[~first][0])]
    torch.testing.assert_close(mean[0], prints[first].mean(0))
    assert share[:, :3].tolist() == [[0.5, -1.0, -1.0], [-1.0, 1.0, -1.0]]
