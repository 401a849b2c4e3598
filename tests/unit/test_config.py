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
from rich.cells import cell_len

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
VALID_MANY = sorted(SAMPLES.glob("valid_many/*/kvmsnapd.yaml"))
INVALID_MANY = sorted(SAMPLES.glob("invalid_many/*/kvmsnapd.yaml"))
ALL_INVALID = INVALID + INVALID_MANY


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
    form = re.compile(rf"{re.escape(path.name)}(:\d+:\d+)?: \S|[ \d]{{5}} \|( |$)")
    assert [line for line in lines if not form.match(line)] == []


# Configurations of several files


def refusal_of(path: Path) -> ConfigError:
    """Return the error with which a configuration is refused."""
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    return refusal.value


def name_of(path: Path) -> str:
    """Return the name of a sample, be it a file or a directory."""
    return path.parent.name if path.name == "kvmsnapd.yaml" else path.stem


@pytest.mark.parametrize("path", VALID_MANY, ids=name_of)
def test_a_valid_sample_of_several_files_loads(path: Path) -> None:
    config = load_config(path)
    assert config.files == (str(path), *map(str, sorted(path.parent.glob("conf.d/[!.]*.yaml"))))


@pytest.mark.parametrize("path", INVALID_MANY, ids=name_of)
def test_an_invalid_sample_of_several_files_is_refused_with_exactly_its_text(path: Path) -> None:
    text = f"{refusal_of(path)}\n".replace(f"{path.parent}/", "")
    expected = path.parent / "expected.txt"
    if os.environ.get("REFRESH_SAMPLES"):
        expected.write_text(text, encoding="utf-8")
    assert text == expected.read_text(encoding="utf-8")


def test_every_directory_of_samples_has_its_main_file() -> None:
    assert sorted(SAMPLES.glob("*_many/*")) == sorted(path.parent for path in VALID_MANY + INVALID_MANY)
    assert sorted(SAMPLES.glob("*_many/*/expected.txt")) == [path.parent / "expected.txt" for path in INVALID_MANY]


# Every refusal, whatever it is about

LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


def as_shown(text: str) -> str:
    """Return text with what a terminal cannot show replaced, each character by one."""
    return "".join(c if c.isprintable() else " " if c == "\t" else "\ufffd" for c in text).rstrip()


@pytest.mark.parametrize("path", ALL_INVALID, ids=name_of)
def test_every_excerpt_is_the_line_with_a_caret_below_the_column(path: Path) -> None:
    for problem in refusal_of(path).problems:
        if not problem.excerpt:
            continue
        text = Path(problem.file).read_text(encoding="utf-8-sig").replace("hunter2", "*******")
        lines = LINE_BREAK.split(text)
        assert 1 <= problem.line <= len(lines)
        line = lines[problem.line - 1]
        assert 1 <= problem.column <= len(line) + 1
        source, carets = problem.excerpt.split("\n")
        assert int(source[:5]) == problem.line
        assert re.fullmatch(r" {6}\| +\^+", carets)
        at = carets.index("^") - 8
        token = as_shown(line[problem.column - 1 :][:20])
        shown = source[8:].ljust(at)
        # Of characters without width several end in the same cell.
        assert any(shown[i:].startswith(token) for i in range(len(shown) + 1) if cell_len(shown[:i]) == at)
        assert len(carets) - 8 <= max(cell_len(shown), at + 1)


@pytest.mark.parametrize("path", ALL_INVALID, ids=name_of)
def test_every_problem_that_can_be_is_shown_with_its_line(path: Path) -> None:
    unreadable = ("is not UTF-8 text", "is UTF-16 text", "cannot be read", "says nothing at all")
    assert [
        str(problem)
        for problem in refusal_of(path).problems
        if not problem.excerpt and not problem.message.startswith(unreadable)
    ] == []


@pytest.mark.parametrize(
    "path",
    ALL_INVALID,
    ids=name_of,
)
def test_problems_come_file_by_file_and_line_by_line(path: Path) -> None:
    files = [str(path), *map(str, sorted(path.parent.glob("conf.d/*.yaml")))]
    places = [(files.index(p.file), p.line, p.column) for p in refusal_of(path).problems]
    assert places == sorted(places)


@pytest.mark.parametrize("path", ALL_INVALID, ids=name_of)
def test_no_problem_is_told_twice_and_each_time_in_the_same_words(path: Path) -> None:
    told = refusal_of(path).problems
    assert len(set(told)) == len(told)
    assert refusal_of(path).problems == told


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


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "---\n...\n", "null\n", "{}\n", "\ufeff"])
def test_a_file_that_says_nothing_at_all_is_refused(write: Write, text: str) -> None:
    assert problems(write(text)) == [
        ("kvmsnapd.yaml: says nothing at all; for a host on which nothing is to be protected write `domains: {}`")
    ]


@pytest.mark.parametrize("text", ["domains: {}", "domains:", "tick: 30s", "policies:"])
def test_a_file_that_says_anything_else_is_the_defaults(write: Write, text: str) -> None:
    config = load_config(write(text))
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
        *('"1,5GiB"', "5 GiB or so", "10.5.5GiB"),
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


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *((word, True) for word in ("true", "yes", "on", "True", "YES", "oN", '"true"')),
        *((word, False) for word in ("false", "no", "off", "FALSE", "No", "OFF", '"off"')),
    ],
)
def test_a_switch_may_be_written_in_any_usual_way(write: Write, word: str, meant: bool) -> None:
    assert load_config(write(f"metrics: {{enabled: {word}}}")).settings.metrics.enabled is meant


@pytest.mark.parametrize("word", ["1", "0", "y", "N", "t", "1.0", '""', "enabled", "[true]", "{}", "null"])
def test_a_switch_is_nothing_else(write: Write, word: str) -> None:
    (message,) = messages(write(f"metrics: {{enabled: {word}}}"))
    assert message.startswith("metrics.enabled: write true or false")


@pytest.mark.parametrize("written", ["3", '"3"'])
def test_a_whole_number_may_be_quoted(write: Write, written: str) -> None:
    assert load_config(write(f"workers: {written}")).settings.workers == 3


@pytest.mark.parametrize(
    "written", ["03", '"03"', "0_3", "3.0", "3.5", "+3", "0x3", "3e0", '" 3"', "true", "[3]", "null"]
)
@pytest.mark.parametrize("key", ["workers", "metrics.port", "defaults.max_chain_depth"])
def test_a_number_is_written_in_one_way(write: Write, key: str, written: str) -> None:
    section, _, name = key.rpartition(".")
    line = f"{section}: {{{name}: {written}}}" if section else f"{name}: {written}"
    (message,) = messages(write(line))
    assert message.startswith(f"{key}: write a whole number")
    assert ("without 0 in front" in message) == ("03" in written)


# Files that cannot be read


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "missing.yaml"
    assert problems(path) == ["missing.yaml: cannot be read: No such file or directory; nothing was changed"]


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"{tmp_path.name}: cannot be read: Is a directory; nothing was changed"]


def test_a_file_of_more_than_four_mebibytes_is_refused_unread(write: Write) -> None:
    path = write("# " + "x" * 4 * 2**20)
    assert problems(path) == [
        "kvmsnapd.yaml: the file is larger than 4194304 bytes, or makes all files larger than that"
    ]


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
        "environment KVMSNAPD_METRICS__PORT: write a number up to 65535, not 65536"
    ]


def test_an_unknown_key_in_the_environment_is_refused_with_its_variable(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMSNAPD_METRICS__PROT", "9000")
    assert problems(write("domains: {}")) == [
        (
            "environment KVMSNAPD_METRICS__PROT: unknown key `prot`; did you mean `port`? Allowed are enabled, "
            "listen, port, web_config, textfile"
        )
    ]


def test_a_variable_in_small_letters_is_named_as_well(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("kvmsnapd_workers", "9")
    assert problems(write("workers: 2"))[0].startswith("environment ")


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("METRICS", "a section cannot be given whole; set single keys, as KVMSNAPD_METRICS__KEY"),
        ("DEFAULTS", "a section cannot be given whole; set single keys, as KVMSNAPD_DEFAULTS__KEY"),
        ("POLICIES", "`policies` belongs into a file, such as conf.d/10-this-host.yaml"),
        ("DOMAINS", "`domains` belongs into a file, such as conf.d/10-this-host.yaml"),
        ("DOMAINS__DB01", "`domains.db01` belongs into a file, such as conf.d/10-this-host.yaml"),
        ("POLICIES__P__SPLAY", "`policies.p.splay` belongs into a file, such as conf.d/10-this-host.yaml"),
        ("DEFAULTS__KEEP", "`defaults.keep` belongs into a file, such as conf.d/10-this-host.yaml"),
        ("DEFAULTS__KEEP__LAST", "`defaults.keep.last` belongs into a file, such as conf.d/10-this-host.yaml"),
        ("DEFAULTS__DISKS", "`defaults.disks` belongs into a file, such as conf.d/10-this-host.yaml"),
        ("DEFAULTS__HOOKS", "`defaults.hooks` belongs into a file, such as conf.d/10-this-host.yaml"),
        ("WATCH__NOW", "`watch` is a single value, and has no `now`"),
        ("LOG__LEVEL__MORE", "`log.level` is a single value, and has no `more`"),
        ("WACTH", "unknown key `wacth`; did you mean `watch`? Allowed are "),
        ("", "unknown key ``. Allowed are "),
    ],
)
@pytest.mark.parametrize("value", ["", "x", "{}", "true"])
def test_what_is_no_single_value_is_refused_in_the_environment(
    write: Write, monkeypatch: pytest.MonkeyPatch, variable: str, message: str, value: str
) -> None:
    monkeypatch.setenv(f"KVMSNAPD_{variable}", value)
    (line,) = problems(write("metrics: {port: 1}"))
    assert line.startswith(f"environment KVMSNAPD_{variable}: {message}")
    assert line.endswith(message) or message.endswith("Allowed are ")


def test_one_key_of_the_defaults_may_come_from_the_environment(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMSNAPD_DEFAULTS__MAX_CHAIN_DEPTH", "7")
    path = write(f"defaults: {{splay: 1m}}\npolicies: {{p: {KEEP_AND_SCHEDULE}}}\ndomains: {{db01: [p]}}\n")
    config = load_config(path)
    assert (config.policies["p"].max_chain_depth, config.policies["p"].splay) == (7, timedelta(minutes=1))
    assert config.environment.variables == {("defaults", "max_chain_depth"): "KVMSNAPD_DEFAULTS__MAX_CHAIN_DEPTH"}
    (place,) = (setting.place for setting in config.explain("db01", "p") if setting.key == "max_chain_depth")
    assert place == "environment KVMSNAPD_DEFAULTS__MAX_CHAIN_DEPTH"


@pytest.mark.parametrize(
    ("variable", "value"), [("KVMSNAPD_WORKERS", "9"), ("KVMSNAPD_DEFAULTS__SPLAY", "soon"), ("KVMSNAPD_DOMAINS", "{}")]
)
def test_what_is_wrong_in_the_environment_hides_nothing_of_the_files(
    write: Write, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    lines = problems(
        write(
            f"""\
tick: soon
policies:
  p: {{schedule: daily, keep: {{last: 1}}, consistency: memory}}
  q: {KEEP_AND_SCHEDULE}
domains:
  db01: [nope]
  db02: [q, q]
"""
        )
    )
    assert [line.split(": ")[:2] for line in lines] == [
        ["environment " + variable, lines[0].split(": ")[1]],
        ["kvmsnapd.yaml:1:7", "tick"],
        ["kvmsnapd.yaml:3:54", "policies.p.consistency"],
        ["kvmsnapd.yaml:6:10", "domains.db01[0]"],
        ["kvmsnapd.yaml:7:13", "domains.db02[1]"],
    ]


@pytest.mark.parametrize("section", ["", " null"])
def test_the_environment_may_give_a_key_of_a_section_that_stands_alone(
    write: Write, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    monkeypatch.setenv("KVMSNAPD_METRICS__PORT", "9000")
    assert load_config(write(f"metrics:{section}\n")).settings.metrics.port == 9000


@pytest.mark.parametrize("line", ["metrics: 5", "metrics: [port]"])
def test_a_section_of_another_form_is_refused_though_the_environment_gives_a_key_of_it(
    write: Write, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("KVMSNAPD_METRICS__PORT", "9000")
    assert problems(write(line))[0].startswith("kvmsnapd.yaml:1:10: metrics: write `key: value` lines below it")


def test_a_configuration_is_not_made_of_the_environment_alone(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMSNAPD_WATCH", "true")
    (line,) = problems(write("# nothing\n"))
    assert line.startswith("kvmsnapd.yaml: says nothing at all")


def test_a_variable_in_large_and_in_small_letters_is_refused_as_given_twice(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("kvmsnapd_workers", "3")
    monkeypatch.setenv("KVMSNAPD_WORKERS", "9")
    (line,) = problems(write("workers: 2"))
    assert line == "environment kvmsnapd_workers: gives the same as KVMSNAPD_WORKERS; unset one of them"


def test_of_the_name_of_a_variable_nothing_is_shown_that_a_terminal_would_obey(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMSNAPD_\x1b[2J", "1")
    (line,) = problems(write("workers: 2"))
    assert line.isprintable()


def test_a_variable_that_is_no_text_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMSNAPD_CONNECT", "test:///b\udcfcro")
    assert problems(write("domains: {}")) == ["environment KVMSNAPD_CONNECT: is not UTF-8 text"]


def test_variables_of_others_do_not_matter(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_UNPACKED", "/nowhere")
    load_config(write("domains: {}"))


def test_systemd_names_the_directories(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/service:/var/lib/second")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/service")
    config = load_config(write("domains: {}"))
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


# What a refusal must not do


def messages(path: Path) -> list[str]:
    """Return key and message of every problem, without places and excerpts."""
    return [f"{problem.key}: {problem.message}" for problem in refusal_of(path).problems]


KEEP_AND_SCHEDULE = "{schedule: hourly, keep: {last: 1}}"


@pytest.mark.parametrize("line", ["Timezone: UTC", "TICK: 10s", "Domains: {db01: [p]}", "dOMAINS: {db01: [nope]}"])
def test_a_key_at_the_top_in_capitals_is_unknown(write: Write, line: str) -> None:
    path = write(f"policies: {{p: {KEEP_AND_SCHEDULE}}}\n{line}\n")
    assert re.search(r"unknown key `\w+`; did you mean", messages(path)[0])


@pytest.mark.parametrize("variable", ["KVMSNAPD_DOMAINS", "KVMSNAPD_DOMAINS__DB01"])
def test_an_unknown_policy_in_the_environment_leaves_no_domain_unprotected(
    write: Write, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, '["nope"]' if variable.endswith("DB01") else '{"db01": ["nope"]}')
    (line,) = problems(write(f"policies: {{p: {KEEP_AND_SCHEDULE}}}\ndomains: {{db01: [p]}}\n"))
    assert re.fullmatch(rf"environment {variable}: `domains(\.db01)?` belongs into a file, .*", line)


@pytest.mark.parametrize("name", ["password_in_connect", "password_in_connect_with_a_wrong_key"])
def test_a_password_is_shown_to_nobody(name: str) -> None:
    told = str(refusal_of(SAMPLES / "invalid" / f"{name}.yaml"))
    assert "hunter2" not in told
    assert "://root:*******@" in told


@pytest.mark.parametrize(
    "text", ['"\\e[2J": 1', '"a\\nb": 1', 'domains: {"\\e[2J": [p]}', 'domains: {db01: ["\\u202e"]}', '"a\\rb": 1']
)
def test_what_a_terminal_would_obey_is_shown_escaped(write: Write, text: str) -> None:
    for problem in refusal_of(write(f"{text}\n")).problems:
        assert (problem.key + problem.message).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "policies: {base: {schedule: hourly, keep: {last: 1}}, p: {extends: bsae}}",
        "policies: {base: {schedule: hourly, keep: {last: 1}}, p: {extends: [base]}}",
        "policies: {base: hourly, p: {extends: base}}",
        "policies: {'bad name': {schedule: hourly, keep: {last: 1}}, p: {extends: 'bad name'}}",
        "defaults: [schedule, keep]\npolicies: {p: {splay: 1m}}",
        "defaults: {shedule: hourly, keep: {last: 1}}\npolicies: {p: {splay: 1m}}",
        "policies: {p: {shedule: hourly, keep: {last: 1}}}",
    ],
    ids=["unknown", "list", "base is a word", "base has a bad name", "defaults are a list", "in defaults", "misspelt"],
)
def test_nothing_is_called_missing_because_of_another_error(write: Write, text: str) -> None:
    assert [line for line in messages(write(text)) if "missing" in line] == []


def test_a_circle_hides_no_other_problem(write: Write) -> None:
    path = write(
        f"policies: {{a: {{extends: a}}, b: {KEEP_AND_SCHEDULE}, c: {{schedule: daily}}}}\ndomains: {{x: [b, b]}}"
    )
    assert [line.partition(":")[0] for line in messages(path)] == [
        "policies.a.extends",
        "policies.c.keep",
        "domains.x[1]",
    ]


def test_a_missing_key_hides_no_contradiction(write: Write) -> None:
    path = write("policies: {p: {keep: {last: 1}, consistency: memory}}\n")
    assert [line.partition(":")[0] for line in messages(path)] == ["policies.p.schedule", "policies.p.consistency"]


@pytest.mark.parametrize(
    "text",
    [
        "domains: {x: [bad name]}",
        "policies: {p: {schedule: daily, keep: {last: 1}, extends: bad name}}",
        "domains: {x: {keep: {last: 1}}}",
    ],
)
def test_one_error_in_the_name_of_a_policy_is_one_problem(write: Write, text: str) -> None:
    assert len(messages(write(text))) == 1


def test_an_error_that_aliases_repeat_is_one_problem() -> None:
    assert len(messages(SAMPLES / "invalid" / "anchor_with_a_problem.yaml")) == 1


def test_a_section_of_another_form_in_a_second_file_is_one_problem() -> None:
    assert len(messages(SAMPLES / "invalid_many" / "section_of_another_form" / "kvmsnapd.yaml")) == 2


@pytest.mark.parametrize("name", ["defaults_extend", "override_that_extends"])
def test_what_only_a_policy_can_extend_is_not_sent_to_defaults(name: str) -> None:
    assert "under defaults" not in messages(SAMPLES / "invalid" / f"{name}.yaml")[0]


@pytest.mark.parametrize("name", ["invalid/uuid_twice.yaml", "invalid_many/same_uuid_in_two_files/kvmsnapd.yaml"])
def test_of_a_uuid_that_is_given_twice_the_first_place_is_named(name: str) -> None:
    assert re.search(r"first in \S+\.yaml:\d+:3", messages(SAMPLES / name)[0])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("log: {level: INFO}", "info"),
        (f"policies: {{p: {KEEP_AND_SCHEDULE[:-1]}, KIND: internal}}}}", "kind"),
        (f"policies: {{standard: {KEEP_AND_SCHEDULE}}}\ndomains: {{x: [STANDARD]}}", "standard"),
        ("policies: {p: {schedule: Hourly, keep: {last: 1}}}", "hourly"),
        ("policies: {p: {schedule: dayly, keep: {last: 1}}}", "daily"),
    ],
)
def test_the_word_that_was_meant_is_named(write: Write, text: str, meant: str) -> None:
    assert f"did you mean `{meant}`?" in messages(write(text))[0]


@pytest.mark.parametrize(
    ("name", "line", "mark", "message"),
    [
        ("brace_not_closed_at_the_end", 4, "{", "not YAML: this brace is not closed by line 5"),
        ("quote_not_closed_before_other_keys", 3, "'", "not YAML: this quote is not closed by line 7"),
        ("bracket_not_closed", 4, "[", "not YAML: this bracket is not closed by line 5"),
    ],
)
def test_what_is_never_closed_is_called_so_where_it_begins(name: str, line: int, mark: str, message: str) -> None:
    (problem,) = refusal_of(SAMPLES / "invalid" / f"{name}.yaml").problems
    assert (problem.line, problem.message) == (line, message)
    source, caret = problem.excerpt.split("\n")
    assert source[caret.index("^")] == mark


def test_no_message_speaks_of_python() -> None:
    told = [line for path in ALL_INVALID for line in messages(path)]
    assert [line for line in told if re.search("input should|timedelta|assert_not|groupref|value error", line)] == []


def test_the_carets_are_as_wide_as_what_they_are_below(write: Write) -> None:
    (problem,) = refusal_of(write("データ: 1\n")).problems
    assert problem.excerpt.count("^") == 6


@pytest.mark.parametrize("key", ["state_directory", "runtime_directory"])
@pytest.mark.parametrize("value", ["kvmsnapd", '""', "~/kvmsnapd"])
def test_a_directory_that_depends_on_where_the_daemon_starts_is_refused(write: Write, key: str, value: str) -> None:
    assert messages(write(f"{key}: {value}\n")) == [f"{key}: write an absolute path"]


def test_a_regular_expression_of_alternatives_that_may_take_for_ever_is_refused(write: Write) -> None:
    selector = f"/{'(a|aa)' * 40}b/"
    assert messages(write(f"domains: {{'{selector}': []}}\n"))


def test_an_empty_regular_expression_is_refused(write: Write) -> None:
    assert messages(write("domains: {'//': []}\n"))


@pytest.mark.parametrize("text", ["? [policies]\n: {}\n", f"{'x' * 256}: 1\n"])
def test_a_file_of_one_wrong_key_is_not_said_to_say_nothing(write: Write, text: str) -> None:
    assert [line for line in messages(write(text)) if "says nothing" in line] == []


# What is shown of what was written


@pytest.mark.parametrize(
    "text",
    [
        "connect: qemu+ssh://root:{}@host/system",
        "conect: qemu+ssh://root:{}@host/system",
        "connect: [qemu+ssh://root:{}@host/system]",
        "domains: {{db01: [qemu+ssh://root:{}@host/system]}}",
        "domains: {{'qemu+ssh://root:{}@host/system': []}}",
        "defaults: {{hooks: {{after: {{command: http://u:{}@host}}}}}}",
    ],
)
def test_a_password_is_stars_of_its_length_and_the_rest_of_the_line_stays(write: Write, text: str) -> None:
    problem = refusal_of(write(text.format("s3cr+t:!") + "\n")).problems[0]
    source, carets = problem.excerpt.split("\n")
    assert source[8:] == text.format("*" * 8)
    assert len(carets) <= len(source)
    assert "s3cr" not in str(problem)


def test_a_password_with_an_at_sign_is_shown_to_nobody(write: Write) -> None:
    told = str(refusal_of(write("connect: qemu+ssh://root:s3c@r3t@host/system\n")))
    assert "s3c" not in told
    assert "r3t" not in told


@pytest.mark.parametrize(
    "text", ["'\u202ekey': 1", "domains: {'\u200b\u202eb': [p]}", "log: {level: '\u2066in'}", "tick: '\u202e1'"]
)
def test_neither_message_nor_excerpt_has_what_a_terminal_would_obey(write: Write, text: str) -> None:
    for line in str(refusal_of(write(f"{text}\n"))).split("\n"):
        assert line.isprintable()


def test_a_hundred_problems_are_told_and_the_others_are_counted(write: Write) -> None:
    path = write("".join(f"unknown{n}: 1\n" for n in range(100)))
    assert len(messages(path)) == 100
    path = write("".join(f"unknown{n}: 1\n" for n in range(107)))
    told = refusal_of(path).problems
    assert [problem.line for problem in told[:-1]] == list(range(1, 101))
    assert str(told[-1]) == f"{path}: and 7 more problems"


@pytest.mark.parametrize(
    "line",
    [
        *("timezone: {}", "workers: {}", "watch: {}", "log: {{level: {}}}", "metrics: {}", "domains: {{x: {}}}"),
        "tick: {}",
        "defaults: {{schedule: {}}}",
        "defaults: {{keep: {{last: {}}}}}",
        "defaults: {{keep: {{within: {}}}}}",
        "domains: {{x: [{}]}}",
    ],
)
def test_a_long_value_is_shown_by_its_beginning(write: Write, line: str) -> None:
    (problem,) = refusal_of(write(line.format("lemon" * 100) + "\n")).problems
    assert "lemon" * 8 in problem.message
    assert "lemon" * 13 not in problem.message
    assert all(len(part) <= 120 for part in problem.excerpt.split("\n"))


# What policies extend


def test_a_circle_names_only_those_within(write: Write) -> None:
    text = f"""\
policies:
  outside: {{extends: a, schedule: hourly, keep: {{last: 1}}}}
  a: {{extends: b}}
  b: {{extends: c}}
  c: {{extends: a}}
  other: {KEEP_AND_SCHEDULE}
domains: {{x: [outside, other]}}
"""
    assert messages(write(text)) == [
        "policies.a.extends: `a` extends `b` extends `c` extends `a`; one of them must stand on its own",
        "policies.b.extends: `b` extends `c` extends `a` extends `b`; one of them must stand on its own",
        "policies.c.extends: `c` extends `a` extends `b` extends `c`; one of them must stand on its own",
    ]


def a_ladder(steps: int) -> str:
    """Return policies of which the first extends the second, and so on, for so many steps."""
    lines = [f"  p{n}: {{extends: p{n + 1}}}" for n in range(steps)]
    return "\n".join(["policies:", *lines, f"  p{steps}: {KEEP_AND_SCHEDULE}", "domains: {x: [p0]}", ""])


def test_policies_extend_one_another_at_most_twenty_deep(write: Write) -> None:
    assert len(load_config(write(a_ladder(20))).policies) == 21
    assert messages(write(a_ladder(21))) == [
        "policies.p0.extends: more than 20 policies extend one another here; take some out"
    ]


# What patterns may cost


@pytest.mark.parametrize(
    "selector",
    [
        "/a+b*c?/",
        "/(web|db)-[0-9]+/",
        "/[a-z]*-[a-z]*-[0-9]*/",
        "/web-[0-9]{1,3}-(a|b|c)(d|e|f)/",
        f"/{'a?' * 3}x/",
    ],
)
def test_a_regular_expression_that_is_soon_done_is_accepted(write: Write, selector: str) -> None:
    assert list(load_config(write(f"domains: {{'{selector}': []}}")).selectors) == [selector]


@pytest.mark.parametrize(
    "selector",
    ["/.*.*.*.*x/", f"/{'a?' * 30}{'a' * 30}/", f"/{'(a|a)' * 25}b/", "/a*(b|c)*/", "/(a+)+/", "/(a|b*)(c*|d*)*/"],
)
def test_a_regular_expression_that_may_take_for_ever_is_refused(write: Write, selector: str) -> None:
    (message,) = messages(write(f"domains: {{'{selector}': []}}"))
    assert re.search("takes too long to match some names|may be repeated, or some names take for ever", message)


@pytest.mark.parametrize("selector", ["a" * 256, f"/{'a' * 254}/", f"{'a' * 255}*"])
def test_a_selector_is_no_longer_than_a_name_can_be(write: Write, selector: str) -> None:
    assert len(messages(write(f"domains: {{'{selector}': []}}"))) == 1
    assert load_config(write(f"domains: {{'{'a' * 255}': []}}")).selectors


# Hints


@pytest.mark.parametrize("name", ["colon_missing", "equals_sign", "colon_without_blank"])
def test_of_a_missing_colon_the_line_above_is_named(name: str) -> None:
    (problem,) = refusal_of(SAMPLES / "invalid" / f"{name}.yaml").problems
    assert "line above" in problem.message


@pytest.mark.parametrize("name", ["quote_within_a_quote", "bracket_too_many"])
def test_a_bracket_or_quote_too_many_is_not_called_indentation(name: str) -> None:
    (problem,) = refusal_of(SAMPLES / "invalid" / f"{name}.yaml").problems
    assert "indentation" not in problem.message


def test_an_override_without_the_name_of_its_policy_is_called_so() -> None:
    (message,) = messages(SAMPLES / "invalid" / "override_without_the_name_of_the_policy.yaml")
    assert "unknown policy" not in message


def test_of_a_key_that_one_use_of_a_policy_lacks_that_use_is_named(write: Write) -> None:
    text = "policies: {p: {schedule: daily}}\ndomains:\n  db01: {p: {keep: {last: 1}}}\n  db02: [p]\n"
    (line,) = problems(write(text))
    assert "db02" in line
