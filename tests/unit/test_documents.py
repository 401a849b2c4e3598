"""What the documents show is true of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmsnapd.config import load_config
from kvmsnapd.config.reference import FILES
from kvmsnapd.metrics import Metrics
from kvmsnapd.state_series import Observation
from tests.builders import an_inventory
from tests.unit.test_metrics import a_fleet

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_made_of_the_models_is_up_to_date(path: Path) -> None:
    assert path.read_text() == FILES[path](), "run ./dev exec python -m kvmsnapd.config.reference"


def test_the_default_configuration_is_valid_and_protects_nothing() -> None:
    config = load_config(ROOT / "config/kvmsnapd.yaml")
    assert (list(config.policies), config.selectors, config.warnings) == (["standard"], {}, ())


def test_the_configuration_of_the_readme_is_valid_and_complete(tmp_path: Path) -> None:
    (block, *_) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = tmp_path / "kvmsnapd.yaml"
    path.write_text(block)
    config = load_config(path)
    assert list(config.selectors) == ["db01", "web-*", "scratch-*"]
    assert config.warnings == ()


def test_every_series_the_readme_names_is_exported() -> None:
    metrics = Metrics(lambda: Observation(fleet=a_fleet(an_inventory())))
    exported = {family.name for family in metrics.registry.collect()} | {"kvmsnapd_build_info"}
    named = set(re.findall(r"kvmsnapd_[a-z_]*[a-z]", (ROOT / "README.md").read_text()))
    assert named <= exported
