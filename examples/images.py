"""Pictures of digits: a pixel is a token, its row and its column are two phases.

`python examples/images.py` trains on the 8 x 8 digits of scikit-learn (`pip install scikit-learn`)
and prints the share of right answers on the last fifth, with both phases, without them, and of
logistic regression, which has a weight for every place.
"""

from __future__ import annotations

import argparse
import math

import torch
from own_module import Block
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, CLASSES = 8, 10


def digits() -> tuple[Tensor, Tensor]:
    """Pixels `(N, 64)` in [0, 1] and digits `(N,)`.

    Raises:
        ImportError: scikit-learn is missing; says how to install it.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"the digits need scikit-learn ({error}): pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)


class FluxImages(nn.Module):
    """Every pixel hears every other. Half of the cylinders turn with the row, half with the column.

    A pixel comes in as a point on each cylinder, too: its brightness is the radius, its place the
    phase. Without `positions` only the brightness is left.
    """

    angle: Tensor | None

    def __init__(self, width: int = 32, cylinders: int = 8, positions: bool = True) -> None:
        super().__init__()
        options = {"cylinders": cylinders, "value_dim": 4, "causal": False}
        self.inputs = nn.Linear(1 + 2 * cylinders * positions, width)
        self.blocks = nn.ModuleList(Block(width, **options) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        angle = None
        if positions:
            row, column = (
                part.reshape(-1)
                for part in torch.meshgrid(*2 * [torch.arange(SIDE)], indexing="ij")
            )
            # The slowest phase turns by half over the picture, so that its two ends differ.
            speed = math.pi / SIDE * 2.0 ** torch.arange(cylinders // 2)[:, None]
            angle = torch.stack((speed * row, speed * column), 1).flatten(0, 1)
        self.register_buffer("angle", angle)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `(B, 10)` of pixels `(B, 64)`."""
        features = pixels[..., None]
        if self.angle is not None:
            turned = torch.cat((self.angle.cos(), self.angle.sin())).mT  # (64, 2 cylinders)
            features = torch.cat((features, features * turned), -1)
        x = self.inputs(features)
        for block in self.blocks:
            x = block(x, self.angle)
        return self.head(self.norm(x.mean(1)))


def run(steps: int, seed: int = 0) -> dict[str, float]:
    """Share of right answers on the last fifth of the pictures, by model."""
    pixels, labels = digits()
    cut = int(0.8 * len(pixels))
    found = {}
    models = {
        "two phases": lambda: FluxImages(),
        "no positions": lambda: FluxImages(positions=False),
        "logistic regression": lambda: nn.Linear(SIDE**2, CLASSES),
    }
    for name, make in models.items():
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for _ in range(steps):
            rows = torch.randint(cut, (64,))
            loss = F.cross_entropy(model(pixels[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            right = model(pixels[cut:]).argmax(-1) == labels[cut:]
        found[name] = right.float().mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, share in run(options.steps, options.seed).items():
        print(f"{name:20} {share:.1%} right")


if __name__ == "__main__":
    main()
