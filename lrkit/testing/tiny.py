"""The tiny model that components are tried on, and a batch for it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class TinyModel(nn.Module):
    """Two blocks with attention and FFN by name, wide and tall layers, one without a bias, and a head.

    Args:
        linear: what makes a layer: ``nn.Linear``, or a function of the same arguments.
    """

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.layer = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": nn.ModuleDict(
                        {"query": linear(32, 24), "value": linear(32, 24, bias=False), "output": linear(24, 32)}
                    ),
                    "ffn": nn.ModuleDict({"up": linear(32, 40), "down": linear(40, 32)}),
                }
            )
            for _ in range(2)
        )
        self.classifier = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, 2] of x [batch, length, 6]."""
        x = self.embed(x)
        for block in self.layer:
            attention, ffn = block["attention"], block["ffn"]  # type: ignore[index]
            x = x + attention["output"](torch.tanh(attention["query"](x)) * attention["value"](x))
            x = x + ffn["down"](torch.tanh(ffn["up"](x)))
        logits: Tensor = self.classifier(x.mean(dim=1))
        return logits


def seed_torch(seed: int) -> None:
    """Seed torch's global generator on the CPU alone: seeding all devices takes ten times as long."""
    torch.default_generator.manual_seed(seed)


def tiny(dtype: torch.dtype = torch.float32, linear: Callable[..., nn.Module] = nn.Linear) -> TinyModel:
    """Return the tiny model, with the same weights each time."""
    seed_torch(0)
    return TinyModel(linear).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return inputs [16, 5, 6] and labels [16] that follow from them, the same each time."""
    x = torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), (x[:, 0, 0] * x[:, 1, 1] > 0).long()
