"""What kind of adapter is trained. Apart from the adapters themselves, since peft takes seconds to import."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Literal

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig

AdapterKind = Literal["lora", "locon", "loha", "lokr", "dora"]


@dataclass(frozen=True)
class AdapterOptions:
    """What kind of adapter, how large, and where.

    kind:      "locon" is LoRA at the convolutions of the residual blocks too, "dora" LoRA with magnitudes
    rank:      of the U-Net's linear layers and 1x1 convolutions
    alpha:     what the product of the factors is multiplied by, times the rank; None: as much as the rank. Layers of
               another rank have it in proportion, so that the factor, `scale`, is the same all over
    dropout:   0..1, of a layer's input (lora, locon, dora) or of its outputs' rows (loha, lokr)
    conv_rank: of 3x3 convolutions. None: as `rank` for locon; for other kinds the residual blocks are left alone
    text_rank: of the text towers' layers; None: these are left alone
    """

    kind: AdapterKind = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    conv_rank: int | None = None
    text_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "conv_rank", "text_rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise LdmError(f"adapter: {name} is {value}, expected 1 or more")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise LdmError(f"adapter: alpha is {self.alpha}, expected a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise LdmError(f"adapter: dropout is {self.dropout}, expected 0 or more, below 1")
        if self.kind == "lora" and self.conv_rank is not None:
            raise LdmError("adapter: conv_rank is given for lora, expected none; locon is LoRA with convolutions")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def convolutions(self) -> int | None:
        """The rank of 3x3 convolutions; None where the residual blocks are left alone."""
        return self.rank if self.kind == "locon" and self.conv_rank is None else self.conv_rank


def network_facts(options: AdapterOptions, config: SystemConfig) -> dict[str, str]:
    """The `ss_*` metadata that tell of the adapter itself, in kohya's and LyCORIS' words."""
    arguments: dict[str, str] = {}
    if options.kind not in ("lora", "locon"):
        arguments["algo"] = {"loha": "loha", "lokr": "lokr", "dora": "locon"}[options.kind]
    if options.kind == "dora":
        arguments["dora_wd"] = "True"
    if (rank := options.convolutions) is not None:
        arguments |= {"conv_dim": str(rank), "conv_alpha": str(options.scale * rank)}
    if options.text_rank not in (None, options.rank):
        arguments["text_dim"] = str(options.text_rank)
    v = "_v" if config.prediction == "v" else ""
    versions = {"sd1": f"sd_v1{v}", "sd2": f"sd_v2{v}", "sdxl": "sdxl_base_v1-0", "sdxl-refiner": "sdxl_refiner_v1-0"}
    return {
        "ss_v2": str(config.family == "sd2"),
        "ss_base_model_version": versions.get(config.family, "latent-diffusion"),
        "ss_network_module": "networks.lora" if options.kind in ("lora", "locon") else "lycoris.kohya",
        "ss_network_dim": str(options.rank),
        "ss_network_alpha": str(options.scale * options.rank),
        "ss_network_dropout": str(options.dropout),
        "ss_network_args": json.dumps(arguments),
    }
