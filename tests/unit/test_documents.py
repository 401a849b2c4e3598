"""What the documents show is true of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmsnapd.config import load_config
from kvmsnapd.config.reference import FILES
from kvmsnapd.errors import ConfigError
from kvmsnapd.metrics import Metrics
from kvmsnapd.series import Observation
from tests.builders import an_inventory
from tests.unit.test_metrics import a_fleet

ROOT = Path(__file__).parents[2]
BLOCKS = [
    block
    for path in ("README.md", "config/README.md")
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_made_of_the_models_is_up_to_date(path: Path) -> None:
    assert path.read_text() == FILES[path](), "run ./dev exec python -m kvmsnapd.config.reference"


def test_the_default_configuration_is_valid_and_protects_nothing() -> None:
    config = load_config(ROOT / "config/kvmsnapd.yaml")
    assert (list(config.policies), config.selectors, config.warnings) == (["standard"], {}, ())


def test_the_configuration_of_the_readme_is_valid_and_complete(tmp_path: Path) -> None:
    (block, *_) = BLOCKS
    path = tmp_path / "kvmsnapd.yaml"
    path.write_text(block)
    config = load_config(path)
    assert list(config.selectors) == ["db01", "web-*", "scratch-*"]
    assert config.warnings == ()


@pytest.mark.parametrize("block", [block for block in BLOCKS if "policies:" in block], ids=len)
def test_every_policy_file_of_the_documents_is_valid(tmp_path: Path, block: str) -> None:
    path = tmp_path / "kvmsnapd.yaml"
    path.write_text(block)
    assert load_config(path).warnings == ()


def test_the_error_of_the_readme_is_what_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "kvmsnapd.yaml"
    path.write_text("timezone: UTC\npolicies:\n  p:\n    schedule: hourly\n    keep: {hourley: 6, daily: 5}\n")
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    shown = (
        str(refusal.value)
        .replace(f"{path}", "/etc/kvmsnapd/kvmsnapd.yaml")
        .replace("policies.p.", "policies.standard.")
    )
    assert shown in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "config/examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_valid_and_does_what_it_says(path: Path) -> None:
    config = load_config(path)
    assert config.warnings == ()
    assert path.read_text().startswith("# yaml-language-server: $schema=../kvmsnapd.schema.json\n")


def test_the_default_file_is_complete_in_fifteen_lines() -> None:
    lines = (ROOT / "config/kvmsnapd.yaml").read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=./kvmsnapd.schema.json"
    assert 1 < len([line for line in lines if line.strip() and not line.strip().startswith("#")]) <= 15


def test_every_key_that_the_default_file_has_commented_out_is_right_as_it_stands(tmp_path: Path) -> None:
    text = (ROOT / "config/kvmsnapd.yaml").read_text()
    spoken = re.sub(r"^( *)#(?! )|^#(?=  )", r"\1", text, flags=re.MULTILINE)
    spoken = (
        spoken.replace("domains: {}", "domains:").replace("    memory: live\n", "").replace("    extends: basic\n", "")
    )
    (tmp_path / "web.yaml").write_text("{}\n")
    path = tmp_path / "kvmsnapd.yaml"
    path.write_text(spoken.replace("/etc/kvmsnapd/web.yaml", str(tmp_path / "web.yaml")))
    config = load_config(path)
    assert list(config.selectors) == ["db01", "web-*", "/lab-[0-9]+/", "scratch-*"]
    assert config.settings.model_fields_set == set(type(config.settings).model_fields)


def test_every_series_the_readme_names_is_exported() -> None:
    metrics = Metrics(lambda: Observation(fleet=a_fleet(an_inventory())))
    exported = {family.name for family in metrics.registry.collect()} | {"kvmsnapd_build_info"}
    named = set(re.findall(r"kvmsnapd_[a-z_]*[a-z]", (ROOT / "README.md").read_text()))
    assert named <= exported
