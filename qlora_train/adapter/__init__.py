"""LoRA adapters on disk, in PEFT's format."""
