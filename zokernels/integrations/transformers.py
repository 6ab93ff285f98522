"""``ZOTrainer``: the Trainer of Hugging Face, with forward passes only.

    g_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps q)
    theta <- (1 - lr * wd) theta - lr * sum_k g_k z_k

L is the loss that the Trainer would have called backward on, of all micro-batches of a step.
docs/transformers.md says what each argument means."""

from __future__ import annotations

import copy
import inspect
import os
import pathlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checks import fail
from ..distributed import Exchange
from ..offload import StoredModel, rewind, stream
from ..optim import ZOSGD, ZerothOrder
from ..step.estimators import Estimator
from ..step.guards import RngState
from ..step.loss import NO_GRAD
from ..trajectory import record
from .trainer_arguments import TrainerArguments
from .trainer_checkpoints import is_whole, whole_or_as_before

__all__ = ["ZOTrainer", "ZOTrainerMixin"]

logger = transformers.utils.logging.get_logger(__name__)

#: The first release whose Trainer keeps the loss of a step where its optimizer's hook can add to it.
_OLDEST = "5.3"
if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, _OLDEST.split("."))):
    raise ImportError(
        f"zokernels.integrations.transformers: expected transformers >= {_OLDEST}, got "
        f"{transformers.__version__}"
    )

#: The losses that reach ``accelerator.backward`` in a forward.  Each thread has its own list, because
#: streamed forwards (offload) take turns in threads.
_LOSSES: ContextVar[list[Tensor] | None] = ContextVar("losses", default=None)

#: The Trainer's own learning rate, where nobody has asked for one.
_DEFAULT_LR: float = transformers.TrainingArguments.learning_rate

#: Names of the first direction's losses in the logs, by the sign of the point.
_POINTS = {1: "loss_plus", -1: "loss_minus", 0: "loss_centre"}


class ZOTrainerMixin(TrainerArguments):
    """Makes a zeroth-order trainer of a ``transformers.Trainer``, in front of it in the list of bases.

    A step of the optimizer runs the Trainer's own ``training_step`` for every micro-batch, once for each
    point of the estimator, without gradients; the loss is what reaches ``accelerator.backward``, which is
    never run.  So accumulation, autocast, label smoothing, and a ``compute_loss`` or ``training_step`` of the
    user's act as they do with backward.  All forwards of a step see one RNG state, hence the same dropout
    masks.

    Args:
        optimizer_cls_and_kwargs: (class, arguments) as for the Trainer: a class of ``zokernels.optim`` or any
            function that makes one of its optimizers of parameter groups.  Default: ``(ZOSGD, {})``, which is
            MeZO.  lr is ``args.learning_rate`` and seed ``args.seed``, unless given here.
        optimizers: (optimizer, scheduler) as for the Trainer, with an optimizer of ``zokernels.optim``.
        trajectory: path of a log that replays the run (:mod:`zokernels.trajectory`).  A run that is resumed
            from a checkpoint goes on with its log.
        eval_mode: run the forwards of the training as in evaluation, without dropout.
        mesh: in several processes (torchrun): a ``DeviceMesh`` with the dimension "data" of all of them, or
            an :class:`zokernels.distributed.Exchange` of one; default: made here.  Each process has batches
            of its own, as the Trainer shares them out, all take the same steps, and the first one writes log
            and checkpoints.
        offload: arguments of :func:`zokernels.offload.stream`, ``{"storage": "host"}`` for example: the
            model's blocks live there and come to the device one after another, in training and in evaluation.
            The model is streamed (``trainer.engine``) when its first forward is due, after
            ``resume_from_checkpoint`` has been read.

    Example::

        class ZOSFTTrainer(ZOTrainerMixin, trl.SFTTrainer): ...

    Raises: ValueError, TypeError where an argument cannot work without gradients.  See docs/transformers.md.
    """

    def __init__(
        self,
        *args: Any,
        trajectory: str | os.PathLike[str] | None = None,
        eval_mode: bool = False,
        mesh: DeviceMesh | Exchange | None = None,
        offload: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._trajectory, self._eval_mode, self._mesh, self._offload = trajectory, eval_mode, mesh, offload
        #: What streams the model, with ``offload``.
        self.engine: StoredModel | None = None
        self._micro_batches: list[tuple[Any, ...]] = []
        self._hooked: ZerothOrder | None = None
        # whether losses are means of micro-batches that nobody divides by their number
        self._means: bool | None = None
        self._told: set[str] = set()
        self._since: float | None = None
        self._logged_step = 0
        self._check_pairs(kwargs)
        self._check_offload()
        try:
            super().__init__(*args, **kwargs)
        except TypeError as error:
            self._check_names(kwargs, (ZOTrainerMixin.__init__, super().__init__), str(error))
            raise
        self._check_arguments()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = None  # fp16 autocast stays; what is scaled for are gradients
        # DistributedDataParallel would copy all weights, and keep buckets for gradients that do not exist.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    # Optimizer --------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self._stream()
        if self.optimizer is None:
            kind, options = self.optimizer_cls_and_kwargs or (ZOSGD, {})
            if "lr" not in options and self.args.learning_rate == _DEFAULT_LR:
                self._tell(
                    f"learning_rate={_DEFAULT_LR:g} is the Trainer's default, made for gradients: ranges of "
                    "the methods here stand in docs/choosing.md, and zokernels.optim.find_lr finds one"
                )
            options = {"lr": self.args.learning_rate, "seed": self.args.seed, **options}
            if self._mesh is not None:
                options = {"mesh": self._mesh, **options}
            model = self.model if model is None else model
            assert model is not None  # the Trainer has made it
            self.optimizer = kind(self._groups(model), **options)
        ours = self.zo_optimizer
        if not isinstance(ours, ZerothOrder):
            fail(self._op, "optimizer", "one of zokernels.optim", type(ours).__name__, TypeError)
        if self._hooked is not ours:
            ours.register_step_pre_hook(self._before_step)
            ours.register_step_post_hook(self._after_step)
            self._hooked = ours
        return self.optimizer

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The trainable parameters by name; those that the Trainer does not decay apart, where anything
        decays.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not self.args.weight_decay:
            return [{"params": named}]
        decayed = set(self.get_decay_parameter_names(model))
        groups = [
            {"params": [(n, p) for n, p in named if n in decayed], "weight_decay": self.args.weight_decay},
            {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    # Step -------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_batches = []  # of the step that begins
        if self._since is None:
            self._since, self._logged_step = time.monotonic(), self.state.global_step
        return super().get_batch_samples(*args, **kwargs)

    def _keep(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What the loop calls for ``training_step``: keeps the micro-batch for the optimizer's step,
        which runs it.
        """
        if self._eval_mode and "train" not in vars(model):
            model.train = lambda mode=True: _train_without_parts(model, mode)  # type: ignore[method-assign]
        # TRL's number of this micro-batch, by which it picks completions
        count = getattr(self, "_step", None)
        prepared = self._with_old_logps(model, self._prepare_inputs(inputs))
        self._micro_batches.append((model, prepared, args, kwargs, count))
        if count is not None:
            self._step = count + 1
        return torch.zeros((), device=self.args.device)

    def _with_old_logps(self, model: nn.Module, inputs: Any) -> Any:
        """The inputs of TRL's GRPOTrainer with the log-probabilities at which the step begins.

        TRL leaves them out where a completion serves one step, and takes those of the forward itself, without
        their gradient: the ratio of the two, and so the loss, would be the same at all weights.
        """
        logps = getattr(self, "_get_per_token_logps_and_entropies", None)
        if logps is None or "advantages" not in inputs or inputs.get("old_per_token_logps") is not None:
            return inputs
        whole = [
            torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask")
        ]
        named = {key: inputs[key] for key in inspect.signature(logps).parameters if key in inputs}
        rng = RngState([self.args.device])
        with torch.no_grad(), self.compute_loss_context_manager():
            old, *_ = logps(model, *whole, inputs["completion_ids"].size(1), **named)
        rng.restore()
        return {**inputs, "old_per_token_logps": old}

    def _accumulated_loss(self) -> Tensor:
        """The closure: the loss of all micro-batches of the step, in fp32 (or float64)."""
        losses: list[Tensor] = []
        token, following = _LOSSES.set(losses), getattr(self, "_step", None)
        # Inputs are prepared when they come (values are scaled, completions generated), and not at each
        # forward: there they only go to the device, as far as a training_step of the user's has added to
        # them.
        self._prepare_inputs = self._prepare_input  # type: ignore[method-assign, assignment]
        try:
            for model, inputs, args, kwargs, count in self._micro_batches:
                if count is not None:
                    self._step = count
                type(self).training_step(self, model, copy.copy(inputs), *args, **kwargs)
        except RuntimeError as error:
            if NO_GRAD not in str(error):
                raise
            expected = "self.accelerator.backward(loss) in the place of loss.backward()"
            got = f"{type(error).__name__}: {str(error).partition(' and ')[0]}"
            fail(self._op, "training_step", expected, got, RuntimeError)
        finally:
            _LOSSES.reset(token)
            vars(self).pop("_prepare_inputs", None)
            if following is not None:
                self._step = following
        if not losses:
            expected = "micro-batches whose loss training_step hands to accelerator.backward"
            fail(self._op, "training_step", expected, f"{len(self._micro_batches)} without", RuntimeError)
        if losses[0].dtype in (torch.bfloat16, torch.float16):
            self._tell(
                f"the loss is in {losses[0].dtype}, whose steps are coarser than the differences to "
                "be measured: "
                "compute it in fp32 (compute_loss_func), or keep fp32 weights with bf16=True"
            )
        share = len(self._micro_batches) if self._means else 1
        wide = [(loss if loss.dtype == torch.float64 else loss.float()) / share for loss in losses]
        return sum(wide[1:], 0.0 + wide[0])

    def _collect(self, loss: Tensor, **options: Any) -> None:
        """What runs in the place of ``accelerator.backward``: it keeps the loss for the closure."""
        if (losses := _LOSSES.get()) is None:
            fail(self._op, "accelerator.backward", "a call from training_step", "another", RuntimeError)
        losses.append(loss)

    def _are_means(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> bool | None:
        """Whether the loss of a micro-batch ignores the count that it is to be divided by.

        The Trainer believes of a model that takes any keyword that its loss is a sum over
        ``num_items_in_batch``, which is not so for most classifiers: their losses would add up to a multiple
        of the mean.  Twice the count tells; None: not yet known."""
        asked = self.model_accepts_loss_kwargs and self.compute_loss_func is None
        if (
            num_items_in_batch is None
            or not asked
            or getattr(self, "loss_is_scaled_for_ga", None) is not None
        ):
            return False
        rng = RngState([self.args.device])
        losses: list[Tensor] = []
        for factor in (1, 2):
            with torch.no_grad(), self.compute_loss_context_manager(), rng.forward(factor):
                count = factor * num_items_in_batch
                # no return_outputs
                loss: Any = self.compute_loss(model, copy.copy(inputs), num_items_in_batch=count)
                losses.append(loss.detach())
        rng.restore()
        decided = bool(losses[0].isfinite() & (losses[0] != 0))
        return bool(losses[0] == losses[1]) if decided else None

    def _before_step(
        self, optimizer: ZerothOrder, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._trajectory is not None and optimizer.trajectory is None:
            record(optimizer, self._trajectory, rewind=True)
        if self._means is None and len(self._micro_batches) > 1:
            model, inputs, rest, named, _ = self._micro_batches[0]
            self._means = self._are_means(model, inputs, *rest, **named)
        if kwargs.get("closure") is None and (len(args) < 2 or args[1] is None):
            return (optimizer, self._accumulated_loss), {}
        return None

    def _after_step(self, optimizer: ZerothOrder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._micro_batches:
            return
        self._micro_batches = []
        assert optimizer.last_loss is not None  # of the step that was taken
        loss = optimizer.last_loss.to(self._tr_loss)
        if self.args.logging_nan_inf_filter and not loss.isfinite():  # as the Trainer does
            loss = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        self._tr_loss += loss

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None  # and so it is not logged

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """The operations of the forwards of a step.

        The Trainer's own estimate is for a forward and a backward, which costs twice as much as the forward.
        """
        return super().floating_point_ops(inputs) * self._forwards() // 3

    def _forwards(self) -> int:
        optimizer = self.zo_optimizer
        assert optimizer is not None  # a training has one
        return len(optimizer.estimator.points()) + len(optimizer.rule.trials)

    # Streaming --------------------------------------------------------------------------------------------

    def _stream(self) -> None:
        if self._offload is None or (self.engine is not None and self.engine.model is self.model):
            return
        if self.engine is not None:  # of the last trial's model
            self.engine.close()
        assert self.model is not None  # the Trainer has made it
        self.engine = stream(self.model, **{"device": self.args.device, **self._offload})

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self._offload is None:
            super()._move_model_to_device(model, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._offload is not None and self.engine is not None:
            expected = "a model that no forward has streamed yet"
            fail(self._op, "resume_from_checkpoint", expected, "one that is streamed")
        if self._offload is not None and self._offload.get("path") is not None:
            self._rewind(resume_from_checkpoint)
            self._offload = {**self._offload, "resume": True}
        elif self._offload is not None and "weights" in self._offload:
            self._offload = {**self._offload, "weights": resume_from_checkpoint}
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _rewind(self, checkpoint: str) -> None:
        """Brings the folder of the run back to the step of a checkpoint; of several ranks one does."""
        assert self._offload is not None
        if self.args.process_index == 0:
            state = torch.load(
                os.path.join(checkpoint, "optimizer.pt"), map_location="cpu", weights_only=True, mmap=True
            )
            rewind(self._offload["path"], checkpoint, state)
        if self.args.world_size > 1:
            torch.distributed.barrier()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if (
            self.engine is None
            or state_dict is not None
            or not isinstance(self.model, transformers.PreTrainedModel)
        ):
            super()._save(output_dir, state_dict)
            return
        super()._save(output_dir, {})  # all but the weights, which never are in memory together
        folder = output_dir or self.args.output_dir
        assert folder is not None  # the arguments have a default
        self.engine.save(os.path.join(folder, "model.safetensors"))

    # Loop -------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._since = None
        args, kwargs = self._from_last_whole(*args, **kwargs)
        # It is set on the instance, so that it also stands before the method of a class of the user's.
        self.training_step = self._keep  # type: ignore[method-assign]
        self.accelerator.backward = self._collect
        try:
            return super().train(*args, **kwargs)
        finally:
            del self.training_step, self.accelerator.backward
            for model in {self.model, self.model_wrapped}:
                vars(model).pop("train", None)
            self._micro_batches = []
            if self._hooked is not None and (log := self._hooked.trajectory) is not None:
                log.flush()

    def _from_last_whole(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of :meth:`train`, where True stands for the last checkpoint that was written to its
        end.

        A process that is killed while it writes one leaves a folder in which the Trainer would find its last
        file missing."""
        given = args[0] if args else kwargs.get("resume_from_checkpoint")
        if given is not True:
            return args, kwargs
        root = pathlib.Path(self.args.output_dir or ".")
        number = lambda path: path.name[len(PREFIX_CHECKPOINT_DIR) + 1 :]
        numbered = [p for p in root.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if number(p).isdecimal()]
        found = {int(number(p)): p for p in numbered}
        for _, path in sorted(found.items(), reverse=True):
            if is_whole(path):
                return (str(path), *args[1:]), {
                    k: v for k, v in kwargs.items() if k != "resume_from_checkpoint"
                }
            self._tell(f"{path} is only a part of a checkpoint, and is passed over")
        return args, kwargs  # the Trainer says that there is none

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._stream()
        return super().evaluation_loop(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._clock_stopped():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        folder = (
            pathlib.Path(self._get_output_dir(trial=trial))
            / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        )
        with (
            self._clock_stopped(),
            whole_or_as_before(folder, self.args.should_save, self.args.world_size > 1),
        ):
            super()._save_checkpoint(model, trial, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not os.path.isfile(os.path.join(checkpoint, "optimizer.pt")):
            expected = f"optimizer.pt in {checkpoint}: it has the seed and the step of the run"
            got = "none (save_only_model, or a part of a checkpoint)"
            fail(self._op, "resume_from_checkpoint", expected, got)
        super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += time.monotonic() - begin

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._hooked is not None and self._hooked.last_loss is not None:
            logs = {**logs, **self._step_metrics(self._hooked)}
        super().log(logs, *args, **kwargs)

    def _step_metrics(self, optimizer: ZerothOrder) -> dict[str, float]:
        """What is logged of the last step.

        That is g (for several directions the root of their mean square), the losses of the first direction,
        the steps in a second since the last log, without evaluations and checkpoints, and the run's skipped
        steps.
        """
        g = optimizer.last_projected_gradient
        assert g is not None  # a step was taken
        metrics = {"projected_gradient": float(g if g.dim() == 0 else g.double().square().mean().sqrt())}
        metrics |= _first_losses(optimizer.estimator, optimizer.last_losses)
        now, step = time.monotonic(), self.state.global_step
        if self._since is not None and step > self._logged_step:
            metrics["steps_per_second"] = (step - self._logged_step) / max(now - self._since, 1e-9)
        self._since, self._logged_step = now, step
        metrics["skipped_steps"] = int(optimizer.skipped_steps)
        return metrics


def _train_without_parts(model: nn.Module, mode: bool) -> nn.Module:
    """``model.train`` with ``eval_mode``: its parts stay in evaluation mode."""
    model.training = mode
    for part in model.children():
        part.eval()
    return model


def _first_losses(estimator: Estimator, losses: Any) -> dict[str, float]:
    named: dict[str, float] = {}
    for (k, sign), loss in zip(estimator.points(), losses, strict=False):
        if k == 0 and _POINTS[sign] not in named:
            named[_POINTS[sign]] = float(loss.reshape(-1)[0])
    return named


class ZOTrainer(ZOTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` with forward passes only: :class:`ZOTrainerMixin` has the additional
    arguments.

    Example::

        trainer = ZOTrainer(model=model, args=args, train_dataset=data)   # instead of Trainer(...)
        trainer.train()
    """
