"""What the training step makes of two answers: rewards, resizing, accuracy and the loss.

Every test names the breakage it is there for (`Breaks:`); `tests/faults/wiring_mutants.py` puts
each one in and looks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import exactly, say, showing, twice_as_large
from torch.nn import functional

from loss_function import PARTS

# ---------------------------------------------------------------- the reward's four parts


def test_the_hard_reward_gets_both_answers_and_their_own_sizes(ready: Any) -> None:
    """Breaks: d_size taken after the resize, or of one answer twice; grids of one answer twice."""

    def prepare(run: Any, targets: Any) -> None:
        other = torch.where(targets.output >= 0, (targets.output + 1) % 10, -1)[:, :-1]
        say(run, showing(other, targets.size - torch.tensor([1, 0])), exactly(targets))

    step = ready(prepare=prepare)
    step.take()
    first, second = (call.result for call in step.calls["answer"])
    given = step.one("compute_reward").given
    assert given["before"].shape != given["after"].shape
    assert torch.equal(given["before"], first.grids())
    assert torch.equal(given["after"], second.grids())
    assert torch.equal(given["size_before"], first.size)
    assert torch.equal(given["size_after"], second.size)
    assert torch.equal(given["target_size"], step.targets.size)
    assert torch.equal(given["inp"], step.batch.query_input)


@pytest.mark.parametrize("order", [1, -1], ids=["wrong, then right", "right, then wrong"])
def test_a_change_of_size_alone_pays_by_d_size(ready: Any, order: Any) -> None:
    """Breaks: d_size taken after the resize (0 for ever)."""

    def prepare(run: Any, targets: Any) -> None:
        say(run, *(twice_as_large(targets), exactly(targets))[::order])

    step = ready(prepare=prepare)
    step.take()
    reward, breakdown = step.one("compute_reward").result
    n = len(step.targets.size)
    torch.testing.assert_close(breakdown["d_size"], torch.full((n,), 0.5 * order))
    assert breakdown["d_acc"].tolist() == [0.0] * n  # after the resize both are the target
    torch.testing.assert_close(
        reward, 0.5 * (breakdown["d_size"] + breakdown["d_color"] + breakdown["d_rev"])
    )


@pytest.mark.parametrize("order", [1, -1], ids=["wrong, then right", "right, then wrong"])
def test_a_better_reading_backwards_pays_by_d_rev(ready: Any, order: Any) -> None:
    """Breaks: no reconstruction handed to the reward, hard or soft (d_rev 0 for ever)."""

    def prepare(run: Any, targets: Any) -> None:
        real = run.system.backward
        told = []

        def backward(reading: Any, output: Any, **options: Any) -> Any:
            logits = real(reading, output, **options)
            told.append(output)
            second = output is not told[0]
            right = second == (order > 0)
            shown = reading.batch.query_input.clamp(min=0)
            shown = shown if right else (shown + 1) % 10
            return 0.0 * logits + 20.0 * functional.one_hot(shown, 10).float()

        run.system.backward = backward

    step = ready(prepare=prepare)
    figures = step.take()
    given = step.one("compute_reward").given
    shown_more = given["copied_after"] - given["copied_before"]
    wanted = 0.5 * (order - shown_more)  # what is recovered beyond what the answer simply shows
    hard, soft = (step.one(name).result[1]["d_rev"] for name in ("compute_reward", "soft_reward"))
    torch.testing.assert_close(hard, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(soft.detach(), hard, atol=1e-4, rtol=0)
    assert figures["reward"] * order > 0.2
    assert torch.equal(step.one("update").given["reward"], step.one("compute_reward").result[0])


def test_the_soft_reward_gets_both_answers_on_the_target_s_canvas(ready: Any) -> None:
    """Breaks: before and after exchanged or the same, sizes or backward readings left out."""
    step = ready()
    step.take()
    first, second = (call.result for call in step.calls["answer"])
    given, (soft, parts) = step.one("soft_reward")
    assert torch.equal(given["size_logits_before"], first.size_logits)
    assert given["size_logits_after"] is second.size_logits
    assert torch.equal(given["target_size"], step.targets.size)
    for name in ("logits_before", "backward_logits_before"):
        assert not given[name].requires_grad
    for name in ("logits_after", "size_logits_after", "backward_logits_after"):
        assert given[name].requires_grad
    read_back = {id(call.given["output"]): call.result for call in step.calls["backward"]}
    assert torch.equal(given["backward_logits_before"], read_back[id(first)])
    assert given["backward_logits_after"] is read_back[id(second)]
    for name, answer in (("logits_before", first), ("logits_after", second)):
        for row, wanted in enumerate(by_interpolation(answer, step.targets)):
            rows, cols = step.targets.size[row].tolist()
            torch.testing.assert_close(given[name][row, :rows, :cols], wanted[-1])
    for name, part in parts.items():
        assert part.abs().sum() > 0, name
    assert soft.requires_grad


def by_interpolation(answer: Any, targets: Any) -> list[torch.Tensor]:
    """Each query's logits (steps, rows, cols, 10) at its target's size, by torch's own resizing."""
    found = []
    for row, (size, wanted) in enumerate(
        zip(answer.size.tolist(), targets.size.tolist(), strict=True)
    ):
        own = answer.logits[:, row, : size[0], : size[1]].movedim(-1, 1)
        mode: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
        found.append(functional.interpolate(own, size=wanted, **mode).movedim(1, -1))
    return found


# ---------------------------------------------------------------- resizing, accuracy


@pytest.mark.parametrize("wrong", [(1, 2), (2, -1), (-1, -1)])
def test_logits_of_another_size_are_resized_for_the_loss(ready: Any, wrong: Any) -> None:
    """Breaks: logits cut to the target's canvas instead of resized."""

    def other_size(targets: Any) -> Any:
        def change(output: Any) -> Any:
            canvas = torch.tensor(output.logits.shape[2:4])
            size = torch.minimum((targets.size + torch.tensor(wrong)).clamp(min=1), canvas)
            return dataclasses.replace(output, size=size)

        return change

    step = ready(prepare=lambda run, targets: say(run, *[other_size(targets)] * 2))
    step.take()
    second = step.calls["answer"][1].result
    assert (second.size != step.targets.size).any(-1).sum() > 3
    given = step.one("forward").given["logits"]
    for row, wanted in enumerate(by_interpolation(second, step.targets)):
        rows, cols = step.targets.size[row].tolist()
        torch.testing.assert_close(given[:, row, :rows, :cols], wanted)


def test_accuracy_is_zero_at_a_wrong_size_however_right_the_cells(ready: Any) -> None:
    """Breaks: training accuracy or exactness that ignores a wrong size."""
    for change, expected in ((twice_as_large, 0.0), (exactly, 1.0)):
        step = ready(prepare=lambda run, t, change=change: say(run, change(t), change(t)))
        step.run.threshold.get_threshold = lambda: 0.5
        figures = step.take()
        assert figures["mask_ratio"] < 0.05  # the resized cells are right
        assert figures["accuracy"] == figures["exact"] == figures["size"] == expected
        assert figures["stored"] == step.run.system.solver2.n_updates == 2 * expected
        right = step.one("forward").given["size_right"]
        assert right.tolist() == [bool(expected)] * len(right)


def test_exact_is_the_share_of_grids_without_a_wrong_cell(ready: Any) -> None:
    """Breaks: the exact figure is the cell accuracy, or sizes alone."""

    def prepare(run: Any, targets: Any) -> None:
        grids = targets.output.clone()
        grids[0, 0, 0] = (grids[0, 0, 0] + 1) % 10
        say(run, *[showing(grids, targets.size)] * 2)

    step = ready(prepare=prepare)
    figures = step.take()
    n = len(step.targets.size)
    assert figures["exact"] == pytest.approx((n - 1) / n)
    cells = step.targets.size[0].prod().item()
    assert figures["accuracy"] == pytest.approx(1 - 1 / cells / n)
    assert figures["mask_ratio"] == pytest.approx(1 / cells / n)
    assert figures["size"] == 1.0


def test_a_target_that_does_not_fit_trains_its_size_and_not_its_cells(ready: Any) -> None:
    """Breaks: cells of a target that the canvas cannot hold are trained."""
    step = ready()
    step.targets = dataclasses.replace(step.targets, fits=step.targets.fits.clone())
    step.targets.fits[0] = False
    step.take()
    given = step.one("forward").given
    assert (given["target"][0] == -1).all()
    assert torch.equal(given["target"][1:], step.targets.output[1:])
    assert torch.equal(given["target_size"], step.targets.size)


# ---------------------------------------------------------------- the loss


def test_the_loss_gets_what_the_second_answer_said(ready: Any) -> None:
    """Breaks: confidence, sizes, inputs or pairs of something else handed to the loss."""
    step = ready()
    step.run.progress.epoch = 1
    step.take()
    first, second = (call.result for call in step.calls["answer"])
    reading = step.one("read").result
    given, parts = step.one("forward")
    assert given["confidence"] is second.confidence
    assert given["size_logits"] is second.size_logits
    assert torch.equal(given["target_size"], step.targets.size)
    assert torch.equal(given["size_right"], (second.size == step.targets.size).all(-1))
    assert torch.equal(given["inp"], step.batch.query_input)
    assert given["pair_summary"] is reading.pair_summary
    assert torch.equal(given["task_ids"], step.batch.demo_task)
    assert given["size_weight"] == pytest.approx(5 / 6)
    backward = {id(call.given["output"]): call.result for call in step.calls["backward"]}
    assert given["backward_logits"] is backward[id(second)]
    assert given["logits"].requires_grad
    assert not torch.equal(first.confidence, second.confidence)
    weights = step.run.system.efe_loss
    stated = {name: float(getattr(weights, f"lambda_{name}")) for name in PARTS}
    stated["size"] *= 5 / 6
    total = sum(stated[name] * float(parts[name].detach()) for name in PARTS)
    assert float(parts["total"].detach()) == pytest.approx(total, rel=1e-5)


TRAINED_BY = {
    "risk": "agent.pointer.",
    "amb": "agent.pointer.",
    "step": "agent.confidence.",
    "cons": "agent.pointer.",
    "bi": "agent.backward_model.",
    "z": "agent.confidence.",
    "prompt": "qwen.project.",
    "size": "agent.size_head.",
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_loss_has_a_weight_and_trains_by_itself(ready: Any, part: Any) -> None:
    """Breaks: that part's weight is 0 by default, or it does not enter the total."""
    step = ready("--no_reward", "--clip", 1e9, "--draw_steps", "off")
    loss = step.run.system.efe_loss
    assert float(getattr(loss, f"lambda_{part}")) > 0
    step.keep_gradients()
    for weight in (0.0, 1.0):
        for name in PARTS:
            getattr(loss, f"lambda_{name}").fill_(weight if name == part else 0.0)
        for module in step.run.system.modules().values():
            module.zero_grad()
        step.take()
        found = step.gradients()
        pulled = {n for n in found if n.startswith(TRAINED_BY[part]) and found[n].abs().sum() > 0}
        assert bool(pulled) == bool(weight)
    if part in ("step", "z", "prompt", "size"):  # the others pull on cells, which all is read off
        apart = {"agent.confidence.", "agent.size_head."} - {TRAINED_BY[part]}
        assert all(found[n].abs().sum() == 0 for n in found if n.startswith(tuple(apart)))


def test_the_divergence_backwards_trains_the_agent_through_its_answer(ready: Any) -> None:
    """Breaks: bi of a detached answer."""
    step = ready("--no_reward", "--clip", 1e9)
    step.keep_gradients()
    for name in PARTS:
        getattr(step.run.system.efe_loss, f"lambda_{name}").fill_(float(name == "bi"))
    step.take()
    found = step.gradients()
    assert any(g.abs().sum() > 0 for n, g in found.items() if n.startswith("agent.pointer."))


@pytest.mark.parametrize("shown", [True, False], ids=["true output", "own answer only"])
def test_the_backward_model_learns_from_the_true_output_alone(ready: Any, shown: Any) -> None:
    """Breaks: the true output never shown to it; the agent's own answers teach it."""

    def prepare(run: Any, _: Any) -> None:
        real = run.system.backward_of
        if not shown:
            run.system.backward_of = lambda *given: real(*given).detach()

    step = ready("--no_reward", "--clip", 1e9, prepare=prepare)
    step.keep_gradients()
    step.take()
    gradients = step.gradients().items()
    own = [g for n, g in gradients if n.startswith("agent.backward_model.") and g is not None]
    assert any(g.abs().sum() > 0 for g in own) == shown
