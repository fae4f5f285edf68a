"""predict.py end to end, with a model that the real trainer made in seconds."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAST, differing, make_task, make_tasks, write_tasks

import command_line
import evaluation
import hypotheses
import predict
import trained_model
import trainloop_complete_with_fixes as trainloop
from persistence.checkpoint_file import MODULES
from persistence.files import FileSystem
from persistence.restoring import module_state

ROOT = Path(predict.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = make_tasks(("flip", "same", "recolour", "crop"))
    tasks["two_tests"] = make_task("turn", n_tests=2)
    return write_tasks(tmp_path_factory.mktemp("data") / "training.json", tasks)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs: best_model.pt, several checkpoints, results.json."""
    runs = tmp_path_factory.mktemp("runs")
    flags = ["--data", str(data), "--runs_dir", str(runs), "--epochs", "2", "--quiet", *FAST]
    flags += ["--hypotheses", "on"]
    assert trainloop.main([*flags, "--save_every", "2", "--agent_lr", "0.01"]) == 0
    return next(runs.glob("arc_complete_2*"))


def call(*argv: Any) -> int:
    """main's exit code; argparse leaves by SystemExit."""
    try:
        return predict.main([*map(str, argv), "--device", "cpu"])
    except SystemExit as left:
        return int(left.code or 0)


def test_answers_every_input_of_every_task_in_order(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "submission.json"
    assert call(run, "--data", data, "--out", out, "--views", 2) == 0
    answers = json.loads(out.read_text())
    tasks = json.loads(data.read_text())
    assert sorted(answers) == sorted(tasks)
    for task_id, task in tasks.items():
        assert len(answers[task_id]) == len(task["test"])
        for answer in answers[task_id]:
            assert list(answer) == ["attempt_1", "attempt_2"]
            for grid in answer.values():
                cells = np.array(grid)
                assert cells.ndim == 2
                assert cells.min() >= 0
                assert cells.max() <= 9
    assert list(tmp_path.iterdir()) == [out]  # no temporary file is left


def test_scores_as_the_trainer_scored(run: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    results = json.loads((run / "results.json").read_text())
    scores = tmp_path / "scores.json"
    flags: tuple[Any, ...]
    flags = ("--out", tmp_path / "s.json", "--score_json", scores, "--views", results["views"])
    flags = (*flags, "--acceptance", results["acceptance"])
    assert call(run, "--data", data, *flags, "--batch_size", 2 * 6) == 0
    found = json.loads(scores.read_text())
    for key in ("n", "exact_at_1", "exact_at_2", "size_accuracy", "cell_accuracy", "tasks_solved"):
        assert found[key] == results[key], key
    assert len(found["by_task"]["two_tests"]) == 2
    printed = capsys.readouterr().out
    assert "two_tests" in printed
    assert "test 1: " in printed
    assert f"Outputs: {results['exact_at_2']}/6 exact in two attempts" in printed


def test_same_answers_twice_and_whatever_the_outputs_are(
    run: Path, data: Path, tmp_path: Path
) -> None:
    noisy = json.loads(data.read_text())
    for task in noisy.values():
        for pair in task["test"]:
            pair["output"] = [[7]]
    other = write_tasks(tmp_path / "training.json", noisy)
    texts = []
    for i, file in enumerate((data, data, other)):
        assert call(run, "--data", file, "--out", tmp_path / f"{i}.json", "--views", 2) == 0
        texts.append((tmp_path / f"{i}.json").read_bytes())
    assert texts[0] == texts[1] == texts[2]


def test_averaged_weights_are_the_ones_used(run: Path) -> None:
    model = trained_model.load_model(run)
    payload = torch.load(model.path, weights_only=True)
    extra = payload["extra"]
    assert model.averaged
    params = {
        f"{module}.{name}": p
        for module, part in model.system.modules().items()
        for name, p in part.named_parameters()
    }
    assert set(extra["average_names"]) <= set(params)
    moved = 0
    for name, value in zip(extra["average_names"], extra["average"]["average"], strict=True):
        assert torch.equal(params[name], value), name
        module, _, key = name.partition(".")
        moved += not torch.equal(value, payload[module][key])
    assert moved > len(params) // 2  # else the test could not tell them from the last weights
    assert extra["task_ids"] == sorted(extra["task_ids"])
    assert model.task_index["two_tests"] == extra["task_ids"].index("two_tests")


def test_a_lone_best_model_is_enough(run: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    copied = tmp_path / "best_model.pt"
    shutil.copy(run / "best_model.pt", copied)
    assert call(copied, "--data", data, "--out", tmp_path / "s.json", "--views", 1) == 0
    assert str(copied) in capsys.readouterr().out
    assert call(run, "--checkpoint", "best", "--data", data, "--out", tmp_path / "b.json") == 0


def test_kaggle_challenges_without_outputs(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    tables: list[dict[str, int]] = []
    predict_tasks = evaluation.predict_tasks

    def watched(*args: Any, **options: Any) -> Any:
        tables.append(options["task_index"])
        return predict_tasks(*args, **options)

    monkeypatch.setattr(evaluation, "predict_tasks", watched)
    tasks = {"new_task": make_task("mirror", n_tests=2), "two_tests": make_task("turn")}
    for task in tasks.values():
        for pair in task["test"]:
            del pair["output"]
    file = write_tasks(tmp_path / "arc-agi_test_challenges.json", tasks)
    out = tmp_path / "submission.json"
    assert call(run, "--data", file, "--out", out, "--views", 1, "--score") == 0
    answers = json.loads(out.read_text())
    assert [len(answers[t]) for t in ("new_task", "two_tests")] == [2, 1]
    assert tables[-1] == trained_model.load_model(run).task_index
    assert len(tables[-1]) == 5
    printed = capsys.readouterr().out
    assert "1 task known from training, 1 unseen" in printed
    assert "test 1: no known output" in printed
    assert "Nothing to score: none of the 3 test inputs has a known output." in printed


@pytest.mark.parametrize(
    ("flags", "workers", "at_once"),
    [((), 3, 3), (("--threads", 2), 3, 2), (("--adapt_batches", 1), 2, 3)],
)
def test_prediction_takes_the_cores_that_there_are(
    run: Path, data: Path, tmp_path: Path, monkeypatch: Any, flags: Any, workers: int, at_once: int
) -> None:
    """Breaks: one process fits all hypotheses and one thread answers, on many idle cores."""
    made: list[int] = []
    asked: list[int] = []
    fitter, predict_tasks = hypotheses.Fitter, evaluation.predict_tasks

    def made_with(tasks: Any, n_workers: int = 1) -> Any:
        made.append(n_workers)
        return fitter(tasks, 1)

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(options.get("at_once", 1))
        return predict_tasks(*args, **options)

    monkeypatch.setattr(predict, "cores", lambda: 3)
    monkeypatch.setattr(command_line, "_threads_at_first", lambda: 3)
    monkeypatch.setattr(hypotheses, "Fitter", made_with)
    monkeypatch.setattr(evaluation, "predict_tasks", watched)
    out = tmp_path / "s.json"
    assert call(run, "--data", data, "--out", out, "--views", 1, *flags) == 0
    assert made == [workers]
    assert asked[-1] == at_once


def test_one_task_file_and_a_folder_of_runs(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "my_task.json"
    file.write_text(json.dumps(make_task("double")))
    out = tmp_path / "s.json"
    assert call(run.parent, "--data", file, "--out", out, "--views", 1, "--score") == 0
    assert list(json.loads(out.read_text())) == ["my_task"]
    printed = capsys.readouterr().out
    assert f"Data:   {file}: 1 task, 1 test input\n" in printed
    assert "0 tasks known from training, 1 unseen" in printed
    assert f"Wrote {out}: 1 answer in " in printed
    assert "1 view\n" in printed
    assert "my_task" in printed


def test_answers_are_drawn_and_scored_as_they_were_written(
    run: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    """Breaks: pictures of other answers than those in the file, marks on right cells, totals that
    scroll away, a score that the file itself does not get."""
    out, page = tmp_path / "s.json", tmp_path / "page.html"
    flags: tuple[Any, ...] = ("--data", data, "--views", 1, "--out", out, "--score", "--quiet")
    assert call(run, *flags, "--show", "--page", page) == 0
    printed = capsys.readouterr().out
    answers, tasks = json.loads(out.read_text()), json.loads(data.read_text())
    blocks = {block.strip().split(",")[0]: block for block in printed.split("\n\n")[:-1]}
    for task_id in ("t0_flip", "t1_same"):
        lines = blocks[task_id].strip().splitlines()[1:]
        first, truth = answers[task_id][0]["attempt_1"], tasks[task_id]["test"][0]["output"]
        assert len(first[0]) == len(truth[0])
        wrong = int((np.array(first) != np.array(truth)).sum())
        column = lines[0].index("attempt 1")
        drawn = [line[column : column + 2 * len(first[0])] for line in lines if "  " in line]
        drawn = [line for line in drawn if line[1:2].isdigit()]
        assert [[int(c) for c in line[1::2]] for line in drawn] == first
        assert sum(line.count("!") for line in drawn) == wrong
    assert "\x1b" not in printed
    assert printed.rstrip().splitlines()[-3].startswith("  network alone")
    text = page.read_text()
    assert text.count("<section>") == sum(len(task["test"]) for task in tasks.values()) == 6
    assert text.count(">known output") == 6
    assert predict.main(["--score_file", str(out), "--data", str(data), "--quiet"]) == 0
    again = capsys.readouterr().out
    assert len(again.splitlines()) == 4
    assert "\n" + again in printed


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(
    run: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / run.name
    shutil.copytree(run, folder)
    newest = max((folder / "checkpoints").glob("*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    flags = ("--data", data, "--out", tmp_path / "s.json", "--views", 1)
    assert call(folder, *flags) == 0
    printed = capsys.readouterr()
    assert newest.name in printed.err
    assert newest.name not in printed.out
    assert newest.read_bytes() == bytes(content)
    assert call(newest, *flags) == 3
    assert "differs from what was written" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_describe_its_model(run: Path, tmp_path: Path) -> None:
    payload = torch.load(run / "best_model.pt", weights_only=True)
    for change, message in (
        (lambda extra: extra.pop("system"), "'system' is missing"),
        (lambda extra: extra["system"].update(depth=3), "this version does not know"),
        (lambda extra: extra["average_names"].reverse(), "do not fit"),
    ):
        extra = json.loads(json.dumps(payload["extra"]["system"]))
        altered = {**payload, "extra": {**payload["extra"], "system": extra}}
        altered["extra"]["average_names"] = list(payload["extra"]["average_names"])
        change(altered["extra"])
        with pytest.raises(predict.UserError, match=message) as raised:
            trained_model.model_of(altered, tmp_path / "m.pt", device="cpu", offline=True)
        assert raised.value.code == 3


def test_weights_that_nothing_trained_are_said(
    run: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    real = trained_model.model_of

    def untrained(*args: Any, **options: Any) -> Any:
        return dataclasses.replace(real(*args, **options), n_batches=0)

    monkeypatch.setattr(trained_model, "model_of", untrained)
    argv = [str(run), "--data", str(data), "--out", str(tmp_path / "s.json"), "--views", "1"]
    assert predict.main(argv) == 0
    assert "no batch was trained, its weights are those of the start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["no_such_run"], 3, "no such run"),
        (["RUN", "--data", "no_such_data"], 3, "no such data"),
        (["RUN", "--checkpoint", "99999"], 3, "no checkpoint 99999. There are: "),
        (["RUN", "--checkpoint", "newest"], 2, "use latest, best or a checkpoint's number"),
        (["RUN/best_model.pt", "--checkpoint", "best"], 2, "is a file already"),
        (["RUN/config.json"], 3, "config.json"),
        (["RUN", "--split", "evaluation"], 3, "Use --split train, which holds 5"),
        (["RUN", "--veiws", "3"], 2, "Did you mean --views?"),
        (["RUN", "--views", "0"], 2, "must be at least 1"),
        (["RUN", "--out", "no/such/folder/s.json"], 2, "does not exist"),
        (["RUN", "--out", "."], 2, "is a folder"),
        (["RUN", "--out", "/dev/null"], 2, "is no regular file"),
        (["~nobody_of_that_name/run"], 3, "no such run"),
        (["RUN", "--data", "~nobody_of_that_name/x"], 3, "no such data"),
        (["RUN", "--data", ""], 3, "names nothing"),
        (["RUN", "--device", "tpu"], 2, "use auto, cpu, cuda or cuda:N"),
    ],
)
def test_errors_are_one_line_and_a_code(
    run: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any,
    flags: list[str], code: int, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    flags = [flag.replace("RUN", str(run)) for flag in flags]
    argv = [*flags] if "--data" in flags else [*flags, "--data", str(data)]
    try:
        found = predict.main(argv)
    except SystemExit as left:
        found = int(left.code or 0)
    printed = capsys.readouterr()
    assert found == code
    assert says in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_one(run: Path, capsys: Any) -> None:
    assert predict.main([str(run), "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_an_interrupted_or_failed_write_leaves_the_old_file(
    run: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    out = tmp_path / "submission.json"
    out.write_text("old")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "predict_tasks", interrupt)
        assert call(run, "--data", data, "--out", out) == 130
    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "replace", full)
        assert call(run, "--data", data, "--out", out, "--views", 1) == 3
    assert "No space left on device" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_one_candidate_is_handed_in_twice_only_without_a_second_best() -> None:
    found = evaluation.Prediction()
    found.add(np.ones((1, 2), np.uint8), 1.0)
    task: Any = type("T", (), {"task_id": "a", "tests": (None,)})()
    assert predict.submission({("a", 0): found}, (task,)) == {
        "a": [{"attempt_1": [[1, 1]], "attempt_2": [[1, 1]]}]
    }
    found.spare = (np.array([[1, 2]], np.uint8), 0.5)
    assert predict.submission({("a", 0): found}, (task,)) == {
        "a": [{"attempt_1": [[1, 1]], "attempt_2": [[1, 2]]}]
    }
    found.add(np.zeros((1, 1), np.uint8), 2.0)
    assert predict.submission({("a", 0): found}, (task,)) == {
        "a": [{"attempt_1": [[0]], "attempt_2": [[1, 1]]}]
    }


@pytest.mark.parametrize("script", ["predict", "report", "export"])
def test_help_does_not_wait_for_torch(script: str) -> None:
    code = (
        f"import sys, {script}; {script}.build_parser().format_help(); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_six_objects_come_from_a_run_or_a_lone_file(run: Path, tmp_path: Path) -> None:
    payload = torch.load(run / "best_model.pt", weights_only=True)
    lone = tmp_path / "moved.pt"
    shutil.copy(run / "best_model.pt", lone)
    *modules, optimizer, metadata = trained_model.load_modules(lone)
    for name, module in zip(MODULES, modules, strict=True):
        saved = payload[name]
        assert differing(module_state(module), saved) == [], name
        assert not module.training
    assert differing(optimizer.state_dict(), payload["optimizer"]) == []
    names = [group["name"] for group in optimizer.param_groups]
    assert names[:2] == ["agent_matrices", "agent"]
    tokens = modules[2].task_tokens.weight  # groups hold the parameters that they held in training
    assert optimizer.param_groups[names.index("task_tokens")]["params"][0] is tokens
    assert metadata["epoch"] == payload["epoch"]
    assert metadata["metrics"] == payload["metrics"]
    newest = trained_model.load_modules(run.parent)[-1]
    assert newest["path"] == str(max((run / "checkpoints").glob("*.pt")))
