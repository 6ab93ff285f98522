"""Evolution strategies over engines: the log is the run, whatever engines there are and whichever die."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
import types

import pytest
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file

import zokernels
from zokernels.cli import main
from zokernels.es import Here, Run, Settings, rewards_of, train
from zokernels.examples import randopt
from zokernels.files.safetensors import Checkpoint
from zokernels.integrations.engine import Weights, create, whole, write_parts
from zokernels.step.estimators import Population

SETTINGS = Settings(Population(4, mirrored=True, maximize=True), sigma=0.05, lr=0.3, seed=7)
RANKS = Population(5, shaping="ranks", maximize=True)


class Dead(Exception):
    """What an engine raises that has died."""


class Memory:
    """An engine over tensors in memory, which says how near the first of them is to a prompt."""

    def __init__(self, path, dist="normal"):
        self.path = path
        self.tensors = load_file(path)
        self.weights = Weights(whole(self.tensors), self.tensors, dist=dist, base=Checkpoint(path))
        self.perturb, self.restore, self.calls = self.weights.perturb, self.weights.restore, 0

    def update(self, seeds, coeffs, decay, rounding, rounding_seed):
        self.weights.update(seeds, coeffs, decay=decay, rounding=rounding, rounding_seed=rounding_seed)

    def generate(self, prompts, **sampling):
        self.calls += 1
        near = [-(self.tensors["a.weight"].float() - p).square().mean() for p in prompts]
        return [f"{float(n):.6f}" for n in near]

    def names(self):
        return [p.name for p in self.weights.pieces]

    def save(self, path):
        create(path, self.weights.base)
        write_parts(path, self.weights.base, self.weights.parts())


class Mortal(Here):
    """Engines of which one dies at the calls whose numbers are in ``deaths``."""

    dead = (Dead,)

    def __init__(self, make, count, deaths):
        super().__init__(make, count)
        self.number, self.deaths, self.born = itertools.count(), deaths, count

    def submit(self, i, function, *args):
        if next(self.number) in self.deaths:
            self._engines[i] = None
            return (i, Dead())
        return (i, super().submit(i, function, *args))

    def result(self, handle):
        if isinstance(handle[1], Dead):
            raise handle[1]
        return handle[1]

    def restart(self, i):
        self.born += 1
        super().restart(i)


@pytest.fixture
def base(tmp_path, rng):
    torch.manual_seed(rng.getrandbits(63))
    tensors = {"a.weight": torch.randn(8, 16).bfloat16(), "b.weight": torch.randn(33), "ids": torch.arange(4)}
    save_file(tensors, path := tmp_path / "base.safetensors")
    return path


def run_all(base, log, engines=None, generations=3, settings=SETTINGS, **options):
    """The generations, the engines' weights, and the run."""
    run = Run(base, log, settings)
    engines = engines or Here(lambda i: Memory(base, settings.dist))
    reward = options.pop("reward", lambda prompt, text: float(text))
    found = list(train(engines, run, lambda step: [0.5, 0.25], reward, generations=generations, **options))
    run.close()
    for engine in engines._engines:
        engine.restore()
    return found, [engine.tensors for engine in engines._engines], run


def replayed(base, log, tmp_path):
    assert main(["replay", str(base), str(log), "-o", str(tmp_path / "replayed.safetensors")]) == 0
    return load_file(tmp_path / "replayed.safetensors")


def assert_same(*models):
    for model in models[1:]:
        assert model.keys() == models[0].keys()
        for name, t in models[0].items():
            assert_same_bits(model[name], t)


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        dataclasses.replace(SETTINGS, weight_decay=0.1, dist="rademacher"),
        dataclasses.replace(
            SETTINGS, estimator=Population(5, shaping="ranks", maximize=True), rounding="nearest"
        ),
    ],
    ids=["antithetic", "decay-rademacher", "ranks"],
)
def test_the_log_replays_to_the_bits_of_every_engine(settings, base, tmp_path):
    log, before = tmp_path / "run.zk", load_file(base)
    engines = Here(lambda i: Memory(base, settings.dist), 3)
    found, models, _ = run_all(base, log, engines, settings=settings)
    members = len(settings.estimator.points())
    assert [g.step for g in found] == [0, 1, 2]
    assert [len(g.rewards) for g in found] == [members] * 3
    assert not torch.equal(models[0]["a.weight"], before["a.weight"])
    assert_same_bits(models[0]["ids"], before["ids"])
    assert_same(replayed(base, log, tmp_path), *models)
    _, (alone,), _ = run_all(base, tmp_path / "alone.zk", settings=settings)
    assert_same(alone, *models)
    assert (tmp_path / "alone.zk").read_bytes() == log.read_bytes()


def test_the_reward_rises(base, tmp_path):
    found, _, _ = run_all(base, tmp_path / "run.zk", generations=40, held_out=[0.375], evaluate_every=5)
    evaluations = [g.evaluation for g in found if g.evaluation is not None]
    assert len(evaluations) == 9  # at the start, and every five
    assert evaluations[-1] > 0.75 * evaluations[0]  # of about -1.1, and towards 0


def test_a_killed_run_goes_on(base, tmp_path):
    whole_log = tmp_path / "whole.zk"
    _, (expected,), _ = run_all(base, whole_log, generations=4)
    data, log = whole_log.read_bytes(), tmp_path / "run.zk"
    run = Run(base, tmp_path / "new.zk", SETTINGS)
    size, begin = run.layout.size, run.file.end
    run.close()
    assert len(data) == begin + 4 * size
    for cut in (0, begin - 1, begin, begin + size - 1, begin + 2 * size, begin + 3 * size + 5, len(data)):
        log.write_bytes(data[:cut])
        engines = Here(lambda i: Memory(base), 1 + cut % 2)
        found, models, _ = run_all(base, log, engines, generations=4)
        assert len(found) == 4 - max(0, cut - begin) // size
        assert log.read_bytes() == data
        assert_same(expected, *models)


@pytest.mark.parametrize("deaths", [{0}, {3}, {9, 10}, {10, 19, 21}], ids=str)
def test_a_dead_engine_is_made_again(deaths, base, tmp_path):
    _, (expected,), _ = run_all(base, tmp_path / "whole.zk")
    engines = Mortal(lambda i: Memory(base), 2, deaths)
    _, models, _ = run_all(base, tmp_path / "run.zk", engines)
    assert engines.born == 2 + len(deaths)
    assert (tmp_path / "run.zk").read_bytes() == (tmp_path / "whole.zk").read_bytes()
    assert_same(expected, *models)


def test_engines_that_always_die_end_the_run(base, tmp_path):
    engines = Mortal(lambda i: Memory(base), 1, range(1, 10**6))
    with pytest.raises(RuntimeError, match="engine 0: expected an engine that lives"):
        run_all(base, tmp_path / "run.zk", engines)


@pytest.mark.parametrize("moment", ["a member", "the record", "an update"])
def test_training_goes_on_after_an_exception(moment, base, tmp_path, monkeypatch):
    """With the same engines: each generation is in the log once, and each engine takes each update once."""
    _, (expected,), _ = run_all(base, tmp_path / "whole.zk", generations=4)
    run, engines, calls = Run(base, tmp_path / "run.zk", SETTINGS), Here(lambda i: Memory(base), 2), []
    moments = {
        "a member": (Memory, "generate"),
        "the record": (Run, "append"),
        "an update": (Memory, "update"),
    }
    kind, name = moments[moment]
    function = getattr(kind, name)

    def interrupted(*args, **options):
        calls.append(1)
        found = function(*args, **options)
        if len(calls) == 3:
            raise Dead
        return found

    go_on = lambda upto: list(
        train(engines, run, lambda step: [0.5, 0.25], lambda p, t: float(t), generations=upto)
    )
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, interrupted)
        with pytest.raises(Dead):
            go_on(4)
    go_on(3)
    go_on(4)
    run.close()
    for engine in engines._engines:
        engine.restore()
    assert_same(expected, *(engine.tensors for engine in engines._engines))
    assert (tmp_path / "run.zk").read_bytes() == (tmp_path / "whole.zk").read_bytes()


def test_engines_of_another_run_are_refused(base, tmp_path):
    engines = Here(lambda i: Memory(base))
    run_all(base, tmp_path / "run.zk", engines, generations=1)
    with pytest.raises(ValueError, match="engines of this run"):
        run_all(base, tmp_path / "other.zk", engines, generations=1)


def test_a_reward_that_is_not_finite_skips_the_generation(base, tmp_path):
    seen = itertools.count()
    reward = lambda prompt, text: math.nan if next(seen) == 3 else float(text)
    _, models, run = run_all(base, tmp_path / "run.zk", generations=2, reward=reward)
    assert [r.finite for r in run.past] == [False, True]
    assert_same(replayed(base, tmp_path / "run.zk", tmp_path), *models)


@pytest.mark.parametrize(
    "bad", [None, "0.5", [1.0], 1j, torch.ones(2), object()], ids=lambda b: type(b).__name__
)
def test_a_reward_that_is_no_number_is_refused(bad, base, tmp_path):
    """Before a record or an update of that generation; a number beyond floats is infinite."""
    engines = Here(lambda i: Memory(base))
    with pytest.raises(TypeError, match="es: reward: expected a function that returns a number, got "):
        run_all(base, tmp_path / "run.zk", engines, reward=lambda prompt, text: bad)
    run = Run(base, tmp_path / "run2.zk", SETTINGS)
    assert rewards_of(lambda prompt, text: -(10**400), [0], [""], None, 0.0) == [-math.inf]
    assert (run.past, engines.taken) == ([], [0])


def test_engines_and_prompts_that_do_not_fit(base, tmp_path):
    class Silent(Memory):
        def generate(self, prompts, **sampling):
            return super().generate(prompts)[1:]

    with pytest.raises(ValueError, match="engine: expected 2 texts, one for each prompt, got 1"):
        run_all(base, tmp_path / "a.zk", Here(lambda i: Silent(base)))
    run = Run(base, tmp_path / "b.zk", SETTINGS)
    with pytest.raises(ValueError, match="prompts: expected at least one prompt, got none for generation 0"):
        next(train(Here(lambda i: Memory(base)), run, lambda step: [], float, generations=1))
    for timeout in (0, -1.0, math.nan, "1"):
        engines = Here(lambda i: Memory(base))
        with pytest.raises((TypeError, ValueError), match="es: timeout"):
            next(train(engines, run, lambda step: [0.5], float, generations=1, timeout=timeout))
    assert run.past == []


def test_two_loops_over_one_run(base, tmp_path):
    """A second loop takes a generation between two of the first one's, which then says so."""
    run, engines = Run(base, tmp_path / "run.zk", SETTINGS), Here(lambda i: Memory(base))
    begin = lambda: train(engines, run, lambda step: [0.5], lambda prompt, text: float(text), generations=3)
    first, second = begin(), begin()
    assert [next(first).step, next(second).step] == [0, 1]
    with pytest.raises(RuntimeError, match=r"one train\(\) at a time"):
        next(first)
    assert next(second).step == 2
    run.close()
    engines._engines[0].restore()
    assert_same(replayed(base, tmp_path / "run.zk", tmp_path), engines._engines[0].tensors)


@pytest.mark.parametrize(
    "change", [{"rates": (-1.0,)}, {"gradients": ((math.nan,) * 4,)}, {"two_pass": True}]
)
def test_crafted_records_are_refused(change, base, tmp_path):
    """Records with right checksums that no generation could have written: nothing is touched."""
    log = tmp_path / "run.zk"
    _, _, run = run_all(base, log, generations=2)
    crafted = run.past[1]._replace(**change)
    data = log.read_bytes()
    log.write_bytes(data[: run._records + run.layout.size] + run.layout.pack(crafted))
    before = log.read_bytes()
    with pytest.raises(ValueError, match="step 1: "):
        Run(base, log, SETTINGS)
    assert log.read_bytes() == before


def test_a_reward_has_its_time():
    def reward(prompt, text):
        try:
            while text == "slow":
                pass
        except Exception:  # a careless function cannot swallow its limit
            return 2.0
        return 1.0

    began = time.monotonic()
    assert rewards_of(reward, [0, 0], ["slow", "fast"], 0.05, -1.0) == [-1.0, 1.0]
    assert time.monotonic() - began < 60  # seconds; without a limit it would never end
    assert rewards_of(reward, [0], ["fast"], None, -1.0) == [1.0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_python_drops_comes_again():
    """An exception that is raised in a destructor is printed and forgotten."""

    class Slow:
        waited = False

        def __del__(self):
            Slow.waited = True
            time.sleep(30)  # the signal ends it

    def reward(prompt, text):
        slow = Slow()
        del slow
        while Slow.waited:
            pass

    assert rewards_of(reward, [0], [""], 0.05, -1.0) == [-1.0]


def test_another_run_is_refused(base, tmp_path):
    log = tmp_path / "run.zk"
    run_all(base, log)
    data = log.read_bytes()
    for other in ({"sigma": 0.1}, {"seed": 8}, {"dist": "rademacher"}, {"estimator": Population(4)}):
        with pytest.raises(ValueError, match="trajectory: resume"):
            Run(base, log, dataclasses.replace(SETTINGS, **other))
    tensors = load_file(base)
    tensors["b.weight"] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"b\.weight: expected the base weights of the run"):
        Run(tmp_path / "other.safetensors", log, SETTINGS)
    assert log.read_bytes() == data
    broken = bytearray(data)
    broken[-40] ^= 1
    log.write_bytes(broken[:-1] + b"xx" * 100)
    with pytest.raises(ValueError, match="expected whole records"):
        Run(base, log, SETTINGS)
    with pytest.raises(ValueError, match="sigma: expected a finite number > 0"):
        Run(base, tmp_path / "new.zk", dataclasses.replace(SETTINGS, sigma=0.0))


def test_what_engines_do_not_have_stays(base, tmp_path):
    class Fewer(Memory):
        def __init__(self, path):
            super().__init__(path)
            self.weights = Weights([p for p in self.weights.pieces if p.name != "b.weight"], self.tensors)
            self.perturb, self.restore = self.weights.perturb, self.weights.restore

    log, engines = tmp_path / "run.zk", Here(lambda i: Fewer(base))
    with pytest.raises(ValueError, match=r"engines: expected the parameters of the run.*'b\.weight'"):
        run_all(base, log, engines)
    with pytest.raises(ValueError, match=r"names: expected parameters of .*'c'"):
        Run(base, tmp_path / "new.zk", SETTINGS, ["c"])
    log.unlink()
    run = Run(base, log, SETTINGS, ["a.weight"])
    list(train(engines, run, lambda step: [0.5], lambda prompt, text: float(text), generations=2))
    run.close()
    final = replayed(base, log, tmp_path)
    assert_same_bits(final["b.weight"], load_file(base)["b.weight"])
    assert_same_bits(final["a.weight"], engines._engines[0].tensors["a.weight"])


def test_two_runs_cannot_have_one_log(base, tmp_path):
    run = Run(base, tmp_path / "run.zk", SETTINGS)
    with pytest.raises(RuntimeError, match="expected a file that no one else writes"):
        Run(base, tmp_path / "run.zk", SETTINGS)
    run.close()


def test_checkpoints_are_whole_models(base, tmp_path):
    _, (model,), _ = run_all(base, tmp_path / "run.zk", generations=2, save_every=2, save_to=tmp_path)
    assert_same(load_file(tmp_path / "generation-2.safetensors"), load_file(base) | model)


# RandOpt ----------------------------------------------------------------------------------------------------


STREAM = zokernels.stream_of("a.weight")


def nearest(base, seeds, sigma, prompts):
    """What :class:`Memory` writes at theta + sigma z of each seed, by one ``combine`` of its own."""
    theta = load_file(base)["a.weight"]
    for seed in seeds:
        zokernels.combine(moved := torch.empty_like(theta), theta, [seed], [sigma], streams=STREAM)
        yield [f"{float(-(moved.float() - p).square().mean()):.6f}" for p in prompts]


@pytest.mark.parametrize("deaths", [None, {2, 9}], ids=["alive", "deaths"])
def test_randopt_keeps_the_best_members(deaths, base):
    make, prompts, sigma = (lambda i: Memory(base)), [0.5, 0.25], 0.5
    engines = Here(make, 2) if deaths is None else Mortal(make, 2, deaths)
    reward = lambda prompt, text: float(text)
    found = randopt.search(engines, prompts, reward, members=9, best=4, sigma=sigma, seed=3)
    seeds = [zokernels.derive_seed(3, 0, k) for k in range(9)]
    texts = list(nearest(base, seeds, sigma, prompts))
    scores = [sum(map(float, own)) / 2 for own in texts]
    assert found.scores == pytest.approx(scores, abs=1e-9)
    assert found.seeds == [seeds[k] for k in sorted(range(9), key=lambda k: -scores[k])[:4]]
    theta = float(-(load_file(base)["a.weight"].float() - 0.5).square().mean())
    assert found.theta == pytest.approx(
        (theta + float(-(load_file(base)["a.weight"].float() - 0.25).square().mean())) / 2, abs=1e-5
    )
    second = sorted(float(own[0]) for own in nearest(base, found.seeds, sigma, prompts))[1]
    answer = lambda prompt, text: "far" if float(text) < second else "near"
    together, each = randopt.ensemble(engines, found, prompts[:1], answer, sigma=sigma)
    own = [answer(0.5, text) for (text, _) in nearest(base, found.seeds, sigma, prompts)]
    assert [answers for (answers,) in each] == own
    assert together == ["near"]  # three of four
    for engine in engines._engines:  # theta again, to the bit
        assert_same_bits(engine.tensors["a.weight"], load_file(base)["a.weight"])


def test_randopt_votes():
    class Says:
        """An engine that says what is written for its member."""

        def perturb(self, seeds, coeffs):
            self.seed = seeds[0] if seeds else 0

        def restore(self):
            self.seed = 0

        def generate(self, prompts, **sampling):
            return {1: ["Rome", ""], 2: ["Bern", ""], 3: ["Bern", "Oslo"], 4: ["", ""]}[self.seed]

    found = randopt.Found([1, 2, 3, 4], [], 0.0)
    vote = lambda found: randopt.ensemble(Here(lambda i: Says()), found, [0, 0], lambda p, t: t, sigma=1.0)[0]
    assert vote(found) == ["Bern", "Oslo"]
    assert vote(found._replace(seeds=[1, 2])) == ["Rome", ""]  # a tie: the better member's
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert randopt.capital(question, "The capital of France is Paris. Not Rome.") == "Paris"
    assert randopt.capital(question, "the capital is unknown") == ""
    with pytest.raises(SystemExit, match="best: expected a number from 1 to 2 members, got 3"):
        randopt.search(None, [], None, members=2, best=3, sigma=1.0)


# TensorBoard ------------------------------------------------------------------------------------------------


def test_tensorboard_has_what_a_generation_has(base, tmp_path, monkeypatch):
    written, closed = [], []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, value, step))

        def flush(self):
            written.append("flush")

        def close(self):
            closed.append(self.folder)

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    options = {"held_out": [0.375], "evaluate_every": 2, "tensorboard": tmp_path / "board"}
    found, _, _ = run_all(base, tmp_path / "run.zk", generations=3, **options)
    expected = []
    for g in found:
        expected += [("reward/mean", sum(g.rewards) / len(g.rewards), g.step)]
        expected += [("reward/best", max(g.rewards), g.step), ("seconds", g.seconds, g.step)]
        if g.step in (0, 1, 2):  # before the first update, after the second and after the last
            expected += [("reward/held out", g.evaluation, g.step)]
        expected += ["flush"]
    assert [w if w == "flush" else w[1:] for w in written] == [
        e if e == "flush" else (e[0], pytest.approx(e[1]), e[2]) for e in expected
    ]
    assert closed == [str(tmp_path / "board")]


def test_without_tensorboard_a_run_that_wants_it_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    engines = Here(lambda i: Memory(base))
    text = r"es: tensorboard: expected the package tensorboard \(pip install tensorboard\), got none"
    with pytest.raises(RuntimeError, match=text):
        run_all(base, tmp_path / "run.zk", engines, tensorboard=tmp_path)
    assert engines._engines[0].calls == 0


def test_tensorboards_own_files(base, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, _, _ = run_all(base, tmp_path / "run.zk", generations=2, tensorboard=tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [
        (g.step, pytest.approx(g.mean, rel=1e-6)) for g in found
    ]
