"""Access of commands to the Hugging Face Hub: no long waits for a Hub that cannot be reached."""

import logging
import os
import sys
from collections.abc import Sequence

_MARKS = ("hf:", "timm/")
"""In the arguments of commands that may read from the Hub."""


def avoid_retries(args: Sequence[str]) -> None:
    """Hide the Hub library's lines about retries, and use only its cache if the Hub has no address.

    The library tries six times in half a minute, and has no setting for fewer. HF_HUB_OFFLINE,
    which it reads when it is imported, makes it use its cache. A value of the user is kept.
    """
    logging.getLogger("huggingface_hub.utils").setLevel(logging.ERROR)
    may_read = args[:1] != ["push"] and any(mark in each for each in args for mark in _MARKS)
    is_imported = "huggingface_hub" in sys.modules
    if may_read and not is_imported and "HF_HUB_OFFLINE" not in os.environ and not _has_address():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _has_address() -> bool:
    """Check whether the Hub's name can be resolved; a proxy may do that itself."""
    import socket  # these take time, and few commands need them
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if getproxies().keys() & {"http", "https", "all"}:
        return True
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        host = urlsplit(endpoint).hostname
        if host is not None:
            socket.getaddrinfo(host, None)
    except OSError:
        return False
    except ValueError:
        pass  # no address at all, which the library reports
    return True
