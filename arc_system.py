"""The five modules of a run, built from one configuration, and the way data takes through them.

demonstrations -> prompt -> answer -> refined prompt -> answer. Training and evaluation call the
same functions, so what is scored is what was trained. No losses, no files, no targets here.
`from arc_system import build_system`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from arc_agent import AgentConfig, AgentOutput, ArcAgent, Sight, size_mask
from dataset_arc import N_INPUT_CANDIDATES, N_SIZE_CANDIDATES, Batch
from grid_features import COLOURS, N_CONTROL
from loss_function import EFELoss
from policy_refined import PolicyInfo, RefinedPolicy, prediction_stats
from qwen_hybrid_prompt import Prompt, QwenHybridPrompt, build_qwen_prompt, context_of_next_task
from solver2 import Solver2


@dataclass(frozen=True)
class SystemConfig:
    """Everything that decides which weights a run has; written to config.json, read by predict."""

    width: int = 96
    heads: int = 4
    blocks: int = 1
    encoder_blocks: int = 1
    planning_steps: int = 5
    n_tasks: int = 1000
    qwen_model: str = "tiny"
    qwen_train: str = "auto"
    qwen_cache_interval: int = 1
    prompt: str = "full"
    policy: str = "on"
    memory: bool = True
    task_tokens: bool = True
    efe_extras: bool = True
    hard_cells: bool = True
    seed: int = 0


@dataclass
class Reading:
    """What a batch says before any answer: the prompt, what the agent sees, pooled pairs."""

    batch: Batch
    prompt: Prompt
    sight: Sight
    summary: Tensor  # (Q, width) of the demonstrations' own prompt, before memory and task tokens
    pair_summary: Tensor | None  # (C, width) each demonstration's tokens, pooled
    inverse: Tensor  # (Q, R, pointers) rule from output to input, fitted to the demonstrations


@dataclass
class System:
    """The five modules. `policy` and `prompt` are the ablation switches of the configuration."""

    config: SystemConfig
    agent: ArcAgent
    qwen: QwenHybridPrompt
    solver2: Solver2
    efe_loss: EFELoss
    policy_rl: RefinedPolicy

    def modules(self) -> dict[str, nn.Module]:
        """By the names a checkpoint uses."""
        return {
            "agent": self.agent,
            "qwen": self.qwen,
            "solver2": self.solver2,
            "efe_loss": self.efe_loss,
            "policy_rl": self.policy_rl,
        }

    def train(self, mode: bool = True) -> System:
        for module in self.modules().values():
            module.train(mode)
        return self

    def read(self, batch: Batch, keep_task: Tensor | None = None) -> Reading:
        """Demonstrations -> prompt and encoded cells. keep_task (Q,) bool: use the task tokens."""
        batch = self._ablate(batch)
        prompt = self.qwen(batch)
        summary, prompt_of_pairs = prompt.summary, prompt.pairs
        if keep_task is None:
            keep_task = torch.ones_like(batch.task_index, dtype=torch.bool)
        if not self.config.task_tokens:
            keep_task = torch.zeros_like(keep_task)
        tokens, mask = self.solver2.tokens(batch.task_index, batch.view_id, keep_task, summary)
        prompt = prompt.extended(tokens.to(prompt.tokens.dtype), mask)
        pairs = prompt_of_pairs.mean(1) if prompt_of_pairs is not None else None
        sight = self.agent.look(batch, self.agent.read_demonstrations(batch))
        inverse = self.agent.backward_model.fit(batch)
        return Reading(batch, prompt, sight, summary, pairs, inverse)

    def answer(self, reading: Reading, tokens: Tensor | None = None) -> AgentOutput:
        """The agent's five planning steps; `tokens` replaces the prompt's (a refinement)."""
        prompt = reading.prompt if tokens is None else Prompt(tokens, reading.prompt.mask)
        return self.agent.plan(reading.batch, reading.sight, prompt)

    def refine(
        self,
        reading: Reading,
        before: AgentOutput,
        generator: torch.Generator | None,
        *,
        deterministic: bool = False,
    ) -> tuple[Tensor, PolicyInfo]:
        """The policy's change of the prompt: refined tokens (Q, L, width) and what it did."""
        prompt = reading.prompt
        return self.policy_rl.refine(
            prompt.tokens,
            prompt.mask,
            prompt.summary,
            answer_stats(before),
            generator,
            self.config.policy,
            deterministic=deterministic,
        )

    def backward(self, reading: Reading, output: AgentOutput) -> Tensor:
        """The backward model's log-probabilities (Q, rows, cols, 10) over the inputs, given the
        agent's answer as it is, in probabilities. Gradient reaches answer and prompt; the backward
        model's weights never learn to excuse a wrong one."""
        colours = output.logits[-1].exp()
        return self._backward(reading, colours, output.size, learn=False)

    def backward_of(self, reading: Reading, grids: Tensor, size: Tensor) -> Tensor:
        """The same of grids (Q, H, W) with the given sizes (Q, 2). The backward model learns here:
        in training the grids are the true outputs, at prediction the answers handed in."""
        colours = one_hot(grids.long().clamp(min=0), COLOURS).float()
        return self._backward(reading, colours, size, learn=True)

    def _backward(self, reading: Reading, colours: Tensor, size: Tensor, *, learn: bool) -> Tensor:
        summary = reading.prompt.summary
        return self.agent.backward_logits(
            reading.batch, colours, size, summary, reading.inverse, learn=learn
        )

    @torch.no_grad()
    def predict(self, batch: Batch, generator: torch.Generator) -> tuple[AgentOutput, Tensor]:
        """The final answer of a batch, and what the backward model says of the inputs given the
        grids of that answer (log-probabilities); for evaluation."""
        reading = self.read(batch)
        output = self.answer(reading)
        if self.config.policy != "off":
            tokens, _ = self.refine(reading, output, generator, deterministic=True)
            output = self.answer(reading, tokens)
        return output, self.backward_of(reading, output.grids(), output.size)

    def _ablate(self, batch: Batch) -> Batch:
        """Null and shuffled prompts take the demonstrations away from Qwen, from the agent's view of
        their cells and from the size rules. What is left of them is the bound of the canvas."""
        if self.config.prompt == "null":
            context = torch.full_like(batch.context, -1)
        elif self.config.prompt == "shuffled":
            context = context_of_next_task(batch)
        else:
            return batch
        candidates = batch.size_candidates.clone()
        candidates[..., N_INPUT_CANDIDATES:] = 0  # rules read off the demonstrations
        support = torch.zeros_like(batch.size_support)
        return dataclasses.replace(
            batch, context=context, size_candidates=candidates, size_support=support
        )


def answer_stats(output: AgentOutput) -> Tensor:
    """The figures of an answer that the policy's state takes in, (Q, 8)."""
    rows, cols = output.logits.shape[2:4]
    inside = size_mask(output.size, rows, cols)
    return prediction_stats(
        output.logits, output.confidence, output.size, output.size_logits, inside
    )


def build_system(config: SystemConfig, device: Any = "cpu", *, offline: bool = False) -> System:
    """Build the modules; weights are a pure function of `config.seed`. Raises ModelError."""
    qwen_mode = config.prompt if config.prompt in ("no_qwen", "null") else "full"
    qwen = build_qwen_prompt(
        config.qwen_model,
        width=config.width,
        n_control=N_CONTROL,
        train=config.qwen_train,
        device=device,
        offline=offline,
        seed=config.seed,
        cache_interval=config.qwen_cache_interval,
        mode=qwen_mode,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        agent = ArcAgent(
            AgentConfig(
                width=config.width,
                heads=config.heads,
                blocks=config.blocks,
                encoder_blocks=config.encoder_blocks,
                n_steps=config.planning_steps,
                n_size_candidates=N_SIZE_CANDIDATES,
            )
        )
        # A shuffled prompt is another task's: kept in memory under this one's name, it could come
        # back to its own task and bring a query its own pair.
        use_memory = config.memory and config.prompt != "shuffled"
        solver2 = Solver2(config.n_tasks, config.width, use_memory=use_memory)
        generator = torch.Generator().manual_seed(config.seed)
        policy_rl = RefinedPolicy(config.width, generator=generator)
    efe_loss = EFELoss(hard_cells=config.hard_cells, extras=config.efe_extras)
    modules = (agent, solver2, efe_loss, policy_rl)
    for module in (*modules, qwen):
        module.to(device)
    return System(config, agent, qwen, solver2, efe_loss, policy_rl)
