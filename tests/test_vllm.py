"""A real vLLM: run by ``make vllm-test``, in an environment of its own (.venv-vllm).

Each case starts its engines in a process of its own, because vLLM leaves a process only with it.  A case
writes what it found as JSON, and the test looks at that.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

if __name__ != "__main__":
    pytest.importorskip("vllm", reason="vLLM has an environment of its own: make vllm-test")

import torch
from engine_layers import Model, Sizes, checkpoint
from safetensors.torch import load_file

import zokernels
from zokernels.integrations.engine import Shape, Weights, trace, whole

ROOT = pathlib.Path(__file__).parent.parent
#: SmolLM2-135M-Instruct as a folder; ``make vllm-test`` makes it.
SMOLLM2 = pathlib.Path(os.environ.get("ZOKERNELS_SMOLLM2", ROOT / ".venv-vllm" / "smollm2"))
WORKER = "zokernels.integrations.vllm.WorkerExtension"
PROMPTS = ["The capital of France is", "Two and two are"]
SAMPLING = {"temperature": 0.0, "max_tokens": 8}
#: A generation's update.
SEEDS, COEFFS = [11, 12, 2**63 + 5], [1e-3, -2e-3, 5e-4]


def llm(folder, ranks=1, **options):
    from vllm import LLM

    settings = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8, "dtype": "bfloat16"}
    return LLM(
        str(folder), worker_extension_cls=WORKER, tensor_parallel_size=ranks, **{**settings, **options}
    )


def random_model(folder, kind="llama"):
    """A decoder of 8 heads with random weights and SmolLM2's tokenizer, as a Hugging Face folder."""
    import transformers

    sizes = dict(
        hidden_size=256, intermediate_size=320, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=49152, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes)
    else:
        config = transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SMOLLM2 / name).read_bytes())
    config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    return folder


def in_memory(folder, seeds, coeffs, **options):
    """The checkpoint's weights after one combine_ of each by its name."""
    tensors = load_file(folder / "model.safetensors")
    for name, t in tensors.items():
        zokernels.combine_(t, seeds, coeffs, streams=zokernels.stream_of(name), **options)
    return tensors


UPDATE = {"rounding": "stochastic", "rounding_seed": SEEDS[0]}


def differing(path, expected):
    """The names of tensors in a file that are not to the bit those expected."""
    found = load_file(path)
    assert found.keys() == expected.keys()
    bits = lambda t: t.view(torch.int16)
    return [name for name, t in expected.items() if not torch.equal(bits(found[name]), bits(t))]


# Cases, each in a process of its own: ``python tests/test_vllm.py CASE FOLDER`` -----------------------------


def case_smollm2(folder):
    """SmolLM2: both memories, the prefix cache, es-at-scale's names, and a file of the trained weights."""
    from zokernels.integrations.vllm import Engine

    model = llm(SMOLLM2, enable_prefix_caching=True)
    engine = Engine(model)
    generate = lambda: engine.generate(PROMPTS, **SAMPLING)
    found = {"names": len(engine.names()), "before": generate()}
    engine.perturb([3], [1e-2])
    found["perturbed"] = generate()
    engine.perturb([4], [1e-2])
    found["other"] = generate()
    engine.restore()
    found["restored"] = generate()
    engine.update(SEEDS, COEFFS)
    engine.save(folder / "trained.safetensors")
    found["trained_differs"] = differing(
        folder / "trained.safetensors", in_memory(SMOLLM2, SEEDS, COEFFS, **UPDATE)
    )
    engine.load(SMOLLM2)
    found["loaded"] = generate()
    with pytest.raises(Exception, match="enable_prefix_caching"):
        model.collective_rpc("zk_setup")
    return found


def case_es_at_scale(folder):
    """The calls that es-at-scale's trainer makes, on an engine made as it makes them."""
    model = llm(random_model(folder / "llama"), enable_prefix_caching=False)
    call = lambda name, *args: model.collective_rpc(name, args=args)
    text = lambda: [r.outputs[0].text for r in model.generate(PROMPTS, _params(), use_tqdm=False)]
    found = {"before": text()}
    call("save_self_initial_weights")
    call("init_inter_engine_group", "127.0.0.1", _free_port(), 0, 1)
    call("perturb_self_weights", 5, 0.05, False)
    found["perturbed"] = text()
    call("restore_self_weights", 5, 0.05)
    found["restored"] = text()
    call("update_weights_from_seeds", SEEDS, COEFFS, 2.0, 2)
    call("broadcast_all_weights", 0)
    call("save_self_weights_to_disk", str(folder / "out.safetensors"))
    expected = in_memory(folder / "llama", SEEDS, COEFFS, **UPDATE)
    found["differs"] = differing(folder / "out.safetensors", expected)
    call("load_weights_from_disk", str(folder / "llama"))
    found["loaded"] = text()
    return found


def case_in_place(folder):
    """memory="inplace": the drift of members, and an exact update all the same."""
    from zokernels.integrations.vllm import Engine

    engine = Engine(llm(random_model(folder / "llama")), memory="inplace", dist="rademacher")
    for seed in range(4):
        engine.perturb([seed], [1e-2])
    drift = engine.drift()
    engine.update(SEEDS, COEFFS)
    engine.save(folder / "out.safetensors")
    expected = in_memory(folder / "llama", SEEDS, COEFFS, dist="rademacher", **UPDATE)
    return {"drift": drift, "differs": differing(folder / "out.safetensors", expected)}


def case_two_ranks(folder):
    """Two tensor-parallel ranks write the file that one would."""
    from zokernels.integrations.vllm import Engine

    model = llm(random_model(folder / "llama"), 2)
    engine = Engine(model)
    pieces = model.collective_rpc("zk_pieces")
    engine.perturb([3], [1e-2])
    texts = engine.generate(PROMPTS, **SAMPLING)
    engine.update(SEEDS, COEFFS)
    engine.save(folder / "out.safetensors")
    expected = in_memory(folder / "llama", SEEDS, COEFFS, **UPDATE)
    found = differing(folder / "out.safetensors", expected)
    return {"texts": texts, "differs": found, "pieces": pieces}


def case_experts(folder):
    """Experts, which vLLM's CPU backend packs: refused by name, or trained where it does not."""
    from zokernels.integrations.vllm import Engine

    model = llm(random_model(folder / "mixtral", "mixtral"))
    try:
        engine = Engine(model)
    except Exception as error:
        return {"refused": str(error)}
    engine.update(SEEDS, COEFFS)
    engine.save(folder / "out.safetensors")
    expected = in_memory(folder / "mixtral", SEEDS, COEFFS, **UPDATE)
    return {"refused": None, "differs": differing(folder / "out.safetensors", expected)}


def make_engine(folder):
    """An engine in a Ray actor."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from zokernels.integrations.vllm import Engine

    return Engine(llm(folder))


def case_actors(folder):
    """Two Ray actors, of which one is killed; the log replays to the bits that they hold."""
    import ray

    from zokernels.cli import main
    from zokernels.es import Actors, Run, Settings, train
    from zokernels.step.estimators import Population

    base = random_model(folder / "llama")
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2)
    actors = Actors(lambda i: make_engine(base), 2)
    settings = Settings(Population(2, mirrored=True, maximize=True), sigma=1e-2, lr=1e-2)
    reward = lambda prompt, text: float(len(text))
    run = Run(base, folder / "run.zk", settings)
    generations = train(
        actors, run, lambda step: PROMPTS, reward, generations=2, sampling=SAMPLING, save_every=2,
        save_to=folder,
    )  # fmt: skip
    first = next(generations)
    ray.kill(actors.actors[0])
    second = next(generations)
    generations.close()
    run.close()
    ray.shutdown()
    assert (
        main(["replay", str(base), str(folder / "run.zk"), "-o", str(folder / "replayed.safetensors")]) == 0
    )
    differs = differing(folder / "generation-2.safetensors", load_file(folder / "replayed.safetensors"))
    return {"rewards": [first.rewards, second.rewards], "differs": differs}


def case_trainer(folder):
    """A trainer that is killed in its second generation, and the same command again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from zokernels.cli import main
    from zokernels.es import Here, Run, Settings, train
    from zokernels.step.estimators import Population

    base, killed = folder / "llama", folder / "killed"
    if not base.exists():
        random_model(base)
    settings = Settings(Population(2, mirrored=True, maximize=True), sigma=1e-2, lr=1e-2)
    run = Run(base, folder / "run.zk", settings)
    begin, seen = len(run.past), []

    def reward(prompt, text):
        seen.append(text)
        if len(seen) > 5 * len(PROMPTS) and not killed.exists():  # four members, and one of the second
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return float(len(text))

    generations = train(
        Here(lambda i: make_engine(base)), run, lambda step: PROMPTS, reward, generations=3,
        sampling=SAMPLING, save_every=3, save_to=folder, tensorboard=folder / "board",
    )  # fmt: skip
    steps = [generation.step for generation in generations]
    run.close()
    replayed = folder / "replayed.safetensors"
    assert main(["replay", str(base), str(folder / "run.zk"), "-o", str(replayed)]) == 0
    board = EventAccumulator(str(folder / "board"))
    board.Reload()
    return {
        "begin": begin, "steps": steps,
        "differs": differing(folder / "generation-3.safetensors", load_file(replayed)),
        "board": [event.step for event in board.Scalars("reward/mean")],
    }  # fmt: skip


def _params():
    from vllm import SamplingParams

    return SamplingParams(**SAMPLING)


def _free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_case(name, folder, status=0):
    """What ``case_<name>`` returned, in a process of its own; None where it is to end with another status."""
    # A thread that shares its core with other programs keeps all others of its process waiting, hundreds of
    # times a token; the models are small, so each rank has one, and it is bound to no core.
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }  # fmt: skip
    command = [sys.executable, __file__, name, str(folder)]
    environment = {**os.environ, **settings}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert process.returncode == status, process.stdout[-4000:] + process.stderr[-8000:]
    return json.loads((folder / "found.json").read_text()) if status == 0 else None


def test_smollm2(tmp_path):
    found = run_case("smollm2", tmp_path)
    assert found["names"] == 272
    assert "Paris" in found["before"][0]
    assert found["perturbed"] != found["before"] != found["other"] != found["perturbed"]
    assert found["restored"] == found["before"] == found["loaded"]
    assert found["trained_differs"] == []


def test_the_methods_of_es_at_scale(tmp_path):
    found = run_case("es_at_scale", tmp_path)
    assert found["perturbed"] != found["before"]
    assert found["restored"] == found["before"] == found["loaded"]
    assert found["differs"] == []


def test_in_place(tmp_path):
    found = run_case("in_place", tmp_path)
    assert all(0 < d["changed"] < 1 and 0 < d["rms"] < 1e-3 for d in found["drift"])
    assert found["differs"] == []


def test_engines_exchange_updates_and_no_weights():
    """es-at-scale's trainer updates engine 0 alone, and then calls all engines to broadcast."""
    from zokernels.integrations.vllm import WorkerExtension

    base = {"a": torch.randn(40).bfloat16(), "b": torch.randn(3, 5)}
    port, engines = _free_port(), []
    for i in range(2):
        engine = WorkerExtension()
        engine.rank = 0
        tensors = {name: t.clone() for name, t in base.items()}
        engine._zk_weights, engine._zk_updates, engine._zk_broadcasts = (
            Weights(whole(tensors), tensors),
            [],
            0,
        )
        engine.init_inter_engine_group("127.0.0.1", port, i, 2)
        engines.append(engine)
    first, second = engines
    same = lambda: all(torch.equal(t, second._zk.tensors[n]) for n, t in first._zk.tensors.items())
    for _ in range(2):
        first.perturb_self_weights(9, 0.1)
        first.restore_self_weights(9, 0.1)
        first.update_weights_from_seeds(SEEDS, COEFFS, 1.0, 3)
        assert not same()
        assert first.broadcast_all_weights(0)
        assert second.broadcast_all_weights(0)
        assert same()
    for engine in engines:  # a trainer that tells all of them; nothing is updated twice
        engine.update_weights_from_seeds(SEEDS[:1], COEFFS[:1], 1.0, 1)
        engine.broadcast_all_weights(0)
    assert same()
    assert len(second._zk_updates) == 3
    second.update_weights_from_seeds(SEEDS[1:], COEFFS[1:], 1.0, 2)
    first.update_weights_from_seeds(SEEDS[:2], COEFFS[:2], 1.0, 2)
    first.broadcast_all_weights(0)
    with pytest.raises(ValueError, match="updates: expected the first 4 of engine 0, got others"):
        second.broadcast_all_weights(0)


def test_two_ranks_have_the_bits_of_one(tmp_path):
    found = run_case("two_ranks", tmp_path)
    assert len(found["texts"]) == 2
    assert found["differs"] == []
    sizes = Sizes(
        hidden=256, heads=8, kv_heads=4, head=32, inner=320, vocabulary=49152, layers=2, ranks=2
    )  # fmt: skip
    for rank, pieces in enumerate(found["pieces"]):
        with torch.device("meta"):
            model = Model(dataclasses.replace(sizes, rank=rank))
        shapes = {name: Shape(shape, torch.bfloat16) for name, shape in checkpoint(sizes).items()}
        ours = trace(model, shapes, model.load_weights)
        plain = json.loads(json.dumps(ours))
        assert {p.name for p in ours} == {p[0] for p in pieces} - {
            f"model.layers.{i}.post_attention_layernorm.weight" for i in range(2)
        }
        assert [piece for piece in plain if piece not in pieces] == []  # the stand-in is as the real one


def test_experts_are_refused_by_name_or_right(tmp_path):
    found = run_case("experts", tmp_path)
    if found["refused"] is not None:
        assert "experts" in found["refused"]
        assert "in the checkpoint" in found["refused"]
    else:
        assert found["differs"] == []


def test_actors_and_the_log(tmp_path):
    found = run_case("actors", tmp_path)
    assert [len(rewards) for rewards in found["rewards"]] == [4, 4]
    assert found["differs"] == []


def test_a_killed_trainer_goes_on(tmp_path):
    run_case("trainer", tmp_path, -signal.SIGKILL)
    found = run_case("trainer", tmp_path)
    assert (found["begin"], found["steps"]) == (1, [1, 2])
    assert found["differs"] == []
    assert found["board"] == [0, 1, 2]  # the folder has both processes' files


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[2])
    result = globals()[f"case_{sys.argv[1]}"](target)
    (target / "found.json").write_text(json.dumps(result))
    os._exit(0)  # vLLM and Ray leave threads behind
