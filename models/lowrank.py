"""Fully connected layers as two thinner ones, as truncated SVD makes them (Fast R-CNN, Girshick 2015, section 3.1).

A layer's name and rank stand in a checkpoint's options as `ranks`, so a compressed model is built like any other.
"""

from collections.abc import Mapping

from torch import Tensor, nn


class LowRank(nn.Sequential):
    """(N, in) -> (N, out) through `rank` numbers a row; only the second layer has a bias."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool = True) -> None:
        most = min(inputs, outputs)
        if not 1 <= rank <= most:
            raise ValueError(f"rank {rank} is impossible for a layer of {inputs} x {outputs}: it is from 1 to {most}")
        super().__init__(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
        self.rank = rank

    def set(self, first: Tensor, second: Tensor, bias: Tensor | None) -> None:
        """first (rank, in), second (out, rank), bias (out,)."""
        for layer, name, value in ((0, "weight", first), (1, "weight", second), (1, "bias", bias)):
            if value is not None:
                getattr(self[layer], name).data.copy_(value)


def narrow(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Puts a new LowRank in the place of each named layer; raises ValueError where there is none or the rank is not."""
    for name, rank in ranks.items():
        layer = dict(model.named_modules()).get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"ranks names {name!r}, which is no fully connected layer of this model")
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise ValueError(f"the rank of {name} must be a whole number, it is {rank!r}")
        model.set_submodule(name, LowRank(layer.in_features, layer.out_features, rank, layer.bias is not None))
