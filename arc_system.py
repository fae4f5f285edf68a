"""The five modules of a run, built from one configuration, and the way data takes through them.

demonstrations -> prompt -> answer -> a proposal and a changed prompt -> answer. Training and evaluation call the
same functions, so what is scored is what was trained. No losses, no files, no targets here.
`from arc_system import build_system`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from arc_agent import AgentConfig, AgentOutput, ArcAgent, Proposal, Sight, size_mask
from dataset_arc import N_INPUT_CANDIDATES, N_SIZE_CANDIDATES, Batch
from grid_features import COLOURS, N_CONTROL
from loss_function import EFELoss
from policy_refined import PolicyInfo, RefinedPolicy, prediction_stats
from proposal_policy import ARM_FACTS, Choice, acceptable, candidates_of
from qwen_hybrid_prompt import Prompt, QwenHybridPrompt, build_qwen_prompt, context_of_next_task
from solver2 import Solver2

# At prediction, planning ends for a query whose expected share of right cells reaches this
# (measured on training demonstrations, see docs/LOG.md).
STOP_CONFIDENCE = 0.8


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
    demonstrations: str = "on"
    prompt: str = "full"
    policy: str = "on"
    memory: bool = True
    task_tokens: bool = True
    efe_extras: bool = True
    hard_cells: bool = True
    stop_confidence: float = STOP_CONFIDENCE
    seed: int = 0


@dataclass
class Reading:
    """What is computed of a batch before any answer: prompt, encoded cells, pooled pairs."""

    batch: Batch
    prompt: Prompt
    sight: Sight
    summary: Tensor  # (Q, width) of the demonstrations' own prompt, before memory and task tokens
    pair_summary: Tensor | None  # (C, width) each demonstration's tokens, pooled
    inverse: Tensor  # (Q, R, pointers) rule from output to input, fitted to the demonstrations


@dataclass
class Refinement:
    """What the policy changed: the prompt's tokens (Q, L, width) and mask (Q, L), the proposed answers that the agent is to
    consider (None: for no query), and what it decided."""

    tokens: Tensor
    mask: Tensor
    proposal: Proposal | None
    info: PolicyInfo
    choice: Choice


@dataclass
class Answered:
    """A prediction: the agent's own answer, the answer after the refinement (the same where none was accepted), what was
    refined (None: policy off), and which queries answered again (n,) int64, in whose order the backward model's
    log-probabilities (n, rows, cols, 10) given each answer are; None where no query did."""

    before: AgentOutput
    after: AgentOutput
    refinement: Refinement | None
    again: Tensor
    backward_before: Tensor | None = None
    backward_after: Tensor | None = None


@dataclass
class System:
    """The five modules. `demonstrations`, `prompt` and `policy` are the ablation switches of the
    configuration."""

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

    def answer(
        self,
        reading: Reading,
        refinement: Refinement | None = None,
        *,
        stop: float | None = None,
    ) -> AgentOutput:
        """The agent's planning steps, after a refinement if one is given; `stop` is the
        confidence at which a query's planning ends (prediction only; None: all steps)."""
        prompt, proposal = reading.prompt, None
        if refinement is not None:
            proposal = refinement.proposal
            prompt = dataclasses.replace(prompt, tokens=refinement.tokens, mask=refinement.mask)
            if proposal is not None:  # what is proposed is said in the prompt, too
                token = self.agent.proposal_token(proposal.facts).unsqueeze(1)
                prompt = prompt.extended(token.to(prompt.tokens.dtype), proposal.given[:, None])
        return self.agent.plan(reading.batch, reading.sight, prompt, stop=stop, proposal=proposal)

    def refine(
        self,
        reading: Reading,
        before: AgentOutput,
        generator: torch.Generator | None,
        *,
        deterministic: bool = False,
        allowed: Tensor | None = None,
    ) -> Refinement:
        """The policy looks at the first answer, chooses among the proposals and changes the prompt.

        allowed (Q, A) bool: the proposals it may choose.
        """
        prompt, batch, policy = reading.prompt, reading.batch, self.policy_rl
        stats, mode = answer_stats(before), self.config.policy
        recalled = self.solver2.recall(fingerprint(batch), batch.task_index)
        candidates = candidates_of(
            batch.proposed,
            batch.proposed_size,
            batch.proposed_facts,
            before.grids(),
            before.logits[-1],
            policy.state(prompt.summary, stats),
            recalled,
        )
        choice = policy.proposals.choose(
            candidates, generator, mode=mode, deterministic=deterministic, allowed=allowed
        )
        tokens, info = policy.refine(
            prompt.tokens,
            prompt.mask,
            prompt.summary,
            stats,
            generator,
            mode,
            deterministic=deterministic,
        )
        return Refinement(tokens, prompt.mask, proposal_of(batch, choice.taken), info, choice)

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
    def predict(
        self,
        batch: Batch,
        generator: torch.Generator,
        *,
        own_score: Tensor | None = None,
        accept: bool = True,
    ) -> Answered:
        """The agent's own answer to a batch, and the refined one; for evaluation. A query's planning ends at
        the step whose confidence reaches `config.stop_confidence`. Only queries with an accepted proposal answer again.

        own_score (Q,): mean share of right cells of the agent's own answers to the demonstrations, each predicted from the
        others, NaN = not measured; accept=False takes what the policy prefers without asking the demonstrations.
        """
        reading = self.read(batch)
        stop = self.config.stop_confidence if self.config.stop_confidence < 1 else None
        before = self.answer(reading, stop=stop)
        nobody = torch.zeros(0, dtype=torch.long, device=before.size.device)
        if self.config.policy == "off":
            return Answered(before, before, None, nobody)
        allowed = acceptable(batch.proposed_facts, own_score) if accept else None
        refinement = self.refine(reading, before, generator, deterministic=True, allowed=allowed)
        again = nobody
        if refinement.proposal is not None:
            again = refinement.proposal.given.nonzero().squeeze(-1)
        if not len(again):
            return Answered(before, before, refinement, nobody)
        some = rows_of(reading, again)
        after = self.answer(some, rows_of(refinement, again), stop=stop)
        old, new = rows_of(before, again), after
        recovered = [self.backward_of(some, a.grids(), a.size) for a in (old, new)]
        return Answered(before, put_rows(before, again, after), refinement, again, *recovered)

    def _ablate(self, batch: Batch) -> Batch:
        """`demonstrations` off or shuffled takes them away from Qwen, from the agent's view of their
        cells and from the size rules, and the hypotheses fitted to them. What is left of them is the bound of
        the canvas. (`prompt` null or shuffled takes away the prompt tokens alone.)"""
        if self.config.demonstrations == "off":
            context = torch.full_like(batch.context, -1)
        elif self.config.demonstrations == "shuffled":
            context = context_of_next_task(batch)
        else:
            return batch
        candidates = batch.size_candidates.clone()
        candidates[..., N_INPUT_CANDIDATES:] = 0  # rules read off the demonstrations
        support = torch.zeros_like(batch.size_support)
        return dataclasses.replace(
            batch,
            context=context,
            size_candidates=candidates,
            size_support=support,
            proposed_size=torch.zeros_like(batch.proposed_size),
        )


def fingerprint(batch: Batch) -> Tensor:
    """Mean control features (Q, N_CONTROL) of each query's demonstrations; blind to colour permutations."""
    seen = (batch.context >= 0).unsqueeze(-1)
    control = batch.demo_control[batch.context.clamp(min=0)] if len(batch.demo_control) else None
    if control is None:
        return torch.zeros(len(seen), N_CONTROL, device=seen.device)
    return (control * seen).sum(1) / seen.sum(1).clamp(min=1)


def arms_right(batch: Batch, prints: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `Solver2.store_arms` keeps of a batch of whole tasks: fingerprints, owners, and per arm the share of the task's
    queries for which it was right, -1 where it proposed nothing.

    prints (Q, N_CONTROL) of the queries; right (Q, A) bool, which proposals were exact.
    """
    by_arm = batch.proposed_facts[..., ARM_FACTS]  # (Q, A, arms)
    there = by_arm.amax(1)
    hit = (by_arm * right.unsqueeze(-1)).amax(1)
    n, index = batch.n_tasks, batch.query_task

    def total(x: Tensor) -> Tensor:
        return torch.zeros(n, x.shape[1], device=x.device).index_add(0, index, x.float())

    n_queries = torch.bincount(index, minlength=n).clamp(min=1)[:, None]
    tried = total(there)
    share = torch.where(tried > 0, total(hit) / tried.clamp(min=1), -1.0)
    owner = torch.full((n,), -1, dtype=torch.long, device=index.device)
    owner[index] = batch.task_index
    return total(prints) / n_queries, owner, share


def proposal_of(batch: Batch, taken: Tensor) -> Proposal | None:
    """The proposals chosen, taken (Q,): 0 = none, else number + 1; None where no query has any to choose from."""
    if not batch.proposed.shape[1]:
        return None
    row = torch.arange(len(taken), device=taken.device)
    number = (taken - 1).clamp(min=0)
    given = taken > 0
    size = batch.proposed_size[row, number] * given[:, None]
    colours = batch.proposed[row, number].long()
    colours = torch.where(given[:, None, None] & (colours < COLOURS), colours, -1)
    return Proposal(colours, size, batch.proposed_facts[row, number] * given[:, None])


QUERY_FIELDS = (
    "query_sources", "query_canvas", "query_input", "query_input_size", "size_candidates",
    "size_support",
)  # fmt: skip
_OUTPUT_AXES = {"logits": 1, "size_logits": 0, "size": 0, "confidence": 1, "n_steps": 0}


def rows_of(x: Any, rows: Tensor) -> Any:
    """The given queries (n,) of a Reading (what answering needs of it), a Refinement or an AgentOutput."""
    if isinstance(x, AgentOutput):
        return AgentOutput(
            **{k: getattr(x, k).index_select(a, rows) for k, a in _OUTPUT_AXES.items()}
        )
    if isinstance(x, Refinement):
        p = x.proposal
        some = None if p is None else Proposal(p.colours[rows], p.size[rows], p.facts[rows])
        return dataclasses.replace(x, tokens=x.tokens[rows], mask=x.mask[rows], proposal=some)
    sight = Sight(*(getattr(x.sight, f.name)[rows] for f in dataclasses.fields(Sight)))
    batch: Any = SimpleNamespace(**{name: getattr(x.batch, name)[rows] for name in QUERY_FIELDS})
    prompt = Prompt(x.prompt.tokens[rows], x.prompt.mask[rows])
    return Reading(batch, prompt, sight, x.summary[rows], None, x.inverse[rows])


def put_rows(whole: AgentOutput, rows: Tensor, some: AgentOutput) -> AgentOutput:
    """`whole` with the given queries' answers (n,) exchanged for those of `some`."""
    return AgentOutput(
        **{
            k: getattr(whole, k).index_copy(a, rows, getattr(some, k))
            for k, a in _OUTPUT_AXES.items()
        }
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
    qwen_mode = "null" if config.demonstrations == "off" else config.prompt
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
        use_memory = config.memory and "shuffled" not in (config.prompt, config.demonstrations)
        solver2 = Solver2(config.n_tasks, config.width, use_memory=use_memory)
        generator = torch.Generator().manual_seed(config.seed)
        policy_rl = RefinedPolicy(config.width, generator=generator)
    efe_loss = EFELoss(hard_cells=config.hard_cells, extras=config.efe_extras)
    modules = (agent, solver2, efe_loss, policy_rl)
    for module in (*modules, qwen):
        module.to(device)
    return System(config, agent, qwen, solver2, efe_loss, policy_rl)
