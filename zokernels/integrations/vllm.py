"""Evolution strategies inside vLLM: perturb, generate, restore and update in a running engine.

    llm = LLM(model, worker_extension_cls="zokernels.integrations.vllm.WorkerExtension")
    engine = Engine(llm)
    engine.perturb([seed], [sigma])          # the engine computes with theta + sigma z
    outputs = llm.generate(prompts)
    engine.update(seeds, coeffs)             # theta += sum_k c_k z_k, on every rank

:class:`WorkerExtension` lives in each of vLLM's workers, and :class:`Engine` calls all of them and empties
the prefix cache.  The weights' arithmetic is that of :mod:`zokernels.integrations.engine`, so all numbers of
ranks and engines have the bits of a Hugging Face model in memory.  The extension also has the methods of
es-at-scale, whose trainer runs with this class instead of its own.

What is refused, by one sentence each: quantised layers, LoRA layers, experts that move between ranks, and
models that load their weights in any other way than by copying.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.platforms import current_platform

from ..checks import fail
from ..files.safetensors import Checkpoint
from .engine import NOTHING, Update, Weights, create, shapes_of, trace, write_parts

if TYPE_CHECKING:
    from ..functional import Dist, Rounding

#: The releases of vLLM with which the tests run.  Others are tried, with a warning.
SUPPORTED = ("0.32",)
#: Seconds for which an engine waits for another one's updates.
_PATIENCE = 600


def _keep_cpu_weights() -> None:
    """Lets the linear layers of vLLM's CPU backend compute with the weights themselves.

    It would move them into packed copies, which nobody could perturb.  Workers import this module before they
    load the model.  Experts it packs in any case, so on the CPU a model with experts is refused."""
    if current_platform.is_cpu():
        from vllm.model_executor.layers import utils

        def dispatch(layer: Any, remove_weight: bool) -> None:
            layer.cpu_linear = torch.nn.functional.linear

        utils.dispatch_cpu_unquantized_gemm = dispatch


def _check_version() -> None:
    if ".".join(vllm.__version__.split(".")[:2]) not in SUPPORTED:
        text = (
            f"expected {' or '.join(SUPPORTED)}, with which it is tested, got {vllm.__version__}; trying it"
        )
        warnings.warn(f"zokernels: vllm: version: {text}", stacklevel=2)


_keep_cpu_weights()
_check_version()


class WorkerExtension:
    """Methods of a vLLM worker (``LLM(..., worker_extension_cls=...)``), called by ``llm.collective_rpc``.

    Methods that begin with ``zk_`` are called by :class:`Engine`.  The others have the names, arguments and
    meaning that es-at-scale's trainer expects:

    * ``perturb_self_weights(seed, noise_scale, negate=False)`` and ``restore_self_weights(seed, sigma)``: the
      latter is exact, whatever the arguments.
    * ``update_weights_from_seeds(seeds, coeffs, alpha, population_size)``: theta += alpha / N sum_k c_k z_k,
      rounded once, stochastically.
    * ``init_inter_engine_group(address, port, engine, engines)`` and ``broadcast_all_weights(src)``: engines
      exchange the seeds and coefficients of updates, some bytes, and never weights.  Where all engines were
      told to update nothing needs to be sent, and nothing is.
    * ``save_self_weights_to_disk(path)`` and ``load_weights_from_disk(path)``: one safetensors file of the
      whole model, with the names of Hugging Face, whatever the number of ranks.
    * ``save_self_initial_weights()``: does nothing, for the checkpoint has them.

    A prefix cache holds what the weights of before computed, and only the engine can empty it.  So these
    methods want ``enable_prefix_caching=False``; :class:`Engine` empties it.
    """

    # vLLM's worker, into which this class is mixed, has these.
    model_runner: Any
    vllm_config: Any
    model_config: Any
    cache_config: Any
    rank: int

    # Our own ------------------------------------------------------------------------------------------------

    def zk_setup(self, memory: str = "master", dist: Dist = "normal", cached: bool = False) -> list[str]:
        """Finds the weights of this rank, and returns their names.

        Args:
            memory, dist: of :class:`zokernels.integrations.engine.Weights`.
            cached: the caller empties the prefix cache and knows whether the engine sleeps.
        """
        self._zk_check(cached)
        base = Checkpoint(_folder_of(self.model_config))
        dtype = self.model_config.dtype
        pieces = trace(model := self._zk_skeleton(), shapes_of(base, dtype), model.load_weights)
        tensors = {name: p.data for name, p in self.model_runner.model.named_parameters()}
        self._zk_weights = Weights(pieces, tensors, memory, dist, base)
        self._zk_weights.check_base()
        self._zk_origin, self._zk_updates, self._zk_broadcasts = base, list[Update](), 0
        return sorted({p.name for p in pieces})

    def _zk_check(self, cached: bool) -> None:
        config, op = self.vllm_config, "vllm"
        if config.quant_config is not None:
            fail(op, "quantization", "None: integers take no noise (docs/quantized.md)", config.quant_config)
        if config.lora_config is not None:
            fail(op, "enable_lora", "False: its layers have other names; merge the adapter first", True)
        if getattr(config.parallel_config, "enable_eplb", False):
            fail(op, "enable_eplb", "False: it moves experts between ranks", True)
        if not cached and self.cache_config.enable_prefix_caching:
            fail(op, "enable_prefix_caching", "False, or zokernels.integrations.vllm.Engine", True)
        if not cached and getattr(self.model_config, "enable_sleep_mode", False):
            fail(op, "enable_sleep_mode", "False, or zokernels.integrations.vllm.Engine", True)

    def _zk_skeleton(self) -> Any:
        """A model as this rank's, without memory, and as it was before vLLM made its layers ready to run."""
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        config = copy.copy(self.vllm_config)
        config.compilation_config = copy.copy(config.compilation_config)
        config.compilation_config.static_forward_context = {}  # where layers enter their names, each once
        with set_default_torch_dtype(self.model_config.dtype), torch.device("meta"):
            return initialize_model(vllm_config=config, model_config=self.model_config)

    @property
    def _zk(self) -> Weights:
        if not hasattr(self, "_zk_weights"):
            self.zk_setup()
        return self._zk_weights

    def zk_perturb(self, seeds: Sequence[int], coeffs: Sequence[float]) -> None:
        self._zk.perturb(seeds, coeffs)

    def zk_update(
        self,
        seeds: Sequence[int],
        coeffs: Sequence[float],
        decay: float | None = None,
        rounding: Rounding = "stochastic",
        rounding_seed: int | None = None,
    ) -> None:
        step = Update(tuple(seeds), tuple(coeffs), decay, rounding, rounding_seed)
        self._zk.update(step.seeds, step.coeffs, **step.terms)
        self._zk_updates.append(step)

    def zk_pieces(self) -> list[list[Any]]:
        """Where this rank has what: the fields of each :class:`~zokernels.integrations.engine.Piece`."""
        return [list(piece) for piece in self._zk.pieces]

    def zk_drift(self) -> dict[str, float]:
        return self._zk.drift()

    def zk_save(self, path: str) -> None:
        """All ranks together write one safetensors file."""
        if self._zk_is_first():
            create(path, self._zk_origin)
        self._zk_barrier()
        write_parts(path, self._zk_origin, self._zk.parts())
        self._zk_barrier()

    def zk_load(self, path: str) -> None:
        self._zk.load(Checkpoint(path))
        self._zk_updates = []

    def _zk_is_first(self) -> bool:
        return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0

    def _zk_barrier(self) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            from vllm.distributed.parallel_state import get_world_group

            torch.distributed.barrier(get_world_group().cpu_group)

    # As in es-at-scale --------------------------------------------------------------------------------------

    def perturb_self_weights(self, seed: int, noise_scale: float, negate: bool = False) -> bool:
        self.zk_perturb([int(seed)], [-float(noise_scale) if negate else float(noise_scale)])
        return True

    def restore_self_weights(self, seed: int = 0, sigma: float = 0.0) -> bool:
        self.zk_perturb(*NOTHING)
        return True

    def update_weights_from_seeds(
        self, seeds: Sequence[int], coeffs: Sequence[float], alpha: float, population_size: int
    ) -> bool:
        scale = float(alpha) / int(population_size)
        self.zk_update([int(s) for s in seeds], [float(c) * scale for c in coeffs])
        return True

    def init_inter_engine_group(
        self, master_address: str, master_port: int, engine_idx: int, num_engines: int
    ) -> bool:
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            master_address,
            int(master_port) + int(self.rank),  # ranks of one number talk to each other
            int(num_engines),
            is_master=engine_idx == 0,
            timeout=datetime.timedelta(seconds=_PATIENCE),
            wait_for_workers=False,
        )
        self._zk_group = store, int(engine_idx), int(num_engines)
        return True

    def broadcast_all_weights(self, src_rank: int) -> bool:
        weights, key = self._zk, str(self._zk_broadcasts)
        self._zk_broadcasts += 1
        store, engine, _ = self._zk_group
        if engine == int(src_rank):
            weights.return_exactly()
            store.set(key, json.dumps(self._zk_updates))
            return True
        done = len(self._zk_updates)
        found = [Update(tuple(s), tuple(c), *rest) for s, c, *rest in json.loads(store.get(key))]
        if found[:done] != self._zk_updates:
            fail("broadcast_all_weights", "updates", f"the first {done} of engine {src_rank}", "others")
        for step in found[done:]:
            self.zk_update(*step)
        return True

    def save_self_weights_to_disk(self, filepath: str) -> bool:
        self.zk_save(filepath)
        return True

    def load_weights_from_disk(self, filepath: str) -> bool:
        self.zk_load(filepath)
        return True

    def save_self_initial_weights(self) -> bool:
        _ = self._zk  # a model that cannot be trained is refused here
        return True


def _folder_of(model_config: Any) -> str:
    """The folder of the checkpoint that vLLM has loaded."""
    name = str(model_config.model)
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, revision=model_config.revision, local_files_only=True))


class Engine:
    """The weights of a ``vllm.LLM`` and its generation, as a trainer uses them.

    Args:
        llm: made with ``worker_extension_cls="zokernels.integrations.vllm.WorkerExtension"``.
        memory: "master" (a second copy of the weights, nothing is ever rounded away) or "inplace" (no copy);
            see :class:`zokernels.integrations.engine.Weights`.
        dist: of the noise, "normal" or "rademacher".

    Every method that changes the weights empties the prefix cache, and raises where requests are running or
    the engine sleeps (``llm.sleep()``).
    """

    def __init__(self, llm: Any, memory: str = "master", dist: Dist = "normal") -> None:
        self.llm = llm
        self._names = sorted({n for names in self._call("zk_setup", memory, dist, True) for n in names})

    def _call(self, method: str, *args: Any) -> list[Any]:
        engine = self.llm.llm_engine
        if self.llm.model_config.enable_sleep_mode and engine.is_sleeping():
            fail("Engine", "llm", "an engine that is awake (llm.wake_up())", "one that sleeps", RuntimeError)
        if engine.has_unfinished_requests():
            fail("Engine", "llm", "no running requests while weights change", "some", RuntimeError)
        found: list[Any] = self.llm.collective_rpc(method, args=args)
        if not self.llm.reset_prefix_cache():
            fail("Engine", "llm", "a prefix cache that can be emptied", "one in use", RuntimeError)
        return found

    def perturb(self, seeds: Sequence[int], coeffs: Sequence[float]) -> None:
        """Computes with theta + sum_k coeffs[k] z_k from now on: one pass."""
        self._call("zk_perturb", list(seeds), list(coeffs))

    def restore(self) -> None:
        """Computes with theta again."""
        self._call("zk_perturb", [], [])

    def update(
        self,
        seeds: Sequence[int],
        coeffs: Sequence[float],
        decay: float | None = None,
        rounding: Rounding = "stochastic",
        rounding_seed: int | None = None,
    ) -> None:
        """theta <- round(decay theta + sum_k coeffs[k] z_k) on every rank, and computes with it."""
        self._call("zk_update", list(seeds), list(coeffs), decay, rounding, rounding_seed)

    def names(self) -> list[str]:
        """The parameters of the checkpoint that the ranks have, all together."""
        return self._names

    def drift(self) -> list[dict[str, float]]:
        """How far theta was from the exact one on each rank (memory="inplace"); it is exact afterwards."""
        return self._call("zk_drift")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes theta as one safetensors file with the names of the checkpoint."""
        self._call("zk_save", os.fspath(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """theta becomes the weights of a safetensors file, or of a folder of them."""
        self._call("zk_load", os.fspath(path))

    def generate(self, prompts: Sequence[Any], **sampling: Any) -> list[str]:
        """One text for each prompt (a text, or a conversation as ``llm.chat`` takes it), in one call."""
        params = vllm.SamplingParams(**sampling)
        texts = bool(prompts) and isinstance(prompts[0], str)
        run = self.llm.generate if texts else self.llm.chat
        return [r.outputs[0].text for r in run(list(prompts), params, use_tqdm=False)]
