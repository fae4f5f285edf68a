"""Device bugs that `wiring_mutants.py device` puts in, one at a time: a table.

On a CPU none of them fails; on a pretended GPU each does (tests/test_pretend_device.py). Form and
rules: `wiring_table.py`.
`from device_table import DEVICE`.
"""

from __future__ import annotations

from wiring_table import AGENT, BATCHES, CELLS, EVALUATION, MEMORY, QWEN, Mutant
from wiring_table import T as LOOP

STEP = "pretend_device: training_step"
VOTE = "pretend_device: voting"
RUN = "pretend_device: saves_resumes"

DEVICE = [
    Mutant(
        "device: the policy's generator is made on the CPU",
        LOOP,
        "generator_for(run.device, *place, 2)",
        'generator_for("cpu", *place, 2)',
        STEP,
    ),
    Mutant(
        "device: arange without a device",
        CELLS,
        "row = torch.arange(rows, device=size.device) < size[:, :1]",
        "row = torch.arange(rows) < size[:, :1]",
        STEP,
    ),
    Mutant(
        "device: a mask made on the CPU",
        MEMORY,
        "[own.new_ones(n, self.n_task_tokens + 1, dtype=torch.bool)]",
        "[torch.ones(n, self.n_task_tokens + 1, dtype=torch.bool)]",
        STEP,
    ),
    Mutant(
        "device: numpy() without cpu()",
        EVALUATION,
        "later, later_sizes = after.grids().cpu().numpy(), after.size.tolist()",
        "later, later_sizes = after.grids().numpy(), after.size.tolist()",
        VOTE,
    ),
    Mutant(
        "device: item() in a training step",
        LOOP,
        '"loss": loss,\n',
        '"loss": torch.tensor(loss.item()),\n',
        STEP,
    ),
    Mutant(
        "device: a mean over a mask in a training step",
        LOOP,
        '"reward": reward.mean(),',
        '"reward": reward[reward == reward].mean(),',
        STEP,
    ),
    Mutant(
        "device: index_add to a sum that starts on the CPU",
        LOOP,
        "none = torch.zeros(batch.n_tasks, device=run.device)",
        "none = torch.zeros(batch.n_tasks)",
        STEP,
    ),
    Mutant(
        "device: averaged weights stay on the CPU after a resume",
        "optimizers.py",
        '        for a, saved in zip(self.average, state["average"], strict=True):\n'
        "            a.copy_(saved)",
        '        self.average = list(state["average"])',
        RUN,
    ),
    Mutant(
        "device: a buffer that is not registered stays behind",
        AGENT,
        'self.register_buffer("offsets", offsets, persistent=False)',
        "self.offsets = offsets",
        STEP,
    ),
    Mutant(
        "device: half precision reaches Cholesky",
        AGENT,
        "with torch.autocast(query.device.type, enabled=False):",
        "if seen.numel():",
        STEP,
    ),
    Mutant(
        "device: readings of Qwen stay on the CPU after a resume",
        QWEN,
        "(int(uses), reading.to(device).clone())",
        "(int(uses), reading.clone())",
        RUN,
    ),
    Mutant(
        "device: a batch left behind but for its queries",
        BATCHES,
        "if isinstance(value, torch.Tensor):\n                value = value.to(",
        'if isinstance(value, torch.Tensor) and not f.name.startswith("own_"):\n'
        "                value = value.to(",
        "pretend_device: training_step and cache",
    ),
]
