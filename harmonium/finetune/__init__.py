"""Training: LoRA adapters over frozen MXFP4 weights, whole small models, and merging (docs/finetune.md)."""
