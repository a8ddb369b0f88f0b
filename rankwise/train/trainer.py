"""The one Trainer subclass: guarded steps, checkpoints sealed by a manifest, signals that end in a safe checkpoint.

    trainer = RankwiseTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, identity=...)
    trainer.train(resume_from_checkpoint=checkpoint)

What it adds lives in functions and small classes of its siblings (step, rows, checkpoints, interruption); here
they are only hooked in. `before_step` is the place for whatever looks at gradients before clipping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from rankwise.errors import RankwiseError, UsageError
from rankwise.evaluate.classify import LabelAccuracy, Tally
from rankwise.evaluate.likelihood import Learnt, token_losses
from rankwise.files.atomic import explained
from rankwise.models.adapt import full_parameters
from rankwise.train.adalora import RankAllocation
from rankwise.train.checkpoints import CheckpointKeeper, discard_unsealed
from rankwise.train.expert_norms import LearntExperts
from rankwise.train.gradients import GradientNorms, parameter_towers
from rankwise.train.interruption import EvaluationStopped, Interruption, StopOnSignal, stoppable
from rankwise.train.phases import PhaseKeeper
from rankwise.train.reporting import Trackers, TrainingProgress
from rankwise.train.rows import LengthGrouped, share_evenly, silenceable, summed
from rankwise.train.step import (
    FrozenPrefix,
    StepGuard,
    counts_all_tokens,
    diverged,
    memory_advice,
    prove_counting,
    within_reach,
)
from rankwise.train.towers import RATE_COLUMN, RateWatch, full_at_common_rate, split_by_tower
from rankwise.train.training_log import TrainingLog

SAMPLE_INDEX, ACCURACY = "sample_index", "eval_accuracy"
DATA_SETS = ("train_dataset", "eval_dataset")


class RankwiseTrainer(Trainer):
    """transformers' Trainer with a guard before every step and checkpoints that can be trusted.

    Args:
        identity: what the run is (model, data, plan, rates …); saved with each checkpoint, compared on resume.
        loraplus_lr_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024).
        tower_rates: tower → learning rate instead of the common one.
        phases: freezes and thaws adapters between steps.
        allocator: lets AdaLoRA divide the ranks while training.
        gradients: writes the table of gradient norms.
        accuracy: measured at each evaluation, as `eval_accuracy` in [0, 1]; the processes share its samples.
        sampler: the order of the training rows, instead of the Trainer's; drawn from seed and epoch (`set_epoch`).
        stateful: callbacks whose `on_save` writes into the checkpoint; they come before it is sealed.
        facts: what trackers list among the run's configuration, beside the training arguments.
        The rest are the Trainer's own. `args.save_total_limit` is taken over: complete checkpoints are rotated
        after a new one is complete. A batch may carry `sample_index`; the data set's `sample_id` names it.

    Raises (from `train`): DivergedError before a step with a loss or gradient that is not finite; Interrupted
    after the checkpoint that a signal asked for; DataError on a full disk; RankwiseError when memory runs out.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        identity: Mapping[str, Any] | None = None,
        loraplus_lr_ratio: float | None = None,
        tower_rates: Mapping[str, float] | None = None,
        phases: PhaseKeeper | None = None,
        allocator: RankAllocation | None = None,
        gradients: GradientNorms | None = None,
        accuracy: LabelAccuracy | None = None,
        sampler: Sampler[int] | None = None,
        stateful: Sequence[TrainerCallback] = (),
        facts: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **rest: Any,
    ) -> None:
        keep, args.save_total_limit = args.save_total_limit, None
        self.rows = rest.get("train_dataset")
        if args.world_size > 1:
            rest |= {name: silenceable(rest[name]) for name in DATA_SETS if rest.get(name) is not None}
        self.guard = StepGuard()
        self.interruption = Interruption(args.world_size)
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.tower_rates = {t: rate for t, rate in (tower_rates or {}).items() if rate != args.learning_rate}
        self.phases, self.gradients, self.allocator = phases, gradients, allocator
        self.accuracy, self.sampler = accuracy, sampler
        self._agreed_signal: int | None = None
        self._resumed_from: str | None = None
        self._operations_per_token: int | None = None
        self._stop = StopOnSignal(self.stops, self.make_up_evaluation)
        keeper = CheckpointKeeper(identity or {}, keep)  # seals what those before it have written
        more = [RATE_COLUMN.format(tower) for tower in self.tower_rates]
        log = TrainingLog(Path(args.output_dir), more + ([ACCURACY] if accuracy else []))
        self._rates = RateWatch()
        self.experts = LearntExperts()
        self.trackers = Trackers(facts or {}, gradients, phases)
        self.progress = [] if args.disable_tqdm else [TrainingProgress()]
        own = [FrozenPrefix(), log, phases, allocator, gradients, self.experts, *stateful, self.trackers, keeper]
        callbacks = [*filter(None, own), self._rates, *callbacks, self._stop, *self.progress]
        super().__init__(args=args, callbacks=callbacks, **rest)
        self.trackers.take(self.callback_handler)
        self.validation: list[Tensor] = []
        self.unproven = counts_all_tokens(self)
        if allocator is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UsageError("--allocator adalora needs whole weights and gradients: leave FSDP and DeepSpeed out")
        if accuracy is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UsageError(
                "--select accuracy needs the whole model in every process, which asks it for a share of the labels; "
                "under FSDP or DeepSpeed choose by loss (--select loss) and score the result with `rankwise evaluate`"
            )

    def train(self, resume_from_checkpoint: str | Path | None = None, **rest: Any) -> Any:
        """Train, from a checkpoint that `checkpoints.resume_point` has found sound where one is given."""
        folder = Path(self.args.output_dir)
        checkpoint = None if resume_from_checkpoint is None else str(resume_from_checkpoint)
        self._resumed_from, self._agreed_signal = checkpoint, None
        self.guard.reset()
        for keeper in (self.phases, self.allocator, self.trackers):
            if checkpoint and keeper:
                keeper.restore(Path(checkpoint))
        hook = self.model.register_forward_hook(within_reach)
        try:
            with self.interruption, explained(folder), memory_advice():
                result = super().train(resume_from_checkpoint=checkpoint, **rest)
        except RankwiseError:
            if self.is_world_process_zero():
                discard_unsealed(folder, self.state.global_step)
            raise
        finally:
            hook.remove()
            for one in self.progress:
                one.close()
        if self._stop.done:
            self.interruption.requested = self.stop_signal
            self.interruption.raise_if_requested(str(folder))
        return result

    @property
    def stop_signal(self) -> int | None:
        """The signal that all processes stop for; several processes agree on it at each step and validation batch."""
        return self.interruption.requested if self.args.world_size == 1 else self._agreed_signal

    def stops(self) -> bool:
        """Whether a signal has come that ends training."""
        return self.is_in_train and self.stop_signal is not None

    def _run_epoch(self, *args: Any, **rest: Any) -> None:
        """The Trainer's; not where a resumed run has nothing left to do, of which the Trainer would take one step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **rest)

    def _maybe_log_save_evaluate(self, *args: Any, **rest: Any) -> None:
        """The Trainer's, but where a signal ends the evaluation, whose figures are those of no data set."""
        try:
            super()._maybe_log_save_evaluate(*args, **rest)
        except EvaluationStopped:
            self._stop.end(self.control, owed=True)
            super()._maybe_log_save_evaluate(*args, **rest)

    def make_up_evaluation(self) -> None:
        """The evaluation that a stopped run owes, before training goes on: it is logged and chosen by as any other."""
        try:
            best = self._determine_best_metric(self._evaluate(None, None), None)
        except EvaluationStopped:
            self._stop.end(self.control, owed=True)  # nothing to save: the checkpoint that is resumed from says so
            return
        self._stop.owed = False
        if best and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = self._resumed_from

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        index = inputs.pop(SAMPLE_INDEX, None)
        if self.unproven:
            prove_counting(self, model, inputs)
            self.unproven = False
        with self.regularised(num_items_in_batch):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.guard.losses.append(loss)
        if index is not None:
            self.guard.samples.append(index)
        if self.accelerator.sync_gradients:
            self.before_step(model)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer counts them, which walks over all parameters at each batch; here once: they stay as many."""
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if tokens is None:
            return 0
        count: int = tokens.numel()
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) // count
        return self._operations_per_token * count

    def regularised(self, num_items_in_batch: Tensor | int | None) -> AbstractContextManager[None]:
        """AdaLoRA's orthogonality term within the model's loss, once per optimizer step whatever the accumulation.

        The model divides the tokens' loss by all tokens of the step, so that the Trainer only sums over batches and
        processes; PEFT adds the term to each.
        """
        if self.allocator is None:
            return nullcontext()
        summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        batches = self.current_gradient_accumulation_steps if summed else 1
        processes = self.args.world_size if summed and self.args.average_tokens_across_devices else 1
        return self.allocator.regularised(1 / (batches * processes))

    def before_step(self, model: nn.Module) -> None:
        """All gradients of the step are there, unclipped; with a gradient scaler they are still scaled.

        The only synchronisation of a step: loss, gradient norm and the norms of the table come to the host together.
        """
        step, scaler = self.state.global_step, self.accelerator.scaler
        if self.phases is not None:
            self.phases.before_clipping(step)
        table = self.gradients if self.gradients is not None and self.gradients.wanted(step + 1) else None
        values = [self.guard.values(self.trained_parameters())]
        if table is not None:
            values.append(table.values(step + 1).to(values[0].device))
        loss, norm, *norms = torch.cat(values).tolist()
        reason = self.guard.check(loss, norm, scaled=scaler is not None)
        if self.args.world_size > 1:
            reason = self.agree(reason)
        if reason:
            names = self.sample_names(self.guard.samples)
            raise diverged(reason, step + 1, names, str(self.args.output_dir))
        if table is not None and self.is_world_process_zero():
            table.record(step + 1, norms, 1.0 if scaler is None else scaler.get_scale(), self.args.max_grad_norm)
        if math.isfinite(norm):  # else a scaler skips the step
            self.experts.see(step + 1, self.optimizer)
        self.guard.reset()

    def agree(self, reason: str | None) -> str | None:
        """One collective call: a bad step or a signal in one process is one in all, so none waits for another."""
        flags = torch.tensor(
            [int(bool(reason)), self.interruption.requested or 0], device=self.args.device, dtype=torch.int32
        )
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        bad, number = flags.tolist()
        self._agreed_signal = number or None
        return reason or ("another process found its loss or gradient not finite" if bad else None)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Everything that the optimizer holds."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def sample_names(self, indices: Sequence[Tensor]) -> list[str]:
        name = getattr(self.rows, "sample_id", str)
        return [name(index) for batch in indices for index in batch.tolist() if index >= 0]

    def get_train_dataloader(self) -> Any:
        """Every row once in an epoch, in whichever process."""
        return share_evenly(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **rest: Any) -> Any:
        return share_evenly(super().get_eval_dataloader(*args, **rest))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's, but for rows of like length: those lengths are known, and the order must survive a resume."""
        if self.sampler is not None:
            return self.sampler
        lengths = getattr(self.rows, "lengths", None)
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGrouped(lengths, step, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Longest rows first where their lengths are known: least padding. The loss does not depend on the order."""
        lengths = getattr(eval_dataset, "lengths", None)
        if lengths is None:
            return SequentialSampler(eval_dataset)
        return sorted(range(len(lengths)), key=lambda place: -lengths[place])

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **rest: Any) -> Any:
        """Of rows with labels the plain cross-entropy of each learnt token, kept for `evaluation_loop`."""
        inputs.pop(SAMPLE_INDEX, None)
        self.end_evaluation_if_asked()
        if "labels" not in inputs:
            return super().prediction_step(model, inputs, *args, **rest)
        inputs = self._prepare_inputs(inputs)
        learnt = Learnt.of(inputs.pop("labels"))
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = token_losses(model, inputs, learnt)
        total = losses.sum()
        self.validation.append(torch.stack([total, total.new_tensor(len(losses))]))
        return total / max(1, len(losses)), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **rest: Any) -> EvalLoopOutput:
        """The Trainer's, with the mean loss over all tokens, however they are batched, in place of a mean of means.

        And how many labels are right: callbacks and the choice of the best checkpoint see it too.
        """
        self.validation = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **rest)
        if self.validation and output.metrics is not None:
            loss, tokens = summed(torch.stack(self.validation).double().sum(0)).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        if self.accuracy is not None and output.metrics is not None:
            tally = self.tally(self.accuracy)
            right, asked = summed(torch.tensor([tally.right, tally.asked], device=self.args.device)).tolist()
            output.metrics[ACCURACY] = right / asked
        return output

    def tally(self, accuracy: LabelAccuracy) -> Tally:
        """This process's share. A signal in one process ends it there at once, and in the others after their share."""
        found, number = Tally(0, 0), self.interruption
        with suppress(EvaluationStopped), stoppable(self.model, lambda: self.is_in_train and bool(number.requested)):
            found = accuracy.right(self.model)
        self.end_evaluation_if_asked()
        return found

    def end_evaluation_if_asked(self) -> None:
        """EvaluationStopped in all processes where a signal has come to one of them."""
        if self.is_in_train and self.args.world_size > 1:
            self.agree(None)
        if self.stops():
            raise EvaluationStopped

    def evaluate(self, *args: Any, **rest: Any) -> dict[str, float]:
        """Evaluation draws no random number from training's stream: how often one evaluates changes no weight."""
        device = self.args.device
        devices = [] if device.type == "cpu" else [device]
        kind = "cuda" if device.type == "cpu" else device.type
        with torch.random.fork_rng(devices=devices, device_type=kind):
            metrics: dict[str, float] = super().evaluate(*args, **rest)
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The Trainer's optimizer, or LoRA+'s; its groups are split by tower where towers have rates of their own."""
        given = self.optimizer is not None
        by_factor = self.loraplus_lr_ratio is not None and not given
        optimizer: Optimizer = self.loraplus_optimizer() if by_factor else super().create_optimizer(model)
        if self.tower_rates and not given:
            towers = parameter_towers(self.model if model is None else model)
            split_by_tower(optimizer, towers, self.tower_rates, self.args.learning_rate)
        return optimizer

    def loraplus_optimizer(self) -> Optimizer:
        """With PEFT's grouping of A and B."""
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        optimizer: Optimizer = create_loraplus_optimizer(
            self.model,
            kind,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **settings,
        )
        full = {id(one) for ones in full_parameters(self.model).values() for one in ones}
        full_at_common_rate(optimizer, full, self.args.learning_rate)
        self.optimizer = optimizer
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **rest: Any) -> None:
        """Beside the learning rate stand those of towers that have their own."""
        if "learning_rate" in logs:
            logs |= self._rates.rates
        super().log(logs, *args, **rest)
