"""Contact sheets of tensors, for a look during training."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def save_sheet(images: Tensor, path: Path, columns: int) -> None:
    """images (B, 3, H, W) in [-1, 1] -> one PNG, row by row."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    pixels = torch.cat([pixels, pixels.new_full((-len(pixels) % columns, *pixels.shape[1:]), 255)])
    b, c, h, w = pixels.shape
    grid = pixels.view(b // columns, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(b // columns * h, columns * w, c)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.numpy()).save(path)
