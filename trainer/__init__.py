"""From a plan to LoRA files."""

__version__ = "0.1.0"
