"""SynPO: preference training for language and video-language models on fused kernels."""

from typing import Any

__all__ = ["SynPOConfig", "SynPOTrainer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and most commands do not need it.
    if name in __all__:
        from . import train

        return getattr(train, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
