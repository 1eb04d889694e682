"""ldm: latent diffusion, small enough to read.

    import ldm
    model = ldm.load()
    model.generate("a red apple")[0].image.save("apple.png")

Names are imported when they are first used, so that `import ldm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.errors import LdmError
    from ldm.pipeline.clip.load import load_clip
    from ldm.pipeline.clip.model import CLIP
    from ldm.pipeline.latent_diffusion import LatentDiffusion
    from ldm.pipeline.load import load
    from ldm.pipeline.request import Apg, Control, GenerateRequest, HighRes, PriorUse
    from ldm.weights.adapters.read import read_adapter

__version__ = "0.1.0"
__all__ = [
    "CLIP",
    "Apg",
    "Control",
    "GenerateRequest",
    "HighRes",
    "LatentDiffusion",
    "LdmError",
    "PriorUse",
    "__version__",
    "load",
    "load_clip",
    "read_adapter",
]

_HOMES = {
    "CLIP": "ldm.pipeline.clip.model",
    "Apg": "ldm.pipeline.request",
    "Control": "ldm.pipeline.request",
    "GenerateRequest": "ldm.pipeline.request",
    "HighRes": "ldm.pipeline.request",
    "LatentDiffusion": "ldm.pipeline.latent_diffusion",
    "LdmError": "ldm.errors",
    "PriorUse": "ldm.pipeline.request",
    "load": "ldm.pipeline.load",
    "load_clip": "ldm.pipeline.clip.load",
    "read_adapter": "ldm.weights.adapters.read",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that holds it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
