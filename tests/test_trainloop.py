"""The real script: what a run trains, scores and records, and each fix in place; `main` is called
in this process."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    CHOICE_FIGURES,
    SCRIPT,
    Script,
    assert_same_end,
    differing,
    make_tasks,
    one_line_error,
    write_tasks,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import command_line
import dataset_arc
import evaluation
import human_rl_agent
import loss_function
import reward_shaping
import run_scores
import run_state
import trainloop_complete_with_fixes as trainloop
from batches import TrainingStream


def gradients(run, batch, targets):
    """One `train_step` whose gradients are kept: (by module and name, the step's figures)."""
    run.optimizer.zero_grad = lambda set_to_none=True: None
    figures = trainloop.train_step(run, batch, targets)
    found = {
        f"{module}.{name}": p.grad
        for module, part in run.system.modules().items()
        if module != "policy_rl"
        for name, p in part.named_parameters()
    }
    return found, figures


def weights(run):
    return {
        f"{module}.{name}": p.detach().clone()
        for module, part in run.system.modules().items()
        for name, p in part.named_parameters()
    }


# ---------------------------------------------------------------- the lines of the contract


def test_accuracy_delta_is_validation_minus_the_untrained_model(reference):
    (start,) = reference.rows("start")
    for row in reference.rows("epoch"):
        gain = row["cell_accuracy"] - start["untrained"]["cell_accuracy"]
        assert row["accuracy_delta"] == pytest.approx(gain, abs=1e-12)


def test_metrics_have_one_row_per_batch_and_epoch(reference):
    n = reference.run.stream.n_batches
    rows = [(r["epoch"], r["batch"]) for r in reference.rows("batch")]
    assert rows == [(e, b) for e in (0, 1) for b in range(n(e))]
    assert [r["epoch"] for r in reference.rows("epoch")] == [0, 1]
    for row in reference.rows("batch"):
        assert row["qwen_grad"] > 0
        assert 0 <= row["mask_ratio"] <= 1
        assert math.isfinite(row["loss"])


def test_the_loss_falls_over_two_epochs(reference):
    first, second = reference.rows("epoch")
    assert second["loss"] < first["loss"]


# ---------------------------------------------------------------- metrics and results


def test_results_json(reference):
    results = json.loads((reference.folder / "results.json").read_text())
    assert results["n"] == 6
    assert 0 <= results["exact_at_1"] <= results["exact_at_2"] <= 6
    assert set(results["slices"]) == {"small"}  # none of these tasks is of ARC-AGI
    for counts in results["slices"].values():
        assert set(counts) == {"n", "exact_at_1", "exact_at_2"}
    for name in ("size_accuracy", "cell_accuracy", "minutes", "seed", "epoch", "batch"):
        assert isinstance(results[name], int | float), name


# ---------------------------------------------------------------- equal runs


def test_the_same_command_gives_the_same_bits(train, reference):
    assert_same_end(train("--epochs", 2), reference)


def test_another_seed_gives_another_run(train, reference):
    other = train("--max_batches", 1, "--seed", 1)
    assert other.figures()[0]["loss"] != reference.figures()[0]["loss"]


def test_tasks_held_out_reach_neither_training_nor_validation_and_are_told_apart(train):
    """Breaks: held-out tasks in a batch, in validation or in the task table; no slices of them."""
    outcome = train("--epochs", 1, "--hold_out", 3, "--eval_views", 1)
    assert outcome.code == 0, outcome.err
    seen = ["t0_flip", "t1_turn", "t3_crop", "t4_double"]
    stream = outcome.run.stream
    assert [task.task_id for task in stream.tasks] == seen
    assert stream.task_table == {name: i for i, name in enumerate(seen)}
    asked = {q[0] for p in range(stream.n_batches(0)) for q in stream.pair_ids(0, p)}
    assert asked == set(seen)
    assert len(outcome.run.system.solver2.task_tokens.weight) == 4
    assert re.search(r"\[Epoch 0\] Val Accuracy: \d\.\d{4} \(\d/4\)", outcome.out)
    results = json.loads((outcome.folder / "results.json").read_text())
    assert results["n"] == 6
    slices = results["slices"]
    assert (slices["seen"]["n"], slices["held_out"]["n"]) == (4, 2)
    for name in ("exact_at_1", "exact_at_2"):
        assert slices["seen"][name] + slices["held_out"][name] == results[name]
    plain = train("--max_batches", 1, "--eval_views", 1, runs="plain")
    assert "held_out" not in json.loads((plain.folder / "results.json").read_text())["slices"]


def test_ablated_demonstrations_take_the_proposals_away_too(train):
    """Breaks: `--demonstrations off` that still answers with rules fitted to them."""
    outcome = train(
        "--max_batches", 1, "--hypotheses", "on", "--demonstrations", "off", "--eval_views", 1
    )
    assert outcome.code == 0, outcome.err
    assert all(row["proposed_frac"] == 0 for row in outcome.rows("batch"))
    results = json.loads((outcome.folder / "results.json").read_text())
    assert results["gains"]["accepted"] == 0


def test_gradient_accumulation_is_the_mean_over_its_batches_and_ends_with_the_epoch(train):
    steps = []

    def prepare(run):
        real = run.optimizer.step

        def step():
            steps.append(run.progress.batch)
            real()

        run.optimizer.step = step

    outcome = train("--grad_accum", 4, "--epochs", 1, prepare=prepare)
    assert outcome.run.progress.total == 6
    assert steps == [3, 5]
    assert outcome.run.average.n_updates == 2


# ---------------------------------------------------------------- other models, and divergence


def test_a_folder_that_save_pretrained_wrote_is_trained(train):
    from language_model import build_tiny

    model: Any = build_tiny(3)[0]
    folder = train.folder / "qwen"
    model.save_pretrained(folder)
    outcome = train("--qwen_model", folder, "--qwen_train", "full", "--max_batches", 2)
    assert outcome.code == 0, outcome.err
    assert str(folder) in outcome.out
    assert outcome.rows("batch")[0]["qwen_grad"] > 0
    trained = dict(outcome.run.system.qwen.backbone.named_parameters())
    assert all(not torch.equal(p, trained[name]) for name, p in model.named_parameters())


def test_a_run_that_diverges_exits_5(train, monkeypatch):
    monkeypatch.setattr(trainloop, "MAX_SKIPPED_IN_A_ROW", 3)
    outcome = train("--epochs", 1, prepare=lambda run: break_loss(run, range(99)))
    line = one_line_error(outcome, 5)
    assert "3 batches in a row" in line
    assert "--agent_lr" in line


# ---------------------------------------------------------------- limits


def test_max_batches_caps_training_and_validation(train):
    outcome = train("--max_batches", 2, "--batch_size", 2)
    assert len(outcome.rows("batch")) == 2
    assert re.search(r"\[Epoch 0\] Val Accuracy: \d\.\d{4} \(\d/4\)", outcome.out)
    assert json.loads((outcome.folder / "results.json").read_text())["n"] == 4
    assert outcome.run.progress.epoch == 1  # --epochs defaults to 1 here


def test_dry_run_writes_nothing(train):
    outcome = train("--dry_run")
    assert outcome.code == 0
    assert "nothing is written (--dry_run)" in outcome.out
    assert [p.name for p in train.folder.iterdir()] == []


# ---------------------------------------------------------------- the seven fixes


def test_fix_1_qwen_is_trained_with_its_own_learning_rate(fresh_run):
    run, batch, targets = fresh_run("--qwen_lr", 0.004, "--agent_lr", 0.002)
    rates = {g["name"]: g["base_lr"] for g in run.optimizer.param_groups}
    assert rates["qwen"] == rates["qwen_heads"] == 0.004
    assert rates["agent"] == 0.002
    before = weights(run)
    found, figures = gradients(run, batch, targets)
    assert figures["qwen_grad"] > 0
    after = weights(run)
    for name in before:
        if name.startswith("qwen."):
            assert found[name] is not None, name
            assert found[name].abs().sum() > 0, name
            assert not torch.equal(before[name], after[name]), name


def norm_of(parameters):
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


def test_qwen_grad_is_the_norm_of_the_language_model_alone(fresh_run):
    """Not of its projections, which learn also where the language model does not."""
    run, batch, targets = fresh_run("--clip", 1e9)
    _, figures = gradients(run, batch, targets)
    assert figures["qwen_grad"] == pytest.approx(norm_of(run.system.qwen.backbone.parameters()))
    assert figures["qwen_heads_grad"] == pytest.approx(norm_of(run.system.qwen.head_parameters()))
    for flags in (("--qwen_train", "frozen"), ("--prompt", "no_qwen"), ("--prompt", "null")):
        _, figures = gradients(*fresh_run(*flags))
        assert figures["qwen_grad"] == 0.0, flags
        assert figures["qwen_heads_grad"] > 0.0, flags


def test_a_row_of_metrics_has_every_figure_of_the_step(reference):
    """Rewards, loss parts and the policy's health: what decides is not thrown away."""
    assert set(run_state.POLICY_FIGURES) <= set(human_rl_agent.HEALTH)
    weights_of = reference.run.system.efe_loss
    for row in reference.rows("batch"):
        parts = {p: row[f"efe_{p}"] for p in loss_function.PARTS}
        assert all(math.isfinite(value) for value in parts.values())
        scale = {p: float(getattr(weights_of, f"lambda_{p}")) for p in parts}
        scale["size"] *= row["size_weight"]
        assert row["efe"] == pytest.approx(sum(scale[p] * parts[p] for p in parts), rel=1e-4)
        mixture = 0.7 * row["efe"] - 0.3 * row["soft_reward"]
        assert row["loss"] == pytest.approx(mixture, rel=1e-4, abs=1e-6)
        deltas = reward_shaping.REWARD_WEIGHTS.items()
        assert row["reward"] == pytest.approx(sum(w * row[n] for n, w in deltas), abs=1e-6)
        assert 0.0 <= row["reward_zero_frac"] <= 1.0
        for name in run_state.POLICY_FIGURES.values():
            assert math.isfinite(row[name]), name
        assert row["policy_std"] > 0
        assert row["policy_grad"] > 0
    extras = [p for p in loss_function.PARTS if p != "size"]
    assert all(any(row[f"efe_{p}"] > 0 for row in reference.rows("batch")) for p in extras)


def test_early_stops_show_in_steps_saved_and_leave_training_alone(train):
    always = train("--stop_confidence", 1, "--epochs", 1, runs="a")
    never = train("--stop_confidence", 0, "--epochs", 1, runs="b")
    for outcome, steps in ((always, 5), (never, 1)):
        assert outcome.code == 0, outcome.err
        (row,) = outcome.rows("epoch")
        assert row["planning_steps"] == steps
        results = json.loads((outcome.folder / "results.json").read_text(encoding="utf-8"))
        assert results["planning_steps"] == steps
    assert always.figures() == never.figures()


def test_every_figure_of_metrics_is_explained_and_no_other(reference):
    text = (SCRIPT.parent / "docs" / "METRICS.md").read_text(encoding="utf-8")
    kinds = ("batch", "epoch", "health")
    named = set(re.findall(r"`(\w+)`", text)) - {"kind", "start", "null", *kinds}
    named -= {"train_step", "random", "off", "policy_", "untrained", "warning", "note"}
    written = {key for kind in kinds for row in reference.rows(kind) for key in row}
    written |= set(CHOICE_FIGURES)  # with hypotheses, see the test of a resume with them
    assert written - named - {"kind", "epoch", "batch"} == set()
    assert named - written == set()


def test_fix_1_every_trained_weight_is_in_the_optimizer_once(fresh_run):
    run, *_ = fresh_run()
    held = [id(p) for g in run.optimizer.param_groups for p in g["params"]]
    assert len(held) == len(set(held))
    own = {id(p) for p in run.system.policy_rl.policy_parameters()}
    wanted = {
        id(p) for m in run.system.modules().values() for p in m.parameters() if p.requires_grad
    }
    assert set(held) == wanted - own  # the policy's own have their own optimizer


def test_fix_1_a_frozen_qwen_stays_as_it_is_and_its_heads_learn(fresh_run):
    run, batch, targets = fresh_run("--qwen_train", "frozen")
    before = weights(run)
    trainloop.train_step(run, batch, targets)
    after = weights(run)
    backbone = {n for n in before if n.startswith("qwen.backbone.")}
    assert all(torch.equal(before[n], after[n]) for n in backbone)
    heads = {n for n in before if n.startswith("qwen.")} - backbone
    assert all(not torch.equal(before[n], after[n]) for n in heads)


def test_fix_2_the_reward_is_part_of_the_gradient_of_agent_and_qwen(fresh_run):
    on, _ = gradients(*fresh_run("--clip", 1e9))
    off, _ = gradients(*fresh_run("--clip", 1e9, "--no_reward"))
    for module in ("agent.", "qwen.backbone.", "qwen.project"):
        # The backward model learns from true outputs alone: no reward reaches it.
        names = [
            n
            for n in on
            if n.startswith(module) and "backward_model" not in n and on[n] is not None
            if on[n].any()  # zero weights keep some of the agent out of the first step
        ]
        assert names
        changed = [n for n in names if not torch.allclose(on[n], off[n], rtol=1e-3, atol=1e-9)]
        assert len(changed) > 0.5 * len(names), module


def test_fix_2_the_loss_is_the_stated_mixture(fresh_run, monkeypatch):
    run, batch, targets = fresh_run()
    answers_in_turn(run, targets, (False, True))
    seen = {}
    real_efe, real_soft = run.system.efe_loss.forward, run.system.policy_rl.soft_reward

    def efe(**given):
        seen["efe"] = real_efe(**given)
        return seen["efe"]

    def soft(*args, **given):
        seen["soft"] = real_soft(*args, **given)
        return seen["soft"]

    monkeypatch.setattr(run.system.efe_loss, "forward", efe)
    monkeypatch.setattr(run.system.policy_rl, "soft_reward", soft)
    figures = trainloop.train_step(run, batch, targets)
    efe_total, reward = float(seen["efe"]["total"].detach()), float(seen["soft"][0].mean().detach())
    assert reward > 1.0
    assert figures["loss"] == pytest.approx(0.7 * efe_total + 0.3 * -reward, rel=1e-5)


def test_fix_3_hard_cells_get_the_stated_share_of_the_gradient(fresh_run):
    """The seeds' 3 x 3 example, in the loss that the script builds: 4.5 times a plain mean."""
    target = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    shown = torch.tensor([[[1, 0, 3], [4, 5, 0], [7, 8, 9]]])
    slopes = {}
    for flags in ((), ("--no_hard_cells",)):
        run, *_ = fresh_run("--no_efe_extras", *flags)
        logits = torch.nn.functional.one_hot(shown, 10).float().mul(3.0)
        logits = logits.expand(5, 1, 3, 3, 10).clone().requires_grad_()
        run.system.efe_loss(logits=logits, target=target)["total"].backward()
        assert logits.grad is not None
        slopes[flags] = logits.grad[-1, 0].abs().sum(-1)
    wrong = (shown != target)[0]
    ratio = slopes[()] / slopes["--no_hard_cells",]
    scale = 0.5 + 0.5 * 2 / 9
    torch.testing.assert_close(ratio[wrong] / scale, torch.full((2,), 4.5))
    torch.testing.assert_close(ratio[~wrong] / scale, torch.ones(7))


def test_fix_3_hard_cells_change_the_training_gradient(fresh_run):
    found = []
    for flags in ((), ("--no_hard_cells",)):
        run, batch, targets = fresh_run(*flags)
        output = targets.output.clone()
        output[:, 0] = torch.where(output[:, 0] >= 0, (output[:, 0] + 1) % 10, -1)  # a row is wrong
        gradient, figures = gradients(run, batch, dataclasses.replace(targets, output=output))
        assert 0 < figures["mask_ratio"] < 1
        found.append(gradient["agent.pointer.to_pointer.bias"])
    on, off = (gradient / gradient.norm() for gradient in found)  # clipping hides its length
    assert not torch.allclose(on, off, rtol=0.01, atol=1e-4)


def test_fix_4_the_size_weight_falls_as_stated_and_is_used(train):
    used = []

    def prepare(run):
        real = run.system.efe_loss.forward

        def forward(**given):
            used.append(round(given["size_weight"], 3))
            return real(**given)

        run.system.efe_loss.forward = forward

    outcome = train("--max_batches", 1, "--epochs", 5, "--batch_size", 3, prepare=prepare)
    said = re.findall(r"Size Warmup Weight: (\d\.\d{3})", outcome.out)
    assert said == ["1.000", "0.833", "0.667", "0.500", "0.500"]
    assert used == [1.0, 0.833, 0.667, 0.5, 0.5]


def test_fix_4_the_size_loss_reaches_the_size_head_by_that_weight(fresh_run):
    slopes = []
    for epoch in (0, 3):
        run, batch, targets = fresh_run("--clip", 1e9, "--no_reward", "--no_efe_extras")
        run.progress.epoch = epoch
        found, _ = gradients(run, batch, targets)
        slopes.append(found["agent.size_head.support"])
    assert slopes[0].abs().sum() > 0
    torch.testing.assert_close(slopes[1], slopes[0] * 0.5)


def test_fix_5_the_threshold_follows_the_accuracy_and_memory_is_updated(reference):
    """The running average moves once an epoch, by the epoch's mean; it starts at 0.2 x 1.1."""
    ema, stored, shown = 0.2, 0, []
    for epoch in (0, 1):
        rows = [row for row in reference.rows("batch") if row["epoch"] == epoch]
        assert [row["threshold"] for row in rows] == pytest.approx([1.1 * ema] * len(rows))
        shown.append(f"{1.1 * ema:.4f}")
        ema = 0.9 * ema + 0.1 * sum(row["accuracy"] for row in rows) / len(rows)
        stored += sum(row["stored"] for row in rows)
    run = reference.run
    assert shown[0] == "0.2200"
    assert re.findall(r"Memory Threshold: (\S+)", reference.out) == shown
    assert run.threshold.get_threshold() == pytest.approx(1.1 * ema)
    assert run.threshold.get_threshold() > 0.22  # accuracy was above it, so it rose
    assert run.system.solver2.n_updates == stored > 0
    said = [int(n) for n in re.findall(r"Memory updates: (\d+)", reference.out)]
    assert sum(said) == stored
    assert all(n > 0 for n in said)


def test_fix_5_only_tasks_above_the_threshold_are_stored(fresh_run):
    for threshold, expected in ((0.01, 2), (0.99, 0)):
        run, batch, targets = fresh_run()
        run.threshold.get_threshold = lambda t=threshold: t
        figures = trainloop.train_step(run, batch, targets)
        assert 0.05 < figures["accuracy"] < 0.9  # nothing that a fixed high bar would take
        assert figures["stored"] == run.system.solver2.n_updates == expected
    run, batch, targets = fresh_run("--no_memory")
    run.threshold.get_threshold = lambda: -1.0
    trainloop.train_step(run, batch, targets)
    assert run.system.solver2.n_updates == 0


def answers_in_turn(run, targets, qualities):
    """The agent's answers replaced: True = the target, False = another colour everywhere."""
    real = run.system.answer
    canvas = targets.output
    turn = iter(qualities)

    def answer(reading, refinement=None, **options):
        output = real(reading, refinement, **options)
        rows, cols = output.logits.shape[2:4]
        wanted = torch.zeros(len(canvas), rows, cols, dtype=torch.long)
        h, w = min(rows, canvas.shape[1]), min(cols, canvas.shape[2])
        wanted[:, :h, :w] = canvas[:, :h, :w].clamp(min=0)
        if not next(turn):
            wanted = (wanted + 1) % 10
        shown = torch.nn.functional.one_hot(wanted, 10).float().mul(8.0).log_softmax(-1)
        output.logits = output.logits * 0 + shown
        output.size = targets.size.clone()
        return output

    run.system.answer = answer


def test_fix_6_better_predictions_give_positive_reward_and_worse_ones_negative(fresh_run):
    for qualities, sign in (((False, True), 1), ((True, False), -1), ((True, True), 0)):
        run, batch, targets = fresh_run()
        assert targets.fits.all()
        answers_in_turn(run, targets, qualities)
        figures = trainloop.train_step(run, batch, targets)
        assert figures["d_acc"] == sign
        assert np.sign(figures["reward"]) == sign or sign == 0
        if sign:
            assert abs(figures["reward"]) > 1.0


def test_fix_6_the_policy_gets_the_reward_of_its_own_step(fresh_run):
    run, batch, targets = fresh_run()
    answers_in_turn(run, targets, (False, True))
    given = []
    real = run.system.policy_rl.update

    def update(info, reward, state):
        given.append(reward.clone())
        return real(info, reward, state)

    run.system.policy_rl.update = update
    trainloop.train_step(run, batch, targets)
    (reward,) = given
    assert reward.shape == (batch.n_queries,)
    assert (reward > 1.0).all()


def test_fix_7_fp16_goes_through_the_grad_scaler_on_the_cpu(train):
    outcome = train("--amp", "fp16", "--max_batches", 3, "--epochs", 1)
    assert outcome.code == 0, outcome.err
    run = outcome.run
    assert run.dtype is torch.float16
    assert run.scaler.is_enabled()
    assert isinstance(run.scaler, torch.amp.GradScaler)
    rows = outcome.rows("batch")
    assert all(math.isfinite(row["loss"]) for row in rows)
    skipped = run.progress.skipped
    halved = 65536.0 * 0.5**skipped
    assert run.scaler.get_scale() == halved
    assert outcome.checkpoint()["extra"]["scaler"]["scale"] == halved
    assert skipped < 3


def test_fix_7_an_overflow_under_fp16_skips_the_step_and_halves_the_scale(fresh_run):
    run, batch, targets = fresh_run("--amp", "fp16")
    break_loss(run, [0])
    before, scale = weights(run), run.scaler.get_scale()
    trainloop.train_step(run, batch, targets)
    after = weights(run)
    learned = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n for n in learned if not n.startswith("policy_rl.rl.")} == set()
    assert run.scaler.get_scale() == scale / 2
    assert run.progress.skipped == 1
    run.scaler.update(1024.0)
    trainloop.train_step(run, batch, targets)
    assert run.progress.skipped == 1
    assert not torch.equal(weights(run)["agent.answer.weight"], before["agent.answer.weight"])


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_fix_7_clipping_bounds_the_norm_of_all_modules_together(fresh_run, amp):
    run, batch, targets = fresh_run("--clip", 0.01, "--amp", amp)
    if amp == "fp16":
        run.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    gradients(run, batch, targets)
    held = [p.grad for g in run.optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.stack([g.norm() for g in held]).norm()
    assert run.progress.skipped == 0
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def break_loss(run, batches):
    """The loss of these batches (counted from 0) becomes infinite."""
    real = run.system.efe_loss.forward
    counter = iter(range(10**6))

    def forward(**given):
        parts = real(**given)
        if next(counter) in batches:
            parts["total"] = parts["total"] * float("inf")
        return parts

    run.system.efe_loss.forward = forward


def test_fix_7_a_batch_that_is_not_finite_is_skipped_counted_and_said(train):
    outcome = train("--epochs", 1, "--save_every", 1, prepare=lambda run: break_loss(run, [1, 3]))
    assert outcome.code == 0, outcome.err
    assert outcome.run.progress.skipped == 2
    assert outcome.run.progress.skipped_in_a_row == 0
    assert "[Batch    1] skipped: loss inf" in outcome.out
    assert "(not finite; 2 so far)" in outcome.out
    (epoch,) = outcome.rows("epoch")
    assert epoch["skipped"] == 2
    assert math.isfinite(epoch["loss"])  # the epoch's mean is of the batches that counted
    for p in weights(outcome.run).values():
        assert torch.isfinite(p).all()
    for a in outcome.run.average.average:
        assert torch.isfinite(a).all()


# ---------------------------------------------------------------- the six runtime issues


def test_issue_1_the_agent_gives_five_steps_of_logits_for_grid_and_batch(fresh_run):
    run, batch, _ = fresh_run()
    with torch.no_grad():
        assert run.system.agent(torch.zeros(4, 6).long()).shape == (5, 4, 6, 10)
        logits = run.system.answer(run.system.read(batch)).logits
    assert logits.shape == (5, batch.n_queries, *batch.query_sources.shape[2:], 10)


def test_issue_2_every_part_of_the_efe_loss_is_computed_in_training(fresh_run, monkeypatch):
    run, batch, targets = fresh_run()
    seen = {}
    real = run.system.efe_loss.forward

    def forward(**given):
        seen.update(real(**given))
        return seen

    monkeypatch.setattr(run.system.efe_loss, "forward", forward)
    trainloop.train_step(run, batch, targets)
    for part in ("risk", "amb", "step", "cons", "bi", "z", "prompt", "size", "total"):
        assert torch.isfinite(seen[part]), part
        assert seen[part].abs() > 0, part
        assert seen[part].requires_grad, part


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32])
def test_issue_3_grids_of_any_dtype_are_one_hot_encoded(fresh_run, dtype):
    run, batch, targets = fresh_run()
    grid = torch.tensor([[1, 2], [3, 0]])
    with torch.no_grad():
        assert torch.equal(run.system.agent(grid.to(dtype)), run.system.agent(grid))
    targets.output = targets.output.to(dtype if dtype != torch.uint8 else torch.int16)
    assert math.isfinite(trainloop.train_step(run, batch, targets)["loss"])


def test_issue_4_no_deprecated_precision_api(fresh_run, recwarn):
    """Warnings are errors in this suite; this names the one place they came from."""
    run, batch, targets = fresh_run("--amp", "fp16")
    trainloop.train_step(run, batch, targets)
    assert [str(w.message) for w in recwarn] == []
    for source in (*SCRIPT.parent.glob("*.py"), *SCRIPT.parent.glob("persistence/*.py")):
        assert "torch.cuda.amp" not in source.read_text(encoding="utf-8"), source.name


def test_issue_5_devices_are_strings_everywhere(fresh_run):
    run, *_ = fresh_run()
    assert run.device == "cpu"
    assert command_line.pick_device("cpu") == "cpu"
    assert command_line.pick_precision("auto", "cpu") == (None, False)
    assert command_line.pick_precision("bf16", "cuda") == (torch.bfloat16, False)
    assert command_line.pick_precision("fp16", "cuda:0") == (torch.float16, True)
    for name in ("cpu", "cuda", "cuda:0"):
        run.device = name
        if name == "cpu" or torch.cuda.is_available():
            with run.autocast():
                pass
        generator = trainloop.generator_for("cpu", 1, 2)
        assert generator.initial_seed() == trainloop.generator_for("cpu", 1, 2).initial_seed()


@pytest.fixture(scope="module")
def sized_run(tasks_file, tmp_path_factory):
    script = Script(tmp_path_factory.mktemp("sized"), tasks_file)
    return script("--dry_run", "--batch_size", 2).run


SIDES = st.integers(1, 30)


@given(sizes=st.tuples(*[SIDES] * 8))
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_issue_6_any_size_pair_goes_through_a_step(sized_run, sizes):
    check_sizes(sized_run, sizes)


@pytest.mark.parametrize("sizes", [(1,) * 8, (30, 30, 1, 1) * 2, (1, 1, 30, 30) * 2, (30,) * 8])
def test_issue_6_the_corners_go_through_a_step(sized_run, sizes):
    check_sizes(sized_run, sizes)


def check_sizes(run, sizes):
    rng = np.random.default_rng(sum(sizes))

    def grid(rows, cols):
        return rng.integers(0, 10, (rows, cols)).astype(np.uint8)

    pairs = tuple(
        dataset_arc.Pair(grid(*sizes[i : i + 2]), grid(*sizes[i + 2 : i + 4])) for i in (0, 4)
    )
    task = dataset_arc.Task("sized", pairs, ())
    stream = TrainingStream([task], seed=0, batch_size=2)
    for position in range(stream.n_batches(0)):
        batch, targets = stream.batch(0, position)
        skipped = run.progress.skipped
        figures = trainloop.train_step(run, batch, targets)
        assert all(math.isfinite(value) for value in figures.values())
        assert run.progress.skipped == skipped


# ---------------------------------------------------------------- the policy in the loop


def test_the_policy_s_parameters_differ_after_a_run(reference, fresh_run):
    fresh, *_ = fresh_run()
    start = dict(fresh.system.policy_rl.rl.named_parameters())
    for name, p in reference.run.system.policy_rl.rl.named_parameters():
        assert not torch.equal(p, start[name]), name
    assert int(reference.run.system.policy_rl.rl.n_updates) == reference.run.progress.total


def test_with_the_policy_off_d_acc_is_exactly_zero(train):
    outcome = train("--policy", "off", "--epochs", 1)
    rows = outcome.rows("batch")
    assert rows
    assert all(row["d_acc"] == 0.0 and row["reward"] == 0.0 for row in rows)
    assert all(row["change"] == 0.0 for row in rows)
    assert int(outcome.run.system.policy_rl.rl.n_updates) == 0


def test_the_policy_learns_after_the_main_step_and_never_twice_through_one_graph(fresh_run):
    run, batch, targets = fresh_run()
    order = []

    def noted(name, real):
        def call(*args, **options):
            order.append(name)
            return real(*args, **options)

        return call

    run.optimizer.step = noted("main", run.optimizer.step)
    run.system.policy_rl.update = noted("policy", run.system.policy_rl.update)
    for _ in range(2):  # a second backward through a freed graph would raise
        trainloop.train_step(run, batch, targets)
    assert order == ["main", "policy"] * 2


def test_bit_the_backward_model_learns_from_the_true_output_alone(fresh_run):
    """What train_step hands to the loss: the agent's answer with gradient to the agent, the target
    with gradient to the backward model."""
    run, batch, targets = fresh_run()
    seen = {}
    run.system.efe_loss.register_forward_pre_hook(
        lambda _, __, options: seen.update(options), with_kwargs=True
    )
    read_grids = run.system.backward_of
    run.system.backward_of = lambda reading, grids, size: (
        seen.setdefault("true", (grids, size)) and read_grids(reading, grids, size)
    )
    weights = list(run.system.agent.backward_model.parameters())
    found = []

    def look(*_):
        for name in ("backward_logits", "backward_logits_true"):
            loss = seen[name].square().sum()
            kwargs: dict[str, Any] = {"allow_unused": True, "retain_graph": True}
            grads = torch.autograd.grad(loss, weights, **kwargs)
            agent = torch.autograd.grad(loss, [run.system.agent.rule.gain], **kwargs)
            found.append(
                [any(g is not None and bool(g.any()) for g in gs) for gs in (grads, agent)]
            )

    run.system.efe_loss.register_forward_hook(look)
    trainloop.train_step(run, batch, targets)
    assert found == [[False, True], [True, False]]
    assert torch.equal(seen["true"][0], targets.output)
    assert torch.equal(seen["true"][1], targets.size)


def test_random_refinement_learns_nothing(train):
    outcome = train("--policy", "random", "--max_batches", 2)
    assert outcome.code == 0, outcome.err
    assert int(outcome.run.system.policy_rl.rl.n_updates) == 0
    assert all(row["change"] > 0 for row in outcome.rows("batch"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--prompt", "null"),
        ("--prompt", "no_qwen"),
        ("--demonstrations", "off"),
        ("--demonstrations", "shuffled", "--stop_confidence", 0.5),
        ("--prompt", "shuffled", "--no_memory", "--no_task_tokens"),
        ("--planning_steps", 1, "--optimizer", "adamw", "--ema", 0),
        ("--qwen_cache_interval", 3),
        ("--blocks", 2, "--amp", "bf16"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_ablation_trains(train, flags):
    outcome = train(*flags, "--max_batches", 2, "--eval_views", 1)
    assert outcome.code == 0, outcome.err
    assert outcome.run.progress.skipped == 0
    assert all(math.isfinite(row["loss"]) for row in outcome.rows("batch"))


def test_evaluation_uses_the_averaged_weights_and_puts_the_own_back(fresh_run, monkeypatch):
    run, batch, targets = fresh_run()
    for _ in range(2):
        trainloop.train_step(run, batch, targets)
    own = weights(run)
    seen = {}

    def predict(system, *args, **options):
        seen.update({n: p.detach().clone() for n, p in system.agent.named_parameters()})
        return {}

    monkeypatch.setattr(evaluation, "predict_tasks", predict)
    tasks = dataset_arc.load_tasks(run.args.data)
    run_scores.evaluate(run, tasks, evaluation.validation_keys(tasks.train, None, 0), 1)
    assert any(not torch.equal(seen[n], own[f"agent.{n}"]) for n in seen)
    assert differing(weights(run), own) == []


# ---------------------------------------------------------------- it learns


def test_it_overfits_eight_small_tasks_to_every_pair_exactly(train):
    """All 24 training pairs of eight different rules, at the model's own size."""
    rules = ("flip", "turn", "recolour", "crop", "swap", "same", "drop", "top")
    tasks = make_tasks(rules, sides=(3, 5))
    data = write_tasks(train.folder / "eight.json", tasks)
    outcome = train(
        "--augment", "off", "--batch_size", 12, "--agent_lr", 6e-3, "--schedule_batches", "36:60",
        "--planning_steps", 2, "--ema", 0.9, "--val_pairs", 1, "--eval_views", 1, data=data,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    run = outcome.run
    exact, asked = 0, set()
    with run.average.applied():
        run.system.train(False)
        for position in range(run.stream.n_batches(0)):
            batch, targets = run.stream.batch(0, position)
            answer = run.system.predict(batch, torch.Generator()).before
            for row, query in enumerate(batch.pair_ids):
                rows, cols = (int(v) for v in targets.size[row])
                assert targets.fits[row]
                same_size = answer.size[row].tolist() == [rows, cols]
                shown = answer.grids()[row, :rows, :cols]
                exact += same_size and torch.equal(shown, targets.output[row, :rows, :cols])
                asked.add(query)
    assert len(asked) == 24
    assert exact == 24
