"""Parameters, losses and learning rates on different devices: the bits of a run that has all of them on one.

Without a GPU the other device is the stand-in of ``late_device``, whose copies to the host arrive late unless
something waits for them; so a step that computes with such a copy before it has arrived fails here."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from late_device import DEVICE, LateDevice
from torch import Tensor, nn
from zosgd_cases import same_bits

import zokernels
import zokernels.optim as zo
from zokernels.transfer import to_device

CPU = torch.device("cpu")
#: Every optimizer, rule and direction whose numbers pass between devices.
METHODS = {
    "sgd": lambda params, lr: zo.ZOSGD(params, lr, 2.0**-5, weight_decay=0.1, clip=1.0, directions=2),
    "sgd in place": lambda params, lr: zo.ZOSGD(params, lr, 2.0**-5, weight_decay=0.1, restore="inplace"),
    "sgd capturable": lambda params, lr: zo.ZOSGD(params, lr, 2.0**-5, weight_decay=0.1, capturable=True),
    "momentum": lambda params, lr: zo.ZOSGD(params, lr, 2.0**-5, weight_decay=0.1, momentum=0.9),
    "momentum, window": lambda params, lr: zo.ZOSGD(params, lr, 2.0**-5, momentum=0.9, window=3),
    "fzoo": lambda params, lr: zo.FZOO(params, lr, 2.0**-5, directions=3, weight_decay=0.1),
    "ranking": lambda params, lr: zo.ZORankSGD(params, lr, 2.0**-5, candidates=3),
    "conservative": lambda params, lr: zo.ZOConservative(params, lr, 2.0**-5),
    "conservative in place": lambda params, lr: zo.ZOConservative(params, lr, 2.0**-5, restore="inplace"),
    "adam": lambda params, lr: zo.ZOAdam(params, lr, 2.0**-5, weight_decay=0.1),
    "adamw": lambda params, lr: zo.ZOAdamW(params, lr, 2.0**-5, weight_decay=0.1),
    "adamw, window": lambda params, lr: zo.ZOAdamW(params, lr, 2.0**-5, weight_decay=0.1, window=3),
    "sign": lambda params, lr: zo.ZOSignSGD(params, lr, 2.0**-5, weight_decay=0.1),
    "hizoo": lambda params, lr: zo.HiZOO(params, lr, 2.0**-5, weight_decay=0.1),
    "sphere": lambda params, lr: zo.ZOSGD(params, lr, 2.0**-5, direction=zo.Sphere()),
    "scaled": lambda params, lr: zo.ZOSGD(params, lr, 2.0**-5, direction=zo.TensorScale("rms")),
    "sparse": lambda params, lr: zo.ZOSGD(params, lr, 2.0**-5, direction=zo.RandomMask(0.5)),
    "low rank": lambda params, lr: zo.LOZO(params, lr, 2.0**-5),
    "coordinates": lambda params, lr: zo.ZOCGE(params, lr, 2.0**-5, weight_decay=0.1, per_step=7),
}


class Places(NamedTuple):
    """Whether the parameters, the loss and the learning rate are on the device (True) or on the host
    (False).
    """

    first: bool
    second: bool | None  # None: there is none
    loss: bool
    lr: bool | None  # None: a Python number

    def __str__(self) -> str:
        there = [name for name, on_device in zip(self._fields, self, strict=True) if on_device]
        return f"{' and '.join(there)} on the device"


PLACES = [
    Places(first=False, second=True, loss=True, lr=None),
    Places(first=True, second=False, loss=False, lr=None),
    Places(first=True, second=None, loss=False, lr=True),
    Places(first=False, second=False, loss=False, lr=True),
    Places(first=False, second=False, loss=True, lr=False),
]
EVERYWHERE = pytest.mark.parametrize("places", PLACES, ids=str)
EACH_METHOD = pytest.mark.parametrize("method", METHODS)


def run(
    make: Callable,
    places: Places,
    device: torch.device,
    parameter: Callable[[Tensor, torch.device], nn.Parameter],
    occupy: Callable[[], object] = lambda: None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and losses of three steps.  ``parameter`` makes one of a tensor on a device; ``occupy``: before
    a loss.

    The loss is a sum of integers below 2^24: exact, so that every device has its bits.
    """
    where = lambda on_device: device if on_device else CPU
    rng = torch.Generator().manual_seed(3)
    values = {"first": torch.randn(6, 9, generator=rng), "second": torch.randn(9, 5, generator=rng)}
    sides = {"first": where(places.first), "second": where(places.second)}
    trained = ["first"] if places.second is None else ["first", "second"]
    params = {name: parameter(values[name], sides[name]) for name in trained}
    lr = 2.0**-6 if places.lr is None else torch.tensor(2.0**-6, dtype=torch.float64).to(where(places.lr))
    optimizer = make(list(params.items()), lr)

    def closure() -> Tensor:
        occupy()
        # copies that wait
        parts = [(p * 256).round().abs().sum().to(where(places.loss)) for p in params.values()]
        return torch.stack(parts).sum() / 256

    losses = [optimizer.step(closure).to(CPU).double() for _ in range(3)]
    return [p.detach().to(CPU) for p in params.values()], losses


def on_the_host(method: str, places: Places) -> tuple[list[Tensor], list[Tensor]]:
    weights, losses = run(METHODS[method], places, CPU, lambda t, device: nn.Parameter(t.clone()))
    assert all(loss.isfinite() for loss in losses)
    assert len(set(map(float, losses))) == 3  # the weights do change
    return weights, losses


@EVERYWHERE
@EACH_METHOD
def test_no_copy_is_used_before_it_has_arrived(method, places):
    right, right_losses = on_the_host(method, places)
    with LateDevice() as late:
        parameter = lambda t, device: late.parameter(t) if device == DEVICE else nn.Parameter(t.clone())
        weights, losses = run(METHODS[method], places, DEVICE, parameter)
    assert losses == right_losses
    assert same_bits(weights, right)


@pytest.mark.gpu
@EVERYWHERE
@EACH_METHOD
def test_a_busy_gpu(method, places):
    """Each loss, and each copy after it, waits for some milliseconds of other work."""
    right, right_losses = on_the_host(method, places)
    device, work = torch.device("cuda", 0), torch.randn(8192, 8192, device="cuda")
    parameter = lambda t, device: nn.Parameter(t.to(device, copy=True))
    weights, losses = run(METHODS[method], places, device, parameter, lambda: work @ work)
    assert losses == right_losses
    assert same_bits(weights, right)


def test_the_stand_in_is_late():
    """The tests above rest on this: a copy that did not wait is wrong until something waits for the
    device.
    """
    x = torch.arange(5.0)
    with LateDevice() as late:
        there = x.to(DEVICE) * 2
        counts = there.long()
        early, right = there.to(CPU, non_blocking=True), there.to(CPU)
        assert torch.equal(right, 2 * x)
        assert torch.equal(early, right)  # the copy that waited came behind it
        early = there.to(CPU, non_blocking=True)
        assert early.isnan().all()
        host = torch.empty(5, dtype=torch.int64)
        host.copy_(counts, non_blocking=True)
        assert (host != right.long()).all()
        assert there.sum().item() == 20  # waits
        assert torch.equal(early, right)
        assert torch.equal(host, right.long())
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + x
        assert late.late == 3


def test_to_device():
    x = torch.tensor([1.5, 2.5])
    assert to_device(x, CPU) is x
    assert torch.equal(to_device(x, CPU, torch.float64), x.double())
    with LateDevice() as late:
        there = to_device(x, DEVICE, torch.float64)
        assert (there.device, there.dtype) == (DEVICE, torch.float64)
        back = to_device(there, CPU)
        assert torch.equal(back, x.double())
        assert late.late == 0


def test_who_copies_without_waiting():
    """All others ask ``to_device``: these record an event behind the copy, and wait for it."""
    package = pathlib.Path(zokernels.__file__).parent
    found = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if "non_blocking" in path.read_text()
    }
    events = {
        "offload/movers.py",
        "offload/gathered.py",
        "offload/encoder.py",
        "trajectory/recorder.py",
        "distributed/signs.py",
    }
    assert found == {"transfer.py", *events}
