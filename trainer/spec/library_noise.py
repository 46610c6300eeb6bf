"""What libraries say about themselves, silenced: it names parts that are not used here, and nothing that a user can do.

Call `silence` before torch, diffusers or transformers is imported: most of them read their variables then.
"""

from __future__ import annotations

import logging
import os
import warnings

VARIABLES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
LOGGERS = (
    "diffusers",
    "transformers",
    "torchao",
    "torch.utils._pytree",
    "bitsandbytes",
    "PIL",
    "httpx",
    "huggingface_hub",
)


def silence() -> None:
    """Leave errors alone to the libraries. Their warnings are for those who program with them."""
    os.environ.update(VARIABLES)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
