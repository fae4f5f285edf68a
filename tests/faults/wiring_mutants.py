"""Break the wiring of the training step in a copy, one way at a time, and show which test notices.

Of 130 natural breakages that were put in by hand, 26 passed all tests; `SURVIVORS` are those (and
their siblings), `OTHERS` more over the same parts. A breakage that no test catches is a promise
that nothing keeps.
    python tests/faults/wiring_mutants.py                # all, and the table
    python tests/faults/wiring_mutants.py reward         # those whose name contains `reward`
    python tests/faults/wiring_mutants.py --check        # only whether the table fits the code
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 240.0  # of one mutant; one that hangs the tests is noticed by them

T = "trainloop_complete_with_fixes.py"
SYSTEM, AGENT, QWEN = "arc_system.py", "arc_agent.py", "qwen_hybrid_prompt.py"
LANGUAGE = "language_model.py"
LOSS, BATCHES, MEMORY = "loss_function.py", "batches.py", "solver2.py"
CURRICULUM, POLICY, REWARD = "curriculum.py", "human_rl_agent.py", "reward_shaping.py"
COMMAND, CELLS, EVALUATION = "command_line.py", "grid_accuracy_loss.py", "evaluation.py"
STATE, RESUMING, LINES = "run_state.py", "resuming.py", "run_lines.py"
CHOICE, REFINED, FITTING = "proposal_policy.py", "policy_refined.py", "hypotheses.py"
FLAG = "wiring: reaches_what_it_names"


class Mutant(NamedTuple):
    """A breakage: the file, the text that occurs in it once, what replaces it, who should notice.

    test: `module: expression`, the tests of tests/test_MODULE.py that pytest's -k EXPRESSION picks.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


EFE_PARTS = ("risk", "amb", "step", "bi", "z", "prompt")
BEST_WEIGHTS = """    train(run, plan, persistence)
    modules = [*run.system.modules().values(), run.optimizer]
    persistence.load_best_model(*modules, device=run.device)
"""
BEST_AVERAGE = """    train(run, plan, persistence)
    best = persistence.load_best_model(*[None] * 6, device=run.device)
    run.average.load_state_dict(best["extra"]["average"])
"""

SURVIVORS = [
    Mutant(
        "7 second answer ignores the refined tokens",
        SYSTEM,
        "self.answer(reading, refinement, stop=stop)",
        "self.answer(reading, stop=stop)",
        "wiring: second_answer_reads",
    ),
    Mutant(
        "9 d_size after the resize",
        SYSTEM,
        "size_before=before.size,\n            size_after=after.size,",
        "size_before=targets.size,\n            size_after=targets.size,",
        "wiring_rewards: hard_reward_gets or pays_by_d_size",
    ),
    Mutant(
        "9 no reconstruction for the reward",
        SYSTEM,
        '                "reconstruction_before": backward_before.argmax(-1),\n'
        '                "reconstruction_after": backward_after.argmax(-1),\n',
        "",
        "wiring_rewards: pays_by_d_rev",
    ),
    *(
        Mutant(
            f"12 default weight of {part} is 0",
            LOSS,
            f"lambda_{part}: float = ",
            f"lambda_{part}: float = 0 * ",
            f"wiring_rewards: trains_by_itself and {part}",
        )
        for part in EFE_PARTS
    ),
    *(
        Mutant(
            f"12 {part} not in the total",
            LOSS,
            "lambdas[name] * parts[name] for name in PARTS]",
            f"lambdas[name] * parts[name] for name in PARTS if name != '{part}']",
            f"wiring_rewards: trains_by_itself and {part}",
        )
        for part in EFE_PARTS
    ),
    Mutant(
        "15 logits cut in place of resized",
        SYSTEM,
        "resize_logits(after.logits, after.size, targets.size",
        "resize_logits(after.logits, targets.size, targets.size",
        "wiring_rewards: another_size_are_resized",
    ),
    Mutant(
        "15 training accuracy ignores a wrong size",
        T,
        "cell_accuracy(shown, target, size_right)",
        "cell_accuracy(shown, target)",
        "wiring_rewards: zero_at_a_wrong_size",
    ),
    Mutant(
        "18 autocast never on",
        STATE,
        "enabled=self.dtype is not None)",
        "enabled=False)",
        "wiring: mixed_precision",
    ),
    Mutant(
        "29 accumulated gradients not averaged",
        T,
        "loss / args.grad_accum",
        "loss",
        "wiring: accumulation_averages",
    ),
    Mutant(
        "21 headline with the best weights",
        T,
        "    train(run, plan, persistence)\n",
        BEST_WEIGHTS,
        "wiring: headline_is_scored",
    ),
    Mutant(
        "21 headline with the best average",
        T,
        "    train(run, plan, persistence)\n",
        BEST_AVERAGE,
        "wiring: headline_is_scored",
    ),
    Mutant(
        "34 views ignore the seed",
        BATCHES,
        "(_VIEW, self.seed,",
        "(_VIEW, 0,",
        "wiring: another_seed_shows",
    ),
    Mutant(
        "4 a constant in the batch line's gradient norm",
        LINES,
        "Qwen_grad: {figures['qwen_grad']:.2e}",
        "Qwen_grad: {2.34e-4:.2e}",
        "wiring: batch_lines_and_summaries",
    ),
    Mutant(
        "4 a constant as the gradient norm",
        T,
        '"qwen_grad": qwen_grad',
        '"qwen_grad": 2.34e-4',
        "wiring: logged_gradient_norm",
    ),
    Mutant(
        "5 --qwen_cache_interval not passed on by the trainer",
        T,
        "qwen_cache_interval=args.qwen_cache_interval,",
        "qwen_cache_interval=1,",
        "wiring: cache",
    ),
    Mutant(
        "5 --qwen_cache_interval not passed on by the system",
        SYSTEM,
        "cache_interval=config.qwen_cache_interval,",
        "cache_interval=1,",
        "wiring: cache",
    ),
    Mutant(
        "6 planning block at step 0 only",
        AGENT,
        "x = block(x, mask, keys, table, rows, cols)",
        "x = block(x, mask, keys, table, rows, cols) if step == 0 else x",
        "wiring: goes_through_the_blocks",
    ),
    Mutant(
        "29 gradient checkpointing does nothing",
        LANGUAGE,
        "    if gradient_checkpointing:\n",
        "    if False:\n",
        "wiring: recomputed",
    ),
    Mutant(
        "33 --device auto says cuda without one",
        COMMAND,
        'return "cuda" if there else "cpu"',
        'return "cuda"',
        "wiring: auto_is_the_device",
    ),
    Mutant(
        "22 --max_checkpoints is 50 by default",
        T,
        '"--max_checkpoints", type=count, default=5,',
        '"--max_checkpoints", type=count, default=50,',
        "wiring: five_checkpoints",
    ),
    Mutant(
        "20 bar never shown", COMMAND, "return quiet or not", "return True or", "wiring: terminal"
    ),
    Mutant(
        "20 bar from 0 on a resume",
        T,
        "initial=min(progress.batch, n_batches),",
        "",
        "wiring: terminal",
    ),
    Mutant(
        "17 own entry given back",
        MEMORY,
        "(self.owners[None] != task_index[:, None]) |",
        "(self.owners[None] >= -1) |",
        "solver2: own_entry",
    ),
    Mutant(
        "17 summaries under another task's name",
        T,
        "owner[batch.query_task] = batch.task_index",
        "owner[batch.query_task] = batch.task_index.flip(0)",
        "wiring: own_summary",
    ),
    Mutant(
        "17 summaries with the task tokens inside",
        T,
        "batch.query_task, reading.summary.detach()",
        "batch.query_task, reading.prompt.summary.detach()",
        "wiring: own_summary",
    ),
]

OTHERS = [
    # 1 command line
    Mutant(
        "1 --task_lr_factor ignored",
        T,
        "task_lr_factor=args.task_lr_factor",
        "task_lr_factor=1.0",
        FLAG,
    ),
    Mutant(
        "1 --weight_decay ignored", T, "weight_decay=args.weight_decay", "weight_decay=0.0", FLAG
    ),
    Mutant("1 --max_context ignored", T, "max_context=args.max_context", "max_context=4", FLAG),
    Mutant(
        "1 --ema ignored",
        T,
        "WeightAverage(params, args.ema)",
        "WeightAverage(params, 0.998)",
        FLAG,
    ),
    Mutant(
        "1 --planning_steps ignored",
        T,
        "planning_steps=args.planning_steps",
        "planning_steps=5",
        FLAG,
    ),
    Mutant("1 --optimizer ignored", T, 'muon=args.optimizer == "muon"', "muon=True", FLAG),
    Mutant("1 --no_efe_extras ignored", T, "not args.no_efe_extras", "True", FLAG),
    Mutant("1 --no_hard_cells ignored", T, "not args.no_hard_cells", "True", FLAG),
    Mutant("1 --no_task_tokens ignored", T, "not args.no_task_tokens", "True", FLAG),
    Mutant(
        "1 --demonstrations ignored",
        T,
        "demonstrations=args.demonstrations",
        'demonstrations="on"',
        FLAG,
    ),
    Mutant(
        "1 --stop_confidence ignored",
        T,
        "stop_confidence=args.stop_confidence",
        "stop_confidence=0.95",
        FLAG,
    ),
    Mutant("1 --blocks ignored", T, "blocks=args.blocks", "blocks=1", FLAG),
    Mutant("1 --width ignored", T, "width=args.width", "width=32", FLAG),
    Mutant("1 --policy ignored", T, "policy=args.policy", 'policy="on"', FLAG),
    Mutant("1 --prompt ignored", T, "prompt=args.prompt", 'prompt="full"', FLAG),
    Mutant("1 --qwen_train ignored", T, "qwen_train=args.qwen_train", 'qwen_train="full"', FLAG),
    Mutant("1 --amp ignored", T, "pick_precision(args.amp, ", 'pick_precision("off", ', FLAG),
    Mutant("1 --views off ignored", T, 'augment=args.views == "on"', "augment=True", FLAG),
    Mutant(
        "1 --no_reward ignored",
        T,
        "torch.zeros_like(soft) if args.no_reward else soft",
        "soft",
        "wiring_rewards: trains_by_itself and size",
    ),
    Mutant(
        "1 --cost_power ignored",
        T,
        "frequency(task, args.cost_power)",
        "frequency(task, 0.0)",
        "wiring: cost_power",
    ),
    Mutant("1 --eval_views ignored", T, "args.eval_views or (", "(", "wiring: headline_is_of_all"),
    Mutant(
        "1 --vote_batches ignored",
        T,
        "max_batches=args.vote_batches",
        "max_batches=None",
        "wiring: headline_is_of_all",
    ),
    Mutant(
        "1 --val_pairs ignored",
        T,
        "limit = args.val_pairs",
        "limit = None",
        "wiring: headline_is_of_all",
    ),
    Mutant(
        "1 learning rates without warmup and decay",
        T,
        'group["base_lr"] * factor',
        'group["base_lr"]',
        "wiring: learning_rate",
    ),
    # 3 prompt, 4 Qwen, 5 cache
    Mutant(
        "3 one task's tokens for all",
        SYSTEM,
        "solver2.tokens(batch.task_index,",
        "solver2.tokens(batch.task_index * 0,",
        "wiring: own_tokens_and_views",
    ),
    Mutant(
        "3 one view's token for all",
        SYSTEM,
        "batch.view_id, keep_task",
        "batch.view_id * 0, keep_task",
        "wiring: own_tokens_and_views",
    ),
    Mutant(
        "3 task tokens never dropped",
        T,
        "(chance < 0.5)",
        "(chance < 2.0)",
        "wiring: half_of_the_tasks",
    ),
    Mutant(
        "3 task tokens dropped by a constant draw",
        T,
        'generator_for("cpu", *place, 1)',
        'generator_for("cpu", 1)',
        "wiring: half_of_the_tasks",
    ),
    Mutant(
        "4 Qwen at the agent's learning rate",
        SYSTEM,
        '"params": parts["qwen"], "lr": qwen_lr',
        '"params": parts["qwen"], "lr": agent_lr',
        "trainloop: fix_1",
    ),
    Mutant(
        "4 the projections' gradient held back",
        QWEN,
        "qwen = self.project(pooled)",
        "qwen = self.project(pooled).detach()",
        "trainloop: fix_1",
    ),
    Mutant(
        "4 gradient norm of the projections in it",
        T,
        'check_gradients(system.qwen.backbone, "Qwen")',
        'check_gradients(system.qwen, "Qwen")',
        "wiring: logged_gradient_norm",
    ),
    Mutant(
        "4 gradient norm of the memory without its task tokens",
        STATE,
        '"memory_grad": ("solver2", "task_tokens")',
        '"memory_grad": ("solver2",)',
        "wiring: logged_gradient_norm",
    ),
    Mutant(
        "4 gradient norm still scaled",
        T,
        "unscale = 1.0 / run.scaler.get_scale()",
        "unscale = 1.0",
        "wiring: between_two_steps",
    ),
    Mutant(
        "5 a pair is known in one view only",
        QWEN,
        "if self.cache.interval == 1:",
        "if True:",
        "wiring: cache_holds",
    ),
    Mutant(
        "5 cache never asked",
        QWEN,
        "self.training and self.cache",
        "False and self.cache",
        "wiring: cache",
    ),
    # 6 agent
    Mutant(
        "6 one step token for all steps",
        AGENT,
        "self.step_token[step]",
        "self.step_token[0]",
        "wiring: token_of_its_own",
    ),
    Mutant(
        "6 answer so far not fed back",
        AGENT,
        "x = x + self.answer(probability.to(x.dtype))",
        "pass",
        "arc_agent: fed_back",
    ),
    # 7 refine, 8 policy
    Mutant(
        "7 evaluation samples the refinement",
        SYSTEM,
        "prompt_alone=False, deterministic=True, allowed",
        "prompt_alone=False, allowed",
        "wiring: hang_on_the_generator",
    ),
    Mutant(
        "6 training stops early",
        SYSTEM,
        "self.answer(reading, refinement, stop=stop)",
        "self.answer(reading, refinement, stop=0.0)",
        "wiring: takes_every_planning_step",
    ),
    Mutant(
        "7 noise the same in every batch",
        T,
        "generator_for(run.device, *place, 2)",
        "generator_for(run.device, 2)",
        "wiring: noise_follows",
    ),
    Mutant(
        "8 policy blind to the first answer",
        SYSTEM,
        "stats, mode = answer_stats(before),",
        "stats, mode = 0 * answer_stats(before),",
        "wiring: policy_sees",
    ),
    Mutant(
        "8 next state is of the first answer",
        T,
        "reading.prompt.summary, answer_stats(after)",
        "reading.prompt.summary, answer_stats(before)",
        "wiring: policy_sees",
    ),
    Mutant(
        "8 policy paid the other way round",
        T,
        "update(refinement.info, reward, ",
        "update(refinement.info, -reward, ",
        "trainloop: fix_6",
    ),
    Mutant(
        "8 policy paid once, not five times",
        POLICY,
        "REWARD_SCALE = 5.0",
        "REWARD_SCALE = 1.0",
        "human_rl_agent: scaled_by_five",
    ),
    # 9 reward, 10 mixture
    Mutant(
        "9 reward of one answer twice",
        SYSTEM,
        "before.grids(), after.grids()",
        "after.grids(), after.grids()",
        "wiring_rewards: hard_reward_gets",
    ),
    Mutant(
        "9 backward reading of the second answer twice",
        SYSTEM,
        "self.backward(reading, before)",
        "self.backward(reading, passed.after)",
        "wiring_rewards: pays_by_d_rev",
    ),
    Mutant(
        "9 soft reward the other way round",
        SYSTEM,
        "                logits_before,\n                logits[-1],",
        "                logits[-1],\n                logits_before,",
        "wiring_rewards: soft_reward_gets",
    ),
    Mutant(
        "9 soft reward without a change of size",
        SYSTEM,
        "size_logits_before=before.size_logits",
        "size_logits_before=after.size_logits",
        "wiring_rewards: soft_reward_gets",
    ),
    Mutant(
        "9 soft reward without a change of the reading back",
        SYSTEM,
        "backward_logits_before=backward_before",
        "backward_logits_before=backward_after.detach()",
        "wiring_rewards: soft_reward_gets or pays_by_d_rev",
    ),
    Mutant(
        "9 size weighs nothing",
        REWARD,
        '"d_size": 0.5',
        '"d_size": 0.0',
        "wiring_rewards: pays_by_d_size",
    ),
    Mutant(
        "10 half and half", LOSS, "EFE_SHARE = 0.7", "EFE_SHARE = 0.5", "trainloop: stated_mixture"
    ),
    Mutant(
        "10 reward with the wrong sign",
        LOSS,
        "(-soft_reward.mean())",
        "soft_reward.mean()",
        "trainloop: stated_mixture",
    ),
    # 12 - 15 loss
    Mutant(
        "12 confidence of the first answer",
        T,
        "confidence=after.confidence",
        "confidence=before.confidence",
        "wiring_rewards: second_answer_said",
    ),
    Mutant(
        "12 reading back of the first answer",
        T,
        "backward_logits=backward_after",
        "backward_logits=backward_before",
        "wiring_rewards: second_answer_said or divergence_backwards",
    ),
    Mutant(
        "12 reading back of a detached answer",
        SYSTEM,
        "        colours = output.logits[-1].exp()\n",
        "        colours = output.logits[-1].exp().detach()\n",
        "wiring_rewards: divergence_backwards",
    ),
    Mutant(
        "12 backward model never shown the true output",
        T,
        "        backward_logits_true=backward_true,\n",
        "",
        "wiring_rewards: backward_model_learns",
    ),
    Mutant(
        "12 backward model taught by the agent's own answers",
        SYSTEM,
        "output.size, learn=False)",
        "output.size, learn=True)",
        "wiring_rewards: backward_model_learns",
    ),
    Mutant(
        "12 confidence blind to a wrong size",
        T,
        "        size_right=size_right,\n",
        "",
        "wiring_rewards: second_answer_said",
    ),
    Mutant(
        "12 all pairs of the batch are one task's",
        T,
        "task_ids=batch.demo_task",
        "task_ids=0 * batch.demo_task",
        "wiring_rewards: second_answer_said",
    ),
    Mutant(
        "13 wrong cells weigh as right ones",
        CELLS,
        "torch.where(wrong, hard,",
        "torch.where(wrong, torch.ones_like(hard),",
        "trainloop: fix_3",
    ),
    Mutant(
        "14 size weight 1 for ever",
        T,
        "size_weight=size_weight,\n        backward",
        "size_weight=1.0,\n        backward",
        "wiring_rewards: second_answer_said",
    ),
    Mutant(
        "15 cells of a target that does not fit are trained",
        SYSTEM,
        ".masked_fill(~targets.fits[:, None, None], -1)",
        "",
        "wiring_rewards: does_not_fit",
    ),
    Mutant(
        "15 exactness ignores a wrong size",
        T,
        "exact_match(shown, target, size_right)",
        "exact_match(shown, target)",
        "wiring_rewards: zero_at_a_wrong_size",
    ),
    Mutant(
        "15 exactness is the share of cells",
        T,
        "exact_match(shown, target, size_right)",
        "cell_accuracy(shown, target, size_right)",
        "wiring_rewards: exact_is_the_share",
    ),
    # 16, 17 threshold and memory
    Mutant(
        "16 the bad solutions are stored",
        T,
        "by_task > run.threshold",
        "by_task < run.threshold",
        "wiring: above_the_threshold",
    ),
    Mutant(
        "16 threshold fed with the exact share",
        T,
        'run.threshold.update(mean["accuracy"])',
        'run.threshold.update(mean["exact"])',
        "wiring: mean_accuracy_of_the_epoch",
    ),
    Mutant(
        "16 threshold never moves",
        T,
        'run.threshold.update(mean["accuracy"])',
        "pass",
        "wiring: mean_accuracy_of_the_epoch",
    ),
    Mutant(
        "16 threshold without its margin",
        CURRICULUM,
        "self.ema_accuracy * self.margin",
        "self.ema_accuracy",
        "curriculum: ten_percent",
    ),
    Mutant(
        "17 accuracy of a task summed, not averaged",
        T,
        "index_add(0, batch.query_task, accuracy) / counts",
        "index_add(0, batch.query_task, accuracy)",
        "wiring: above_the_threshold",
    ),
    Mutant(
        "17 summaries summed, not averaged",
        T,
        "summary / counts[:, None]",
        "summary",
        "wiring: own_summary",
    ),
    Mutant(
        "17 a shuffled prompt is kept",
        SYSTEM,
        'config.memory and "shuffled" not in (config.prompt, config.demonstrations)',
        "config.memory",
        "wiring: shuffled_prompt",
    ),
    # 18, 19 precision and steps
    Mutant(
        "18 evaluation without mixed precision",
        T,
        "dtype=run.dtype,",
        "dtype=None,",
        "wiring: mixed_precision",
    ),
    Mutant(
        "18 an infinite loss is healthy",
        T,
        "torch.isfinite(norm) & torch.isfinite(loss)",
        "torch.isfinite(norm)",
        "wiring: not_finite",
    ),
    Mutant(
        "18 an infinite gradient is healthy",
        T,
        "torch.isfinite(norm) & torch.isfinite(loss)",
        "torch.isfinite(loss)",
        "wiring: not_finite",
    ),
    Mutant(
        "18 the average takes skipped batches in",
        T,
        "        if healthy:\n            run.average.update()",
        "        run.average.update()\n        if healthy:",
        "wiring: not_finite",
    ),
    Mutant(
        "18 no clipping", T, "(params, args.clip)", "(params, 1e9)", "trainloop: clipping_bounds"
    ),
    Mutant(
        "18 fp16 without scaling",
        COMMAND,
        "(torch.float16, True)",
        "(torch.float16, False)",
        FLAG,
    ),
    # 20, 21 lines and validation
    Mutant(
        "20 d_acc in the place of the reward",
        LINES,
        "Reward: {figures['reward']:",
        "Reward: {figures['d_acc']:",
        "wiring: figure_of_the_batch_line",
    ),
    Mutant(
        "20 summaries of sums",
        STATE,
        "value / max(1, self.counted)",
        "value",
        "wiring: batch_lines_and_summaries",
    ),
    Mutant(
        "20 memory updates counted over all epochs",
        STATE,
        "self.memory_updates = 0",
        "pass",
        "trainloop: fix_5_the_threshold",
    ),
    Mutant(
        "21 raw weights validated",
        T,
        "with run.average.applied():",
        "if True:",
        "trainloop: averaged_weights",
    ),
    Mutant(
        "21 validation of whole tasks",
        EVALUATION,
        "only=keys",
        "only=None",
        "wiring: headline_is_of_all",
    ),
    Mutant(
        "21 evaluation without task tokens",
        T,
        "task_index=run.stream.task_table,",
        "task_index=None,",
        "wiring: evaluation_knows",
    ),
    Mutant(
        "21 headline of the validation subset",
        T,
        "validation if args.max_batches else everything",
        "validation",
        "wiring: headline_is_of_all",
    ),
    # 22 - 29 saving, resuming, leaving
    Mutant(
        "22 --save_every not passed on",
        T,
        "save_every_n_batches=args.save_every",
        "save_every_n_batches=50",
        "wiring: five_checkpoints",
    ),
    Mutant(
        "22 --max_checkpoints not passed on",
        T,
        "max_checkpoints=args.max_checkpoints",
        "max_checkpoints=5",
        "run_state: old_checkpoints_go",
    ),
    Mutant(
        "23 --best_metric ignored",
        T,
        "row.get(args.best_metric)",
        'row.get("accuracy_delta")',
        "wiring: by_the_metric",
    ),
    Mutant(
        "24 checkpoints without metrics",
        T,
        "metrics=checkpoint_metrics(figures)",
        "metrics={}",
        "wiring: figures_of_its_batch",
    ),
    Mutant(
        "25 metrics not rewound",
        RESUMING,
        "    run.log.rewind(progress.epoch, progress.batch)\n",
        "",
        "wiring: lost_its_last_batches",
    ),
    Mutant(
        "25 the cache's content not restored",
        STATE,
        'in {**parts, "qwen_cache": run.system.qwen.load_cache_state}.items():',
        "in parts.items():",
        "run_state: names_that_save",
    ),
    Mutant(
        "27 --drive_backup ignored",
        T,
        "drive_backup=args.drive_backup,",
        "drive_backup=None,",
        "resuming: comes_back_from_drive",
    ),
    Mutant(
        "29 out of memory is unexpected",
        COMMAND,
        "EXIT_MEMORY if memory else",
        "EXIT_UNEXPECTED if memory else",
        "command_line: out_of_memory",
    ),
    # 34 seeds, honesty
    Mutant(
        "34 views ignore the epoch",
        BATCHES,
        "(_VIEW, self.seed, epoch,",
        "(_VIEW, self.seed, 0,",
        "wiring: another_seed_shows",
    ),
    Mutant(
        "34 evaluation views ignore the seed",
        T,
        "evaluation_views(n_views, args.seed)",
        "evaluation_views(n_views)",
        "wiring: evaluation_knows",
    ),
    Mutant(
        "34 noise and task dropping ignore the seed",
        T,
        "place = (args.seed, ",
        "place = (0, ",
        "wiring: noise_follows",
    ),
    Mutant(
        "34 noise and task dropping ignore the epoch",
        T,
        "place = (args.seed, progress.epoch, ",
        "place = (args.seed, 0, ",
        "wiring: noise_follows",
    ),
    Mutant(
        "34 order of the batches ignores the seed",
        T,
        "            seed=args.seed,\n            batch_size",
        "            seed=0,\n            batch_size",
        FLAG,
    ),
    Mutant(
        "honesty: tasks with outputs are predicted",
        EVALUATION,
        "if any(pair.output is not None for",
        "if False and any(pair.output is not None for",
        "evaluation: in_sight_are_refused",
    ),
]

# The choice among hypotheses: made, shown, chosen, answered with, accepted, learnt, remembered.
HYPOTHESES = [
    Mutant(
        "40 training's proposals made with the own pair",
        FITTING,
        "return rule_list.leave_one_out(pairs, arms=arms, limits=TRAINING_LIMITS)",
        "return rule_list.fit_task(pairs, [a for a, _ in pairs], arms=arms, "
        "limits=TRAINING_LIMITS)",
        "hypotheses: explained_from_the_others",
    ),
    Mutant(
        "40 proposals with the own pair change an own answer's logits",
        FITTING,
        "return rule_list.leave_one_out(pairs, arms=arms, limits=TRAINING_LIMITS)",
        "return rule_list.fit_task(pairs, [a for a, _ in pairs], arms=arms, "
        "limits=TRAINING_LIMITS)",
        "honesty: own_output_changes_no_bit",
    ),
    Mutant(
        "40 proposals of the next demonstration",
        BATCHES,
        "proposals=tuple(offered[i] for i in asked) if offered else (),",
        "proposals=tuple(offered[i - 1] for i in asked) if offered else (),",
        "batches: in_the_batch_s_view",
    ),
    Mutant(
        "40 no proposals where no test output is known",
        T,
        'if args.hypotheses == "on":  # they need',
        'if args.hypotheses == "on" and plan.final:  # they need',
        "honesty: noise_for_all",
    ),
    Mutant(
        "40 ablated demonstrations come back as proposals",
        T,
        'if args.policy != "off" and args.demonstrations == "on":',
        'if args.policy != "off":',
        "trainloop: ablated_demonstrations",
    ),
    Mutant(
        "40 facts of the worst of equal answers",
        FITTING,
        "best = group[0]",
        "best = group[-1]",
        "hypotheses: equal_answers",
    ),
    Mutant(
        "40 one arm counted of several that answer alike",
        FITTING,
        "        for h in group:",
        "        for h in group[:1]:",
        "hypotheses: equal_answers",
    ),
    Mutant(
        "40 what training asks for comes last",
        FITTING,
        "                if self._asked:",
        "                if self._asked and not self._later:",
        "hypotheses: asks_for",
    ),
    Mutant(
        "40 the work of a dead child is lost",
        FITTING,
        "                self._later.appendleft(work[1])",
        "                pass",
        "hypotheses: hands_its_work_on",
    ),
    Mutant(
        "40 hypotheses with a gap in the order",
        FITTING,
        "            if task_id not in self.done:\n                break",
        "            if task_id not in self.done:\n                continue",
        "hypotheses: has_no_gap",
    ),
    Mutant(
        "41 proposals not in the batch's view",
        BATCHES,
        "answer = query_of[q][0].view.apply(grid)",
        "answer = grid",
        "batches: in_the_batch_s_view or grows_with",
    ),
    Mutant(
        "41 facts of the first proposal for all",
        BATCHES,
        "proposed_facts[q, a] = offer.facts[a]",
        "proposed_facts[q, a] = offer.facts[0]",
        "batches: grows_with",
    ),
    Mutant(
        "41 facts of another query",
        SYSTEM,
        "return Proposal(colours, size, batch.proposed_facts[row, number]",
        "return Proposal(colours, size, batch.proposed_facts[row - 1, number]",
        "wiring: takes_what_was_drawn",
    ),
    Mutant(
        "41 the canvas of an evaluation does not grow",
        BATCHES,
        "room = np.maximum(room, _swapped((grid.shape[0], grid.shape[1]), request.view))",
        "pass",
        "batches: grows_with",
    ),
    Mutant(
        "41 proposals not inverted for the vote",
        EVALUATION,
        "shown = mine(proposed[:, a], size)",
        "shown = proposed[row, a, : size[0], : size[1]]",
        "evaluation: own_view_and_apart",
    ),
    Mutant(
        "42 answers without the proposal",
        SYSTEM,
        "            proposal = refinement.proposal\n",
        "            proposal = None\n",
        "arc_system: decides_answer or reaches_cells",
    ),
    Mutant(
        "42 gain of cells not applied",
        AGENT,
        "proposed = proposal.colours.flatten(1), self.proposal_gain[proposal.verdict]",
        "proposed = proposal.colours.flatten(1), 0 * self.proposal_gain[proposal.verdict]",
        "arc_system: decides_answer or reaches_cells",
    ),
    Mutant(
        "42 gain of the size not applied",
        AGENT,
        "            size_logits = self._with_proposed_size(size_logits, proposal)\n",
        "",
        "arc_system: decides_answer or reaches_cells",
    ),
    Mutant(
        "42 the proposed size beyond the bound is cut",
        AGENT,
        "bound = torch.maximum(bound, proposal.size)",
        "pass",
        "arc_agent: larger_than_the_bound",
    ),
    Mutant(
        "42 no token for the proposal",
        SYSTEM,
        "                prompt = prompt.extended(token.to(prompt.tokens.dtype), "
        "proposal.given[:, None])\n",
        "",
        "arc_system: token_of_a_proposal",
    ),
    Mutant(
        "42 the token also where nothing was taken",
        SYSTEM,
        "proposal.given[:, None])\n        return",
        "proposal.given[:, None] | True)\n        return",
        "arc_system: changes_no_bit or token_of_a_proposal",
    ),
    Mutant(
        "42 a share of cells where there is no proposal",
        AGENT,
        "share = torch.where(colour >= 0, share, 0.0).unsqueeze(-1)",
        "share = share.unsqueeze(-1)",
        "arc_system: changes_no_bit",
    ),
    Mutant(
        "42 the prediction is refined unasked",
        SYSTEM,
        "again = refinement.proposal.given.nonzero().squeeze(-1)",
        "again = torch.arange(len(before.size))",
        "arc_system: decides_answer",
    ),
    Mutant(
        "42 a prediction without proposals answers again",
        SYSTEM,
        "generator, prompt_alone=False, ",
        "generator, ",
        "arc_system: refused_refinement",
    ),
    Mutant(
        "42 a prediction keeps what training would need",
        SYSTEM,
        "torch.is_grad_enabled() and not everyone",
        "not everyone",
        "arc_system: refused_refinement",
    ),
    Mutant(
        "42 the new answers under other queries",
        SYSTEM,
        "getattr(whole, k).index_copy(a, rows, getattr(some, k))",
        "getattr(whole, k).index_copy(a, rows.flip(0), getattr(some, k))",
        "arc_system: decides_answer or answer_again_alone",
    ),
    Mutant(
        "42 who answers again sees another query's cells",
        SYSTEM,
        "getattr(x.sight, f.name)[rows]",
        "getattr(x.sight, f.name)[rows.flip(0)]",
        "arc_system: answer_again_alone",
    ),
    Mutant(
        "42 who answers again reads another query's prompt",
        SYSTEM,
        "return dataclasses.replace(x, tokens=x.tokens[rows]",
        "return dataclasses.replace(x, tokens=x.tokens[rows.flip(0)]",
        "arc_system: answer_again_alone",
    ),
    Mutant(
        "42 the answer before is not read backwards",
        SYSTEM,
        "for a in (rows_of(passed.before, again), ",
        "for a in (rows_of(passed.after, again), ",
        "arc_system: read_backwards",
    ),
    Mutant(
        "47 reversibility of another query",
        EVALUATION,
        "zip(again.tolist(), found.tolist(), strict=True)",
        "zip(again.flip(0).tolist(), found.tolist(), strict=True)",
        "evaluation: told_backwards",
    ),
    Mutant(
        "43 acceptance always true",
        CHOICE,
        "return full | (facts[..., _CELLS] > own_score[:, None])",
        "return torch.ones_like(full)",
        "arc_system: accept_and_refuse",
    ),
    Mutant(
        "43 acceptance by a full verdict alone",
        CHOICE,
        "return full | (facts[..., _CELLS] > own_score[:, None])",
        "return full",
        "arc_system: accept_and_refuse",
    ),
    Mutant(
        "43 as good as the network is enough",
        CHOICE,
        "(facts[..., _CELLS] > own_score[:, None])",
        "(facts[..., _CELLS] >= own_score[:, None])",
        "proposal_policy: acceptance_by",
    ),
    Mutant(
        "43 --acceptance off not passed on",
        EVALUATION,
        'accept=acceptance != "off",',
        "accept=True,",
        "wiring: acceptance_asks",
    ),
    Mutant(
        "43 own scores not handed on",
        EVALUATION,
        "            own_scores=own_scores,\n",
        "",
        "wiring: acceptance_asks",
    ),
    Mutant(
        "43 own scores of the queries mixed up",
        EVALUATION,
        "own_score=_by_query(batch, own_scores).to(device),",
        "own_score=_by_query(batch, own_scores).to(device).flip(0),",
        "evaluation: told_how_well",
    ),
    Mutant(
        "44 the choice never learns",
        T,
        'if args.policy == "on" and batch.proposed.shape[1]:',
        "if False:",
        "wiring: choice_learns",
    ),
    Mutant(
        "44 the choice learns with --policy random",
        T,
        'if args.policy == "on" and batch.proposed.shape[1]:',
        "if batch.proposed.shape[1]:",
        "wiring: learns_no_choice",
    ),
    Mutant(
        "44 rewards of candidates 0",
        REFINED,
        "rewards.append(torch.where(is_there, reward, 0.0))",
        "rewards.append(torch.zeros_like(reward))",
        "policy_refined: earns_what_answering",
    ),
    Mutant(
        "44 sizes of candidates after the resize",
        REFINED,
        "size_after=side,",
        "size_after=target_size,",
        "policy_refined: earns_what_answering",
    ),
    Mutant(
        "44 candidates paid against the second answer",
        T,
        "            before.grids(),\n            batch.proposed,",
        "            after.grids(),\n            batch.proposed,",
        "wiring: choice_learns",
    ),
    Mutant(
        "44 advantage the other way round",
        CHOICE,
        "choosing = -(gained * live).sum() / n_live",
        "choosing = (gained * live).sum() / n_live",
        "proposal_policy: teach_each",
    ),
    Mutant(
        "44 no hindsight",
        CHOICE,
        "HINDSIGHT_WEIGHT * (hindsight * differ).sum() / n_differ",
        "0 * (hindsight * differ).sum() / n_differ",
        "proposal_policy: teach_each",
    ),
    Mutant(
        "44 groups without spread teach",
        CHOICE,
        "differ = (candidates.mask & ~is_best).any(1)",
        "differ = candidates.mask.any(1)",
        "proposal_policy: do_not_differ",
    ),
    Mutant(
        "44 the exactness head is not trained",
        CHOICE,
        "- ENTROPY_WEIGHT * entropy.mean() + sure_loss",
        "- ENTROPY_WEIGHT * entropy.mean()",
        "proposal_policy: as_often_as",
    ),
    Mutant(
        "44 another draw than the first is carried out",
        CHOICE,
        "return self.drawn[:, 0]",
        "return self.drawn[:, -1]",
        "wiring: takes_what_was_drawn",
    ),
    Mutant(
        "44 the choice's optimizer not saved",
        STATE,
        '            "choice_optimizer": self.system.policy_rl.proposals.optimizer,\n',
        "",
        "resuming: any_number_of_processes",
    ),
    Mutant(
        "45 recall returns the own task",
        MEMORY,
        "(self.arm_owners[None] != task_index[:, None]) | (task_index[:, None] < 0)",
        "(self.arm_owners[None] >= -1) | (task_index[:, None] < 0)",
        "solver2: own_arms",
    ),
    Mutant(
        "45 arms not tried count as wrong",
        MEMORY,
        "tried = (right >= 0) & nearest",
        "tried = (right >= -1) & nearest",
        "solver2: right_over_tried",
    ),
    Mutant(
        "45 recall of the least alike",
        MEMORY,
        ".topk(n_alike, dim=-1, largest=False)",
        ".neg().masked_fill(~known, math.inf).topk(n_alike, dim=-1, largest=False)",
        "solver2: most_alike_alone",
    ),
    Mutant(
        "45 a task that comes again is stored twice",
        MEMORY,
        "same = (self.arm_owners == task_index[row]) & (task_index[row] >= 0)",
        "same = (self.arm_owners == -9)",
        "solver2: replaces_its_arms",
    ),
    Mutant(
        "45 what is recalled is not handed on",
        SYSTEM,
        "            recalled,\n        )",
        "            0 * recalled - 1,\n        )",
        "arc_system: recalled_reaches",
    ),
    Mutant(
        "45 arms right over all queries",
        SYSTEM,
        "total(hit) / tried.clamp(min=1)",
        "total(hit) / n_queries",
        "arc_system: per_task_and_arm",
    ),
    Mutant(
        "46 validation of held-out tasks",
        T,
        "validation_keys(seen, limit, args.seed)",
        "validation_keys(tasks.train, limit, args.seed)",
        "trainloop: held_out",
    ),
    Mutant(
        "46 training on held-out tasks",
        T,
        "            seen_tasks(tasks, args.hold_out),\n            seed",
        "            tasks.train,\n            seed",
        "trainloop: held_out",
    ),
    Mutant(
        "47 Ctrl+C waits for the demonstrations",
        EVALUATION,
        "system, wanted, explained, progress=lambda _: heed_stop(), **options",
        "system, wanted, explained, **options",
        "wiring: stop_is_heeded",
    ),
    Mutant(
        "48 the second answer goes without its proposal",
        SYSTEM,
        "self.answer(rows_of(reading, again), rows_of(refinement, again), ",
        "self.answer(rows_of(reading, again), ",
        "wiring: takes_what_was_drawn",
    ),
    Mutant(
        "48 a first answer that stands learns nothing",
        SYSTEM,
        "put_rows(before, again, second)",
        "put_rows(dataclasses.replace(before, logits=before.logits.detach()), again, second)",
        "wiring: first_answer_stands",
    ),
    Mutant(
        "48 the policy is told that unread prompts earned 0",
        T,
        "refinement.info.of(again), reward[again], after_state[again]",
        "refinement.info, reward, after_state",
        "wiring: queries_that_answered_again",
    ),
    Mutant(
        "48 first answers learn at full weight",
        T,
        "FIRST_ANSWER_WEIGHT * len(again) / len(target)",
        "1.0",
        "wiring: followed_by_a_second",
    ),
    Mutant(
        "48 the second answer learns twice, the first never",
        T,
        "first, goal = rows_of(before, again), target[again]",
        "first, goal = rows_of(after, again), target[again]",
        "wiring: followed_by_a_second",
    ),
    Mutant(
        "48 first answers learn from other targets",
        T,
        "own_size = targets.size[again]",
        "own_size = targets.size[again].flip(0)",
        "wiring: followed_by_a_second",
    ),
    Mutant(
        "47 more hypotheses named than the voting had",
        EVALUATION,
        "first = len({task_id for task_id, _ in explained}) if first is None else first",
        "first = fitter.n_first() if first is None else first",
        "wiring: come_late",
    ),
    Mutant(
        "47 late hypotheses are lost",
        EVALUATION,
        "    explained = collect(deadline if last is None else None, last)\n",
        "",
        "wiring: come_late",
    ),
    Mutant(
        "47 late hypotheses do not vote",
        EVALUATION,
        "if asked <= set(network.refined.candidates):",
        "if True:",
        "evaluation: came_late",
    ),
    Mutant(
        "47 an overruled proposal keeps its whole vote",
        EVALUATION,
        "(OVERRULED if overruled else 1.0)",
        "1.0",
        "evaluation: overrules",
    ),
    Mutant(
        "47 proposals vote in the network's own ballot",
        EVALUATION,
        "                    vote(shown, chance[a + 1]",
        "                    ballot.add(shown, 1.0)\n                    vote(shown, chance[a + 1]",
        "evaluation: own_view_and_apart",
    ),
    Mutant(
        "47 gains before minus after",
        EVALUATION,
        "rows.append([b - a for a, b in zip",
        "rows.append([a - b for a, b in zip",
        "evaluation: gains_by_hand",
    ),
    Mutant(
        "47 cells of another size count",
        EVALUATION,
        "cells = float((grid == target).mean()) if same else 0.0\n                sides",
        "cells = float((grid == target).mean()) if same else 0.5\n                sides",
        "evaluation: gains_by_hand",
    ),
    Mutant(
        "47 demonstrations scored with themselves in sight",
        EVALUATION,
        "others = (*pairs[:number], *pairs[number + 1 :])",
        "others = pairs",
        "evaluation: scored_from_the_others",
    ),
    Mutant(
        "47 every task is asked for its own score",
        EVALUATION,
        "if verdicts and not verdicts[0].full and any(v.share > 0 for v in verdicts):",
        "if verdicts:",
        "wiring: acceptance_asks",
    ),
]

MUTANTS = SURVIVORS + OTHERS + HYPOTHESES


def run_tests(folder: Path, test: str) -> None:
    """In a forked process: pytest's own exit code; what it prints goes to `folder`/out."""
    import pytest

    os.chdir(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != REPO)]
    module, expression = test.split(": ", 1)
    with Path("out").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-k", expression]
        code = 99
        try:
            code = int(pytest.main([f"tests/test_{module}.py", *options]))
        except BaseException:
            traceback.print_exc(file=out)
            raise
        finally:
            sys.stdout.flush()
            out.flush()
            os._exit(code)


def outcome_of(test: str, file: str = "", text: str = "") -> tuple[int | None, str]:
    """(pytest's exit code or None at the time limit, what it said) in a copy; `text` is put in
    `file`."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        for source in (*REPO.glob("*.py"), REPO / "pyproject.toml"):
            shutil.copy(source, folder)
        for part in ("persistence", "tests"):
            shutil.copytree(REPO / part, folder / part, ignore=shutil.ignore_patterns("__p*"))
        if file:
            (folder / file).write_text(text, encoding="utf-8")
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, test))
        process.start()
        process.join(LIMIT_S)
        if process.is_alive():
            process.kill()
            process.join()
            return None, ""
        return process.exitcode, (folder / "out").read_text(encoding="utf-8", errors="replace")


def misfits() -> list[str]:
    """Which texts of the table their file has not exactly once, and which test files are
    missing."""
    found = []
    for m in MUTANTS:
        n = (REPO / m.file).read_text(encoding="utf-8").count(m.old)
        if n != 1:
            found.append(f"{m.name}: its text is found {n} times in {m.file}")
        if not (REPO / f"tests/test_{m.test.split(': ')[0]}.py").is_file():
            found.append(f"{m.name}: there is no file of its test, {m.test}")
    return found


def try_out(mutant: Mutant) -> str:
    """By what it was caught, or ""."""
    source = (REPO / mutant.file).read_text(encoding="utf-8")
    code, said = outcome_of(mutant.test, mutant.file, source.replace(mutant.old, mutant.new))
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", said, re.MULTILINE)
    if code == 0:
        return ""
    if code is None:
        return "the time limit"
    if code != 1 or not failed:  # no test at all, or none that could be read
        raise SystemExit(f"{mutant.name}: exit code {code}\n{said[-3000:]}")
    return failed[0]


def check_the_whole(chosen: list[Mutant]) -> None:
    """Without a breakage the same tests pass."""
    by_module: dict[str, set[str]] = {}
    for mutant in chosen:
        module, expression = mutant.test.split(": ", 1)
        by_module.setdefault(module, set()).add(f"({expression})")
    for module, expressions in by_module.items():
        code, said = outcome_of(f"{module}: {' or '.join(sorted(expressions))}")
        if code != 0:
            raise SystemExit(f"{module}: its tests fail without a breakage\n{said[-3000:]}")


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    wrong = misfits()
    if wrong or wanted == "--check":
        sys.exit("\n".join([*wrong, "adapt the table"]) if wrong else 0)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1")
    # Plugins of installed packages complain about being imported already.
    os.environ.update(TOKENIZERS_PARALLELISM="false", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.dont_write_bytecode = True
    import tokenizers  # noqa: F401 - once for all: the forks have it then
    import torch  # noqa: F401
    import tqdm  # noqa: F401
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model  # noqa: F401

    missed, chosen, begun = [], [m for m in MUTANTS if wanted in m.name], time.monotonic()
    check_the_whole(chosen)
    print("| breakage | caught by | seconds |\n|---|---|---|", flush=True)
    for mutant in chosen:
        since = time.monotonic()
        by = try_out(mutant)
        if not by:
            missed.append(mutant.name)
        took_s = time.monotonic() - since
        print(f"| {mutant.name} | {by or 'NOTHING'} | {took_s:.0f} |", flush=True)
    figures = {
        "mutants": len(chosen),
        "caught": len(chosen) - len(missed),
        "problems": missed,
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps({**figures, "ok": not missed}))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
