"""What the training step hands from part to part, and what the trainer makes of its flags.

Every test names the breakage it is there for (`Breaks:`); `tests/faults/wiring_mutants.py` puts
each
one in and looks. Most of them watch the arguments of the real calls of one `train_step`, or change
what a part says and look at what comes out elsewhere.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    Script,
    differing,
    interrupt_after,
    lively_system,
    make_tasks,
    say,
    showing,
    watch,
    write_tasks,
)

import command_line
import evaluation
import rule_list
import run_lines
import run_scores
import run_state
import trainloop_complete_with_fixes as trainloop
from arc_agent import drawn_steps
from arc_system import answer_stats, arms_right, fingerprint
from batches import TrainingStream, View, evaluation_views
from grid_features import N_CONTROL
from qwen_hybrid_prompt import build_qwen_prompt

# ---------------------------------------------------------------- refinement and second answer


def test_the_second_answer_reads_the_refined_tokens(ready: Any) -> None:
    """Breaks: the second answer is given the old tokens (reward 0 for ever)."""
    step = ready()
    step.take()
    first, second = step.calls["answer"]
    refined = step.one("refine").result
    plain = step.one("read").result.prompt.tokens
    assert first.given.get("refinement") is None
    assert second.given["refinement"] is refined
    assert not torch.equal(refined.tokens, plain)
    assert not torch.equal(first.result.logits, second.result.logits)
    assert refined.info.step is not None


def test_training_takes_every_planning_step(ready: Any) -> None:
    """Breaks: the early stop of prediction in training."""
    step = ready("--stop_confidence", 0, "--draw_steps", "off")
    step.take()
    for call in step.calls["answer"]:
        assert call.result.n_steps.tolist() == [5] * step.batch.n_queries
    assert len(step.one("forward").given["logits"]) == 5


def test_a_batch_s_planning_steps_are_drawn_by_its_place(ready: Any) -> None:
    """Breaks: every batch takes as many, or the two answers take different numbers."""
    step = ready("--no_memory", "--planning_steps", 3)
    taken: list[int] = []
    for epoch, batch in [(0, n) for n in range(8)] + [(1, 0), (1, 1), (0, 0)]:
        step.run.progress.epoch, step.run.progress.batch = epoch, batch
        step.take()
        first, second = (set(call.result.n_steps.tolist()) for call in step.calls["answer"][-2:])
        assert first == second
        taken += first
        assert taken[-1] == drawn_steps(3, step.run.args.seed, epoch, batch, 3)
    assert set(taken) == {1, 2, 3}
    assert taken[0] == taken[-1]


def test_drawn_steps_cost_the_same_time_whatever_their_number() -> None:
    """Breaks: the odds of k steps are not 1 / k."""
    drawn = [drawn_steps(5, 0, n) for n in range(4000)]
    spent = {k: k * drawn.count(k) / sum(drawn) for k in range(1, 6)}
    assert all(abs(share - 0.2) < 0.03 for share in spent.values()), spent


def test_the_policy_sees_the_first_answer_and_then_the_second(ready: Any) -> None:
    """Breaks: the policy's state is of another answer, or the next state is the state."""
    step = ready()
    rl = step.run.system.policy_rl.rl
    watch(rl, "act", step.calls)
    step.take()
    first, second = step.calls["answer"]
    prompt = step.one("read").result.prompt
    state = step.run.system.policy_rl.state
    seen = state(prompt.summary, answer_stats(first.result))
    assert torch.equal(step.one("act").given["state"], seen)
    update = step.one("update").given
    assert torch.equal(
        update["next_state"], state(prompt.summary, answer_stats(second.result)).detach()
    )
    assert not torch.equal(update["next_state"], seen)
    assert torch.equal(update["reward"], step.one("compute_reward").result[0])


def test_the_policy_s_noise_follows_seed_epoch_and_batch(ready: Any) -> None:
    """Breaks: refinement or task dropping drawn from a constant, or without the seed."""
    step = ready("--no_memory", "--planning_steps", 1)
    step.keep_gradients()
    step.run.system.policy_rl.update = lambda *_: {}  # the same policy every time
    actions, kept = [], []
    for seed, epoch, batch in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        step.run.args.seed = seed
        step.run.progress.epoch, step.run.progress.batch = epoch, batch
        step.take()
        actions.append(step.calls["refine"][-1].result.info.action)
        kept.append(step.calls["read"][-1].given["keep_task"].tolist())
    assert torch.equal(actions[0], actions[-1])
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(actions[i], actions[j], atol=0.1)
    assert kept[0] == kept[-1]


def test_half_of_the_tasks_go_without_their_tokens_as_a_whole(ready: Any) -> None:
    """Breaks: task tokens always or never dropped, per query, or by a constant draw."""
    step = ready("--policy", "off", "--planning_steps", 1)
    step.keep_gradients()
    draws = []
    for batch in range(8):
        step.run.progress.batch = batch
        step.take()
        keep = step.calls["read"][-1].given["keep_task"]
        by_task = [keep[step.batch.query_task == task].unique() for task in (0, 1)]
        assert all(len(values) == 1 for values in by_task)
        draws += [bool(values[0]) for values in by_task]
        assert torch.equal(step.calls["tokens"][-1].given["keep_task"], keep)
    assert 4 <= sum(draws) <= 12
    assert len({tuple(draws[i : i + 2]) for i in range(0, 16, 2)}) > 2


# ---------------------------------------------------------------- the choice among proposals


def test_the_choice_learns_from_what_every_candidate_would_have_earned(ready: Any) -> None:
    """Breaks: candidates compared with the second answer, another target or size; rewards or
    exactness not those that are learnt from; the choice never learns."""
    step = ready(proposing=True)
    chooser = step.run.system.policy_rl.proposals
    before = [p.detach().clone() for p in chooser.parameters()]
    figures = step.take()
    first = step.calls["answer"][0].result
    given, (rewards, exact) = step.one("proposal_rewards")
    batch, targets = step.batch, step.targets
    assert torch.equal(given["own"], first.grids())
    assert torch.equal(given["own_size"], first.size)
    assert torch.equal(given["proposed"], batch.proposed)
    assert torch.equal(given["size"], batch.proposed_size)
    assert torch.equal(given["target"], targets.output)
    assert torch.equal(given["target_size"], targets.size)
    assert torch.equal(given["inp"], batch.query_input)
    learnt = step.one("learn_choice").given
    assert learnt["rewards"] is rewards
    assert learnt["exact"] is exact
    choice = step.one("refine").result.choice
    assert learnt["choice"] is choice
    assert any(not torch.equal(a, b) for a, b in zip(before, chooser.parameters(), strict=True))
    there = (batch.proposed_size > 0).all(-1)
    assert figures["proposed_frac"] == pytest.approx(float(there.any(1).float().mean()))
    assert figures["proposal_taken_frac"] == pytest.approx(float((choice.taken > 0).float().mean()))
    assert figures["proposal_exact"] == pytest.approx(float(exact[:, 1:].any(1).float().mean()))
    assert figures["proposal_exact"] >= 0.5
    for name, value in step.one("learn_choice").result.items():
        assert figures[name] == pytest.approx(float(value)), name


def test_where_no_proposal_is_taken_the_first_answer_stands_and_learns(ready: Any) -> None:
    """Breaks: a second answer where nothing was proposed; a first answer without gradient; the
    policy that learns from queries whose prompt it did not change."""
    slopes: list[Any] = []

    def prepare(run: Any, targets: Any) -> None:
        real = run.system.answer

        def answer(reading: Any, refinement: Any = None, **given: Any) -> Any:
            output = real(reading, refinement, **given)
            if refinement is None:
                output.logits.register_hook(slopes.append)
            return output

        run.system.answer = answer

    step = ready("--policy", "random", proposing=True, prepare=prepare)
    step.take()
    first, second = (call.result for call in step.calls["answer"])
    taken = step.one("refine").result.choice.taken
    stays = taken == 0
    again = (~stays).nonzero().squeeze(-1)
    assert 0 < len(again) < len(taken)
    final = step.calls["forward"][0].given
    reward = step.calls["compute_reward"][0]  # the others judge the proposals
    assert torch.equal(reward.given["after"][stays], first.grids()[stays])
    assert torch.equal(reward.given["after"][again], second.grids())
    assert (reward.result[0][stays] == 0).all()
    assert reward.result[0][again].abs().sum() > 0
    assert torch.equal(final["size_logits"][stays], first.size_logits[stays])
    assert torch.equal(final["size_logits"][again], second.size_logits)
    (slope,) = slopes
    learns = slope[-1].abs().sum((1, 2, 3))
    assert (learns > 0).all()
    cells = (step.targets.output >= 0).sum((1, 2))
    assert (learns[stays] * cells[stays]).mean() > (learns[again] * cells[again]).mean()


def test_the_policy_learns_from_the_queries_that_answered_again(ready: Any) -> None:
    """Breaks: prompts that nobody read with their change count as decisions that earned 0."""
    step = ready(proposing=True)
    step.take()
    refinement = step.one("refine").result
    again = (refinement.choice.taken > 0).nonzero().squeeze(-1)
    assert 0 < len(again) < step.batch.n_queries
    update = step.one("update").given
    assert torch.equal(update["info"].action, refinement.info.action[again])
    assert torch.equal(update["info"].step.log_prob, refinement.info.step.log_prob[again])
    assert torch.equal(update["reward"], step.calls["compute_reward"][0].result[0][again])
    assert len(update["next_state"]) == len(again)


def test_a_first_answer_that_was_followed_by_a_second_learns_at_its_weight(ready: Any) -> None:
    """Breaks: only what was answered with a proposal in sight is trained (the network forgets to
    answer by itself); another target, size or weight for it."""
    step = ready("--policy", "random", "--no_reward", proposing=True)
    figures = step.take()
    first = step.calls["answer"][0].result
    again = (step.one("refine").result.choice.taken > 0).nonzero().squeeze(-1)
    final, learns = step.calls["forward"]
    assert torch.equal(learns.given["target"], step.targets.output[again])
    assert torch.equal(learns.given["target_size"], step.targets.size[again])
    assert torch.equal(learns.given["size_logits"], first.size_logits[again])
    assert torch.equal(learns.given["confidence"], first.confidence[:, again])
    right = (first.size[again] == step.targets.size[again]).all(-1)
    assert torch.equal(learns.given["size_right"], right)
    assert learns.given["size_weight"] == final.given["size_weight"]
    share = trainloop.FIRST_ANSWER_WEIGHT * len(again) / step.batch.n_queries
    total = final.result["total"] + share * learns.result["total"]
    assert figures["loss"] == pytest.approx(0.7 * float(total.detach()), rel=1e-5)


@pytest.mark.parametrize("flags", [("--policy", "random"), ("--policy", "off")])
def test_a_policy_that_is_not_on_learns_no_choice(ready: Any, flags: Any) -> None:
    """Breaks: the ablation that goes on learning."""
    step = ready(*flags, proposing=True)
    before = [p.detach().clone() for p in step.run.system.policy_rl.proposals.parameters()]
    step.take()
    after = step.run.system.policy_rl.proposals.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_second_answer_takes_what_was_drawn(ready: Any) -> None:
    """Breaks: the first draw not carried out, or another one; the proposal of another query."""
    step = ready("--policy", "random", proposing=True)
    step.take()
    refinement = step.one("refine").result
    taken = refinement.choice.drawn[:, 0]
    assert (refinement.choice.drawn != taken[:, None]).any(0)[1:].all()
    assert len(taken.unique()) > 1
    for row, number in enumerate(taken.tolist()):
        size = step.batch.proposed_size[row, number - 1] if number else torch.zeros(2).long()
        assert torch.equal(refinement.proposal.size[row], size)
        rows, cols = size.tolist()
        if number:
            shown = refinement.proposal.colours[row, :rows, :cols]
            wanted = step.batch.proposed[row, number - 1, :rows, :cols].long()
            assert torch.equal(shown, wanted)
            facts = step.batch.proposed_facts[row, number - 1]
            assert torch.equal(refinement.proposal.facts[row], facts)
        else:
            assert (refinement.proposal.colours[row] == -1).all()
    again = (taken > 0).nonzero().squeeze(-1)
    assert 0 < len(again) < len(taken)
    given = step.calls["answer"][1].given
    assert torch.equal(given["refinement"].proposal.colours, refinement.proposal.colours[again])
    assert torch.equal(given["refinement"].tokens, refinement.tokens[again])
    assert torch.equal(given["reading"].sight.cells, step.one("read").result.sight.cells[again])


def test_the_choice_follows_seed_epoch_and_batch(ready: Any) -> None:
    """Breaks: draws from a constant generator."""
    step = ready("--planning_steps", 1, proposing=True)
    step.keep_gradients()
    step.run.system.policy_rl.update = lambda *_: {}
    step.run.system.policy_rl.learn_choice = lambda *_: {}
    drawn = []
    for seed, epoch, batch in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        step.run.args.seed = seed
        step.run.progress.epoch, step.run.progress.batch = epoch, batch
        step.take()
        drawn.append(step.calls["refine"][-1].result.choice.drawn.tolist())
    assert drawn[0] == drawn[-1]
    assert len({str(d) for d in drawn}) >= 3


def test_memory_is_told_which_arms_were_right(ready: Any) -> None:
    """Breaks: arms stored without being asked, under another task, or the own answer among them."""
    step = ready(proposing=True)
    step.take()
    exact = step.one("proposal_rewards").result[1]
    given = step.one("store_arms").given
    assert set(given["task_index"].tolist()) == set(step.batch.task_index.tolist())
    wanted = arms_right(step.batch, fingerprint(step.batch), exact[:, 1:])
    for name, value in zip(("fingerprint", "task_index", "right"), wanted, strict=True):
        assert torch.equal(given[name], value), name
    assert given["right"].max() == 1.0
    recall = step.one("recall").given
    assert torch.equal(recall["fingerprint"], fingerprint(step.batch))
    assert torch.equal(recall["task_index"], step.batch.task_index)
    without = ready("--no_memory", proposing=True)
    without.take()
    assert "store_arms" not in without.calls


class Fitted:
    """A fitter with everything done, but `n_late` tasks that come after the voting has begun."""

    failed = None
    n_busy = 0

    def __init__(self, tasks: Any, n_late: Any = 0) -> None:
        self.asked: list[Any] = []
        self.found = {
            (t.task_id, i): e
            for t in tasks
            for i, e in enumerate(
                rule_list.fit_task(
                    [(p.input, p.output) for p in t.demonstrations], [p.input for p in t.tests]
                )
            )
        }
        self.n_tasks, self.n_late = len(tasks), n_late

    def collect(self, deadline: Any = None, n_tasks: Any = None, waiting: Any = None) -> Any:
        n = self.n_tasks - (self.n_late if not self.asked and n_tasks is None else 0)
        self.asked.append((deadline, n_tasks))
        return dict(list(self.found.items())[: n if n_tasks is None else n_tasks])

    def n_first(self) -> Any:
        return self.n_tasks  # those that came after the voting had begun, too


@pytest.fixture
def scored(ready: Any, task_set: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`scored(fitter, *flags)`: (results of `evaluate`, what `predict_tasks` was given each
    time)."""

    def make(fitter: Any, *flags: Any, stop: Any = None, busy: int = 0, **options: Any) -> Any:
        step = ready(*flags)
        step.run.stop = stop
        step.run.fitter = SimpleNamespace(n_busy=busy)
        given = []
        real = evaluation.predict_tasks

        def predict(system: Any, tasks: Any, views: Any, **rest: Any) -> Any:
            given.append({**rest, "tasks": tasks})
            return real(system, tasks, views, **rest)

        monkeypatch.setattr(evaluation, "predict_tasks", predict)
        keys = evaluation.validation_keys(task_set.train, None, 0)
        result = run_scores.evaluate(step.run, task_set, keys, 1, fitter=fitter, **options)
        monkeypatch.setattr(evaluation, "predict_tasks", real)
        return result, given

    return make


def test_acceptance_asks_what_it_says(scored: Any, task_set: Any) -> None:
    """Breaks: --acceptance not passed on; the network asked where its score is not needed, or not
    asked."""
    fitter = Fitted(task_set.train)
    doubtful = evaluation.contested(fitter.found)
    assert 0 < len(doubtful) < 6
    result, given = scored(fitter, "--acceptance", "demonstrations")
    asked, voted = given
    assert {t.task_id.split("/")[0] for t in asked["tasks"]} == doubtful
    assert set(voted["own_scores"]) == doubtful
    assert voted["accept"]
    assert asked.get("proposals") is None
    assert result["acceptance"] == "demonstrations"
    for kind, accept in (("full", True), ("off", False)):
        _, (voted,) = scored(fitter, "--acceptance", kind)
        assert voted["own_scores"] is None
        assert voted["accept"] == accept
        assert set(voted["proposals"]) == {k for k, e in fitter.found.items() if e.hypotheses}


def test_an_evaluation_takes_the_threads_that_hypotheses_leave(
    scored: Any, task_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: --threads without effect on a tiny model's evaluation, all of them taken while
    hypotheses are fitted, or fewer although other cores are free."""
    monkeypatch.setattr(run_state, "cores", lambda: 3)
    fitter = Fitted(task_set.train)
    _, given = scored(fitter, "--threads", "3", "--acceptance", "demonstrations")
    assert [one["at_once"] for one in given] == [3, 3]
    for busy, at_once in ((1, 2), (3, 1), (9, 1)):
        _, given = scored(Fitted(task_set.train), "--threads", "3", busy=busy)
        assert {one["at_once"] for one in given} == {at_once}
    monkeypatch.setattr(run_state, "cores", lambda: 5)
    _, given = scored(Fitted(task_set.train), "--threads", "3", busy=3)
    assert {one["at_once"] for one in given} == {2}


def test_hypotheses_that_come_late_vote_and_both_numbers_are_told(
    scored: Any, task_set: Any
) -> None:
    """Breaks: late hypotheses lost; the run's numbers do not repeat it."""
    until = time.monotonic() + 600
    fitter = Fitted(task_set.train, n_late=2)
    result, (voted,) = scored(fitter, "--acceptance", "full", deadline=until)
    assert len(voted["proposals"]) <= 4
    assert [n for _, n in fitter.asked] == [None, None]
    assert fitter.asked[0][0] <= time.monotonic()  # the voting waits for nothing
    assert fitter.asked[1][0] == until
    assert result["hypothesis_tasks"] == [4, 6]
    assert result["hypothesis_queries"] == 6
    again = Fitted(task_set.train)
    same, (voted_again,) = scored(again, "--acceptance", "full", "--hypothesis_tasks", "4:6")
    assert [n for _, n in again.asked] == [4, 6]
    assert set(voted_again["proposals"]) == set(voted["proposals"])
    assert same == result


def test_a_stop_is_heeded_while_the_demonstrations_are_asked(scored: Any, task_set: Any) -> None:
    """Breaks: Ctrl+C that waits for a view of all doubtful tasks."""
    asked, answered = [], []
    real = evaluation.demonstration_scores

    def demonstrations(system: Any, tasks: Any, **options: Any) -> Any:
        asked.append(len(tasks))
        answered.append(real(system, tasks, **options))
        return answered[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "demonstration_scores", demonstrations)
        with pytest.raises(run_state.StopRequested):
            scored(Fitted(task_set.train), "--acceptance", "demonstrations", stop=stopped_after(0))
    assert asked == [len(evaluation.contested(Fitted(task_set.train).found))]
    assert answered == []


def stopped_after(n: Any) -> Any:
    """Signals that ask to stop when they have been looked at n times."""

    class Signals:
        looked = 0

        @property
        def requested(self) -> Any:
            self.looked += 1
            return self.looked > n

    return Signals()


# ---------------------------------------------------------------- precision, gradients, steps


@pytest.mark.parametrize(("amp", "dtype"), [("off", None), ("bf16", torch.bfloat16)])
def test_mixed_precision_is_on_where_it_was_asked_for(
    ready: Any, task_set: Any, amp: Any, dtype: Any
) -> None:
    """Breaks: autocast never on (or always), in training or in evaluation."""
    seen: list[Any] = []

    def prepare(run: Any, _: Any) -> None:
        for name in ("read", "answer", "refine", "backward", "backward_of"):
            real = getattr(run.system, name)

            def call(*args: Any, real: Any = real, **options: Any) -> Any:
                seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
                return real(*args, **options)

            setattr(run.system, name, call)

    step = ready("--amp", amp, prepare=prepare)
    step.take()
    assert len(seen) >= 7
    assert set(seen) == {dtype or False}
    seen.clear()
    keys = evaluation.validation_keys(task_set.train, None, 0)
    run_scores.evaluate(step.run, task_set, keys, 1)
    assert len(seen) >= 3
    assert set(seen) == {dtype or False}


def test_gradient_accumulation_averages(ready: Any) -> None:
    """Breaks: `loss / grad_accum` without the division, or by another number."""
    found = {}
    for n in (1, 3):
        alike = ("--policy", "off", "--no_memory", "--clip", 1e9, "--draw_steps", "off")
        step = ready("--grad_accum", n, *alike)
        step.keep_gradients()
        for number in range(n):
            step.take(last=number == n - 1)
        found[n] = step.gradients()
    assert any(g.abs().sum() > 0 for g in found[1].values())
    for name, gradient in found[1].items():
        assert (found[3][name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name


def test_every_learning_rate_follows_the_schedule(ready: Any) -> None:
    """Breaks: the factor of warmup and decay is logged and not applied."""
    step = ready("--warmup_batches", 4, "--qwen_lr", 0.004)
    rates = []
    step.run.optimizer.step = lambda: rates.append(
        {g["name"]: g["lr"] / g["base_lr"] for g in step.run.optimizer.param_groups}
    )
    for total in (0, 1, 3, 9):
        step.run.progress.total = total
        figures = step.take()
        assert set(rates[-1].values()) == {figures["lr_factor"]} == {min(1.0, (total + 1) / 4)}
    assert {"agent", "qwen", "qwen_heads", "task_tokens", "solver2"} <= set(rates[0])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_no_weight_and_no_average(ready: Any, where: Any) -> None:
    """Breaks: only the loss, or only the gradient, is looked at; the average takes the batch in."""

    def prepare(run: Any, _: Any) -> None:
        real = run.system.efe_loss.forward

        def forward(**given: Any) -> Any:
            parts = real(**given)
            if where == "loss":
                return {**parts, "total": parts["total"] + float("inf")}
            parts["total"].register_hook(lambda g: g * float("nan"))
            return parts

        run.system.efe_loss.forward = forward

    step = ready("--no_reward", prepare=prepare)
    main = [p for g in step.run.optimizer.param_groups for p in g["params"]]
    before = [p.detach().clone() for p in main]
    averages = [a.clone() for a in step.run.average.average]
    step.take()
    assert step.run.progress.skipped == step.run.progress.skipped_in_a_row == 1
    assert differing(before, [p.detach() for p in main]) == []
    assert step.run.average.n_updates == 0
    assert differing(averages, step.run.average.average) == []


GRADIENTS = {  # figure -> the weights whose gradients it measures
    "qwen_grad": r"qwen\.backbone\.",
    "qwen_heads_grad": r"qwen\.(?!backbone\.)",
    "agent_grad": r"agent\.",
    "memory_grad": r"solver2\.",
    "refinement_grad": r"policy_rl\.(?!rl\.|proposals\.)",
}


def test_the_logged_gradient_norms_are_each_part_s_own(ready: Any) -> None:
    """Breaks: a constant, or another part's norm, in its place."""
    step = ready("--clip", 1e9)
    step.keep_gradients()
    norms = []
    for weight in (0.01, 50.0):  # the second a stronger pull on the prompt
        for module in step.run.system.modules().values():
            module.zero_grad()
        step.run.system.efe_loss.lambda_prompt.fill_(weight)
        figures = step.take()
        found = step.gradients()
        for name, of_part in GRADIENTS.items():
            own = [g.norm() for n, g in found.items() if re.match(of_part, n)]
            assert figures[name] == pytest.approx(float(torch.stack(own).norm()), rel=1e-4), name
            assert figures[name] > 0, name
        norms.append(figures["qwen_grad"])
    assert norms[1] > 1.5 * norms[0] > 0


def test_gradient_norms_are_those_of_the_loss_also_between_two_steps(ready: Any) -> None:
    """Breaks: norms of scaled gradients where the scaler has not yet taken its scale out."""
    step = ready(
        "--amp", "fp16", "--grad_accum", 2, "--policy", "off", "--no_memory", "--clip", 1e9
    )
    step.run.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step.keep_gradients()
    first, both = step.take(last=False), step.take()
    assert step.run.progress.skipped == 0
    for name in set(GRADIENTS) - {"refinement_grad"}:
        assert first[name] > 0
        assert both[name] == pytest.approx(2 * first[name], rel=0.02), name


# ---------------------------------------------------------------- the log


LINE = re.compile(
    r"^\[Batch +(\d+)\] Reward: (\S+) \| Loss: (\S+) \| Qwen_grad: (\S+) \| Mask_ratio: (\S+)$",
    re.MULTILINE,
)


def test_the_batch_lines_and_summaries_say_the_figures_of_the_metrics(reference: Any) -> None:
    """Breaks: a constant or another figure in the line; a summary of the last batch alone."""
    rows = {(row["epoch"], row["batch"]): row for row in reference.rows("batch")}
    lines = LINE.findall(reference.out)
    assert len(lines) == 2
    names = ("reward", "loss", "qwen_grad", "mask_ratio")
    for epoch, line in enumerate(lines):
        row = rows[epoch, int(line[0])]
        for name, said in zip(names, line[1:], strict=True):
            close: Any = {"rel": 6e-3} if name == "qwen_grad" else {"abs": 6e-4}
            assert float(said) == pytest.approx(row[name], **close), name
    assert lines[0][1:] != lines[1][1:]
    said = {
        "loss": re.findall(r"Average Loss: (\S+)", reference.out),
        "reward": re.findall(r"Average RL Reward: (\S+)", reference.out),
        "qwen_grad": re.findall(r"Qwen Gradient Norm: (\S+)", reference.out),
        "mask_ratio": re.findall(r"Average Mask Ratio: (\S+)", reference.out),
    }
    for epoch in (0, 1):
        of_epoch = [row for key, row in rows.items() if key[0] == epoch]
        assert len(of_epoch) > 1
        (summary,) = (row for row in reference.rows("epoch") if row["epoch"] == epoch)
        for name, values in said.items():
            mean = sum(row[name] for row in of_epoch) / len(of_epoch)
            assert summary[name] == pytest.approx(mean, rel=1e-6, abs=1e-9), name
            assert float(values[epoch]) == pytest.approx(mean, rel=6e-3, abs=6e-5), name


def test_every_figure_of_the_batch_line_is_its_own(ready: Any) -> None:
    """Breaks: one figure in the place of another (of an untrained model many are 0)."""
    step = ready()
    figures = step.take() | {
        "reward": 0.1234, "loss": 2.3456, "qwen_grad": 3.45e-4, "mask_ratio": 0.4567,
        "d_acc": -0.5678, "exact": 0.679,
    }  # fmt: skip
    said: list[str] = []
    step.run.log.say = lambda text, **_: said.append(text)
    step.run.progress.batch = 50
    run_lines.log_batch(step.run, figures)
    assert LINE.findall(said[0]) == [("50", "+0.1234", "2.3456", "3.45e-04", "0.4567")]
    step.run.recent.add(figures)
    run_lines.log_batch(step.run, figures)
    assert said[-1].split("average: ")[1] == (
        "reward +0.1234, d_acc -0.5678, loss 2.3456, exact 0.679"
    )
    kept = trainloop.checkpoint_metrics(figures)
    assert {name: figures[name] for name in kept} == pytest.approx(kept, abs=1e-6)
    assert {"loss", "reward", "qwen_grad", "mask_ratio", "d_acc"} <= set(kept)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


BAR = re.compile(r"Epoch 0: +\d+%\|[^|]*\| (\d+)/(\d+) \[")


def test_a_terminal_shows_the_bar_and_a_resumed_one_goes_on_where_it_was(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: the bar never shown on a terminal, shown elsewhere, or begun at 0 on a resume."""
    flags = (
        "--max_batches", 3, "--val_pairs", 1, "--eval_views", 1, "--policy", "off",
        "--planning_steps", 1,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        stopped = train(*flags)  # no terminal
    assert stopped.code == 130
    assert not BAR.search(stopped.err)
    with monkeypatch.context() as patch:
        patch.setattr(io, "StringIO", Terminal)
        resumed = train("--resume", *flags)
    assert resumed.code == 0, resumed.err
    shown = BAR.findall(resumed.err)
    assert shown
    assert shown[0] == ("2", "3")
    assert "[Epoch 0] Val Accuracy" in resumed.out
    with monkeypatch.context() as patch:
        patch.setattr(io, "StringIO", Terminal)
        short = train("--schedule_batches", "1:2", *flags[2:])
    assert {total for _, total in BAR.findall(short.err)} == {"2"}  # where the schedule ends
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        shows = [not command_line.no_bar(quiet) for quiet in (False, True)]
        patch.setattr(sys, "stderr", None)  # as Python has it where the user has closed it
        assert command_line.no_bar(False)
    assert shows == [True, False]


# ---------------------------------------------------------------- the headline


def test_the_headline_is_scored_with_the_last_weights_and_their_average(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: results.json scored with the best checkpoint's weights, or with its average."""
    seen: list[dict[str, Any]] = []

    def predict(system: Any, *args: Any, **options: Any) -> Any:
        seen.append(
            {
                f"{module}.{name}": value.detach().clone()
                for module, part in system.modules().items()
                for name, value in part.state_dict().items()
            }
        )
        return {}  # nothing is scored: the first epoch stays the best

    monkeypatch.setattr(evaluation, "predict_tasks", predict)
    outcome = train("--epochs", 2, "--max_batches", 2, "--ema", 0.5, "--eval_views", 2)
    assert outcome.code == 0, outcome.err
    best = torch.load(outcome.folder / "best_model.pt", weights_only=True)
    last = outcome.checkpoint()
    assert (best["epoch"], last["epoch"]) == (0, 1)
    assert len(seen) == 4  # untrained, two validations, the headline

    def as_evaluated(file: Any) -> Any:
        found = {
            f"{module}.{name}": value
            for module in ("agent", "qwen", "solver2", "efe_loss", "policy_rl")
            for name, value in file[module].items()
        }
        extra = file["extra"]
        return found | dict(zip(extra["average_names"], extra["average"]["average"], strict=True))

    headline = seen[-1]
    wanted, other = as_evaluated(last), as_evaluated(best)
    assert differing({n: headline[n] for n in wanted}, wanted) == []
    averaged = set(last["extra"]["average_names"])
    apart = {n for n in wanted if not torch.equal(wanted[n], other[n])}
    assert apart & averaged  # the best is another model, in averaged
    assert apart - averaged  # and in other weights
    raw = {f"agent.{name}": value for name, value in last["agent"].items()}
    assert any(not torch.equal(headline[n], raw[n]) for n in raw)


def test_the_headline_is_of_all_test_pairs_and_validation_of_the_subset(train: Any) -> None:
    """Breaks: the headline on the validation subset; validation of whole tasks, not of the
    pairs."""
    data = write_tasks(train.folder / "two.json", make_tasks(("flip", "same", "swap"), n_tests=2))
    flags = ("--eval_views", 3, "--vote_batches", 1)
    outcome = train("--epochs", 1, "--val_pairs", 3, *flags, data=data)
    assert outcome.code == 0, outcome.err
    results = json.loads((outcome.folder / "results.json").read_text())
    assert results["n"] == 6
    assert results["views"] == 3
    assert results["batches_done"] == 1  # the first view is always whole
    assert re.search(r"Val Accuracy: \d\.\d{4} \(\d/3\)", outcome.out)


@pytest.mark.parametrize("seed", [0, 4])
def test_evaluation_knows_the_training_tasks_the_views_and_the_seed(
    ready: Any, task_set: Any, monkeypatch: pytest.MonkeyPatch, seed: Any
) -> None:
    """Breaks: evaluation without the tasks' own tokens, with other views, or blind to the seed."""
    step = ready("--seed", seed)
    given: dict[str, Any] = {}
    real = evaluation.predict_tasks

    def predict(system: Any, tasks: Any, views: Any, **options: Any) -> Any:
        given.update(options, tasks=tasks, views=views)
        return real(system, tasks, views, **options)

    monkeypatch.setattr(evaluation, "predict_tasks", predict)
    keys = evaluation.validation_keys(task_set.train, None, seed)
    result = run_scores.evaluate(step.run, task_set, keys, 3, max_batches=1)
    assert given["views"] == evaluation_views(3, seed)
    assert given["seed"] == seed
    assert given["only"] == keys
    assert given["dtype"] is None
    assert all(pair.output is None for task in given["tasks"] for pair in task.tests)
    asked = [call.given["batch"] for call in step.calls["read"]]
    table = step.run.stream.task_table
    for batch in asked:
        rows = [table[task_id] for task_id, *_ in batch.pair_ids]
        assert batch.task_index.tolist() == rows
    assert result["n"] == len(keys)
    assert result["batches_done"] == len(asked)  # --vote_batches 1: the first view alone, whole
    assert sum(batch.n_queries for batch in asked) == len(keys)


def test_predictions_do_not_hang_on_the_generator_with_the_policy_on(proposing: Any) -> None:
    """Breaks: evaluation samples an action or a proposal in place of taking the preferred one."""
    system = lively_system()
    a, b = (
        system.predict(proposing[0], torch.Generator().manual_seed(seed), accept=False)
        for seed in (1, 2)
    )
    assert torch.equal(a.after.logits, b.after.logits)
    assert torch.equal(a.refinement.tokens, b.refinement.tokens)
    assert torch.equal(a.refinement.choice.taken, b.refinement.choice.taken)
    assert not torch.equal(a.after.logits, a.before.logits)


# ---------------------------------------------------------------- seeds


def test_another_seed_shows_the_tasks_in_other_views_and_so_does_another_epoch(train: Any) -> None:
    """Breaks: views that ignore --seed or the epoch."""

    def views(seed: Any, epoch: Any) -> Any:
        run = train("--dry_run", "--seed", seed).run
        shown = {}
        for position in range(run.stream.n_batches(epoch)):
            batch, _ = run.stream.batch(epoch, position)
            for (task_id, *_), view in zip(batch.pair_ids, batch.views, strict=True):
                shown[task_id] = view
        assert len(shown) == 6
        return shown

    first = views(0, 0)
    assert views(0, 0) == first
    for other in (views(1, 0), views(0, 1)):
        same = [task for task in first if first[task] == other[task]]
        assert len(same) < 2


# ---------------------------------------------------------------- flags


def groups(run: Any) -> dict[str, Any]:
    return {group["name"]: group for group in run.optimizer.param_groups}


FLAGS: list[tuple[tuple[Any, ...], Callable[[Any], Any], Any]] = [
    (("--qwen_cache_interval", 3), lambda run: run.system.qwen.cache.interval, 3),
    (("--planning_steps", 2), lambda run: run.system.agent.config.n_steps, 2),
    (("--blocks", 2), lambda run: len(run.system.agent.blocks), 2),
    (("--width", 48), lambda run: run.system.agent.config.width, 48),
    (("--max_context", 1), lambda run: run.stream.batch(0, 0)[0].context.shape[1], 1),
    (("--batch_size", 3), lambda run: run.stream.batch(0, 0)[0].n_queries, 3),
    (("--views", "off"), lambda run: set(run.stream.batch(0, 0)[0].views), {View()}),
    (("--augment", "off"), lambda run: set(run.stream.batch(0, 0)[0].views), {View()}),
    (("--ema", 0.5), lambda run: run.average.decay, 0.5),
    (("--weight_decay", 0.3), lambda run: groups(run)["agent"]["weight_decay"], 0.3),
    (("--weight_decay", 0.3), lambda run: groups(run)["task_tokens"]["weight_decay"], 0.0),
    (
        ("--agent_lr", 0.01, "--task_lr_factor", 3),
        lambda run: groups(run)["task_tokens"]["base_lr"],
        pytest.approx(0.03),
    ),
    (("--optimizer", "adamw"), lambda run: any(g["muon"] for g in groups(run).values()), False),
    (("--optimizer", "muon"), lambda run: any(g["muon"] for g in groups(run).values()), True),
    (("--warmup_batches", 7), lambda run: run.schedule.factor(0), pytest.approx(1 / 7)),
    (("--schedule_batches", "3:9"), lambda run: run.schedule.factor(6) * 2, pytest.approx(1.0)),
    (("--no_memory",), lambda run: run.system.solver2.use_memory, False),
    (("--no_task_tokens",), lambda run: run.system.config.task_tokens, False),
    (("--no_efe_extras",), lambda run: run.system.efe_loss.extras, False),
    (("--no_hard_cells",), lambda run: run.system.efe_loss.hard_cells, False),
    (("--policy", "random"), lambda run: run.system.config.policy, "random"),
    (("--prompt", "no_qwen"), lambda run: run.system.qwen.mode, "no_qwen"),
    (("--demonstrations", "off"), lambda run: run.system.config.demonstrations, "off"),
    (("--stop_confidence", 0.5), lambda run: run.system.config.stop_confidence, 0.5),
    (("--qwen_train", "frozen"), lambda run: run.system.qwen.lm_parameters(), []),
    (("--seed", 5), lambda run: (run.stream.seed, run.system.config.seed), (5, 5)),
    (("--amp", "fp16"), lambda run: (run.dtype, run.scaler.is_enabled()), (torch.float16, True)),
    (("--amp", "bf16"), lambda run: (run.dtype, run.scaler.is_enabled()), (torch.bfloat16, False)),
]


@pytest.mark.parametrize(
    ("flags", "found", "expected"), FLAGS, ids=[" ".join(map(str, row[0])) for row in FLAGS]
)
def test_a_flag_reaches_what_it_names(train: Any, flags: Any, found: Any, expected: Any) -> None:
    """Breaks: a flag that is parsed and not passed on (`--qwen_cache_interval` was one)."""
    if flags == ("--batch_size", 3):
        flags = ("--batch_size", 3, "--views", "off")
    outcome = train("--dry_run", *flags)
    assert outcome.code == 0, outcome.err
    assert found(outcome.run) == expected


def test_large_tasks_come_up_less_often_by_cost_power(train: Any) -> None:
    """Breaks: --cost_power not passed on."""
    data = write_tasks(train.folder / "l.json", make_tasks(["same", "flip"] * 8, sides=(14, 15)))
    n = [
        train("--dry_run", "--cost_power", power, data=data).run.stream.n_batches(0)
        for power in (0, 2)
    ]
    assert n[1] < 0.6 * n[0]


def test_what_the_cache_holds_is_not_read_again_in_another_view(train: Any) -> None:
    """Breaks: --qwen_cache_interval not passed on, a cache that training does not ask, or one that
    knows a pair in one view only."""
    for interval, expected in ((1, True), (9, False)):
        run = train("--dry_run", "--qwen_cache_interval", interval).run
        assert run.system.qwen.training
        read: list[int] = []
        run.system.qwen.backbone.register_forward_hook(lambda *_, read=read: read.append(1))
        for epoch in (0, 1):
            read.clear()
            for position in range(run.stream.n_batches(epoch)):
                run.system.read(run.stream.batch(epoch, position)[0])
            assert bool(read) == (expected or epoch == 0)


def test_auto_is_the_device_that_is_there(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: --device auto says cuda without one, or is not the default."""
    for there, expected in ((False, "cpu"), (True, "cuda")):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda there=there: there)
            assert command_line.pick_device("auto") == expected
            assert command_line.pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trainloop.parse_arguments([]).device == "auto"
    outcome = train("--dry_run", "--width", 24, fast=False)
    assert outcome.code == 0, outcome.err
    assert outcome.run.device == "cpu"
    assert "Device: cpu" in outcome.out


@pytest.fixture(scope="module")
def saved(tasks_file: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of six batches with a checkpoint after each; read it, do not change it."""
    script = Script(tmp_path_factory.mktemp("saved"), tasks_file)
    outcome = script(*SAVED)
    assert outcome.code == 0, outcome.err
    return outcome


SAVED = (
    "--save_every", 1, "--max_batches", 6, "--batch_size", 3, "--eval_views", 1, "--policy", "off",
    "--planning_steps", 1, "--best_metric", "cell_accuracy",
)  # fmt: skip


def test_five_checkpoints_are_kept_by_default(saved: Any) -> None:
    """Breaks: another default of --max_checkpoints, or --save_every not passed on."""
    assert trainloop.parse_arguments([]).max_checkpoints == 5
    assert trainloop.parse_arguments([]).save_every == 50
    assert saved.run.progress.total == 6
    assert len(list((saved.folder / "checkpoints").glob("*.pt"))) == 5


def test_the_best_model_is_best_by_the_metric_that_was_asked_for(saved: Any) -> None:
    """Breaks: --best_metric ignored."""
    best = json.loads((saved.folder / "best_metadata.json").read_text())
    assert "cell_accuracy" in json.dumps(best.get("metric_name", best.get("metric")))
    (row,) = saved.rows("epoch")
    assert saved.run.progress.best == row["cell_accuracy"] != row["accuracy_delta"]


def test_a_later_epoch_is_the_best_by_the_metric_that_was_asked_for(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: epochs compared by another metric than the record's."""
    real, shares = run_scores.evaluate, iter((0.5, 0.6, 0.7, 0.7))

    def evaluate(*args: Any, **given: Any) -> Any:
        return real(*args, **given) | {"cell_accuracy": next(shares)}

    monkeypatch.setattr(run_scores, "evaluate", evaluate)
    small = ("--max_batches", 1, "--eval_views", 1, "--policy", "off", "--planning_steps", 1)
    outcome = train(*small, "--epochs", 2, "--hypotheses", "off", "--best_metric", "cell_accuracy")
    assert outcome.code == 0, outcome.err
    best = json.loads((outcome.folder / "best_metadata.json").read_text())
    assert (best["epoch"], best["metrics"]["cell_accuracy"]) == (1, 0.7)


def test_the_last_validation_is_the_final_evaluation_where_both_ask_the_same(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: figures of the answers with proposals taken for the network's; other queries."""
    titles: list[str] = []
    real = run_scores.evaluate

    def evaluate(*args: Any, title: str = "Validation", **given: Any) -> Any:
        titles.append(title)
        return real(*args, title=title, **given)

    monkeypatch.setattr(run_scores, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "joined", lambda *_: {})  # all answers are the inputs then
    flags = ("--max_batches", 2, "--epochs", 2, "--hypotheses", "on")
    both = [train(*flags, "--eval_views", n) for n in (1, 2)]
    assert [outcome.code for outcome in both] == [0, 0], both[0].err + both[1].err
    first, second = ["Untrained model", "Validation"], ["Validation", "Final voting"]
    assert titles == [*first, "Final voting", *first, *second]
    names = ("val_accuracy", "accuracy_delta", "cell_accuracy", "size_accuracy", "planning_steps")
    rows = [[[row[n] for n in names] for row in o.rows("epoch")] for o in both]
    assert rows[0] == rows[1]
    results = [json.loads((o.folder / "results.json").read_text()) for o in both]
    assert results[0]["validated"] == results[1]["validated"]
    assert results[0]["exact_at_1"] < results[0]["validated"]["exact_at_1"]


# ---------------------------------------------------------------- checkpoints and metrics


def test_a_checkpoint_says_the_figures_of_its_batch(saved: Any) -> None:
    """Breaks: checkpoints without metrics, or with another batch's."""
    from model_persistence import ModelPersistence

    rows = {row["batch"]: row for row in saved.rows("batch")}
    of_batches = {
        entry["batch"]: entry["metrics"]
        for entry in ModelPersistence(saved.folder).checkpoints.values()
        if "accuracy_delta" not in entry["metrics"] and entry["metrics"]
    }
    assert len(of_batches) >= 3
    for batch, metrics in of_batches.items():
        for name in ("loss", "reward", "qwen_grad", "mask_ratio", "d_acc"):
            assert metrics[name] == pytest.approx(rows[batch][name], abs=1e-6)


def test_a_run_that_lost_its_last_batches_writes_their_metrics_once(saved: Any, train: Any) -> None:
    """Breaks: metrics of batches after the checkpoint are kept and written again."""
    folder = train.folder / saved.folder.name
    shutil.copytree(saved.folder, folder)
    for file in sorted((folder / "checkpoints").glob("*.pt"))[1:]:
        file.unlink()
    again = train("--resume", folder, *SAVED)
    assert again.code == 0, again.err
    assert "batches lost: 0" not in again.out
    assert again.figures() == saved.figures()
    assert len(again.figures()) == 6
    assert len(again.rows("epoch")) == 1


# ---------------------------------------------------------------- the agent


def test_every_planning_step_goes_through_the_blocks(whole_batch: Any) -> None:
    """Breaks: the block applied at step 0 only (five heads on one state)."""
    system = lively_system()
    (block,) = system.agent.blocks
    real, seen = block.forward, []

    def first_only(x: Any, *rest: Any) -> Any:
        seen.append(x)
        return real(x, *rest) if len(seen) == 1 else x

    with torch.no_grad():
        reading = system.read(whole_batch)
        honest = system.answer(reading).logits
        block.forward = first_only
        lazy = system.answer(reading).logits
    assert len(honest) == len(seen) == 5
    assert torch.equal(honest[0], lazy[0])
    for step in range(1, 5):
        assert not torch.allclose(honest[step], lazy[step], atol=1e-4), step


def test_every_planning_step_has_a_token_of_its_own(whole_batch: Any) -> None:
    """Breaks: one step token for all steps."""
    system = lively_system()
    answer = system.answer(system.read(whole_batch))
    answer.logits[-1].exp().square().sum().backward()
    gradient = system.agent.step_token.grad
    assert (gradient.abs().sum(1) > 0).all()


def test_own_tokens_and_views_reach_the_queries_they_belong_to(task_set: Any) -> None:
    """Breaks: one task's tokens, or one view's token, for every query."""
    stream = TrainingStream(task_set.train, seed=0, batch_size=6)
    batches = (batch for epoch in range(9) for batch, _ in stream.epoch(epoch))
    batch = next(batch for batch in batches if len(batch.view_id.unique()) == 2)
    with torch.no_grad():
        system = lively_system()
        base = system.read(batch).prompt.tokens
        for index, table in (
            (batch.task_index, system.solver2.task_tokens.weight),
            (batch.view_id, system.solver2.view_tokens.weight),
        ):
            assert len(index.unique()) == 2
            for row in index.unique().tolist():
                before = table[row].clone()
                table[row] += 1.0
                changed = (system.read(batch).prompt.tokens != base).flatten(1).any(1)
                assert changed.tolist() == (index == row).tolist()
                table[row] = before


def test_recomputed_activations_are_computed_twice(whole_batch: Any) -> None:
    """Breaks: gradient checkpointing switched on does nothing."""
    runs = {}
    for recompute in (False, True):
        module = build_qwen_prompt(
            "tiny", width=32, n_control=N_CONTROL, gradient_checkpointing=recompute
        )
        calls: list[int] = []
        layer: Any = module.backbone.get_submodule("layers.0.mlp")
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        tokens = module(whole_batch).tokens
        forward = len(calls)
        tokens.square().sum().backward()
        runs[recompute] = len(calls) / forward
    assert runs == {False: 1.0, True: 2.0}


# ---------------------------------------------------------------- memory


def test_memory_keeps_each_task_s_own_summary_under_its_own_name(ready: Any) -> None:
    """Breaks: summaries stored under another task's name, or with the task's tokens inside."""
    stored = []
    for sign in (1.0, -1.0):
        step = ready()
        system = step.run.system
        with torch.no_grad():
            system.solver2.task_tokens.weight.mul_(sign)
            system.solver2.unknown.mul_(sign)
            system.solver2.view_tokens.weight.mul_(sign)
            wanted = system.qwen(step.batch).summary
        step.run.threshold.get_threshold = lambda: -1.0
        step.take()
        bank = {
            int(owner): key
            for owner, key in zip(system.solver2.owners, system.solver2.keys, strict=True)
            if owner >= 0
        }
        assert set(bank) == set(step.batch.task_index.tolist())
        assert len(bank) == 2
        for row, key in bank.items():
            own = wanted[step.batch.task_index == row]
            torch.testing.assert_close(key, own.mean(0))
        stored.append(system.solver2.keys.clone())
    assert torch.equal(stored[0], stored[1])


def test_memory_takes_only_the_tasks_above_the_threshold(ready: Any) -> None:
    """Breaks: the mean of the batch, or of one query, in place of each task's own accuracy."""

    def prepare(run: Any, targets: Any) -> None:
        grids = targets.output.clone()
        wrong = run.good_task != run.query_task
        grids[wrong] = torch.where(grids[wrong] >= 0, (grids[wrong] + 1) % 10, -1)
        say(run, *[showing(grids, targets.size)] * 2)

    for good in (0, 1):
        step = ready()
        step.run.good_task, step.run.query_task = good, step.batch.query_task
        system = step.run.system
        prepare(step.run, step.targets)
        step.run.threshold.get_threshold = lambda: 0.9
        figures = step.take()
        rows = {int(i) for i in step.batch.task_index[step.batch.query_task == good]}
        assert {int(o) for o in system.solver2.owners if o >= 0} == rows
        assert figures["stored"] == 1
        assert system.solver2.scores.max() == 1.0


@pytest.mark.parametrize("option", ["prompt", "demonstrations"])
def test_a_shuffled_prompt_is_never_kept(option: Any) -> None:
    """Breaks: another task's prompt stored under this one's name, back to its own task later."""
    assert lively_system().solver2.use_memory
    options: dict[str, Any] = {option: "shuffled"}
    assert not lively_system(**options).solver2.use_memory


def test_the_threshold_takes_in_the_mean_accuracy_of_the_epoch(reference: Any) -> None:
    """Breaks: the running average fed with another figure, or with the last batch alone."""
    epochs = reference.rows("epoch")
    ema = 0.2
    for row in epochs:
        ema = 0.9 * ema + 0.1 * row["accuracy"]
    assert reference.run.threshold.n_updates == len(epochs) == 2
    assert reference.run.threshold.get_threshold() == pytest.approx(1.1 * ema)
