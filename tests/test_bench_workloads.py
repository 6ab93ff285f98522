"""The parameter lists are those of the published models, and every form of a step over them is the same
step.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from bench import step, workloads

#: Published totals, and the number of tensors.  A tied head is counted once.
TOTALS = {
    "opt-125m": (125_239_296, 196),
    "opt-1.3b": (1_315_758_080, 388),
    "opt-13b": (12_853_473_280, 644),
    "qwen3-1.7b": (1_720_574_976, 310),
}


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_totals_are_the_published_ones(name):
    shapes = workloads.shapes(name)
    assert (workloads.total(shapes), len(shapes)) == TOTALS[name]


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_lists_are_those_of_transformers(name):
    """Names, shapes and order of the model that transformers builds, without memory, from the same
    numbers.
    """
    transformers = pytest.importorskip("transformers")
    config = workloads.WORKLOADS[name]
    common = {"hidden_size": config.hidden, "num_hidden_layers": config.layers, "vocab_size": config.vocab}
    common |= {"num_attention_heads": config.heads, "tie_word_embeddings": True}
    with torch.device("meta"):
        if isinstance(config, workloads.Opt):
            widths = {"ffn_dim": config.ffn, "word_embed_proj_dim": config.hidden}
            model = transformers.OPTForCausalLM(
                transformers.OPTConfig(**common, **widths, max_position_embeddings=config.positions)
            )
        else:
            widths = {
                "intermediate_size": config.ffn,
                "num_key_value_heads": config.kv_heads,
                "head_dim": config.head,
            }
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, **widths))
        theirs = [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert list(workloads.shapes(name).items()) == theirs


def test_scale_shrinks_layers_and_widths():
    small, full = workloads.shapes("opt-1.3b", 0.25), workloads.shapes("opt-1.3b")
    assert list(small) == [n for n in full if workloads.layer_of(n) in {workloads.layer_of(m) for m in small}]
    assert len(small) == 4 + 6 * 16
    assert small["model.decoder.layers.5.fc1.weight"] == (2048, 512)
    for scale in (0, 1.5):
        with pytest.raises(ValueError, match="scale: expected"):
            workloads.shapes("opt-1.3b", scale)


def test_parts():
    assert workloads.module_of("a.layers.3.fc1.weight") == "a.layers.3.fc1"
    assert workloads.layer_of("a.layers.3.fc1.weight") == "a.layers.3"
    assert workloads.layer_of("a.embed.weight") == "a.embed"


def test_arena_holds_every_parameter_aligned():
    shapes = workloads.shapes("qwen3-1.7b", 0.02)
    flat, views = step.arena(shapes, torch.bfloat16, "cpu")
    assert {n: tuple(v.shape) for n, v in views.items()} == shapes
    assert all((v.data_ptr() - flat.data_ptr()) % 256 == 0 for v in views.values())
    spans = sorted((v.data_ptr(), v.data_ptr() + v.nbytes) for v in views.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_every_form_is_the_same_step():
    """From one theta, each form ends at theta - lr g z plus what it documents: two-pass ends one
    perturbation on.
    """
    shapes = workloads.shapes("qwen3-1.7b", 0.02)
    ends = {}
    for form in ("exact", "inplace", "two-pass", "fan-out"):
        torch.manual_seed(0)
        flat, views = step.arena(shapes, torch.float32, "cpu")
        flat.zero_()
        step.forms(views, "normal")[form][1]()
        ends[form] = torch.cat([v.flatten() for v in views.values()])
    torch.testing.assert_close(ends["exact"], ends["inplace"], rtol=0, atol=1e-8)
    assert torch.equal(ends["exact"], ends["fan-out"])
    assert 0 < ends["exact"].std() / (step.LR * step.GRADIENT) < 1.1
    # restore + update of one direction, then +eps - 2 eps of the next
    expected = (2 * step.EPS**2) ** 0.5
    assert 0.95 < ends["two-pass"].std() / expected < 1.05
