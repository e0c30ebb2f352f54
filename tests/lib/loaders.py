"""What the tests of tests/loaders share: a model, and the record of what was loaded."""

from pathlib import Path

import torch

#: (consumer, model, scheme, result)
RESULTS: list[tuple[str, ...]] = []


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
