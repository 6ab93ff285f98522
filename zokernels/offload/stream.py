"""Making an engine: where the weights come from, and where they live."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..checks import check_integer, fail, is_integer, named_arguments
from ..contract import canonical_name
from ..files.safetensors import DTYPES, Checkpoint
from ..step.roles import home_of
from ..wire import Wire, format_of
from .blocks import STORAGES, Block, aliases, blocks_of, materialise, persistent_buffers, place_extents
from .encoder import Encoder
from .engine import Engine
from .footprint import fitting
from .gathered import Group, check_mesh
from .layout import WireLayout
from .memory import mapping
from .movers import Carrier
from .run import LOG, Run
from .storage import DiskStorage, HostStorage
from .stored import OnDevice, StoredModel
from .timeline import Timeline

#: Writes the initial value of the parameter of a name.
Fill = Callable[[str, Tensor], object]


@named_arguments
def stream(
    model: nn.Module,
    blocks: str | Sequence[nn.Module] | None = None,
    storage: str = "host",
    device: torch.device | str | None = None,
    *,
    weights: str | os.PathLike[str] | Fill | None = None,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    slots: int | None = None,
    scratch: int | None = None,
    memory: int | None = None,
    write_every: int | None = 1,
    threads: int = 2,
    cache: int = 0,
    wire: Wire | None = None,
    mesh: DeviceMesh | None = None,
    master: torch.dtype | None = None,
) -> StoredModel:
    """Let the blocks of ``model`` live in ``storage`` and come to ``device`` one after another, once a step.

        theta   = round(decay * theta + sum_k c_k z_k)      the last step's update, as the block comes in
        theta_s = round(theta + e_s z)                      for each forward s; theta itself goes back

    All forwards of a step go through a block before it leaves: the model, whatever it is, runs in lockstep,
    once for each forward.  Losses and weights are those of the same optimizer on the whole model in memory,
    to the bit.  Whatever is in no block (embeddings, norms, the head, tied weights) stays on the device.

    What an optimizer keeps of each weight (momentum, the moments of Adam, the bits of a mask) is stored and
    moves with the weights of its block, behind them.

    The weights of a block are its parameters and the integers of its quantised layers: persistent buffers of
    int8, uint8, int16 or int32 with two dimensions or more, such as those of
    :class:`~zokernels.quantize.QuantizedLinear`.  They move with the block, so QZO and QuZO are streamed,
    too.  All other buffers stay on the device.

    Make the optimizer from ``model.named_parameters()`` afterwards, and step as usual.  Every other forward
    (evaluation, generation) is streamed, too, and builds no graph for :meth:`~torch.Tensor.backward`.

    With storage="device" nothing moves, and nothing runs in lockstep: the parameters are ordinary ones on the
    device, and an optimizer's steps are those of any model in memory (``restore="exact"`` perturbs it block
    by block), with every method, and with graphs for backward outside of steps.

    Args:
        model: any module with a list of blocks, each called once or more in a forward; with ``weights``, its
            parameters may be on "meta" (:func:`empty_weights`).
        blocks: the name of their container ("model.layers"), or modules; default: the largest container of
            modules of one class.
        storage: "device" (nothing moves; see above), "host" (one region of memory of exact size, pinned for a
            GPU) or "disk".
        device: of slots, activations and resident parameters; default: that of the model's first parameter on
            a device.
        weights: a safetensors file, or a folder of shards, that holds the model's parameters by name; it is
            never written to.  Or a function of a name and a tensor that fills the tensor, for a model made
            from nothing.
        path: (disk) a folder for what is written: blocks, and the log of the run.  None: nothing is written.
            The updates are then kept in memory, and each block takes them as it comes in, which halves the
            traffic.
        resume: continue the run in ``path``, where there is one; the optimizer that is made next takes its
            steps.
        slots: (host, disk) buffers on the device, of the size of the largest block.  With 1 nothing is copied
            during a computation.  Default: 3, or fewer where ``memory`` has no room for them, which a warning
            says.  They become larger by the states of an optimizer that is made, and perhaps fewer.
        scratch: (host, disk) buffers for perturbed copies: 2, or 1, which saves memory and draws the noise
            once for each forward.  Default: 2, or 1 where ``memory`` has no room for them.
        memory: (host, disk) bytes of the device that weights may take: slots, scratch and what stays there
            (:func:`footprint`).  Default: 0.8 of what is free on a GPU; no limit on the CPU.
        write_every: (host, disk) after how many updates a block is written back.  n > 1 saves traffic; the
            block then takes up to n updates each time it comes in.
        threads: how many read and write files.
        cache: (disk) bytes of host memory for copies of the first blocks, as many as fit, which are then not
            read again.  What is written goes to the file all the same.
        wire: (host, disk) what crosses the link: None (the weights; lossless), "bf16", "fp16", "fp8" or
            "int8" (``zokernels.wire``).  The host keeps the exact weights and applies each update itself, so
            nothing comes back.  bf16 of bf16 weights and fp16 of fp16 weights are lossless
            (:attr:`Engine.is_lossless`), and give the bits of None.  All else is lossy: forwards compute with
            decode(encode(theta)), rounded to the weights' dtype, in the place of theta.  What is stored and
            saved, and ``state_dict()``, are the weights themselves.
        mesh: (host, disk) a ``DeviceMesh`` of one dimension: each rank keeps a slice of every block, or reads
            it from disk, and the slices are gathered as the block comes in.  The ranks run all forwards
            together and take the same steps, so give the optimizer a mesh that has them all.  ``path`` must
            be a folder that all ranks see: the first one writes it.
        master: (host, disk) torch.bfloat16 or torch.float16: how the blocks' fp32 weights are kept.  Their
            dtype is this one from then on, in ``state_dict()``, in files and for the optimizer, whose updates
            are made in fp32 and rounded to it (``rounding="stochastic"``, its default).  Forwards compute
            with fp32 copies, theta +- e z without a rounding; under autocast in its dtype.

    Returns: a :class:`StoredModel`, which is a context manager: ``flush()``, ``save(file)``, ``close()``.
    For storage on the host or on disk it is the :class:`Engine`.

    Raises: ValueError, OSError and TypeError, before anything is written, naming the argument.

    Sources: the dual forward, Wang et al. 2025 (ZO2, arXiv 2503.12668); disk as a tier, Rajbhandari et al.
    2021 (ZeRO-Infinity, arXiv 2104.07857) and Liao et al. 2024 (Fuyou, arXiv 2403.06504).
    """
    op = "stream"
    _check(op, storage, weights, path, resume, slots, scratch, memory, write_every, threads, cache, wire)
    if master is not None and (storage == "device" or wire is not None):
        fail(op, "master", "None where storage is 'device', and with wire=", master)
    if mesh is not None:
        check_mesh(op, mesh, storage)
    target = _device(op, model, device)
    if not all(home_of(p).in_memory for _, _, _, p in aliases(model)):
        fail(op, "model", "a model that is not streamed", "one that is", RuntimeError)
    fill = weights if callable(weights) else None
    checkpoint = None if weights is None or callable(weights) else Checkpoint(weights)
    made = blocks_of(op, model, blocks, master)
    places = {} if fill else _sources(op, model, made, checkpoint, storage == "host")
    if master is torch.float16:
        _check_range(op, made)
    for block in made if storage == "disk" and places else ():
        place_extents(block, [places[e.name] for e in block.entries])
    layout = None if wire is None else WireLayout(wire, made, 1 if mesh is None else mesh.size())
    if storage == "device":
        _load(model, made, {} if checkpoint is None else checkpoint.tensors(), fill, target)
        return OnDevice(model, made, target, Timeline(target))
    # The blocks' files of a run that is continued may have states.
    group = None if mesh is None else Group(mesh)
    run = None if path is None else _run_of(op, path, made, resume, group)
    try:
        fit = functools.partial(fitting, op, model, made, target, slots, layout=layout, memory=memory)
        count, of_scratch = fit(scratch)
        writes = write_every if storage != "disk" or path is not None else None
        refit = lambda: fit(of_scratch, held=of_scratch)[0]
        parts = 1 if group is None or layout is not None else group.count
        carrier = Carrier(op, made, target, count, layout, Timeline(target), writes, refit, parts)
        store: HostStorage | DiskStorage
        if storage == "host":
            store = HostStorage(carrier, group)
        else:
            store = DiskStorage(carrier, threads, checkpoint is not None, cache, group)
        size = max(b.scratch for b in made)
        copies = [torch.empty(size, dtype=torch.uint8, device=target) for _ in range(of_scratch)]
        # From here on the model changes.
        loaded = {} if checkpoint is None else checkpoint.tensors()
        _load_resident(model, made, loaded, fill)
        mover = store.mover(lambda block: _packed(block, loaded, fill), run)
        _move_the_rest(model, made, target)
        link = mover if isinstance(mover, Encoder) else None
        timeline, slots_made = carrier.timeline, store.slots
        return Engine(
            model, made, slots_made, copies, mover, target, timeline, writes, run, link, store=store
        )
    except BaseException as error:
        if run is not None:  # whose lock would keep others out
            run.withdraw() if isinstance(error, MemoryError) else run.close()
        raise


def _run_of(
    op: str, path: str | os.PathLike[str], blocks: Sequence[Block], resume: bool, group: Group | None
) -> Run:
    """The run in the folder ``path``, which the first rank of ``group`` writes, and the others look at."""
    if group is None:
        return Run(path, blocks, resume)
    if group.is_first:
        try:
            run = Run(path, blocks, resume)
        except BaseException as error:
            group.from_first(str(error))
            raise
        group.from_first()
        return run
    if (failure := group.from_first()) is not None:
        fail(op, "path", "a folder that the first rank can use", f"its error: {failure}", RuntimeError)
    if not os.path.isfile(os.path.join(path, LOG)):
        fail(op, "path", "a folder that all ranks see", f"{os.fspath(path)}, without the run of the first")
    return Run(path, blocks, resume, writes=False)


def _load_resident(
    model: nn.Module, blocks: Sequence[Block], loaded: dict[str, Tensor], fill: Fill | None
) -> None:
    """Makes real weights of those on "meta", and loads the values of those in no block, and of buffers."""
    resident = materialise(model, {id(e.param) for b in blocks for e in b.entries})
    _find_again(model, blocks)
    streamed = {id(e.param) for b in blocks for e in b.entries}
    with torch.no_grad():
        for name, p in resident:
            if fill:
                fill(name, p)
        for name, p in model.named_parameters() if loaded else ():
            if id(p) not in streamed:
                p.copy_(_tensor_of(name, loaded, model, p))
    _load_buffers(model, loaded, streamed)


def _load(
    model: nn.Module,
    blocks: Sequence[Block],
    loaded: dict[str, Tensor],
    fill: Fill | None,
    device: torch.device,
) -> None:
    """Loads the values of all weights, each on the host and then to ``device``, and of buffers."""
    filled = dict(materialise(model, set()))
    _find_again(model, blocks)
    filled |= {e.name: e.param for b in blocks for e in b.entries}
    with torch.no_grad():
        for name, p in filled.items() if fill else ():
            fill(name, p)  # type: ignore[misc]
            p.data = p.data.to(device)
        for name, p in model.named_parameters() if loaded else ():
            p.copy_(_tensor_of(name, loaded, model, p))
            p.data = p.data.to(device)
    _load_buffers(model, loaded, set())
    _move_the_rest(model, (), device)
    _find_again(model, blocks)


def _find_again(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Puts the weights that the model has now into the blocks, by their names."""
    fresh = {name: p for name, _, _, p in aliases(model)}
    for b in blocks:
        b.entries = [e._replace(param=fresh[e.name]) for e in b.entries]


def _move_the_rest(model: nn.Module, blocks: Sequence[Block], device: torch.device) -> None:
    streamed = {id(e.param) for b in blocks for e in b.entries}
    for p in model.parameters():
        if id(p) not in streamed and p.device != device:
            p.data = p.data.to(device)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in streamed and buffer.device != device:
                module._buffers[key] = buffer.to(device)


def _check(
    op: str,
    storage: Any,
    weights: Any,
    path: Any,
    resume: Any,
    slots: Any,
    scratch: Any,
    memory: Any,
    write_every: Any,
    threads: Any,
    cache: Any,
    wire: Any,
) -> None:
    if storage not in STORAGES:
        fail(op, "storage", ", ".join(map(repr, STORAGES)), repr(storage))
    if wire is not None:
        format_of(op, wire)
        if storage == "device":
            fail(op, "wire", "None where storage is 'device': nothing crosses a link", repr(wire))
    if slots is not None:
        check_integer(op, "slots", slots)
    if memory is not None:
        check_integer(op, "memory", memory)
        if storage == "device":
            fail(op, "memory", "None where storage is 'device': all weights are there", memory)
    check_integer(op, "threads", threads)
    check_integer(op, "cache", cache, 0)
    if cache and storage != "disk":
        fail(op, "cache", "0 unless storage is 'disk'", cache)
    if scratch not in (None, 1, 2):
        fail(op, "scratch", "1 or 2", repr(scratch))
    if write_every is not None and not is_integer(write_every, 1):
        fail(op, "write_every", "an integer >= 1, or None for storage that is only read", repr(write_every))
    if storage == "disk":
        if (weights is None or callable(weights)) and path is None:
            fail(
                op,
                "weights, path",
                "a checkpoint to read, a folder to write, or both, where storage is 'disk'",
                None,
            )
        if path is not None and write_every is None:
            fail(op, "write_every", "an integer >= 1 with path=", None)
    elif path is not None:
        fail(op, "path", "None unless storage is 'disk'", repr(path))
    elif write_every is None:
        fail(op, "write_every", "an integer >= 1 unless storage is 'disk'", None)
    if resume and path is None:
        fail(op, "resume", "True only with path=", True)


def _device(op: str, model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is None:
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    target = torch.device(device)
    if target.type not in ("cpu", "cuda"):
        fail(op, "device", "'cpu' or 'cuda'", repr(str(target)))
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    return target


def _check_range(op: str, blocks: Sequence[Block]) -> None:
    """Raises where fp16 has no finite number for a weight that the model has."""
    most = torch.finfo(torch.float16).max
    for e in (e for b in blocks for e in b.entries if e.is_widened and not e.param.is_meta):
        if bool((largest := e.param.detach().abs().max()) > most):
            fail(op, f"master: {e.name}", f"weights up to {most}, as torch.float16 has", float(largest))


def _sources(
    op: str, model: nn.Module, blocks: Sequence[Block], checkpoint: Checkpoint | None, copied: bool
) -> dict[str, tuple[str, int, int]]:
    """(path, begin, size) of each streamed parameter in the checkpoint, which must fit the whole model.

    Weights that are stored in another dtype than the model's are so in the file, too; where they are
    ``copied`` from there, they may be in the model's.  Resident ones may be in either.
    """
    if checkpoint is None:
        if missing := [n for n, _, _, p in aliases(model) if p.is_meta]:
            fail(op, "weights", f"a checkpoint for weights on 'meta' ({missing[0]!r}, ...)", None)
        return {}
    where = {canonical_name(name): (file, file.entries[name]) for name, file in checkpoint.where.items()}
    places = {}
    names = {e.name: e for b in blocks for e in b.entries}
    master = blocks[0].master
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, _, _, p in aliases(model):
        groups.setdefault(id(p), []).append((name, p))
    for same in groups.values():
        name, p = next((a for a in same if canonical_name(a[0]) in where), same[0])
        if canonical_name(name) not in where:
            fail(op, f"weights: {name}", f"a tensor of that name in {checkpoint.path}", "none")
        file, entry = where[canonical_name(name)]
        if entry.shape != tuple(p.shape):
            fail(op, f"weights: {name}", f"shape {tuple(p.shape)}, as in the model", entry.shape)
        streamed = next((names[alias] for alias, _ in same if alias in names), None)
        stored = p.dtype if streamed is None else streamed.dtype
        either = p.dtype is torch.float32 and (copied or streamed is None) and master is not None
        if DTYPES.get(entry.dtype) not in ((p.dtype, master) if either else (stored,)):
            whose = "as in the model" if stored is p.dtype else "as master says"
            fail(op, f"weights: {name}", f"dtype {stored}, {whose}", entry.dtype)
        for alias, _ in same:
            if alias in names:
                places[alias] = (str(file.path), entry.begin, entry.size)
    return places


def _load_buffers(model: nn.Module, loaded: dict[str, Tensor], streamed: set[int]) -> None:
    """Loads the resident buffers that the checkpoint has; others stay as the model made them."""
    for name, buffer in persistent_buffers(model):
        found = loaded.get(canonical_name(name))
        if found is not None and id(buffer) not in streamed:
            if found.shape != buffer.shape:
                fail(
                    "stream",
                    f"weights: {name}",
                    f"shape {tuple(buffer.shape)}, as in the model",
                    tuple(found.shape),
                )
            buffer.detach().copy_(found)


def _tensor_of(name: str, loaded: dict[str, Tensor], model: nn.Module, p: Tensor) -> Tensor:
    names = [n for n, _, _, q in aliases(model) if q is p] or [name]
    return next(loaded[canonical_name(n)] for n in names if canonical_name(n) in loaded)


def _packed(block: Block, loaded: dict[str, Tensor], fill: Fill | None) -> Tensor:
    """The bytes of a block, from the checkpoint, from ``fill``, or from the model."""
    data = mapping(block.nbytes, torch.device("cpu"))
    for e in block.entries:
        if fill:
            fill(e.name, e.of(data))
        else:
            e.of(data).copy_(loaded[canonical_name(e.name)] if loaded else e.param.detach())
    return data
