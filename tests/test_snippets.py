"""The snippets and commands of the user's five pages, on a CPU.

They stand here as the user wrote them, but for `--device cuda` (cpu), the number of epochs and
batches, the small model of FAST, and a folder in place of /content/drive/MyDrive. What else cannot
run as written is in NOT_AS_WRITTEN, with the reason.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from conftest import FAST, make_tasks, write_tasks

import curriculum
import dataset_arc
import model_persistence
import trainloop_complete_with_fixes as trainloop
from loss_function import EFELoss, combined_loss
from model_persistence import ModelPersistence, PersistenceError
from persistence.drive import configured_drive_backup
from persistence.find_run import find_latest_run, point_latest_at
from policy_refined import RefinedPolicy
from trained_model import load_modules

ROOT = Path(trainloop.__file__).parent

NOT_AS_WRITTEN = {
    "cat ALL_7_FIXES_EXPLAINED.md": "the documents are in docs/",
    "from google.colab import drive; drive.mount('/content/drive')": "exists on Colab only",
    "setup_drive_backup('/content/drive/MyDrive/ARC-EFE-Backups')": "refused while Drive is not "
    "mounted: a folder made there would be no backup; runs with another folder",
    "!pip install torch transformers": "needs the network; requirements.txt is the list",
    "qwen...register_full_backward_hook(hook); loss.backward()": "a hook sees the forward passes "
    "after it: register it before the loss is computed",
    "--device cuda": "refused without a GPU, with exit code 2",
    "from torch.cuda.amp import autocast, GradScaler": "torch calls it deprecated (document 002 "
    "says so, too); the same lines run with torch.amp and the device's name",
    "persistence.load_checkpoint(previous_id, agent, qwen, solver2, ...)": "the dots stand for the "
    "rest of the six",
    "ModelPersistence('/path/to/output/dir')": "stands for a run folder",
    "class SizeWarmupCurriculum: ... / class DynamicMemoryThreshold: ...": "listings of classes "
    "that are imported here; the second one reads a name that it never sets (ema_alpha)",
    "loss = consistency; if accuracy > 0.95: ...; param.requires_grad = False": "what the pages "
    "say was wrong before",
    "cp runs/arc_complete_*/best_model.pt FOLDER": "copies it; cp then says that it will not "
    "overwrite it by the same file behind arc_complete_latest, and its exit code is 1",
    "runs/arc_complete_latest on a file system without links": "not made there; name the run",
    "Commit: 4d049be": "commits of another repository",
}

COMMANDS = [
    "python trainloop_complete_with_fixes.py --epochs 20 --device cuda",
    "python trainloop_complete_with_fixes.py --epochs 20",
    "python trainloop_complete_with_fixes.py --epochs 10",
    "python trainloop_complete_with_fixes.py --resume --epochs 20 --device cuda",
    "python trainloop_complete_with_fixes.py --epochs 20 --resume --device cuda",
    "python trainloop_complete_with_fixes.py --resume --epochs 20",
    "python trainloop_complete_with_fixes.py --epochs 20 --agent_lr 1e-4 --qwen_lr 1e-4 "
    "--device cuda",
    "python trainloop_complete_with_fixes.py --max_batches 100 --epochs 5 --device cuda",
    "python trainloop_complete_with_fixes.py --epochs 20 --agent_lr 1e-5 --qwen_lr 1e-5 "
    "--device cpu",
    "python /content/ARC-EFE/trainloop_complete_with_fixes.py --epochs 20 --agent_lr 1e-4 "
    "--qwen_lr 1e-4 --device cuda",
    "python /content/ARC-EFE/trainloop_complete_with_fixes.py --resume --epochs 20 --device cuda",
    "python fixed.py --epochs 10 --agent_lr 1e-5 --qwen_lr 5e-5 --device cuda --max_batches 500",
]
DOCUMENTS = (
    "ALL_7_FIXES_EXPLAINED.md", "COLAB_PERSISTENCE_GUIDE.md", "COLAB_PERSISTENT_GUIDE.md",
    "COLAB_RUNTIME_FIXES.md", "COMPLETE_PIPELINE_ANALYSIS.md", "COMPLETE_SOLUTION_SUMMARY.md",
    "EFE_LOSS_INTEGRATION.md", "FINAL_SYSTEM_STATUS.md", "VARIABLE_GRID_SIZE_FIX.md",
)  # fmt: skip


class Shell(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


def python(command: str, *more: str, epochs: int = 1) -> Shell:
    """`python SCRIPT flags` in this process and the current folder, small and on the CPU."""
    command = re.sub(r"--epochs \d+", f"--epochs {epochs}", command.replace("cuda", "cpu"))
    _, script, *flags = shlex.split(command)
    argv = [script, *flags, *more, *(FAST if script in ("fixed.py", TRAINER) else ())]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return Shell(int(end.value.code or 0), out.getvalue(), err.getvalue())


TRAINER = "trainloop_complete_with_fixes.py"


def bash(command: str) -> Shell:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    return Shell(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with training.json, where the first command ran."""
    folder = tmp_path_factory.mktemp("home")
    write_tasks(folder / "training.json", make_tasks())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ARC_TRAINER_CONFIG_DIR", str(folder / "configuration"))
        done = python(COMMANDS[0], "--save_every", "1")
    assert done.code == 0, done.err
    (folder / "console.txt").write_text(done.out, encoding="utf-8")
    return folder


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, which is the current one."""
    shutil.copytree(trained, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


# -- commands ------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    _, script, *flags = shlex.split(command)
    assert (ROOT / Path(script).name).is_file()
    args = trainloop.build_parser().parse_args(flags)
    assert args.epochs in (5, 10, 20)


def test_train_then_resume_in_place(home: Path) -> None:
    first = (home / "console.txt").read_text(encoding="utf-8")
    assert "[Batch    0] Reward: " in first
    assert "[Epoch 0] Val Accuracy: " in first
    done = python(COMMANDS[3], epochs=2)
    assert done.code == 0, done.err
    assert "EXACT" in done.out
    assert "[Epoch 1] Val Accuracy: " in done.out
    assert len(list((home / "runs").glob("arc_complete_2*"))) == 1  # the same run goes on


def test_fixed_py_is_the_trainer(home: Path) -> None:
    command = COMMANDS[-1].replace("500", "1")
    done = python(command)
    assert done.code == 0, done.err
    newest = find_latest_run("runs")
    assert newest is not None
    arguments = json.loads((newest / "config.json").read_text(encoding="utf-8"))["arguments"]
    assert (arguments["agent_lr"], arguments["qwen_lr"]) == (1e-5, 5e-5)
    assert (home / "runs" / "arc_complete_latest").resolve() == newest.resolve()
    wrong = python("python fixed.py --no_such_flag")
    assert wrong.code == 2  # exit codes pass through


def test_training_json_of_the_working_folder_is_found_and_said(home: Path, tmp_path: Path) -> None:
    file = str((home / "training.json").resolve())
    out = (home / "console.txt").read_text(encoding="utf-8")
    (config,) = home.glob("runs/arc_complete_2*/config.json")
    recorded = json.loads(config.read_text(encoding="utf-8"))["arguments"]["data"]
    assert recorded.endswith("/training.json")
    assert f"Data: training.json was found by itself, {recorded}" in out
    assert dataset_arc.default_data() == file
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    assert dataset_arc.default_data() == "arcagi2"  # and nothing beside the project
    done = python(f"python {TRAINER} --resume {home}/runs/arc_complete_latest --epochs 2", epochs=1)
    assert (done.code, "EXACT" in done.out) == (0, True), done.err  # the recorded file, from there
    assert f"Run: {config.parent.resolve()}" in done.out  # the run itself, not the link to it
    with mock.patch.object(dataset_arc, "__file__", str(home / "dataset_arc.py")):
        assert dataset_arc.default_data() == file  # beside the script


def test_listing_and_copying_a_run(home: Path) -> None:
    assert "checkpoints" in bash("ls -la runs/arc_complete_*/").out
    assert bash("ls -ltr runs/arc_complete_*/ | tail -1").code == 0
    assert "training.log" in bash("ls -lh runs/arc_complete_*/training.log").out
    drive = home / "ARC-EFE-Backups"
    drive.mkdir()
    bash(f"cp runs/arc_complete_*/best_model.pt {drive}/")
    (best,) = home.glob("runs/arc_complete_2*/best_model.pt")
    assert (drive / "best_model.pt").read_bytes() == best.read_bytes()


def test_checkpoints_go_to_drive_and_come_back_through_the_latest_link(home: Path) -> None:
    (run,) = home.glob("runs/arc_complete_2*")
    drive = home / "MyDrive"
    drive.mkdir()
    copied = bash(
        "cp -r runs/arc_complete_latest/checkpoints/ \\\n "
        f"{drive}/checkpoint_backup_20260101_120000"
    )
    assert copied == (0, "", "")
    for file in (run / "checkpoints").glob("*.pt"):
        file.unlink()
    back = bash(f"cp -r {drive}/checkpoint_backup_* \\\n runs/arc_complete_latest/checkpoints/")
    assert back == (0, "", "")
    done = python(COMMANDS[5])
    assert (done.code, "EXACT" in done.out) == (0, True), done.err
    assert find_latest_run("runs") == Path("runs") / run.name


def test_latest_is_a_link_that_the_other_scripts_follow(home: Path) -> None:
    link = home / "runs" / "arc_complete_latest"
    (run,) = home.glob("runs/arc_complete_2*")
    assert link.readlink() == Path(run.name)
    assert find_latest_run(home / "runs") == run  # the link is no second run
    flags = "--data training.json --device cpu --threads 1 --out"
    done = python(f"python predict.py runs/arc_complete_latest --views 1 {flags} answer.json")
    assert done.code == 0, done.err
    assert len(json.loads((home / "answer.json").read_text(encoding="utf-8"))) == 6
    import report

    assert report.find_run(link).resolve() == run.resolve()
    folder = home / "runs" / "own"
    folder.mkdir()
    link.unlink()
    link.mkdir()
    point_latest_at(folder)  # a folder of that name is someone's own
    assert link.is_dir()
    assert not link.is_symlink()


def test_a_file_system_without_links_costs_the_link_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run = tmp_path / "arc_complete_20260101_120000"
    run.mkdir()
    point_latest_at(run)
    assert list(tmp_path.iterdir()) == [run]


# -- names and calls -----------------------------------------------------------------------------
def test_names_are_where_the_pages_import_them_from() -> None:
    from curriculum import DynamicMemoryThreshold, GradientMonitor, SizeWarmupCurriculum
    from model_persistence import TrainingState, setup_drive_backup

    assert DynamicMemoryThreshold is curriculum.DynamicMemoryThreshold
    assert GradientMonitor is curriculum.GradientMonitor
    assert SizeWarmupCurriculum is curriculum.SizeWarmupCurriculum
    assert callable(TrainingState)
    assert callable(setup_drive_backup)
    for module in (trainloop, model_persistence):
        with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
            _ = module.no_such_name


def test_resume_info_and_the_previous_checkpoint(home: Path) -> None:
    output_dir = "runs/arc_complete_latest"
    agent, qwen, solver2, efe_loss, policy_rl, optimizer, _ = load_modules(output_dir)
    persistence = ModelPersistence(output_dir)
    resume_info = persistence.get_resume_info()
    assert resume_info is not None
    assert set(resume_info) == {"checkpoint_id", "epoch", "batch", "metrics"}
    assert len(persistence.checkpoints) > 1
    previous_id = max(persistence.checkpoints.keys()) - 1
    metadata = persistence.load_checkpoint(
        previous_id, agent, qwen, solver2, efe_loss, policy_rl, optimizer
    )
    assert metadata["checkpoint_id"] == previous_id
    assert metadata["optimizer"] == "loaded"
    persistence = ModelPersistence(output_dir, max_checkpoints=3)  # Keep only last 3
    persistence = ModelPersistence(
        output_dir,
        max_checkpoints=2,  # Only 2 instead of 5
        save_every_n_batches=100,  # Save less frequently
    )
    assert [batch for batch in range(1, 301) if persistence.should_save_checkpoint(batch)] == [
        100,
        200,
        300,
    ]


def test_what_a_checkpoint_contains(home: Path) -> None:
    (file, *_) = home.glob("runs/arc_complete_latest/checkpoints/checkpoint_*.pt")
    checkpoint = torch.load(file, weights_only=True)
    for key in ("epoch", "batch", "metrics", "timestamp", "agent", "qwen", "solver2"):
        assert key in checkpoint
    assert {"efe_loss", "policy_rl"} <= set(checkpoint)
    assert set(checkpoint["optimizer"]) == {"state", "param_groups"}


def test_the_best_model_is_loaded_with_the_page_s_own_optimizer(home: Path) -> None:
    agent, qwen, solver2, efe_loss, policy_rl, _, _ = load_modules("runs", checkpoint="latest")
    with torch.no_grad():
        for p in agent.parameters():
            p.zero_()
    trainable_params = [
        {"params": agent.parameters(), "lr": 1e-5},
        {"params": qwen.parameters(), "lr": 5e-5},
    ]
    optimizer = torch.optim.Adam(trainable_params)
    before = optimizer.state_dict()
    said: list[str] = []
    persistence = ModelPersistence("runs/arc_complete_latest", on_message=said.append)
    metadata = persistence.load_best_model(
        agent, qwen, solver2, efe_loss, policy_rl, optimizer, device="cpu"
    )
    print(f"Loaded best model from epoch {metadata['epoch']}")  # noqa: T201 - the page's line
    assert metadata["metrics"]["accuracy_delta"] is not None
    assert metadata["optimizer"].startswith("left out: ")
    assert any("weights loaded, the optimizer's state left out" in line for line in said)
    assert optimizer.state_dict() == before
    saved = torch.load("runs/arc_complete_latest/best_model.pt", weights_only=True)["agent"]
    assert all(torch.equal(value, saved[key]) for key, value in agent.state_dict().items())
    with pytest.raises(model_persistence.MismatchError):  # a resume is exact or refused
        persistence.load_latest(agent, qwen, solver2, efe_loss, policy_rl, optimizer)
    input_grid = [[0, 1, 2], [3, 4, 5]]
    predictions = agent(input_grid)
    assert predictions.shape == (5, 2, 3, 10)


def test_an_optimizer_with_the_same_groups_but_of_another_kind(home: Path) -> None:
    agent, qwen, solver2, efe_loss, policy_rl, ours, _ = load_modules("runs")
    groups = [{"params": group["params"]} for group in ours.param_groups]
    other = torch.optim.Adam(groups, lr=1e-5)
    persistence = ModelPersistence("runs/arc_complete_latest", on_message=lambda _: None)
    metadata = persistence.load_checkpoint(
        max(persistence.checkpoints), agent, qwen, solver2, efe_loss, policy_rl, other
    )
    assert metadata["optimizer"].startswith("left out: it was saved by another kind of optimizer")
    assert not other.state


def test_qwen_is_seen_to_train(home: Path, whole_batch: Any) -> None:
    _, qwen, *_ = load_modules("runs/arc_complete_latest")
    qwen.train()
    flag = {"seen": False}

    def hook(m: Any, gin: Any, gout: Any) -> None:
        flag["seen"] = True

    qwen.transformer.layers[0].register_full_backward_hook(hook)
    loss = qwen(whole_batch).tokens[..., 0].sum()
    loss.backward()
    assert flag["seen"]
    grad_monitor = trainloop.GradientMonitor()
    qwen_grad_info = grad_monitor.check_gradients(qwen, "Qwen")
    assert qwen_grad_info["norm"] > 0


def test_the_old_form_of_the_loss_and_the_weight_of_hard_cells() -> None:
    out = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    pred_after = torch.tensor([[1, 0, 3], [4, 5, 0], [7, 8, 9]])
    mask = (pred_after != out).float()  # 1 where wrong, 0 where right
    mask_ratio = mask.sum() / mask.numel()
    assert mask.sum() == 2
    pred = torch.randn(5, 3, 3, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    efe_loss_fn = EFELoss()
    for target in (out, out.float(), out.byte()):
        efe_losses = efe_loss_fn(pred, target)
        efe_loss_val = efe_losses.get("total", sum(efe_losses.values()))
        expected = efe_loss_fn(logits=pred[:, None], target=out[None])["total"]
        assert torch.equal(efe_loss_val, expected)
    efe_loss_val = efe_loss_val * (0.5 + 0.5 * mask_ratio)
    efe_loss_val.backward()
    assert pred.grad is not None


def test_reward_and_combined_loss_of_two_grids() -> None:
    policy_rl = RefinedPolicy(32, generator=torch.Generator().manual_seed(0))
    target = inp = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    pred_before, pred_after = torch.tensor([[1, 0, 3], [4, 5, 0], [7, 8, 9]]), target
    reward, breakdown = policy_rl.compute_reward(pred_before, pred_after, target, inp)
    d_acc, d_size, d_color, d_rev = (breakdown[k] for k in ("d_acc", "d_size", "d_color", "d_rev"))
    assert torch.isclose(reward, 1.0 * d_acc + 0.5 * d_size + 0.5 * d_color + 0.5 * d_rev)
    assert d_acc == pytest.approx(2 / 9)
    efe_loss = torch.tensor(3.0)
    assert torch.equal(combined_loss(efe_loss, reward), 0.7 * efe_loss + 0.3 * (-reward))


def test_the_curricula_give_the_figures_of_the_pages() -> None:
    from curriculum import DynamicMemoryThreshold, SizeWarmupCurriculum

    weights = [SizeWarmupCurriculum().get_size_loss_weight(epoch) for epoch in range(5)]
    assert [f"{weight:.3f}" for weight in weights] == ["1.000", "0.833", "0.667", "0.500", "0.500"]
    threshold = DynamicMemoryThreshold(initial_threshold=0.2, ema_alpha=0.1)
    assert threshold.get_threshold() == pytest.approx(0.22)
    threshold.update(current_accuracy=0.3)
    assert threshold.get_threshold() == pytest.approx(0.21 * 1.10)


def test_mixed_precision_as_written_but_by_device(home: Path) -> None:
    from torch.amp import GradScaler, autocast

    agent, *_ = load_modules("runs")
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-5)
    loss_fn = EFELoss()
    scaler = GradScaler("cpu")
    with autocast("cpu"):
        predictions = agent([[1, 2], [3, 4]])
        loss = loss_fn(predictions, torch.tensor([[1, 2], [3, 4]]))["total"]
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(agent.parameters(), max_norm=1.0)
    before = [p.clone() for p in agent.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True))


def test_drive_backup_is_set_up_once(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from model_persistence import setup_drive_backup

    monkeypatch.setenv("ARC_TRAINER_CONFIG_DIR", str(tmp_path / "configuration"))
    backup_folder = tmp_path / "MyDrive" / "ARC-EFE-Backups"
    backup_folder.mkdir(parents=True, exist_ok=True)
    drive_backup_path = setup_drive_backup(str(backup_folder))
    assert drive_backup_path == backup_folder.resolve()
    assert f"Drive backup enabled: {backup_folder}" in capsys.readouterr().out
    assert configured_drive_backup() == backup_folder.resolve()


# -- what is not as written ----------------------------------------------------------------------
@pytest.mark.skipif(Path("/content/drive").is_mount(), reason="a Drive is mounted here")
def test_what_cannot_run_as_written_says_why(home: Path) -> None:
    from torch.cuda import amp

    with pytest.warns(FutureWarning, match="deprecated"):
        amp.GradScaler(enabled=False)
    with pytest.raises(PersistenceError, match="Google Drive is not mounted"):
        model_persistence.setup_drive_backup("/content/drive/MyDrive/ARC-EFE-Backups")
    persistence = ModelPersistence("runs/arc_complete_latest")
    with pytest.raises(TypeError, match="missing"):
        persistence.load_checkpoint(0, None, None, None, ...)  # type: ignore[call-arg]
    if not torch.cuda.is_available():
        command = [TRAINER, "--epochs", "20", "--device", "cuda"]
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            assert trainloop.main(command[1:]) == 2
        assert "--device cuda" in err.getvalue()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_documents_of_the_pages_exist(name: str) -> None:
    lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 75
