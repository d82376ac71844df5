"""transformers and accelerate without their own bars and remarks, which are not the command's output."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within, they say nothing but errors; afterwards they are as before."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    dispatch = logging.getLogger("accelerate.big_modeling")
    level = dispatch.level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    dispatch.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        dispatch.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()
