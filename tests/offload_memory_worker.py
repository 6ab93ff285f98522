"""A streamed run of a checkpoint in a process of its own (test_offload_disk.py): ``FOLDER LAYERS WIDTH SLOTS
STEPS``.

Prints the losses, and the most memory that was resident, in bytes.
"""

from __future__ import annotations

import json
import pathlib
import sys

import torch
from torch import nn

from zokernels import offload
from zokernels.optim import ZOSGD


class Deep(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def write(path: pathlib.Path, layers: int, width: int) -> int:
    """A checkpoint of :class:`Deep`: each weight begins at another place of the same random numbers."""
    size, torch_rng = 4 * width * width, torch.Generator().manual_seed(0)
    numbers = (torch.randn(width * width, generator=torch_rng) * width**-0.5).numpy().tobytes()
    entries = {
        f"layers.{i}.weight": {
            "dtype": "F32",
            "shape": [width, width],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(layers)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for i in range(layers):
            at = 4 * (i * 12347 % (width * width))
            file.write(memoryview(numbers)[at:])
            file.write(memoryview(numbers)[:at])
    return layers * size


def most_resident() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main(place: str, layers: int, width: int, slots: int, steps: int) -> None:
    folder = pathlib.Path(place)
    with offload.empty_weights():
        model = Deep(layers, width)
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    options = {"weights": folder / "base.safetensors", "path": folder / "run", "slots": slots}
    with offload.stream(model, "layers", "disk", **options):
        optimizer = ZOSGD(model.named_parameters(), lr=1e-3, eps=1e-3, seed=3)
        losses = [float(optimizer.step(lambda: model(x))) for _ in range(steps)]
    print(json.dumps({"losses": losses, "resident": most_resident()}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
