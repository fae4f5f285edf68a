"""The agent: shapes, sizes, log-probabilities, five real refinements, pointers, gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lively_system, make_task, taking, write_tasks

import dataset_arc
from arc_agent import (
    N_POINTERS,
    N_STEPS,
    AgentConfig,
    ArcAgent,
    AxialAttention,
    RuleFit,
    SizeHead,
    choose_size,
    rotary_dim,
    rotary_table,
    rotate,
    towards,
)
from arc_system import SystemConfig, build_system
from batches import evaluation_batches, evaluation_targets
from grid_accuracy_loss import size_mask
from grid_parts import COLOURS
from grid_transforms import N_SOURCES
from hypotheses import N_PROPOSAL_FACTS, Proposals
from size_rules import N_SIZE_CANDIDATES


@pytest.fixture
def batch(whole_batch: Any) -> Any:
    return whole_batch


@pytest.fixture
def output(system: Any, batch: Any) -> Any:
    with torch.no_grad():
        return system.answer(system.read(batch))


# ---------------------------------------------------------------- what comes out


def test_logits_are_five_steps_of_log_probabilities(output: Any, batch: Any) -> None:
    n, _, rows, cols = batch.query_sources.shape
    assert output.logits.shape == (N_STEPS, n, rows, cols, 10)
    assert output.logits.dtype == torch.float32
    total = output.logits.exp().sum(-1)
    inside = size_mask(output.size, rows, cols).expand(N_STEPS, -1, -1, -1)
    torch.testing.assert_close(total[inside], torch.ones_like(total[inside]), atol=1e-4, rtol=0)
    assert output.confidence.shape == (N_STEPS, n)
    assert output.size_logits.shape == (n, 2, 30)
    torch.testing.assert_close(
        output.size_logits.exp().sum(-1), torch.ones(n, 2), atol=1e-4, rtol=0
    )


def test_grids_are_minus_one_outside_the_predicted_size(output: Any) -> None:
    grids = output.grids()
    inside = size_mask(output.size, *grids.shape[1:])
    assert (grids[inside] >= 0).all()
    assert (grids[~inside] == -1).all()
    assert output.grids(0).shape == grids.shape


def test_each_planning_step_changes_state_answer_and_confidence(output: Any) -> None:
    for step in range(1, N_STEPS):
        assert not torch.equal(output.logits[step], output.logits[step - 1])
        assert not torch.equal(output.confidence[step], output.confidence[step - 1])


def test_the_answer_so_far_is_fed_back(batch: Any) -> None:
    """Without the feedback of step 1 the later steps come out differently, step 1 does not."""
    system = lively_system()
    with torch.no_grad():
        full = system.answer(system.read(batch)).logits
        system.agent.answer.weight.zero_()
        blind = system.answer(system.read(batch)).logits
    assert torch.equal(full[0], blind[0])
    assert not torch.equal(full[1], blind[1])


def test_planning_steps_follow_the_configuration(batch: Any) -> None:
    system = lively_system(planning_steps=2)
    with torch.no_grad():
        assert system.answer(system.read(batch)).logits.shape[0] == 2


def test_planning_ends_where_the_confidence_says_so(system: Any, batch: Any) -> None:
    """Each query answers as it did at the step at which it was sure; the others plan on."""
    with torch.no_grad():
        reading = system.read(batch)
        whole = system.answer(reading)
        sure = whole.confidence.sigmoid()
        for stop in [*sure[:-1].flatten().tolist(), 0.0]:
            early = system.answer(reading, stop=stop)
            reached = sure[:-1] >= stop
            first = torch.where(reached.any(0), reached.long().argmax(0), N_STEPS - 1)
            assert early.n_steps.tolist() == (first + 1).tolist()
            for query, step in enumerate(first.tolist()):
                for later in range(N_STEPS):
                    at = min(later, step)
                    torch.testing.assert_close(
                        early.logits[later, query], whole.logits[at, query], atol=1e-4, rtol=0
                    )
                    torch.testing.assert_close(
                        early.confidence[later, query], whole.confidence[at, query],
                        atol=1e-4, rtol=0,
                    )  # fmt: skip
    assert whole.n_steps.tolist() == [N_STEPS] * batch.n_queries
    assert len(set(first.tolist())) == 1  # at 0 nobody goes beyond the first step


def test_steps_that_are_not_needed_are_not_computed(
    system: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = system.agent.blocks[0].forward

    def count(x: Any, *rest: Any) -> Any:
        seen.append(len(x))
        return real(x, *rest)

    monkeypatch.setattr(system.agent.blocks[0], "forward", count)
    with torch.no_grad():
        reading = system.read(batch)
        sure = system.answer(reading).confidence.sigmoid()
        assert seen == [batch.n_queries] * N_STEPS
        seen.clear()
        system.answer(reading, stop=0.0)
        assert seen == [batch.n_queries]
        seen.clear()
        stop = sure[0].sort().values[-1].item()
        system.answer(reading, stop=stop)  # one is sure at once
        assert seen[:2] == [batch.n_queries, batch.n_queries - 1]


def test_an_early_stop_is_for_prediction_only(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    system = lively_system(stop_confidence=0.0)
    with torch.no_grad():
        output = system.predict(batch, torch.Generator()).before
    assert output.n_steps.tolist() == [1] * batch.n_queries
    with torch.no_grad():
        assert system.answer(system.read(batch)).n_steps.tolist() == [N_STEPS] * batch.n_queries
    always = lively_system(stop_confidence=1.0)
    with torch.no_grad():
        output = always.predict(batch, torch.Generator()).before
    assert output.n_steps.tolist() == [N_STEPS] * batch.n_queries


def test_results_do_not_depend_on_the_other_queries_of_a_batch(system: Any, task_set: Any) -> None:
    """Padding is neutral: a task alone and beside larger ones gets the same answer."""
    together = next(evaluation_batches(task_set.train, batch_size=6))
    with torch.no_grad():
        all_at_once = system.answer(system.read(together))
        for row, (task_id, _, _) in enumerate(together.pair_ids):
            task = [t for t in task_set.train if t.task_id == task_id]
            alone = next(evaluation_batches(task, batch_size=6))
            one = system.answer(system.read(alone))
            rows, cols = (int(v) for v in one.size[0])
            assert torch.equal(all_at_once.size[row], one.size[0])
            torch.testing.assert_close(
                all_at_once.logits[:, row, :rows, :cols],
                one.logits[:, 0, :rows, :cols],
                atol=2e-4,
                rtol=1e-3,
            )


def test_the_order_of_demonstrations_hardly_matters_to_the_agent(
    system: Any, task_set: Any
) -> None:
    batch = next(evaluation_batches(task_set.train, batch_size=2))
    turned = dataclasses.replace(batch, context=batch.context.flip(1))
    with torch.no_grad():
        a = system.agent.look(batch, system.agent.read_demonstrations(batch))
        b = system.agent.look(turned, system.agent.read_demonstrations(turned))
    torch.testing.assert_close(a.evidence, b.evidence, atol=1e-4, rtol=1e-4)


def test_a_bare_grid_gives_five_steps_of_logits(system: Any) -> None:
    with torch.no_grad():
        for shape in ((1, 1), (3, 4), (30, 30)):
            logits = system.agent(torch.zeros(shape, dtype=torch.long))
            assert logits.shape[0] == N_STEPS
            assert logits.shape[-1] == 10
            assert torch.isfinite(logits).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 31), (2, 2, 2)])
def test_a_bare_grid_of_impossible_shape_is_refused(system: Any, shape: Any) -> None:
    with pytest.raises(ValueError, match=r"sides 1\.\.30"):
        system.agent(torch.zeros(shape, dtype=torch.long))


# ---------------------------------------------------------------- gradients


def test_every_weight_is_reached_by_gradient(proposing: Any) -> None:
    batch, _ = proposing
    system = lively_system().train()
    reading = system.read(batch)
    answer = system.answer(reading, taking(system, reading, [1, 0, 1, 1, 0, 1]))
    back = system.backward_of(reading, answer.grids(), answer.size)
    total = answer.logits.square().mean() + answer.confidence.square().mean()
    (total + answer.size_logits.square().mean() + back.square().mean()).backward()
    dead = [
        name
        for name, p in system.agent.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert dead == []


def test_the_backward_model_learns_from_the_answer_alone(system: Any, batch: Any) -> None:
    """Its logits follow the predicted grid, have gradient to it, and never see the input."""
    with torch.no_grad():
        reading = system.read(batch)
        answer = system.answer(reading)
    logits = answer.logits.clone().requires_grad_()
    back = system.backward(reading, dataclasses.replace(answer, logits=logits))
    assert back.shape == (*batch.query_input.shape, 10)
    back.square().sum().backward()
    assert logits.grad[-1].abs().sum() > 0
    other = dataclasses.replace(batch, query_input=batch.query_input.flip(0).clone())
    with torch.no_grad():
        again = system.backward(dataclasses.replace(reading, batch=other), answer)
    assert torch.equal(back.detach(), again)


def gradients_of_the_backward_model(system: Any, loss: Any) -> Any:
    parameters = list(system.agent.backward_model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return sum(float(g.abs().sum()) for g in found if g is not None)


def test_the_true_output_teaches_the_backward_model_and_the_predicted_one_the_agent(
    batch: Any,
) -> None:
    """A wrong answer reaches the agent through it, and none of its weights."""
    system = lively_system().train()
    reading = system.read(batch)
    answer = system.answer(reading)
    back = system.backward(reading, answer).square().sum()
    assert back.requires_grad
    assert gradients_of_the_backward_model(system, back) == 0
    (reached,) = torch.autograd.grad(back, system.agent.rule.features.weight, retain_graph=True)
    assert reached.abs().sum() > 0
    true = system.backward_of(reading, answer.grids(), answer.size).square().sum()
    assert gradients_of_the_backward_model(system, true) > 0
    agent = torch.autograd.grad(true, system.agent.rule.features.weight, allow_unused=True)
    assert agent == (None,)


def test_the_same_grid_reads_the_same_in_probabilities_and_in_colours(
    system: Any, batch: Any
) -> None:
    with torch.no_grad():
        reading = system.read(batch)
        answer = system.answer(reading)
        colours = torch.nn.functional.one_hot(answer.logits[-1].argmax(-1), 10).float()
        certain = dataclasses.replace(answer, logits=colours.log().unsqueeze(0))
        a = system.backward(reading, certain)
        b = system.backward_of(reading, answer.grids(), answer.size)
    assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["flip", "turn", "recolour"])
def test_the_fit_knows_the_inverse_of_a_rule_that_only_the_demonstrations_show(
    tmp_path: Path, rule: Any
) -> None:
    """An untrained backward model recovers the input from the true output, and not from a copy of
    the input, nor without demonstrations."""
    path = write_tasks(tmp_path / "one.json", {"a": make_task(rule, n_demonstrations=4)})
    tasks = dataset_arc.load_tasks(path).train
    fresh = build_system(SystemConfig(width=32, heads=2, n_tasks=1))
    batch = next(evaluation_batches(tasks))
    truth = evaluation_targets(tasks, batch)
    blind = dataclasses.replace(batch, context=torch.full_like(batch.context, -1))
    with torch.no_grad():
        reading, nothing = fresh.read(batch), fresh.read(blind)
        assert nothing.inverse is not None
        assert nothing.inverse.eq(0).all()
        told = {
            "truth": fresh.backward_of(reading, truth.output, truth.size),
            "copy": fresh.backward_of(reading, batch.query_input, batch.query_input_size),
            "no demonstrations": fresh.backward_of(nothing, truth.output, truth.size),
        }
    index = batch.query_input.clamp(min=0).unsqueeze(-1)
    p = {name: float(back.exp().gather(-1, index).mean()) for name, back in told.items()}
    assert p["truth"] > p["copy"] + 0.1
    assert p["truth"] > p["no demonstrations"] + 0.1


def test_the_backward_model_does_not_depend_on_the_other_queries_of_a_batch(
    system: Any, task_set: Any
) -> None:
    together = next(evaluation_batches(task_set.train, batch_size=6))
    truth = evaluation_targets(task_set.train, together)
    with torch.no_grad():
        at_once = system.backward_of(system.read(together), truth.output, truth.size)
        for row, (task_id, _, _) in enumerate(together.pair_ids):
            task = [t for t in task_set.train if t.task_id == task_id]
            alone = next(evaluation_batches(task))
            own = evaluation_targets(task, alone)
            one = system.backward_of(system.read(alone), own.output, own.size)[0]
            rows, cols = one.shape[:2]
            torch.testing.assert_close(at_once[row, :rows, :cols], one, atol=2e-4, rtol=1e-3)


# ---------------------------------------------------------------- demonstrations


def test_right_names_the_pointers_that_hit_the_demonstrated_colour(system: Any, batch: Any) -> None:
    with torch.no_grad():
        demos = system.agent.read_demonstrations(batch)
    pairs, rows, cols = batch.demo_output.shape
    right = demos.right.view(pairs, rows, cols, N_POINTERS)
    for pair in range(pairs):
        for row in range(rows):
            for col in range(cols):
                colour = int(batch.demo_output[pair, row, col])
                expected = torch.zeros(N_POINTERS)
                if colour >= 0:
                    planes = batch.demo_sources[pair, :, row, col]
                    expected[: len(planes)] = (planes == colour).float()
                    expected[len(planes) + colour] = 1.0
                assert torch.equal(right[pair, row, col], expected)


def test_a_query_without_demonstrations_gets_a_finite_answer(system: Any, batch: Any) -> None:
    alone = dataclasses.replace(batch, context=torch.full_like(batch.context, -1))
    with torch.no_grad():
        answer = system.answer(system.read(alone))
    assert torch.isfinite(answer.logits).all()
    assert torch.isfinite(answer.size_logits).all()


def test_evidence_is_read_off_the_demonstrations(task_set: Any) -> None:
    """An untrained agent already copies where all demonstrations copy."""
    import arc_system

    system = arc_system.build_system(
        arc_system.SystemConfig(width=32, heads=2, n_tasks=6), "cpu"
    ).train(False)
    tasks = [t for t in task_set.train if t.task_id.endswith("same")]
    batch = next(evaluation_batches(tasks))
    with torch.no_grad():
        answer = system.answer(system.read(batch))
    grid = answer.grids()[0, : tasks[0].tests[0].input.shape[0], : tasks[0].tests[0].input.shape[1]]
    assert np.array_equal(grid.numpy(), tasks[0].tests[0].input)


# ---------------------------------------------------------------- the fitted rule


def rule_of_sign(cells: Any, seed: Any) -> Any:
    """Features (1, cells, 7) with a last 1; pointer 3 is right where the first feature is positive,
    pointer 8 elsewhere."""
    features = torch.randn(1, cells, 7, generator=torch.Generator().manual_seed(seed))
    features[..., -1] = 1.0
    right = torch.zeros(1, cells, N_POINTERS)
    right[..., 3] = (features[..., 0] > 0).float()
    right[..., 8] = 1.0 - right[..., 3]
    return features, right


def test_the_rule_of_the_demonstrations_holds_at_new_cells() -> None:
    fit = RuleFit(AgentConfig(width=8, rule_width=6))
    seen, right = rule_of_sign(120, seed=0)
    query, wanted = rule_of_sign(200, seed=1)
    score = fit(query, seen, right, torch.ones(1, 120, dtype=torch.bool))
    assert (score.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9


def test_without_gradient_steps_the_rule_is_ridge_regression() -> None:
    """Against the normal equations, written out in numpy."""
    fit = RuleFit(AgentConfig(width=8, rule_width=6, rule_steps=0)).requires_grad_(False)
    seen, right = rule_of_sign(30, seed=0)
    right[0, :10, 0] = 1.0  # these ten are as in the input
    query, _ = rule_of_sign(9, seed=1)
    mask = torch.arange(30)[None] < 20
    score = fit(query, seen, right, mask)
    x, r = seen[0, :20].double().numpy(), right[0, :20].double().numpy()
    heavier = 1.0 + float(fit.log_changed.exp())
    w = np.where(r[:, 0] > 0, 1.0, heavier)
    w /= w.sum()
    ridge = float(fit.log_ridge.exp()) * np.eye(7)
    rule = np.linalg.solve((x * w[:, None]).T @ x + ridge, (x * w[:, None]).T @ r)
    expected = query[0].double().numpy() @ rule * float(fit.gain[0])
    np.testing.assert_allclose(score[0].numpy(), expected, atol=1e-4)


def test_gradient_steps_make_the_demonstrated_colours_more_likely() -> None:
    seen, right = rule_of_sign(40, seed=2)
    right[..., 5] = right[..., 3]  # two pointers explain the same cells
    mask = torch.ones(1, 40, dtype=torch.bool)

    def surprise(steps: Any) -> Any:
        fit = RuleFit(AgentConfig(width=8, rule_width=6, rule_steps=steps)).requires_grad_(False)
        p = fit(seen, seen, right, mask).softmax(-1)
        return -(p * right).sum(-1).log().mean()

    assert surprise(3) < surprise(1) < surprise(0)


def test_a_step_of_the_rule_is_the_likelihood_s_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    right = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1e-6]], dtype=torch.float64)
    belief = logits.softmax(-1)
    (belief * right).sum(-1).log().sum().backward()
    torch.testing.assert_close(towards(belief.detach(), right), logits.grad)


def test_the_rule_learns_its_features_and_sees_demonstrations_only() -> None:
    torch.manual_seed(0)
    fit = RuleFit(AgentConfig(width=8, rule_width=6))
    x, raw = torch.randn(2, 1, 30, 8)
    _, right = rule_of_sign(30, seed=0)
    right[0, :10, 0] = 1.0  # these ten are as in the input: the others weigh more
    mask = torch.arange(30)[None] < 20
    seen = fit.of(x, raw)
    score = fit(seen[:, :5], seen, right, mask)
    score.square().sum().backward()
    for name, p in fit.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().sum() > 0, name
    unseen = seen.detach().clone()
    unseen[:, 20:] = 7.0
    assert torch.equal(fit(seen[:, :5], unseen, right, mask), score)
    assert not fit(seen[:, :5], seen, right, torch.zeros_like(mask)).any()


def test_axial_attention_sees_its_row_and_column_alone() -> None:
    torch.manual_seed(0)
    attention = AxialAttention(16, 2)
    table = rotary_table(3, 4, rotary_dim(8), torch.device("cpu"))
    x = torch.randn(1, 12, 16)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, 11] = False  # the last cell is outside
    with torch.no_grad():
        before = attention(x, mask, table, 3, 4)
        for cell in range(12):
            other = x.clone()
            other[0, cell] += 1.0
            row, col = divmod(cell, 4)
            sees = [r == row or c == col for r in range(3) for c in range(4)]
            if cell == 11:
                sees = [i == 11 for i in range(12)]
            changed = (attention(other, mask, table, 3, 4) != before).any(-1)[0]
            assert changed.tolist() == sees


# ---------------------------------------------------------------- size


def test_the_size_head_follows_rules_that_the_demonstrations_support() -> None:
    head = SizeHead(8, 3)
    candidates = torch.tensor([[[3, 6, 0], [4, 8, 0]]])
    support = torch.tensor([[[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]])
    log_p = head(torch.zeros(1, 8), candidates, support)
    assert (log_p.argmax(-1) + 1).tolist() == [[6, 8]]
    assert torch.isfinite(log_p).all()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, 2), atol=1e-4, rtol=0)


def test_the_size_head_can_say_any_number() -> None:
    head = SizeHead(8, 3)
    with torch.no_grad():
        head.free.bias[16] = 50.0
        head.free.bias[30 + 28] = 50.0
    log_p = head(torch.zeros(1, 8), torch.tensor([[[3, 6, 0]] * 2]), torch.ones(1, 2, 3))
    assert (log_p.argmax(-1) + 1).tolist() == [[17, 29]]


def test_choose_size_stays_on_the_canvas() -> None:
    logits = torch.zeros(2, 2, 30)
    logits[:, :, 19] = 5.0
    logits[:, :, 4] = 1.0
    canvas = torch.tensor([[20, 30], [19, 5]])
    assert choose_size(logits, canvas).tolist() == [[20, 20], [5, 5]]


# ---------------------------------------------------------------- positions and colours


def test_rotation_keeps_norms_and_depends_on_distance_alone() -> None:
    dim = rotary_dim(16)
    cos, sin = rotary_table(5, 6, dim, torch.device("cpu"))
    x = torch.randn(1, 1, 1, 16).expand(1, 1, 30, 16)
    y = rotate(x, (cos, sin))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    y = y.view(5, 6, 16)
    torch.testing.assert_close((y[0, 0] * y[2, 3]).sum(), (y[1, 2] * y[3, 5]).sum())
    assert (y[0, 0] * y[2, 3]).sum() != (y[0, 0] * y[3, 2]).sum()


def test_weights_are_a_function_of_the_seed() -> None:
    def weights(seed: Any) -> Any:
        torch.manual_seed(seed)
        return ArcAgent(AgentConfig(width=32, heads=2, n_size_candidates=N_SIZE_CANDIDATES))

    a, b, c = weights(1), weights(1), weights(2)
    same = [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    assert all(same)
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


def test_pointers_are_sources_and_colours() -> None:
    assert N_POINTERS == N_SOURCES + COLOURS


def test_a_proposal_larger_than_the_bound_of_the_own_answer_can_be_answered_with(
    system: Any, task_set: Any
) -> None:
    """Breaks: the size of an accepted proposal cut to what the demonstrations call for."""
    task = [t for t in task_set.train if t.task_id.endswith("same")]
    facts = np.zeros((1, N_PROPOSAL_FACTS), np.float32)
    facts[0, 0] = 1.0
    large = np.full((25, 27), 3, np.uint8)
    offer = {(task[0].task_id, 0): Proposals((large,), facts)}
    batch = next(evaluation_batches(task, proposals=offer))
    assert (batch.query_canvas < torch.tensor(large.shape)).all()
    sure = lively_system()
    with torch.no_grad():
        sure.agent.proposal_gain[0] = sure.agent.proposal_size_gain[0] = 20.0
        reading = sure.read(batch)
        answer = sure.answer(reading, taking(sure, reading, [1]))
    assert answer.size.tolist() == [[25, 27]]
    assert (answer.grids()[0, :25, :27] == 3).all()
