"""Embedded worlds: models, prompts and objectives that need no download."""
