"""The plan of gpu-check: what runs in which order, what it is expected to take, and what its end decides.

Seven minutes decide: whether the kernels are right, whether a pass costs what a copy costs, and if not, which
pipe is the reason.  What comes after them is in the order of what it decides, and runs where minutes are
left.  The seconds of a GPU are estimates until one has been measured.
"""

from __future__ import annotations

from . import ncu, stages
from .measures import bench, offload, population
from .stage import Stage

MINUTES = 7.0

#: How many seconds are kept back for the report.
REPORT = 8

_COMBINE = f"--op combine --numel {1 << 28} --seconds 1.2".split()

#: The memory of slots and scratch for large models, as tests/test_offload_families.py adds it up.
_SMALL = ("--storage", "host", "--halves", "--slots", "2", "--scratch", "1")
_STEPS = ("--length", "2048", "--steps", "3")
_FITS = ("--shape", "opt-1.3b", "--storage", "memory", "host", "--batch", "8", "--length", "2048")

STAGES = (
    Stage("libraries", "required", 10, 240, stages.libraries, "whether the compiled libraries load here"),
    Stage("report", "required", 10, 40, stages.report, "which backends are ready, and what the machine has"),
    Stage("agreement-cuda", "required", 40, 75, stages.agreement_cuda, "CUDA's bits against the reference"),
    Stage("math", "required", 20, 75, stages.math, "the square root of every radius, Philox, normals", True),
    Stage(
        "agreement-triton", "required", 40, 75, stages.agreement_triton,
        "Triton's bits against the reference", beside=True,
    ),
    Stage("gpu-tests", "required", 60, 110, stages.gpu_tests, "every operation, CUDA graphs, nothing waits"),
    Stage(
        "bench-combine", "measure", 85, 110, bench("bench-combine", *_COMBINE, "--dtype", "bf16", "fp32"),
        "whether a pass costs what a copy costs: bf16, fp32, both roundings, K = 1 and 2",
    ),
    Stage(
        "bench-published", "measure", 15, 30, bench("bench-published", "--op", "published", "--seconds", "1"),
        "our share of the bandwidth beside FlashOpt's",
    ),
    Stage("ncu", "measure", 50, 70, ncu.stage, "which pipe limits four kernels, and bytes moved"),
    Stage(
        "bench-step", "measure", 60, 75, bench("bench-step", "--op", "step", "--workload", "opt-1.3b"),
        "the hot path of a step against MeZO's loop, and captured in a CUDA graph",
    ),
    Stage("sanitizer", "optional", 40, 60, stages.sanitizer, "accesses past the end of a tensor"),
    Stage(
        "offload-fits", "measure", 42, 75, offload("offload-fits", *_FITS),
        "tokens a second streamed against in memory; copies against plain ones",
    ),
    # --- after the seven minutes ---
    Stage(
        "bench-step-13b", "measure", 45, 90,
        bench("bench-step-13b", "--op", "step", "--workload", "qwen3-1.7b", "opt-13b"),
        "the hot path of a step for another parameter list, and for 26 GB of weights",
    ),
    Stage(
        "bench-many", "measure", 25, 60, bench("bench-many", "--op", "many", "--seconds", "1"),
        "noise elements a second, K = 64 directions in one pass",
    ),
    Stage(
        "bench-fan-out", "measure", 25, 60, bench("bench-fan-out", "--op", "fan_out", "--seconds", "1"),
        "one read and three writes against three passes",
    ),
    Stage(
        "offload-13b", "measure", 60, 120, offload("offload-13b", "--shape", "opt-13b", *_SMALL, *_STEPS),
        "GPU memory of a streamed 13B model, and its step against its transfers",
    ),
    Stage(
        "offload-30b", "measure", 90, 150, offload("offload-30b", "--shape", "opt-30b", *_SMALL, *_STEPS),
        "the same for 30B, as many layers as the host's memory takes",
    ),
    Stage(
        "bench-combine-fp16", "measure", 25, 60,
        bench("bench-combine-fp16", *_COMBINE, "--seconds", "0.5", "--dtype", "fp16"),
        "whether a pass costs what a copy costs in fp16",
    ),
    Stage("population", "measure", 40, 90, population, "members of one forward against plain inference"),
    Stage("two-gpus", "optional", 20, 60, stages.two_gpus, "launches for a GPU that is not the current one"),
    Stage("distributed", "optional", 60, 180, stages.distributed, "shards' bits over NCCL, two GPUs or four"),
    Stage("cpu-tests", "optional", 30, 120, stages.cpu_tests, "contract and operations under this Python"),
)  # fmt: skip
