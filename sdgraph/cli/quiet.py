"""Silence the libraries while a command runs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let diffusers and transformers print errors only, for our own messages and progress bars report the progress.

    Deprecation warnings are silenced too, for they concern developers.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", module=r"(diffusers|transformers|huggingface_hub)\b")
        for library in ("diffusers", "transformers"):
            if importlib.util.find_spec(library) is None:
                continue
            logging = importlib.import_module(f"{library}.utils.logging")
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            if logging.is_progress_bar_enabled():
                stack.callback(logging.enable_progress_bar)
            logging.disable_progress_bar()
        yield
