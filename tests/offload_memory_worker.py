"""A streamed run of a checkpoint in a process of its own (test_offload_disk.py): ``FOLDER METHOD LAYERS WIDTH
SLOTS STEPS``.

Prints the losses, and the most memory that was resident, in bytes.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable

import torch
from torch import nn

from zokernels import offload
from zokernels.optim import QZO, ZOSGD, ZOAdam
from zokernels.quantize import QuantizedLinear


class Deep(nn.Module):
    def __init__(self, layers: int, width: int, kind: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(width, width, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def write(path: pathlib.Path, layers: int, width: int, method: str) -> int:
    """A checkpoint of :class:`Deep`: each weight begins at another place of the same random numbers.

    Returns the bytes of weights, and of what ``method`` keeps of them.
    """
    torch_rng, quantized = torch.Generator().manual_seed(0), method == "QZO"
    numbers = torch.randn(width * width, generator=torch_rng)
    data = ((numbers * 40).clamp(-127, 127).to(torch.int8) if quantized else numbers * width**-0.5).numpy()
    bytes_, scale = data.tobytes(), torch.full((width, 1), width**-0.5 / 40).numpy().tobytes()
    entries, at = {}, 0
    parts = [("weight", "I8" if quantized else "F32", [width, width], len(bytes_))]
    parts += [("scale", "F32", [width, 1], len(scale))] * quantized
    for i in range(layers):
        for key, dtype, shape, size in parts:
            entries[f"layers.{i}.{key}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for i in range(layers):
            first = 4 * (i * 12347 % (width * width // 4))
            file.write(memoryview(bytes_)[first:])
            file.write(memoryview(bytes_)[:first])
            file.write(scale if quantized else b"")
    return 3 * at if method == "Adam" else at


def most_resident() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main(place: str, method: str, layers: int, width: int, slots: int, steps: int) -> None:
    folder = pathlib.Path(place)
    with offload.empty_weights():
        model = Deep(layers, width, QuantizedLinear if method == "QZO" else nn.Linear)
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    options = {"weights": folder / "base.safetensors", "path": folder / "run", "slots": slots}
    with offload.stream(model, "layers", "disk", **options):
        kind, lr, eps = {"SGD": (ZOSGD, 1e-3, 1e-3), "Adam": (ZOAdam, 1e-5, 1e-3), "QZO": (QZO, 1e-6, 1e-5)}[
            method
        ]
        optimizer = kind(model.named_parameters(), lr=lr, eps=eps, seed=3)
        losses = [float(optimizer.step(lambda: model(x))) for _ in range(steps)]
    print(json.dumps({"losses": losses, "resident": most_resident()}))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
