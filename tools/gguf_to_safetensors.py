"""Turns a GGUF file of a Llama-like model into a folder of safetensors, for engines that want one.

    python tools/gguf_to_safetensors.py model.gguf folder

Run it with a Python that has torch, transformers, accelerate and gguf, such as that of vLLM.
"""

import argparse
from pathlib import Path
from typing import Any


def convert(file: Path, folder: Path) -> None:
    """Quantised weights come out as bfloat16. The tokenizer and its chat template come along."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    # What was loaded is dequantised, but still says that it is not; a fresh model of the same form does not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config).to(torch.float32)
    weights = {
        name: value.dequantize() if hasattr(value, "dequantize") else value
        for name, value in loaded.state_dict().items()
    }
    plain.load_state_dict(weights, strict=False)
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    convert(given.file, given.folder)


if __name__ == "__main__":
    main()
