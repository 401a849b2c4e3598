"""What all unit tests share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests out of them."""
    for variable in list(os.environ):
        if variable.upper().startswith("KVMSNAPD_") or variable in {"STATE_DIRECTORY", "RUNTIME_DIRECTORY"}:
            monkeypatch.delenv(variable)
