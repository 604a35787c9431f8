"""Joining a Ray cluster: a wrong address is told within seconds, and SIGTERM meanwhile is an interrupt."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from vtrial.cluster import session
from vtrial.records import InputError


@pytest.fixture(autouse=True)
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cluster of another test's, and this process's own handler of SIGTERM again at the end."""
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def joined(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The addresses that Ray is asked to join from now on."""
    asked: list[object] = []
    monkeypatch.setattr(session.ray, "init", lambda address, **unused: asked.append(address))
    return asked


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:99999", "nosuchhost.invalid:6379"]
)
def test_an_address_where_nobody_listens_is_told_before_ray_waits(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = joined(monkeypatch)
    with pytest.raises(InputError) as caught:
        session.connect(address, 1, lambda text: None)
    assert f"--address {address}: no Ray cluster answers there" in str(caught.value)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError) as caught:
        session.connect(None, 1, lambda text: None)
    assert f"RAY_ADDRESS {address}: no Ray" in str(caught.value) and "--address" not in str(caught.value)
    assert asked == []


def test_an_address_that_answers_or_that_ray_finds_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = joined(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for each in (address, f"ray://{address}", "auto"):
            assert not session.connect(each, 1, lambda text: None)
    assert asked == [address, f"ray://{address}", "auto"]


@pytest.mark.parametrize("address", ["auto", None])
def test_sigterm_while_ray_begins_is_an_interrupt(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**unused: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(session.ray, "init", init)
    with pytest.raises(KeyboardInterrupt):
        session.connect(address, 1, lambda text: None)
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler, "from now on too"
