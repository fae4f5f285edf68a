"""The same small training killed and resumed under HF Trainer, Lightning, Accelerate and ours.

Dropout, shuffling and random augmentation are on; each peer is used as its own documentation says.
Asked of each: is a killed and resumed run bit-exact, does it survive a SIGKILL in a save, does it
notice a flipped bit, does it fall back to an older checkpoint by itself?
    python benchmarks/bench_resume_peers.py
Peers that are not installed are left out. Children are forked, so each library is imported once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

EPOCHS, BATCHES, BATCH_SIZE, SAVE_EVERY, KILL_AT = 2, 12, 4, 5, 17
WIDTH = 64


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.body = nn.Sequential(
            nn.Linear(8, WIDTH), nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH), nn.ReLU()
        )
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.head(self.body(inputs)).squeeze(-1)
        return {"loss": (output - labels).square().mean(), "logits": output}


class Data(torch.utils.data.Dataset):
    """48 samples; with `augment`, noise from the global generator, as in most training code."""

    def __init__(self, augment: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(BATCHES * BATCH_SIZE, 8, generator=generator)
        self.labels = self.inputs.sum(1).sin()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        inputs = self.inputs[index]
        if self.augment:
            inputs = inputs + 0.1 * torch.randn(8)
        return {"inputs": inputs, "labels": self.labels[index]}


class SaveKiller:
    """SIGKILL at the Nth file operation that Python sees inside the `which`th save.

    Writers in compiled code (torch.save, safetensors) count as one operation each; a kill there
    leaves half of their file, as a kill in the middle of a write does.
    """

    current: SaveKiller | None = None

    @classmethod
    def watch_compiled_writers(cls) -> None:
        """Before the libraries are imported, which may take these functions by name."""
        with contextlib.suppress(ImportError):
            import safetensors.torch

            safetensors.torch.save_file = cls._halved(safetensors.torch.save_file, 1)
        torch.save = cls._halved(torch.save, 1)

    @classmethod
    def _halved(cls, function: Callable[..., Any], at: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            target = args[at] if len(args) > at else kwargs.get("f", kwargs.get("filename"))
            killer = cls.current
            if killer and killer.inside and isinstance(target, (str, Path)):
                killer.events += 1
                if killer.events == killer.number:
                    os.truncate(target, Path(target).stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def __init__(self, which: int, number: int | None) -> None:
        self.which, self.number = which, number
        self.saves = self.events = 0
        self.inside = False
        SaveKiller.current = self
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.inside or os.getpid() != self.pid:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3
        if writes or event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"):
            self.events += 1
            if self.events == self.number:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.pid = os.getpid()
            self.saves += 1
            self.inside = self.saves == self.which
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False

        return wrapped


Run = Callable[[Path, bool, int | None, SaveKiller | None], torch.nn.Module]


def die_at(step: int, kill_at: int | None) -> None:
    if kill_at is not None and step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


# -- the four ways to train ------------------------------------------------------------------------
def hf_trainer() -> tuple[Run, str]:
    import transformers

    def run(
        folder: Path, augment: bool, kill_at: int | None, killer: SaveKiller | None
    ) -> torch.nn.Module:
        transformers.set_seed(0)
        model = Net()

        class Killer(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                die_at(state.global_step, kill_at)

        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH_SIZE,
            save_steps=SAVE_EVERY,
            save_total_limit=3,
            learning_rate=1e-2,
            seed=0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=Data(augment), callbacks=[Killer()]
        )
        if killer:
            trainer._save_checkpoint = killer.around(  # type: ignore[method-assign]
                trainer._save_checkpoint
            )
        resume = any(folder.glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=resume)
        return model

    return run, f"HF Trainer {transformers.__version__}"


def lightning_trainer() -> tuple[Run, str]:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(
        folder: Path, augment: bool, kill_at: int | None, killer: SaveKiller | None
    ) -> torch.nn.Module:
        L.seed_everything(0, verbose=False)

        class Module(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = Net()

            def training_step(self, batch: Any, index: int) -> torch.Tensor:
                return self.net(**batch)["loss"]

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), lr=1e-2)

            def on_train_batch_end(self, *_: Any) -> None:
                die_at(self.trainer.global_step, kill_at)

        keep = ModelCheckpoint(
            dirpath=folder, every_n_train_steps=SAVE_EVERY, save_last=True, save_top_k=-1
        )
        trainer = L.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            devices=1,
            callbacks=[keep],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        if killer:
            trainer.save_checkpoint = killer.around(trainer.save_checkpoint)
        module = Module()
        loader = torch.utils.data.DataLoader(Data(augment), BATCH_SIZE, shuffle=True)
        trainer.fit(module, loader, ckpt_path="last")
        return module.net

    return run, f"Lightning {L.__version__}"


def accelerate_loop() -> tuple[Run, str]:
    import accelerate
    from accelerate.utils import DataLoaderConfiguration, set_seed

    def run(
        folder: Path, augment: bool, kill_at: int | None, killer: SaveKiller | None
    ) -> torch.nn.Module:
        set_seed(0)
        settings = DataLoaderConfiguration(use_seedable_sampler=True)
        accelerator = accelerate.Accelerator(cpu=True, dataloader_config=settings)
        net = Net()
        model, optimizer, loader = accelerator.prepare(
            net,
            torch.optim.AdamW(net.parameters(), lr=1e-2),
            torch.utils.data.DataLoader(Data(augment), BATCH_SIZE, shuffle=True),
        )
        save = killer.around(accelerator.save_state) if killer else accelerator.save_state
        start = 0
        saved = [p for p in folder.glob("step_*") if p.is_dir()]
        if saved:  # as the documented complete examples do: the newest folder
            newest = max(saved, key=lambda p: int(p.name.removeprefix("step_")))
            accelerator.load_state(str(newest))
            start = int(newest.name.removeprefix("step_"))
        step = start
        for epoch in range(start // BATCHES, EPOCHS):
            loader.set_epoch(epoch)
            here = loader
            if epoch == start // BATCHES and start % BATCHES:
                here = accelerator.skip_first_batches(loader, start % BATCHES)
            for batch in here:
                loss = model(**batch)["loss"]
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step % SAVE_EVERY == 0:
                    save(str(folder / f"step_{step}"))
                die_at(step, kill_at)
        return net

    return run, f"Accelerate {accelerate.__version__}"


def ours() -> tuple[Run, str]:
    from model_persistence import ModelPersistence, capture_rng_state, restore_rng_state

    def run(
        folder: Path, augment: bool, kill_at: int | None, killer: SaveKiller | None
    ) -> torch.nn.Module:
        torch.manual_seed(0)
        net, data = Net(), Data(augment)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        six = (net, None, None, None, None, optimizer)
        persistence = ModelPersistence(
            folder, drive_backup=False, save_every_n_batches=SAVE_EVERY, on_message=lambda _: None
        )
        save = persistence.save_checkpoint
        if killer:
            save = killer.around(save)
        step = 0
        if persistence.checkpoints:
            found = persistence.load_latest(*six)
            step = found["extra"]["step"]
            restore_rng_state(found["extra"]["rng"])
        while step < EPOCHS * BATCHES:
            epoch, batch = divmod(step, BATCHES)
            # Order is a function of (seed, epoch): nothing to replay after a resume.
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
            rows = order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE].tolist()
            samples = torch.utils.data.default_collate([data[i] for i in rows])
            loss = net(**samples)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % SAVE_EVERY == 0:
                extra = {"step": step, "rng": capture_rng_state()}
                save(*six, epoch, batch, {"loss": loss.item()}, extra=extra)
            die_at(step, kill_at)
        persistence.close()
        return net

    return run, "ours"


FRAMEWORKS = {
    "hf": hf_trainer,
    "lightning": lightning_trainer,
    "accelerate": accelerate_loop,
    "ours": ours,
}


# -- the questions ---------------------------------------------------------------------------------
def attempt(run: Run, folder: Path, augment: bool, **options: Any) -> tuple[int, str]:
    """One forked process. Returns (exit code or minus the signal, sha256 of the final weights)."""
    folder.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            which = options.get("kill_in_save")
            killer = SaveKiller(2, which) if "kill_in_save" in options else None
            net = run(folder, augment, options.get("kill_at"), killer)
            digest = hashlib.sha256()
            for _, t in sorted(net.state_dict().items()):
                digest.update(t.numpy().tobytes())
            events = killer.events if killer else 0
            os.write(writer, f"{digest.hexdigest()} {events}".encode())
            status = 0
        os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123 - a descriptor, not a path
        said = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said


def newest_weights(name: str, folder: Path) -> Path:
    """The weights file that the next resume would read."""
    if name == "hf":
        steps = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        return steps[-1] / "model.safetensors"
    if name == "accelerate":
        steps = sorted(folder.glob("step_*"), key=lambda p: int(p.name.split("_")[1]))
        return steps[-1] / "model.safetensors"
    if name == "lightning":
        return folder / "last.ckpt"
    return sorted((folder / "checkpoints").glob("checkpoint_*.pt"))[-1]


def ask(name: str, flips: int, kills: int) -> dict[str, Any]:
    """All questions to one framework."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    SaveKiller.watch_compiled_writers()
    run, title = FRAMEWORKS[name]()
    answers: dict[str, Any] = {"title": title}
    root = Path(tempfile.mkdtemp(prefix=f"peers-{name}-"))
    try:
        finals = {}
        for augment in (False, True):
            status, said = attempt(run, root / f"reference-{augment}", augment)
            if status != 0:
                return {**answers, "error": "the uninterrupted run failed"}
            finals[augment] = said.split()[0]
            again = attempt(run, root / f"again-{augment}", augment)[1].split()[0]
            work = root / f"killed-{augment}"
            attempt(run, work, augment, kill_at=KILL_AT)
            if augment:
                shutil.copytree(work, root / "killed", symlinks=True)
            _, said = attempt(run, work, augment)
            key = "exact, augmentation" if augment else "exact, no augmentation"
            answers[key] = bool(said) and said.split()[0] == finals[augment]
            answers["repeatable"] = answers.get("repeatable", True) and again == finals[augment]
        # Killed in its second save: at points spread over what a whole save does.
        _, said = attempt(run, root / "count", True, kill_in_save=None)
        events = int(said.split()[1])
        points = sorted({round(1 + i * (events - 1) / (kills - 1)) for i in range(kills)})
        survived = 0
        for point in points:
            work = root / f"save-{point}"
            attempt(run, work, True, kill_in_save=point)
            survived += attempt(run, work, True)[0] == 0
        answers["survives a kill in a save"] = f"{survived}/{len(points)}"
        # One flipped bit in the newest weights.
        noticed = 0
        for number in range(flips):
            work = root / f"flip-{number}"
            shutil.copytree(root / "killed", work, symlinks=True)
            path = newest_weights(name, work)
            path = path.resolve() if path.is_symlink() else path
            data = bytearray(path.read_bytes())
            rng = random.Random(number)
            data[len(data) // 2 + rng.randrange(-len(data) // 5, len(data) // 5)] ^= 16
            path.write_bytes(data)
            status, _ = attempt(run, work, True)
            noticed += status != 0 or any(work.rglob("quarantine/*.pt"))
        answers["notices a flipped bit"] = f"{noticed}/{flips}"
        # The newest file is cut in half.
        work = root / "half"
        shutil.copytree(root / "killed", work, symlinks=True)
        path = newest_weights(name, work)
        path = path.resolve() if path.is_symlink() else path
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        answers["falls back to an older one"] = attempt(run, work, True)[0] == 0
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return answers


COLUMNS = (
    "repeatable",
    "exact, no augmentation",
    "exact, augmentation",
    "survives a kill in a save",
    "notices a flipped bit",
    "falls back to an older one",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=sorted(FRAMEWORKS), help="ask only one")
    parser.add_argument("--flips", type=int, default=8, help="flipped bits to try")
    parser.add_argument("--kills", type=int, default=6, help="points of a save to kill at")
    args = parser.parse_args()
    if args.framework:
        print(json.dumps(ask(args.framework, args.flips, args.kills)))
        return
    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    figures = {}
    for name in FRAMEWORKS:
        command = [sys.executable, __file__, "--framework", name]
        command += ["--flips", str(args.flips), "--kills", str(args.kills)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["?"])[-1]
            print(f"| {name} | left out: {reason} |")
            continue
        answers = json.loads(done.stdout.strip().splitlines()[-1])
        figures[name] = answers
        words = {True: "yes", False: "no"}
        cells = [str(words.get(answers.get(c), answers.get(c, "-"))) for c in COLUMNS]
        print(f"| {answers['title']} | {' | '.join(cells)} |", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
