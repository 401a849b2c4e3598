"""The configuration: every sample loads, or is refused with exactly the words beside it.

After a change of a message, ``REFRESH_SAMPLES=1 pytest tests/unit/test_config.py`` writes the texts anew; read the
difference before you keep it.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, get_args
from zoneinfo import ZoneInfo

import pytest

from kvmsnapd.config import Config, load_config
from kvmsnapd.config.models import Settings
from kvmsnapd.config.yaml_document import parse_yaml
from kvmsnapd.errors import ConfigError
from kvmsnapd.model import Kind
from kvmsnapd.policy import ConsistencyRule, DiskSelection, Hook, Hooks
from kvmsnapd.retention import ALL, KeepRules

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsnapd.policy import Policy

    Write = Callable[[str], Path]

SAMPLES = Path(__file__).parent.parent / "samples"
VALID = sorted(SAMPLES.glob("valid/*.yaml"))
INVALID = sorted(SAMPLES.glob("invalid/*.yaml"))


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.upper().startswith("KVMSNAPD_") or variable in {"STATE_DIRECTORY", "RUNTIME_DIRECTORY"}:
            monkeypatch.delenv(variable)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file and return where it is."""

    def write(text: str) -> Path:
        path = tmp_path / "kvmsnapd.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path) -> list[str]:
    """Return the lines with which a file is refused, its path replaced by the bare name."""
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    return [str(problem).replace(str(path), path.name) for problem in refusal.value.problems]


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_sample_loads(path: Path) -> None:
    assert load_config(path).path == path


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_sample_is_refused_with_exactly_its_text(path: Path) -> None:
    text = "".join(f"{line}\n" for line in problems(path))
    expected = path.with_suffix(".txt")
    if os.environ.get("REFRESH_SAMPLES"):
        expected.write_text(text, encoding="utf-8")
    assert text == expected.read_text(encoding="utf-8")


def test_no_text_is_left_without_its_sample() -> None:
    assert sorted(SAMPLES.glob("invalid/*.txt")) == [path.with_suffix(".txt") for path in INVALID]


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_every_line_of_a_text_begins_with_the_name_of_the_file(path: Path) -> None:
    lines = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    assert lines
    form = re.compile(rf"{re.escape(path.name)}(:\d+:\d+)?: \S|[ \d]{{5}} \| ")
    assert [line for line in lines if not form.match(line)] == []


def sample(name: str) -> Config:
    return load_config(SAMPLES / "valid" / f"{name}.yaml")


# What a valid file means


def test_every_setting_arrives_where_it_belongs() -> None:
    config = sample("every_setting")
    policy = config.policies["nightly"]
    assert str(policy.schedule) == "30 2 * * *"
    assert policy.timezone == policy.schedule.timezone == ZoneInfo("Australia/Lord_Howe")
    assert policy.keep == KeepRules(1, 2, 3, 4, 5, ALL, timedelta(hours=36))
    assert (policy.kind, policy.consistency, policy.catch_up) == (Kind.INTERNAL, ConsistencyRule.MEMORY, False)
    assert (policy.splay, policy.max_age) == (timedelta(0), timedelta(hours=36))
    assert (policy.max_deletes_per_run, policy.max_chain_depth) == (3, 150)
    assert (policy.memory_live, policy.max_pause, policy.min_free_bytes) == (False, timedelta(seconds=90), 0)
    warm = config.policies["warm"]
    assert (warm.kind, warm.consistency, warm.memory_live) == (Kind.EXTERNAL, ConsistencyRule.MEMORY, True)
    assert (warm.max_pause, warm.min_free_bytes) == (timedelta(seconds=2), 3 * 2**29)
    assert warm.overlay_directory == "/srv/overlays"
    part = config.policies["part"]
    assert part.disks == DiskSelection(("vda", "/images/*"), ("/images/scratch-*",))
    assert warm.hooks == Hooks(
        before=Hook(("/usr/local/bin/hook", "before", "two words"), timedelta(minutes=5), required=True),
        after=Hook(("hook-after",), timedelta(minutes=1)),
        on_failure=Hook(("hook-failed",), timedelta(seconds=10)),
    )
    rare = config.policies["rare"]
    assert (rare.disks, rare.max_age, str(rare.schedule)) == (part.disks, timedelta(days=3), "weekly")
    assert config.selectors == {
        "11111111-2222-3333-4444-555555555555": (policy,),
        "db-*": (warm,),
        "web-*": (part, replace(rare, max_age=timedelta(days=40))),
    }
    settings = config.settings
    assert (settings.connect, settings.tick, settings.workers) == ("qemu+unix:///system", timedelta(seconds=10), 2)
    assert settings.watch is True
    assert (settings.takes_per_storage, settings.merges_per_storage) == (3, 2)
    assert (settings.metrics.enabled, settings.metrics.listen, settings.metrics.port) == (False, "::1", 0)
    assert (settings.log.level, settings.log.format) == ("debug", "json")
    assert (config.state_directory, config.runtime_directory) == (Path("/var/lib/elsewhere"), Path("/run/elsewhere"))


def keys_of(model: object) -> set[str]:
    """Return the names of all settings of a model and of those below it."""
    found: set[str] = set()
    for name, field in getattr(model, "model_fields", {}).items():
        found.add(name)
        for part in (field.annotation, *get_args(field.annotation)):
            found |= keys_of(part)
    return found


def written_keys(data: object) -> set[str]:
    if not isinstance(data, dict):
        return set()
    return set(data).union(*map(written_keys, data.values()))


def test_the_sample_of_every_setting_has_every_setting() -> None:
    path = SAMPLES / "valid" / "every_setting.yaml"
    missing = keys_of(Settings) - written_keys(parse_yaml(str(path), path.read_text(encoding="utf-8")).data)
    assert missing == set()


def test_an_empty_file_is_the_defaults() -> None:
    config = sample("empty")
    settings = config.settings
    assert (config.policies, config.selectors, config.warnings) == ({}, {}, ())
    assert (settings.connect, settings.timezone) == ("qemu:///system", ZoneInfo("UTC"))
    assert (settings.takes_per_storage, settings.merges_per_storage) == (4, 1)
    assert (settings.metrics.listen, settings.metrics.port) == ("127.0.0.1", 9783)
    assert (config.state_directory, config.runtime_directory) == (Path("/var/lib/kvmsnapd"), Path("/run/kvmsnapd"))


def test_a_policy_of_two_lines_has_safe_defaults() -> None:
    policy = sample("byte_order_mark").policies["standard"]
    assert (policy.kind, policy.consistency) == (Kind.EXTERNAL, ConsistencyRule.FILESYSTEM_PREFERRED)
    assert (policy.catch_up, policy.max_deletes_per_run, policy.max_chain_depth) == (True, 10, 16)
    assert (policy.memory_live, policy.max_pause, policy.min_free_bytes) == (False, timedelta(seconds=10), 2**30)
    assert (policy.overlay_directory, policy.disks, policy.hooks) == (None, DiskSelection(), Hooks())


def test_policies_follow_the_time_zone_of_the_file() -> None:
    config = sample("complete_as_in_the_readme")
    assert config.policies["standard"].schedule.timezone == ZoneInfo("Europe/Berlin")
    assert config.policies["standard"].timezone == ZoneInfo("Europe/Berlin")


def test_an_empty_list_of_policies_arrives_as_such() -> None:
    assert sample("complete_as_in_the_readme").selectors["scratch-*"] == ()


@pytest.mark.parametrize(
    ("schedule", "seconds"), [("every 1m", 6), ("every 20m", 120), ("hourly", 300), ("daily", 300)]
)
def test_splay_is_a_tenth_of_the_interval_and_at_most_five_minutes(write: Write, schedule: str, seconds: int) -> None:
    config = load_config(write(f"policies: {{p: {{schedule: {schedule}, keep: {{last: 1}}}}}}"))
    assert config.policies["p"].splay == timedelta(seconds=seconds)


def test_the_age_that_means_trouble_is_two_of_the_longest_intervals_and_the_splay(write: Write) -> None:
    config = load_config(write('policies: {p: {schedule: "0 9-17 * * 1-5", keep: {last: 1}}}'))
    assert config.policies["p"].max_age == 2 * timedelta(hours=64) + timedelta(minutes=5)


def test_yaml_1_1_traps_stay_text() -> None:
    config = sample("yaml_1_1_traps_stay_text")
    assert list(config.policies) == ["no", "22.30", "1e3"]
    assert list(config.selectors) == (
        ["on", "off", "yes", "22:30", "0o17", "0x1f", "1_000", "007", "2026-11-22", "~", "null", "true", ".inf"]
    )
    assert [policy.name for policy in config.selectors["off"]] == ["no", "1e3"]
    assert config.selectors["yes"] == ()


def test_what_is_quoted_stays_text(write: Write) -> None:
    config = load_config(
        write('connect: "5"\npolicies: {7: {schedule: hourly, keep: {last: 1}}}\ndomains: {db01: ["7"]}\n')
    )
    assert config.settings.connect == "5"
    assert [policy.name for policy in config.selectors["db01"]] == ["7"]


def test_anchors_stand_for_their_values() -> None:
    config = sample("anchors")
    assert config.policies["standard"].keep == config.policies["other"].keep
    assert config.selectors["a"] == config.selectors["b"]


def a_policy_with(write: Write, *lines: str) -> Policy:
    """Load a policy with these settings."""
    text = "".join(f"    {line}\n" for line in ("schedule: hourly", "keep: {last: 2}", *lines))
    return load_config(write(f"policies:\n  p:\n{text}")).policies["p"]


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("0", 0),
        ("123456", 123456),
        ('"123456"', 123456),
        ("500MiB", 500 * 2**20),
        ("10 GiB", 10 * 2**30),
        ("10gib", 10 * 2**30),
        ("1.5G", 1_500_000_000),
        ("2TB", 2 * 10**12),
        ("100 kB", 100_000),
        ("7B", 7),
    ],
)
def test_a_size_has_a_decimal_or_a_binary_unit_or_none(write: Write, written: str, size: int) -> None:
    assert a_policy_with(write, f"min_free: {written}").min_free_bytes == size


@pytest.mark.parametrize(
    "written",
    [
        *("-5", "1e9", "nan", "inf", "GiB", "[1GiB]"),
        *(pytest.param(text) for text in ('"1,5GiB"', "5 GiB or so", "10.5.5GiB")),
    ],
)
def test_anything_else_is_no_size(write: Write, written: str) -> None:
    with pytest.raises(ConfigError, match="write a size, such as 500MiB or 10GiB"):
        a_policy_with(write, f"min_free: {written}")


@pytest.mark.parametrize(
    "lines",
    [
        ("kind: internal", "consistency: memory"),
        ("kind: internal",),
        ("memory: live", "consistency: memory"),
        ("memory: live",),
        ("kind: internal", "disks: {include: [], exclude: []}"),
        ("kind: internal", "max_pause: 1h"),
    ],
    ids=", ".join,
)
def test_settings_that_mean_the_same_are_no_contradiction(write: Write, lines: tuple[str, ...]) -> None:
    assert a_policy_with(write, *lines).memory_live is ("memory: live" in lines)


def test_a_section_of_which_all_is_commented_out_is_its_defaults(write: Write) -> None:
    policy = a_policy_with(write, "disks:", "  # exclude: [vdb]", "hooks:", "  before:", "    # command: [x]")
    assert (policy.disks, policy.hooks) == (DiskSelection(), Hooks())


def test_only_the_hook_before_can_be_required(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"hooks\.after\.required: unknown key `required`"):
        a_policy_with(write, "hooks: {after: {command: [x], required: true}}")


def test_a_hook_is_not_required_unless_it_says_so(write: Write) -> None:
    hooks = a_policy_with(write, "hooks: {before: {command: [x]}, after: {command: [y]}}").hooks
    assert hooks == Hooks(Hook(("x",), timedelta(minutes=1)), Hook(("y",), timedelta(minutes=1)))


def test_an_unknown_key_of_a_hook_is_told_which_there_are(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"did you mean `required`\? Allowed are command, timeout, required"):
        a_policy_with(write, "hooks: {before: {command: [x], requird: true}}")


@pytest.mark.parametrize("word", ["true", "yes", "on"])
def test_a_switch_may_be_written_in_any_usual_way(write: Write, word: str) -> None:
    assert load_config(write(f"metrics: {{enabled: {word}}}")).settings.metrics.enabled is True
    assert load_config(write("metrics: {enabled: off}")).settings.metrics.enabled is False


# Files that cannot be read


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "missing.yaml"
    assert problems(path) == ["missing.yaml: cannot be read: No such file or directory; nothing was changed"]


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"{tmp_path.name}: cannot be read: Is a directory; nothing was changed"]


def test_a_file_of_more_than_four_mebibytes_is_refused_unread(write: Write) -> None:
    path = write("# " + "x" * 4 * 2**20)
    assert problems(path) == ["kvmsnapd.yaml:1:1: the file is larger than 4194304 bytes"]


# The environment


def test_the_environment_overrides_one_setting_and_leaves_its_neighbours(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMSNAPD_METRICS__PORT", "9000")
    metrics = load_config(write('metrics: {port: 1, listen: "::1"}')).settings.metrics
    assert (metrics.port, metrics.listen) == (9000, "::1")


def test_the_environment_overrides_a_setting_at_the_top(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMSNAPD_CONNECT", "test:///default")
    monkeypatch.setenv("KVMSNAPD_TICK", "5s")
    settings = load_config(write("connect: qemu:///session")).settings
    assert (settings.connect, settings.tick) == ("test:///default", timedelta(seconds=5))


def test_a_bad_value_in_the_environment_is_refused_with_its_variable(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMSNAPD_METRICS__PORT", "65536")
    assert problems(write("metrics: {port: 9783}")) == [
        "environment KVMSNAPD_METRICS__PORT: write a number up to 65535, not '65536'"
    ]


def test_an_unknown_key_in_the_environment_is_refused_with_its_variable(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMSNAPD_METRICS__PROT", "9000")
    assert problems(write("")) == [
        (
            "environment KVMSNAPD_METRICS__PROT: unknown key `prot`; did you mean `port`? Allowed are enabled, "
            "listen, port"
        )
    ]


def test_a_variable_in_small_letters_is_named_as_well(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("kvmsnapd_workers", "9")
    assert problems(write("workers: 2"))[0].startswith("environment ")


def test_a_section_in_the_environment_that_is_no_json_is_refused_with_its_variable(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMSNAPD_METRICS", "port=9000")
    (line,) = problems(write(""))
    assert line.startswith("environment KVMSNAPD_METRICS: ")


def test_a_bad_value_within_a_section_of_the_environment_is_not_blamed_on_the_file(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMSNAPD_METRICS", '{"port": 65536}')
    (line,) = problems(write("# nothing about metrics"))
    assert line.startswith("environment KVMSNAPD_METRICS: ")


def test_variables_of_others_do_not_matter(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_UNPACKED", "/nowhere")
    load_config(write(""))


def test_systemd_names_the_directories(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/service:/var/lib/second")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/service")
    config = load_config(write(""))
    assert (config.state_directory, config.runtime_directory) == (Path("/var/lib/service"), Path("/run/service"))


# Warnings


def test_policies_that_keep_more_than_the_chain_holds_are_warned_of(write: Write) -> None:
    path = write(
        """\
policies:
  short: {schedule: hourly, keep: {last: 2, daily: 5}}
  long: {schedule: daily, keep: {last: 10}}
domains:
  db01: [short, long]
  web: [short]
"""
    )
    assert [warning.replace(str(path), path.name) for warning in load_config(path).warnings] == [
        (
            "kvmsnapd.yaml:5:3: domains.db01: the policies may keep 6 (short) + 10 (long) snapshots, and one more is "
            "there while a new one is taken, but a backing chain may be only 16 deep (max_chain_depth); domains it "
            "applies to are refused"
        )
    ]


def test_a_rule_without_limit_is_warned_of(write: Write) -> None:
    path = write("policies: {p: {schedule: daily, keep: {yearly: all}}}\ndomains: {db01: [p]}\n")
    assert "may keep no limit (p) snapshots" in load_config(path).warnings[0]


def test_policies_beyond_what_any_libvirt_starts_are_warned_of(write: Write) -> None:
    path = write(
        """\
policies:
  p: {schedule: daily, keep: {last: 80}, max_chain_depth: 150}
  q: {schedule: daily, keep: {last: 70}, max_chain_depth: 150}
domains:
  db01: [p, q]
  db02: [q]
"""
    )
    (warning,) = load_config(path).warnings
    assert "domains.db01: the policies may keep 80 (p) + 70 (q) snapshots" in warning
    assert "may be only 150 deep (the limit of this libvirt)" in warning


def test_as_many_as_fit_with_the_one_that_is_taken_are_not_warned_of(write: Write) -> None:
    path = write("policies: {p: {schedule: daily, keep: {last: 15}}}\ndomains: {db01: [p]}\n")
    assert load_config(path).warnings == ()


def test_internal_policies_are_not_warned_of(write: Write) -> None:
    path = write("policies: {p: {schedule: daily, keep: {last: 99}, kind: internal}}\ndomains: {db01: [p]}\n")
    assert load_config(path).warnings == ()


def test_problems_of_values_and_of_references_are_shown_at_once(write: Write) -> None:
    path = write("tick: soon\ndomains: {db01: [gold]}\n")
    assert len(problems(path)) == 2


@pytest.mark.parametrize("line", ["  *: [p]", "  *-web: [p]", "  db01: [*]", "  db01: {a: *}"])
def test_an_unquoted_pattern_is_told_to_be_quoted(write: Write, line: str) -> None:
    (problem,) = problems(write(f"domains:\n{line}\n"))
    assert "must be quoted" in problem


def test_a_tab_is_called_a_tab(write: Write) -> None:
    (problem,) = problems(write("domains:\n\tdb01: []\n"))
    assert re.search(r"\btab", problem)


def test_the_uuid_of_a_domain_may_be_written_in_capitals(write: Write) -> None:
    uuid = "ABCDEFAB-2222-3333-4444-555555555555"
    config = load_config(write(f"policies: {{p: {{schedule: daily, keep: {{last: 1}}}}}}\ndomains: {{{uuid}: [p]}}"))
    assert list(config.selectors) == [uuid.lower()]
