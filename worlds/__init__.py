"""Embedded worlds, whose models, prompts and objectives need no download, and readers of published data."""
