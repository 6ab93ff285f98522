"""``make ship-described``: the files that describe the package to others, read by the tools of these.

The recipe for conda is rendered by rattler-build (``py-rattler-build``), without and with CUDA: templates,
conditions and requirements, but no build, which needs conda's channels.  ``CITATION.cff`` is validated by
``cffconvert``.
"""

from __future__ import annotations

import os
import pathlib

from cffconvert.citation import Citation
from rattler_build import Stage0Recipe, VariantConfig

from zokernels.version import __version__

ROOT = pathlib.Path(__file__).resolve().parent.parent


def recipe(more: dict[str, list[str]]) -> dict:
    """The recipe as it would be built, with what ``variants.yaml`` says and these variants instead."""
    os.environ["ZOKERNELS_VERSION"] = __version__
    folder = ROOT / "packaging" / "conda"
    variants = VariantConfig.from_file(folder / "variants.yaml").to_dict() | more
    rendered = Stage0Recipe.from_file(folder / "recipe.yaml").render(VariantConfig(variants))
    (one,) = rendered
    return one.recipe.to_dict()


def main() -> None:
    cuda = {"cuda_compiler_version": ["13.0"], "cuda_compiler": ["cuda-nvcc"]}
    for expected, more in (("0", {}), ("1", cuda)):
        got = recipe(more)
        assert got["package"] == {"name": "zokernels", "version": __version__}, got["package"]
        assert got["build"]["script"]["env"]["ZOKERNELS_CUDA"] == expected, got["build"]
        tools = got["requirements"]["build"]
        assert any(tool.startswith("cuda-nvcc") for tool in tools) == (expected == "1"), tools
        assert "pytorch >=2.10" in got["requirements"]["run"], got["requirements"]
        print(f"recipe for conda, ZOKERNELS_CUDA={expected}: {', '.join(tools)}")
    Citation((ROOT / "CITATION.cff").read_text()).validate()
    print("CITATION.cff: valid")
    print("3 passed, 0 failed")


if __name__ == "__main__":
    main()
