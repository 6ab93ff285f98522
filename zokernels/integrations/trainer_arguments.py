"""Which arguments of a Trainer work without gradients, and what is said of those that do not."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..checks import check_call, fail, fail_unknown
from ..distributed import Exchange
from ..offload import stream
from ..optim import ZOSGD, ZerothOrder

logger = transformers.utils.logging.get_logger(__name__)

if TYPE_CHECKING:  # what a mix-in takes for granted of the bases behind it
    Behind = transformers.Trainer
else:
    Behind = object


class TrainerArguments(Behind):
    """The checks of a zeroth-order trainer's arguments, and its warnings, each of which is given once."""

    _mesh: DeviceMesh | Exchange | None
    _offload: dict[str, Any] | None
    _told: set[str]

    @property
    def _op(self) -> str:
        return type(self).__name__

    @property
    def zo_optimizer(self) -> ZerothOrder | None:
        """The optimizer without accelerate's wrapper; None before the training."""
        optimizer: Any = self.optimizer
        ours: ZerothOrder | None = getattr(optimizer, "optimizer", optimizer)
        return ours

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(f"{self._op}: {message}", stacklevel=3)

    def _check_arguments(self) -> None:
        args = self.args
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.is_fsdp_xla_enabled:
            expected = "neither: they shard gradients and states that do not exist"
            fail(self._op, "deepspeed, fsdp", expected, "one")
        if args.n_gpu > 1:
            expected = "1 (CUDA_VISIBLE_DEVICES=0): nn.DataParallel copies the weights"
            fail(self._op, "n_gpu", expected, args.n_gpu)
        self._check_optimizer()
        self._check_processes()
        if self._offload is not None and args.load_best_model_at_end:
            expected = "False with offload: a streamed model loads no state_dict"
            fail(self._op, "load_best_model_at_end", expected, True)
        if self._offload is not None and self.optimizer is not None:
            expected = "optimizer_cls_and_kwargs with offload: an optimizer comes after the stream"
            fail(self._op, "optimizers", expected, type(self.optimizer).__name__)
        if args.max_grad_norm not in (0, 1.0):  # 1.0 is the Trainer's default: nobody has asked for it
            self._tell(
                f"max_grad_norm={args.max_grad_norm} has no effect, because there is no gradient; "
                "optimizer_cls_and_kwargs=(ZOSGD, {'clip': ...}) bounds the projected gradient"
            )
        default = {f.name: f.default for f in dataclasses.fields(args)}
        for name in ("optim", "adam_beta1", "adam_beta2", "adam_epsilon"):
            value = getattr(args, name)
            if value != default[name]:
                value = getattr(value, "value", value)  # of an enumeration
                self._tell(f"{name}={value} has no effect: optimizer_cls_and_kwargs names the optimizer")
        lr = (self.optimizer_cls_and_kwargs or (ZOSGD, {}))[1].get("lr", args.learning_rate)
        if args.learning_rate not in (lr, default["learning_rate"]):
            text = f"learning_rate={args.learning_rate:g} has no effect"
            self._tell(f"{text}: the lr={lr:g} of optimizer_cls_and_kwargs counts")
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if getattr(args, name, False):
                logger.info(f"{self._op}: {name} is off: without backward no activations are kept")
                setattr(args, name, False)

    def _check_offload(self) -> None:
        """The arguments for :func:`zokernels.offload.stream`, which is called when a forward is due."""
        if self._offload is None:
            return
        if not isinstance(self._offload, dict):
            expected = "a dict of arguments of zokernels.offload.stream, such as {'storage': 'host'}"
            fail(self._op, "offload", expected, repr(self._offload), TypeError)
        check_call(stream, (None,), self._offload)  # None: the model, which the Trainer makes

    def _check_names(self, given: Iterable[str], takers: Iterable[Callable[..., None]], said: str) -> None:
        """Refuses an argument that none of ``takers`` has, if the error ``said`` is about it."""
        for name in given:
            if f"unexpected keyword argument {name!r}" in said:
                taken = [p for taker in takers for p in inspect.signature(taker).parameters.values()]
                variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
                known = [p.name for p in taken if p.kind not in variable and p.name != "self"]
                fail_unknown(self._op, name, known)

    def _check_pairs(self, given: dict[str, Any]) -> None:
        """The arguments for an optimizer are pairs, which the Trainer takes apart before it looks at them."""
        forms = {
            "optimizers": "(optimizer, scheduler or None)",
            "optimizer_cls_and_kwargs": "(class, {arguments})",
        }
        for name, form in forms.items():
            pair, got = given.get(name), ""
            if isinstance(pair, (tuple, list)):
                if len(pair) != 2:
                    got = f"a {type(pair).__name__} of {len(pair)}"
                elif name == "optimizer_cls_and_kwargs" and not isinstance(pair[1], dict):
                    got = f"{type(pair[1]).__name__} as its second part"
            elif pair is not None:
                got = pair.__name__ if isinstance(pair, type) else type(pair).__name__
            if got:
                fail(self._op, name, f"a pair {form}", got, TypeError)

    def _check_optimizer(self) -> None:
        """Checks the optimizer that the arguments name.

        One that a subclass makes in ``create_optimizer`` is checked when it is made.
        """
        ours = self.zo_optimizer
        if ours is not None and not isinstance(ours, ZerothOrder):
            expected = "an optimizer of zokernels.optim (transformers.Trainer takes one of torch)"
            got = f"the class {ours.__name__}" if isinstance(ours, type) else type(ours).__name__
            fail(self._op, "optimizers", expected, got, TypeError)
        if self.optimizer_cls_and_kwargs is None:
            return
        kind, _ = self.optimizer_cls_and_kwargs
        if not callable(kind):
            expected = "a class of zokernels.optim, such as (ZOSGD, {})"
            fail(self._op, "optimizer_cls_and_kwargs", expected, repr(kind), TypeError)
        of_torch = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if of_torch and not issubclass(kind, ZerothOrder):
            expected = "a class of zokernels.optim (transformers.Trainer takes those of torch)"
            fail(self._op, "optimizer_cls_and_kwargs", expected, kind.__name__, TypeError)

    def _check_processes(self) -> None:
        processes = self.args.world_size
        if self._mesh is None and processes > 1:
            self._mesh = init_device_mesh(self.args.device.type, (processes,), mesh_dim_names=("data",))
        if self._mesh is not None:
            if not isinstance(self._mesh, Exchange):
                self._mesh = Exchange(self._mesh)
            if self._mesh.names != ("data",) or len(self._mesh.ranks) != processes:
                expected = (
                    f"the dimension 'data' of {processes} processes: the Trainer gives each its own batches"
                )
                fail(self._op, "mesh", expected, f"{self._mesh.names} of {len(self._mesh.ranks)}")
        ours = self.zo_optimizer
        if processes > 1 and ours is not None and ours.team.alone:
            fail(self._op, "optimizers", "an optimizer with mesh in several processes", type(ours).__name__)
