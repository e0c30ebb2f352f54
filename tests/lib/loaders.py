"""What the tests of tests/loaders share: a model, its quantized copy, what was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from lib.checkpoints import quantized
from safetensors import safe_open
from safetensors.torch import load_file

import quantkit
from quantkit import checkpoint
from quantkit.checkpoint.cli import main
from quantkit.checkpoint.config_json import layer, weights_in


class Result(NamedTuple):
    consumer: str
    model: str
    scheme: str
    result: str


RESULTS: list[Result] = []


def llama(folder: Path, **changes) -> Path:
    """A small random Llama, bfloat16, in shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    return folder


def write(source: Path, folder: Path, scheme=None, **options) -> dict[str, torch.Tensor]:
    """A checkpoint quantized by the command: what each layer's weight should be after loading."""
    if checkpoint.SCHEMES.get(getattr(scheme, "name", None)) == scheme and not options:
        assert main(["quantize", str(source), str(folder), "--scheme", scheme.name]) == 0
    else:
        checkpoint.quantize(source, folder, scheme, **options)
    weights = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            weights |= weights_in(opened.metadata())
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    return {
        layer(name): quantkit.dequantize(*quantized(w.scheme, tensors[name])).to(w.dtype)
        for name, w in weights.items()
    }
