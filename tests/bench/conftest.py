"""Benchmarks run on the machine's own libvirt: one ratio per run, and no other root in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.generations import own

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.libvirtd import Libvirtd


@pytest.fixture
def libvirtd(generations: Callable[[str], Libvirtd]) -> Libvirtd:
    """Provide the machine's own libvirtd."""
    return generations(own() or "libvirt")
