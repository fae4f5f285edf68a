"""The whole project on a pretended GPU: nothing mixes devices, and a training step waits for the
device only where `ALLOWED` says so; and in half precision every part stays close to float32.

`pretend_device.py` says how it is pretended, docs/GPU.md what that cannot show, and breakages
that these tests notice: `python tests/faults/wiring_mutants.py device:`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Proposer, Script, lively_system, stir
from pretend_device import AS_GIVEN_ON_CUDA, CUDA, FLOAT32_ON_CUDA, Pretended, Wait
from torch import Tensor, nn

import evaluation
import predict
import trained_model
import trainloop_complete_with_fixes as trainloop
from adaptation import adapt
from batches import evaluation_views
from rule_list import fit_task

PROPOSER = Proposer()  # works each task out once
LOOP, QWEN = "trainloop_complete_with_fixes.py", "qwen_hybrid_prompt.py"
# (file, function, call) where a training step may wait for the device: how often, and why.
ALLOWED: dict[tuple[str, str, str], tuple[int, str]] = {
    (QWEN, "_readings", "tolist"): (1, "lengths of texts: which are read together; none queued"),
    (QWEN, "_run", "__bool__"): (4, "transformers, a length of texts each: are positions packed?"),
    ("arc_system.py", "answer_twice", "nonzero"): (1, "who answers again: the others are spared"),
    ("curriculum.py", "check_gradients", "tolist"): (1, "all of Qwen's figures at once"),
    (LOOP, "train_step", "__bool__"): (1, "no step on numbers that are not finite; behind it, so"),
    ("human_rl_agent.py", "update", "__bool__"): (1, "nor for the policy"),
    ("proposal_policy.py", "learn", "__bool__"): (1, "nor for the choice"),
    ("ranks.py", "means", "tolist"): (1, "all figures of the batch at once"),
}
ALLOWED_WITH_CACHE = {
    (QWEN, "_readings", "cpu: copied to cpu"): (1, "keys of what was read before"),
}
ALLOWED_WITH_SCALER = {
    (LOOP, "train_step", "item"): (1, "GradScaler: were all gradients finite?"),
}


@pytest.fixture
def device() -> Iterator[Pretended]:
    with Pretended() as pretended:
        yield pretended


@pytest.fixture
def on_device(train: Script) -> Callable[..., Any]:
    """`on_device(*flags)`: a run of the script set up on the pretended device, stirred."""

    def make(*flags: Any, proposing: bool = False) -> Any:
        outcome = train("--dry_run", "--device", "cuda", "--qwen_model", "tiny", *flags)
        assert outcome.code == 0, outcome.err
        stir(outcome.run.system)
        outcome.run.stream.proposals = PROPOSER if proposing else None
        return outcome.run

    return make


# ---------------------------------------------------------------- what is noticed at all


def x() -> Tensor:
    return torch.arange(12.0, device="cuda").view(3, 4)


def cpu() -> Tensor:
    return torch.arange(12.0).view(3, 4)


MIXED: dict[str, Callable[[], Any]] = {
    "arithmetic": lambda: x() + cpu(),
    "the other way": lambda: cpu() * x(),
    "in place": lambda: cpu().add_(x()),
    "joined": lambda: torch.stack([torch.zeros(()), x()[0, 0]]),
    "a layer left behind": lambda: nn.Linear(4, 2)(x()),
    "a layer that was moved": lambda: nn.Linear(4, 2).to("cuda")(cpu()),
    "index_add to a fresh sum": lambda: torch.zeros(2, 4).index_add(0, x()[0, :3].long(), x()),
    "a CPU tensor by a device index": lambda: cpu()[x()[0, :1].long()],
    "a mask": lambda: x().masked_fill(torch.ones(3, 4, dtype=torch.bool), 0.0),
    "a generator": lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    "a generator the other way": lambda: torch.rand(3, generator=torch.Generator("cuda")),
    "a generator that draws": lambda: x().multinomial(2, True, generator=torch.Generator()),
    "numpy": lambda: x().numpy(),
    "numpy, implicit": lambda: np.asarray(x()),
    "two GPUs": lambda: x() + x().to("cuda:1"),
    "a gradient": lambda: setattr(nn.Parameter(x()), "grad", cpu()),
}


@pytest.mark.parametrize("what", MIXED)
def test_mixed_devices_are_an_error(what: str) -> None:
    with (
        pytest.raises(AssertionError, match=r"CPU|device|generator|cuda:0 meets cuda:1"),
        Pretended(),
        contextlib.suppress(RuntimeError),  # what product code might catch is said at the end
    ):
        MIXED[what]()


WAITING: dict[str, Callable[[], Any]] = {
    "item": lambda: x()[0, 0].item(),
    "tolist": lambda: x().tolist(),
    "if": lambda: bool(x()[0, 0] > 0),
    "float": lambda: float(x()[0, 0]),
    "printed": lambda: f"{x()[0, 0]:.2f}",
    "cpu": lambda: x().cpu(),
    "to the CPU": lambda: x().to("cpu"),
    "to the device": lambda: cpu().to("cuda"),
    "to like another": lambda: cpu().to(x()),
    "made from data": lambda: torch.tensor([1, 2], device="cuda"),
    "nonzero": lambda: x().nonzero(),
    "where": lambda: torch.where(x() > 2),
    "by a mask": lambda: x()[x() > 2],
    "by a list": lambda: x()[[0, 1]],
    "by a CPU index": lambda: x()[torch.tensor([0, 1])],
    "a number on the CPU": lambda: torch.where(x() > 2, x(), torch.tensor(0.0)),
    "bincount": lambda: x()[0].long().bincount(minlength=4),
    "unique": lambda: x().unique(),
    "one draw": lambda: x().multinomial(1),
    "repeats": lambda: x()[0].repeat_interleave(x()[0].long()),
    "copied over": lambda: x().copy_(cpu()),
    "equal": lambda: torch.equal(x(), x()),
    "inverse": lambda: torch.linalg.inv(x() @ x().T + torch.eye(3, device="cuda")),
}


@pytest.mark.parametrize("what", WAITING)
def test_waits_are_counted(what: str, device: Pretended) -> None:
    WAITING[what]()
    assert sum(device.take_waits().values()) == 1


def test_what_a_gpu_does_without_waiting_is_no_wait(device: Pretended) -> None:
    moved = cpu().to("cuda", non_blocking=True)
    assert (moved.device, moved.is_cuda, (moved + 1).device) == (CUDA, True, CUDA)
    assert torch.equal(moved[1], moved.view(4, 3).flatten()[4:8])
    device.take_waits()
    index = moved[0, :2].long()
    moved[index], moved[torch.zeros(3, dtype=torch.long, device="cuda")]
    moved[moved > 2] = 0.0
    moved * torch.tensor(2.0) + 1
    torch.where(moved > 2, moved, 0.0)
    (moved + 1).multinomial(4, replacement=True, generator=torch.Generator("cuda"))
    moved.repeat_interleave(2, 1), moved.topk(2), moved.sort(), moved[0].cumsum(0)
    layer = nn.Linear(4, 2).to("cuda", non_blocking=True)
    layer(moved).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda
    torch.optim.AdamW(layer.parameters()).step()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    assert not torch.zeros(2).is_cuda
    assert moved.to("cuda:1").device.index == moved.to("cuda:1").get_device() == 1
    device.take_waits()
    assert device.take_waits() == Counter()


def test_autocast_is_that_of_cuda(device: Pretended) -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = x() @ x().T
        assert half.dtype == torch.bfloat16
        assert half.softmax(-1).dtype == half.exp().dtype == half.sum().dtype == torch.float32
        with pytest.raises(RuntimeError, match="not implemented for 'BFloat16'"):
            torch.linalg.cholesky_ex(half)  # the CPU's own autocast would make it float32
        with torch.autocast("cuda", enabled=False):
            assert half.softmax(-1).dtype == torch.bfloat16
    device.faults.clear()


def test_the_lists_of_autocast_are_those_of_this_torch() -> None:
    """Which operations have a kernel for autocast on CUDA, on the CPU: torch's own table."""
    named: dict[str, set[str]] = {}
    for overload in torch._C._dispatch_get_all_op_names():
        if overload.startswith("aten::"):
            keys = named.setdefault(overload[6:].split(".")[0], set())
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            keys |= {k for k in ("AutocastCUDA", "AutocastCPU") if has(overload, k)}
    for name in FLOAT32_ON_CUDA - {"__pow__"}:
        assert named[name] == {"AutocastCUDA"}, name
    for name in AS_GIVEN_ON_CUDA:
        assert named[name] == {"AutocastCPU"}, name
    for name in ("linear", "matmul", "conv2d", "scaled_dot_product_attention", "cdist"):
        assert named[name] == {"AutocastCUDA", "AutocastCPU"}, name
    for name in ("embedding_bag", "index_add", "gather", "silu"):
        assert named[name] == set(), name


# ---------------------------------------------------------------- training


def places(waits: Counter[Wait]) -> Counter[tuple[str, str, str]]:
    """The waits as `ALLOWED` names them."""
    found: Counter[tuple[str, str, str]] = Counter()
    for wait, times in waits.items():
        found[wait.file, wait.function, wait.call] += times
    return found


STEPS: dict[str, tuple[Sequence[Any], bool, tuple[Any, ...]]] = {
    # flags, whether hypotheses propose, what is allowed beside ALLOWED
    "hypotheses": (("--device", "cuda:1"), True, ()),
    "no hypotheses": ((), False, ()),
    "fp16": (("--amp", "fp16", "--grad_accum", 2), True, (ALLOWED_WITH_SCALER,)),
    "bf16, policy off": (("--amp", "bf16", "--policy", "off"), True, ()),
    "random policy": (("--policy", "random", "--prompt", "shuffled"), True, ()),
    "cache": (("--qwen_cache_interval", 2, "--demonstrations", "shuffled"), False,
              (ALLOWED_WITH_CACHE,)),
}  # fmt: skip


@pytest.mark.parametrize("what", STEPS)
def test_a_training_step_stays_on_the_device_and_waits_no_more_than_allowed(
    what: str, device: Pretended, on_device: Callable[..., Any]
) -> None:
    flags, proposing, further = STEPS[what]
    allowed = {at: much for some in (ALLOWED, *further) for at, much in some.items()}
    run = on_device("--amp", "off", *flags, proposing=proposing)
    for number in range(2):
        batch, targets = (part.to(run.device) for part in run.stream.batch(0, number))
        device.take_waits()
        figures = trainloop.train_step(run, batch, targets, last=bool(number))
        waited = places(device.take_waits())
        assert {at: n for at, n in waited.items() if n > allowed.get(at, (0, ""))[0]} == {}
        assert all(np.isfinite(value) for value in figures.values())
    assert run.progress.skipped == 0
    if what in ("hypotheses", "fp16"):  # the lists hold nothing that does not happen
        assert waited.keys() == allowed.keys()
    for module in run.system.modules().values():
        assert all(t.is_cuda for t in (*module.parameters(), *module.buffers()))
    moments = [s for s in run.optimizer.state.values() if "exp_avg" in s]
    assert moments
    assert all(s["exp_avg"].is_cuda and not s["step"].is_cuda for s in moments)


def test_the_device_computes_what_the_cpu_does(train: Script) -> None:
    """The first step's figures are the CPU's, but for what is rounded otherwise."""
    figures = []
    for name in ("cpu", "cuda"):
        with Pretended():
            options = ("--amp", "off", "--qwen_model", "tiny", "--blocks", 1)
            run = train("--dry_run", "--device", name, *options).run
            stir(run.system)
            run.stream.proposals = PROPOSER
            batch, targets = (part.to(run.device) for part in run.stream.batch(0, 0))
            figures.append(trainloop.train_step(run, batch, targets))
    assert figures[0].keys() == figures[1].keys()
    for name, value in figures[0].items():
        assert figures[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# ---------------------------------------------------------------- the scripts


def test_a_run_trains_scores_saves_resumes_and_answers(device: Pretended, train: Script) -> None:
    """Set-up, validation, batches, checkpoints, final voting, --resume and predict.py."""
    gpu: tuple[Any, ...] = (
        "--device",
        "cuda:1",
        "--qwen_model",
        "tiny",
        "--eval_views",
        1,
        "--max_batches",
        2,
    )
    gpu += ("--blocks", 1, "--planning_steps", 2, "--qwen_cache_interval", 3, "--val_pairs", 1)
    first = train(*gpu, "--amp", "fp16")
    assert first.code == 0, first.err
    device.random_states[1] = torch.ones(16, dtype=torch.uint8)
    assert set(device.synchronised) == {torch.device("cuda:1")}  # before what is copied is written
    trained_model.load_model(first.folder, device="cuda", offline=True)
    resumed = train("--resume", "--epochs", 2, "--device", "cuda:1")
    assert resumed.code == 0, resumed.err
    assert "EXACT" in resumed.out + resumed.err
    assert device.random_states[1].sum() == 0  # as it was saved
    file = resumed.checkpoint()
    assert file["extra"]["rng"]["cuda"][0].dtype == torch.uint8
    assert file["extra"]["in_use"]["device"] == "pretended"
    assert resumed.run.progress.epoch == 2
    answer = train.folder / "answer.json"
    asked = ["--data", str(train.data), "--out", str(answer), "--device", "cuda", "--views", "1"]
    assert predict.main([str(first.folder), *asked]) == 0
    assert answer.is_file()


def test_voting_and_test_time_training_answer_as_on_the_cpu(task_set: Any) -> None:
    hidden = evaluation.without_outputs(task_set.train[:4])
    explained = {}
    for task in hidden:
        pairs = [(p.input, p.output) for p in task.demonstrations if p.output is not None]
        explained[task.task_id, 0] = fit_task(pairs, [task.tests[0].input])[0]
    answers = []
    for name in ("cpu", "cuda"):
        with Pretended() if name == "cuda" else contextlib.nullcontext():
            system = lively_system(planning_steps=2)
            for module in system.modules().values():
                module.to(name)
            found = evaluation.predict_tasks(
                system,
                hidden,
                evaluation_views(1),
                device=name,
                proposals=evaluation.proposals_for(explained),
                own_scores={task.task_id: 0.3 for task in hidden},
            )
            assert any(change.accepted for p in found.values() for change in p.changes)
            answers.append(
                {key: [evaluation.content(g) for g in p.attempts()] for key, p in found.items()}
            )
            if name == "cuda":
                adapted = adapt(system, hidden[:2], {}, n_batches=1, device=name, seed=3)
                assert all(p.is_cuda for p in adapted.system.agent.parameters())
                assert adapted.n_batches >= 3
    assert answers[0] == answers[1]


def test_a_frozen_models_kept_states_go_to_the_device(device: Pretended, train: Script) -> None:
    """Breaks: states that stay in the RAM where they are pooled, or on the device where they are
    kept."""
    flags = ("--device", "cuda", "--qwen_model", "tiny", "--qwen_train", "frozen", "--epochs", 2)
    done = train(*flags, "--max_batches", 1, "--val_pairs", 1, "--eval_views", 1)
    assert done.code == 0, done.err
    states = done.run.system.qwen.states
    assert states.hits > 0
    assert all(kept.device.type == "cpu" for kept in states._entries.values())
    assert done.run.args.batch_cells > 0
