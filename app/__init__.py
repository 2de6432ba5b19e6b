"""What a run prints, draws and saves, and what is built around runs: sweeps, timing, training a reward model."""


def quiet_libraries() -> None:
    """The user sees our lines, not the loading bars of libraries."""
    from huggingface_hub.utils import logging as hub_logging  # here, so that importing a part of app stays quick
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
