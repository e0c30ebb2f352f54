"""A checkpoint to read, tensor by tensor: quantized weights as codes and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..params import QuantizationParams
from .files import Buffer, Path_, Region, path_of
from .plan import weights_of
from .source import Source


class Checkpoint(Mapping[str, "torch.Tensor | tuple[torch.Tensor, QuantizationParams]"]):
    """A checkpoint to read: ``(q, qparams)`` of each quantized weight by its name, else the tensor.

    What is read is copied from the file, one tensor at a time. Files without quantized weights are
    taken, too.

    Args:
        path: as for :func:`quantize`.

    Attributes:
        config: what config.json says.
        weights: how each quantized weight was quantized: ``scheme``, ``shape`` and ``dtype``.

    Raises:
        CheckpointError that says in one line what is wrong. TypeError where path is none.
    """

    def __init__(self, path: Path_) -> None:
        self._source = Source(path_of("path", path))
        try:
            found = weights_of(self._source)
        except BaseException:
            self._source.close()
            raise
        self.config = self._source.config
        self.weights = {name: weight for name, (weight, _) in found.items()}
        self._parts = {name: inputs for name, (_, inputs) in found.items()}
        parts = {part for inputs in self._parts.values() for part in inputs}
        self._names = [*self.weights, *(n for n in self._source.tensors if n not in parts)]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, as leaving ``with`` does."""
        self._source.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self.weights or name in self._names

    def __getitem__(self, name: str) -> torch.Tensor | tuple[torch.Tensor, QuantizationParams]:
        weight = self.weights.get(name)
        if weight is None:
            if name not in self._names:
                raise KeyError(name)
            return self._read(self._source.tensors[name])
        parts = {part: self._read(region) for part, region in self._parts[name].items()}
        return weight.scheme.loaded(parts, name, weight.shape, weight.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, or of a weight before it was quantized. Nothing is read."""
        weight = self.weights.get(name)
        return self._source.tensors[name].shape if weight is None else weight.shape

    def _read(self, region: Region) -> torch.Tensor:
        return self._source.read(region, Buffer(region.nbytes))
