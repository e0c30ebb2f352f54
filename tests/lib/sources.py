"""Checkpoints to quantize: folders of shards, and files whose headers say what a test likes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit import checkpoint
from quantkit.checkpoint.files import CheckpointError

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}


def tensors(layers: int = 3, rows: int = 96, columns: int = 256, dtype=torch.bfloat16):
    """The tensors of a small model, by file."""
    made = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made).to(dtype)

    shards = []
    for i in range(layers):
        shard = {
            f"model.layers.{i}.mlp.up_proj.weight": random(rows, columns),
            f"model.layers.{i}.mlp.up_proj.bias": random(rows),
            f"model.layers.{i}.input_layernorm.weight": random(columns),
            f"model.layers.{i}.mlp.gate.weight": random(8, columns),
        }
        if i == 0:
            shard["model.embed_tokens.weight"] = random(128, columns)
        if i == layers - 1:
            shard["lm_head.weight"] = random(128, columns)
            shard["position_ids"] = torch.arange(16).view(1, 16)
        shards.append(shard)
    return shards


def folder(path: Path, **sizes: Any) -> Path:
    """A Hugging Face folder with its index, a tokenizer, and what should not be copied."""
    path.mkdir(parents=True)
    shards = tensors(**sizes)
    places = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / name, {"format": "pt"})
        places |= dict.fromkeys(shard, name)
    index(path, places)
    (path / "config.json").write_text('{"model_type": "test", "vocab_size": 128}')
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"other weights")
    (path / ".git").mkdir()
    (path / ".git" / "HEAD").write_text("ref: refs/heads/main")
    return path


def index(path: Path, weight_map: dict[str, Any]) -> None:
    said = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(said))


def header(entries: dict[str, Any] | bytes, data: int = 0) -> bytes:
    """A safetensors file of this header and so many zeros."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(dtype: str, shape: list[int], begin: int = 0) -> dict[str, Any]:
    end = begin + math.prod(shape) * SIZES[dtype]
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sparse(path: Path, dtype: str, shape: list[int], name: str = "w.weight") -> Path:
    """A file with one tensor of zeros, which takes no space on the disk."""
    said = entry(dtype, shape)
    start = header({name: said})
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(len(start) + said["data_offsets"][1])
    return path


def files_of(path: Path) -> dict[str, bytes]:
    """Every file of a quantized checkpoint but what it remembers for itself."""
    found = [p for p in sorted(path.rglob("*")) if p.is_file() and ".quantkit" not in p.parts]
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def refused(text, *arguments, **keywords):
    """checkpoint.quantize says it, in one line."""
    with pytest.raises(CheckpointError) as error:
        checkpoint.quantize(*arguments, **keywords)
    line = str(error.value)
    assert text in line and line.isprintable(), line
