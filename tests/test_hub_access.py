"""Without an address of the Hub, commands use its library's cache, without waiting."""

import logging
import os
import socket
import sys
import urllib.request

import pytest

from mixmo_fastai.config.hub_names import local_path
from mixmo_fastai.runtime.hub_access import avoid_retries


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def find(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)


@pytest.mark.parametrize(
    ("line", "is_offline"),
    [
        ("fit hf:me/pets", True),
        ("predict hf:me/pets a.png", True),
        ("fit digits --arch timm/resnet10t", True),
        ("fit digits", False),
        ("push run --to hf:me/pets", False),
    ],
)
def test_only_commands_that_read_from_the_hub_are_offline(line, is_offline):
    avoid_retries(line.split())
    assert os.environ.get("HF_HUB_OFFLINE") == ("1" if is_offline else None)


def test_networks_proxies_and_settings_are_respected(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    avoid_retries(["fit", "hf:me/pets"])
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    avoid_retries(["fit", "hf:me/pets"])
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    avoid_retries(["fit", "hf:me/pets"])
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize("endpoint", ["http://[bad", "hf-mirror.com"])
def test_malformed_endpoints_are_left_to_the_library(monkeypatch, endpoint):
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    avoid_retries(["fit", "hf:me/pets"])
    assert "HF_HUB_OFFLINE" not in os.environ


def test_revisions_may_have_slashes():
    assert local_path("me/net@refs/pr/1") is None
    assert local_path("x" * 300) is None


def test_lines_about_retries_are_hidden(monkeypatch, caplog):
    logger = logging.getLogger("huggingface_hub.utils")
    level = logger.level
    try:
        avoid_retries([])
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
    finally:
        logger.setLevel(level)
    assert not caplog.records
