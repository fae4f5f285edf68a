"""The five modules together: building, ablations, refinement, prediction without targets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import differing, lively_system

import arc_system
from arc_system import SystemConfig, answer_stats, build_system
from policy_refined import N_STATS
from qwen_hybrid_prompt import ModelError

NAMES = {"agent", "qwen", "solver2", "efe_loss", "policy_rl"}


@pytest.fixture
def batch(whole_batch):
    return whole_batch


@torch.no_grad()
def final_logits(system, batch, seed=0):
    """Of the answer after a refinement, as training sees it: tokens changed, a proposal taken."""
    reading = system.read(batch)
    before = system.answer(reading)
    generator = torch.Generator().manual_seed(seed)
    refinement = system.refine(reading, before, generator, deterministic=True)
    return system.answer(reading, refinement).logits


def test_the_modules_have_the_names_of_a_checkpoint(system):
    assert set(system.modules()) == NAMES
    assert all(module.training is False for module in system.modules().values())


def test_weights_are_a_function_of_the_seed_and_leave_global_randomness_alone():
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


def test_a_model_that_is_none_is_a_model_error():
    with pytest.raises(ModelError, match="neither 'auto', 'tiny'"):
        build_system(SystemConfig(width=32, heads=2, qwen_model="no such model"))


def test_policy_off_leaves_the_answer_and_the_tokens_alone(batch):
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


def test_policy_on_changes_the_answer_and_random_does_so_by_the_generator(batch):
    system = lively_system()
    with torch.no_grad():
        before = system.answer(system.read(batch))
    assert not torch.equal(final_logits(system, batch), before.logits)
    assert torch.equal(final_logits(system, batch), final_logits(system, batch))
    noisy = lively_system(policy="random")
    a, b = (final_logits(noisy, batch, seed) for seed in (1, 2))
    assert not torch.equal(a, b)


def test_the_prompt_reaches_the_answer_through_every_part(batch):
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


def test_stored_memory_reaches_the_answer_of_other_tasks(batch):
    system = lively_system()
    base = final_logits(system, batch)
    with torch.no_grad():
        reading = system.read(batch)
        n = 1
        system.solver2.store(
            reading.summary[:n], torch.tensor([-1]), torch.ones(n), torch.ones(n).bool()
        )
    assert not torch.equal(final_logits(system, batch), base)


def other_demonstrations(batch):
    """The batch with other outputs in the demonstrations of its first task; which queries are its."""
    shown = (batch.demo_task == 0)[:, None, None]
    other = torch.where(shown & (batch.demo_output >= 0), 9 - batch.demo_output, batch.demo_output)
    return dataclasses.replace(batch, demo_output=other), batch.query_task == 0


@pytest.mark.parametrize("prompt", ["null", "shuffled"])
def test_null_and_shuffled_prompts_take_away_the_tokens_and_nothing_else(batch, prompt):
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
def test_without_demonstrations_or_with_others_they_reach_nothing(batch, demonstrations):
    """What a query's own demonstrations show changes nothing any more."""
    system = lively_system(demonstrations=demonstrations)
    changed, own = other_demonstrations(batch)
    a, b = final_logits(system, batch), final_logits(system, changed)
    assert torch.equal(a[:, own], b[:, own])
    full = lively_system()
    a, b = final_logits(full, batch), final_logits(full, changed)
    assert not torch.equal(a[:, own], b[:, own])


def test_no_qwen_drops_the_language_model_and_no_task_tokens_the_table(batch):
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


def test_dropping_the_task_tokens_is_per_query(system, batch):
    keep = torch.zeros_like(batch.task_index, dtype=torch.bool)
    unseen = dataclasses.replace(batch, task_index=torch.full_like(batch.task_index, -1))
    with torch.no_grad():
        dropped, never = system.read(batch, keep), system.read(unseen)
        kept = system.read(batch)
    assert torch.equal(dropped.prompt.tokens, never.prompt.tokens)
    assert not torch.equal(kept.prompt.tokens, never.prompt.tokens)


def test_the_policy_s_state_is_eight_finite_figures(system, batch):
    with torch.no_grad():
        stats = answer_stats(system.answer(system.read(batch)))
    assert stats.shape == (batch.n_queries, N_STATS)
    assert ((stats >= 0) & (stats <= 1.0001)).all()


def test_reading_twice_gives_the_same_bits(system, batch):
    with torch.no_grad():
        a, b = system.read(batch), system.read(batch)
    assert torch.equal(a.prompt.tokens, b.prompt.tokens)
    assert torch.equal(system.answer(a).logits.detach(), system.answer(b).logits.detach())


def test_no_module_of_the_prediction_path_takes_targets():
    names = {f.name for f in dataclasses.fields(arc_system.Batch)}
    assert not {name for name in names if "target" in name or "query_output" in name}
