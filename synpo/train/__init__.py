"""Training on preference pairs: configuration, data, the trainer, its diagnostics."""

from ..evaluate import paired_bootstrap
from ..pretrained import load_model, load_tokenizer
from .config import SynPOConfig
from .model import lora_recipe
from .trainer import SynPOTrainer

__all__ = ["SynPOConfig", "SynPOTrainer", "load_model", "load_tokenizer", "lora_recipe", "paired_bootstrap"]
