"""Models: what config.json says (`parse_config`), and the decoder made of it (`make_model`).

Nothing outside this package knows an architecture by name; see architectures.py for the table.
"""

from nanovllm.models.config import ModelConfig, load_config, parse_config
from nanovllm.models.decoder import make_model
from nanovllm.models.loader import Checkpoint, WeightsError, load_model
from nanovllm.models.rules import UnsupportedModelError
from nanovllm.models.stage import Model

__all__ = [
    "Checkpoint",
    "Model",
    "ModelConfig",
    "UnsupportedModelError",
    "WeightsError",
    "load_config",
    "load_model",
    "make_model",
    "parse_config",
]
