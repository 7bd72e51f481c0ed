"""Training on preference pairs: configuration, data, the trainer, its diagnostics."""

from ..pretrained import load_model, load_tokenizer
from .config import SynPOConfig
from .diagnostics import paired_bootstrap
from .model import lora_recipe
from .trainer import SynPOTrainer

__all__ = ["SynPOConfig", "SynPOTrainer", "load_model", "load_tokenizer", "lora_recipe", "paired_bootstrap"]
