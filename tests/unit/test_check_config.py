"""``check-config`` and ``schema``: what they print, of which domains, and how they end."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from kvmsnapd.cli import main
from kvmsnapd.config.models import PolicyKeys

if TYPE_CHECKING:
    from collections.abc import Callable

    Write = Callable[..., str]
    Capture = pytest.CaptureFixture[str]

DEFAULT_HOST = "test:///default"
DEFAULT_UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"  # of its one domain, `test`
SCHEMA = Path(__file__).parents[2] / "config" / "kvmsnapd.schema.json"

CONFIG = """\
timezone: Europe/Berlin
defaults: {splay: 1m}
policies:
  standard: {schedule: hourly, keep: {last: 2}, kind: internal}
  nightly: {extends: standard, schedule: daily}
domains:
  test: {standard: {keep: {last: 3}}}
  web-*: [standard, nightly]
  "*eb-1": [nightly]
  /lab-[0-9]+/: [nightly]
  scratch-*: []
  ABCDEFAB-2222-3333-4444-555555555555: [nightly]
"""
UUID = "abcdefab-2222-3333-4444-555555555555"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a main file and files of conf.d; return the main file's path, relative to the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, **parts: str) -> str:
        Path("kvmsnapd.yaml").write_text(text, encoding="utf-8")
        for name, content in parts.items():
            Path("conf.d").mkdir(exist_ok=True)
            Path(f"conf.d/{name}").write_text(content, encoding="utf-8")
        return "kvmsnapd.yaml"

    return write


def check(capsys: Capture, config: str, *arguments: str, code: int = 0) -> str:
    """Return what ``check-config`` prints; it must end with this code and complain of nothing."""
    assert main(["check-config", "--config", config, *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def resolved(capsys: Capture, config: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Return what applies to which domain, as JSON says it."""
    found = json.loads(check(capsys, config, "--json", *arguments, code=code))
    assert len({answer["domain"] for answer in found}) == len(found)
    return {answer.pop("domain"): answer for answer in found}


CAVEAT = "Without --connect nobody knows which domains the UUIDs among the entries are."


def sections(text: str) -> list[str]:
    """Return the lines of a text that begin a domain."""
    return [line for line in text.splitlines() if not line.startswith(" ") and line not in {"", CAVEAT}]


# Without --resolved


def test_the_files_of_conf_d_are_counted(capsys: Capture, write: Write) -> None:
    config = write(CONFIG, **{"a.yaml": "domains: {db01: [nightly]}\n", "b.yaml": "", "c.yaml~": "{"})
    assert check(capsys, config).splitlines()[0] == (
        "kvmsnapd.yaml and 2 in conf.d: valid; 2 policies, 7 entries under domains"
    )


def test_each_policy_is_shown_with_what_it_takes_from_others(capsys: Capture, write: Write) -> None:
    assert check(capsys, write(CONFIG)).splitlines()[1:] == [
        "  standard: hourly, keep last=2, internal, Europe/Berlin",
        "  nightly: daily, keep last=2, internal, Europe/Berlin",
    ]


def test_a_configuration_without_domains_is_valid(capsys: Capture, write: Write) -> None:
    assert check(capsys, write("domains: {}")) == "kvmsnapd.yaml: valid; 0 policies, 0 entries under domains\n"


def test_a_configuration_that_says_nothing_is_refused(capsys: Capture, write: Write) -> None:
    assert main(["check-config", "--config", write("# nothing\n", **{"a.yaml": "# nothing either\n"})]) == 78
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (
        "",
        "kvmsnapd.yaml: says nothing at all; for a host on which nothing is to be protected write `domains: {}`\n",
    )


def test_an_empty_main_file_is_no_problem_if_a_part_says_something(capsys: Capture, write: Write) -> None:
    config = write("", **{"a.yaml": "domains:\n"})
    assert check(capsys, config) == "kvmsnapd.yaml and 1 in conf.d: valid; 0 policies, 0 entries under domains\n"


def test_a_file_that_ends_in_yml_is_a_warning(capsys: Capture, write: Write) -> None:
    config = write(CONFIG, **{"a.yml": "{"})
    warning = "conf.d/a.yml: is not read; files of conf.d end in .yaml"
    assert check(capsys, config).splitlines()[0] == f"warning: {warning}"
    assert json.loads(check(capsys, config, "--json"))["warnings"] == [warning]


def test_all_of_a_valid_configuration_as_json(capsys: Capture, write: Write) -> None:
    config = write(CONFIG, **{"a.yaml": "tick: 10s\n"})
    assert json.loads(check(capsys, config, "--json")) == {
        "files": ["kvmsnapd.yaml", "conf.d/a.yaml"],
        "policies": ["standard", "nightly"],
        "warnings": [],
        "findings": [],
        "problems": [],
    }


def test_problems_are_shown_with_their_excerpts_and_end_with_78(capsys: Capture, write: Write) -> None:
    config = write("tick: soon\n", **{"a.yaml": "domains: {db01: [standart]}\n"})
    assert main(["check-config", "--config", config]) == 78
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "kvmsnapd.yaml:1:7: tick: 'soon' is not a duration: write a number with a unit, such as 90s, 15m, 36h, 7d or "
        "1h30m\n"
        "    1 | tick: soon\n"
        "      |       ^^^^\n"
        "conf.d/a.yaml:1:18: domains.db01[0]: unknown policy `standart`. No policy is defined\n"
        "    1 | domains: {db01: [standart]}\n"
        "      |                  ^^^^^^^^\n"
    )


@pytest.mark.parametrize(
    "more", [[], ["--resolved"], ["--resolved", "db01"], ["--connect", DEFAULT_HOST]], ids=" ".join
)
def test_problems_as_json_are_objects_and_end_with_78(capsys: Capture, write: Write, more: list[str]) -> None:
    config = write("tick: soon\n", **{"a.yaml": "metrics:\n  prot: 1\n"})
    assert main(["check-config", "--json", "--config", config, *more]) == 78
    assert json.loads(capsys.readouterr().out) == {
        "problems": [
            {
                "file": "kvmsnapd.yaml",
                "line": 1,
                "column": 7,
                "key": "tick",
                "message": ("'soon' is not a duration: write a number with a unit, such as 90s, 15m, 36h, 7d or 1h30m"),
            },
            {
                "file": "conf.d/a.yaml",
                "line": 2,
                "column": 3,
                "key": "metrics.prot",
                "message": (
                    "unknown key `prot`; did you mean `port`? Allowed are enabled, listen, port, web_config, textfile"
                ),
            },
        ]
    }


def test_a_problem_of_no_line_has_none_as_json(capsys: Capture, write: Write) -> None:
    config = write("")
    Path("kvmsnapd.yaml").unlink()
    assert main(["check-config", "--json", "--config", config]) == 78
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    message = "cannot be read: No such file or directory; nothing was changed"
    assert problem == {"file": "kvmsnapd.yaml", "line": None, "column": None, "key": None, "message": message}


def test_a_problem_of_the_environment_names_the_variable_as_json(
    capsys: Capture, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMSNAPD_WORKERS", "9")
    assert main(["check-config", "--json", "--config", write("workers: 2\n")]) == 78
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["file"], problem["line"]) == ("environment KVMSNAPD_WORKERS", None)


# With --connect


def test_a_configuration_that_fits_its_host_has_no_findings(capsys: Capture, write: Write) -> None:
    config = write("policies: {p: {schedule: hourly, keep: {last: 2}}}\ndomains: {te*: [p]}\n")
    assert check(capsys, config, "--connect", DEFAULT_HOST).startswith("kvmsnapd.yaml: valid")


def test_entries_and_policies_without_domains_are_findings(capsys: Capture, write: Write) -> None:
    found = json.loads(check(capsys, write(CONFIG), "--json", "--connect", DEFAULT_HOST, code=1))
    assert found["findings"] == [
        f"kvmsnapd.yaml:12:3: domain '{UUID}' is configured, and libvirt has none of this name",
        "kvmsnapd.yaml:8:3: pattern 'web-*' fits no domain",
        "kvmsnapd.yaml:9:3: pattern '*eb-1' fits no domain",
        "kvmsnapd.yaml:10:3: pattern '/lab-[0-9]+/' fits no domain",
        "policy 'nightly' applies to no domain",
    ]


def test_a_policy_that_is_only_extended_is_no_finding(capsys: Capture, write: Write) -> None:
    config = write("policies: {base: {schedule: hourly, keep: {last: 2}}, p: {extends: base}}\ndomains: {test: [p]}\n")
    assert "finding" not in check(capsys, config, "--connect", DEFAULT_HOST)


# --resolved


def test_without_names_and_libvirt_each_entry_is_resolved(capsys: Capture, write: Write) -> None:
    found = resolved(capsys, write(CONFIG), "--resolved")
    assert {domain: (answer["coverage"], list(answer["policies"])) for domain, answer in found.items()} == {
        "test": ("protected", ["standard"]),
        "web-*": ("protected", ["standard", "nightly"]),
        "*eb-1": ("protected", ["nightly"]),
        "/lab-[0-9]+/": ("protected", ["nightly"]),
        "scratch-*": ("unprotected on purpose", []),
        UUID: ("protected", ["nightly"]),
    }
    assert {entry: place for answer in found.values() for entry, place in answer["entries"].items()} == {
        "test": "kvmsnapd.yaml:7:3",
        "web-*": "kvmsnapd.yaml:8:3",
        "*eb-1": "kvmsnapd.yaml:9:3",
        "/lab-[0-9]+/": "kvmsnapd.yaml:10:3",
        "scratch-*": "kvmsnapd.yaml:11:3",
        UUID: "kvmsnapd.yaml:12:3",
    }


def test_every_key_of_a_policy_is_resolved_with_its_place(capsys: Capture, write: Write) -> None:
    keys = resolved(capsys, write(CONFIG), "--resolved", "test")["test"]["policies"]["standard"]
    assert list(keys) == list(PolicyKeys.model_fields)
    assert keys["keep"] == {"value": {"last": 3}, "from": "kvmsnapd.yaml:7:21"}
    assert keys["schedule"] == {"value": "hourly", "from": "kvmsnapd.yaml:4:14"}
    assert keys["splay"] == {"value": "1m", "from": "kvmsnapd.yaml:2:12"}
    assert keys["timezone"] == {"value": "Europe/Berlin", "from": "kvmsnapd.yaml:1:1"}
    assert keys["max_age"]["from"] == "from the schedule"
    assert keys["memory"] == {"value": None, "from": "default"}


@pytest.mark.parametrize(
    ("name", "coverage", "entries"),
    [
        ("test", "protected", ["test"]),
        ("web-2", "protected", ["web-*"]),
        ("lab-17", "protected", ["/lab-[0-9]+/"]),
        (UUID, "protected", [UUID]),
        (UUID.upper(), "protected", [UUID]),
        ("scratch-1", "unprotected on purpose", ["scratch-*"]),
        (
            "web-1",
            "unprotected: *eb-1 and web-* fit it equally well and disagree; name it on a line of its own",
            ["*eb-1", "web-*"],
        ),
        (
            "lab-x",
            "unprotected: no entry under domains fits it; give it policies, or [] if that is meant",
            [],
        ),
        ("WEB-2", "unprotected: no entry under domains fits it; give it policies, or [] if that is meant", []),
    ],
)
def test_a_named_domain_is_resolved_without_libvirt(
    capsys: Capture, write: Write, name: str, coverage: str, entries: list[str]
) -> None:
    unclear = coverage.startswith("unprotected: ")
    found = resolved(capsys, write(CONFIG), "--resolved", name, code=int(unclear))
    assert list(found) == [name]
    assert (found[name]["coverage"], list(found[name]["entries"])) == (coverage, entries)
    assert bool(found[name]["policies"]) == (coverage == "protected")


def test_several_domains_are_resolved_in_the_order_asked(capsys: Capture, write: Write) -> None:
    config = write(CONFIG)
    words = ("--resolved", "web-2", "test", "nobody")
    assert list(resolved(capsys, config, *words, code=1)) == ["web-2", "test", "nobody"]
    assert sections(check(capsys, config, *words, code=1)) == [
        "web-2: protected",
        "test: protected",
        "nobody: unprotected: no entry under domains fits it; give it policies, or [] if that is meant",
    ]


def test_the_text_names_the_entry_and_has_a_line_for_each_key_that_is_yaml(capsys: Capture, write: Write) -> None:
    lines = check(capsys, write(CONFIG), "--resolved", "test").splitlines()
    assert lines[:5] == [CAVEAT, "", "test: protected", "  by kvmsnapd.yaml:7:3: test", "  standard:"]
    found = yaml.safe_load("\n".join(lines[4:]))["standard"]
    assert list(found) == list(PolicyKeys.model_fields)
    assert (found["schedule"], found["keep"], found["memory"]) == ("hourly", {"last": 3}, None)
    form = re.compile(r"    (\w+): .*\S +# (\S.*)")
    assert [line for line in lines[5:] if line and not form.fullmatch(line)] == []
    places = {key: place for line in lines[5:] for key, place in form.findall(line)}
    assert list(places) == list(PolicyKeys.model_fields)
    assert {key: places[key] for key in ("keep", "splay", "max_age", "memory")} == {
        "keep": "kvmsnapd.yaml:7:21",
        "splay": "kvmsnapd.yaml:2:12",
        "max_age": "from the schedule",
        "memory": "default",
    }
    assert len({line.index("# ") for line in lines[5:] if line}) == 1


@pytest.mark.parametrize(
    ("words", "told"), [(["test"], True), ([], False), (["test", "--connect", DEFAULT_HOST], False)], ids=str
)
def test_without_libvirt_uuids_among_the_entries_are_a_caveat(
    capsys: Capture, write: Write, words: list[str], told: bool
) -> None:
    assert (CAVEAT in check(capsys, write(CONFIG), "--resolved", *words)) == told
    without = CONFIG.replace(UUID.upper(), "db-*")
    assert CAVEAT not in check(capsys, write(without), "--resolved", *words)


def test_both_entries_of_an_ambiguous_domain_are_named_with_their_places(capsys: Capture, write: Write) -> None:
    assert check(capsys, write(CONFIG), "--resolved", "web-1", code=1).splitlines()[3:] == [
        "  by kvmsnapd.yaml:9:3: *eb-1",
        "  by kvmsnapd.yaml:8:3: web-*",
        "",
    ]


def test_places_are_those_of_the_files_of_conf_d(capsys: Capture, write: Write) -> None:
    config = write(CONFIG, **{"a.yaml": "domains:\n  db01: {nightly: {timezone: Asia/Tokyo}}\n"})
    answer = resolved(capsys, config, "--resolved", "db01")["db01"]
    assert answer["entries"] == {"db01": "conf.d/a.yaml:2:3"}
    assert answer["policies"]["nightly"]["timezone"] == {"value": "Asia/Tokyo", "from": "conf.d/a.yaml:2:20"}


def test_values_with_brackets_are_shown_as_they_are(capsys: Capture, write: Write) -> None:
    config = write(CONFIG + "  db01: {standard: {kind: external, disks: {exclude: ['[bold]x', '/dev/*']}}}\n")
    assert "{include: [], exclude: ['[bold]x', /dev/*]}" in check(capsys, config, "--resolved", "db01")


def test_a_long_value_takes_no_room_from_key_and_place(capsys: Capture, write: Write) -> None:
    command = f"[/usr/local/sbin/hook, {'x' * 500}]"
    config = write(f"{CONFIG}  db01:\n    standard:\n      hooks: {{after: {{command: {command}}}}}\n")
    lines = check(capsys, config, "--resolved", "db01").splitlines()
    assert f"    max_chain_depth: 16{' ' * 37}  # default" in lines
    (long,) = (line for line in lines if line.startswith("    hooks: "))
    assert "x" * 500 in long
    assert long.endswith("}  # kvmsnapd.yaml:15:7")


def test_on_a_narrow_terminal_key_and_place_are_still_to_be_read(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "a-folder-as-long-as-those-of-packages-are"
    folder.mkdir()
    path = folder / "kvmsnapd.yaml"
    path.write_text(Path(write(CONFIG)).read_text(encoding="utf-8"), encoding="utf-8")
    terminal, other_end = pty.openpty()
    command = [sys.executable, "-m", "kvmsnapd", "check-config", "--config", str(path), "--resolved", "test"]
    with subprocess.Popen(
        command, stdout=other_end, stderr=other_end, env={**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    ) as process:
        os.close(other_end)
        text = ""
        with suppress(OSError):  # how a terminal ends
            while part := os.read(terminal, 4096):
                text += part.decode()
        assert process.wait(30) == 0
    os.close(terminal)
    for word in ("max_chain_depth", "kvmsnapd.yaml:7:21", "kvmsnapd.yaml:4:14"):
        assert word in text


def test_without_entries_nothing_is_resolved(capsys: Capture, write: Write) -> None:
    assert check(capsys, write("domains: {}"), "--resolved") == ""
    assert check(capsys, write("domains: {}"), "--resolved", "--json") == "[]\n"


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 0),
        (["test", "scratch-1"], 0),
        (["web-1"], 1),
        (["nobody"], 1),
        (["test", "nobody"], 1),
        (["nobody", "test"], 1),
    ],
    ids=str,
)
def test_what_protects_nothing_though_nobody_asked_for_that_ends_with_1(
    capsys: Capture, write: Write, form: list[str], words: list[str], code: int
) -> None:
    assert check(capsys, write(CONFIG), *form, "--resolved", *words, code=code)


def test_with_libvirt_each_of_its_domains_is_resolved(capsys: Capture, write: Write) -> None:
    found = resolved(capsys, write(CONFIG), "--resolved", "--connect", DEFAULT_HOST)
    assert {domain: answer["coverage"] for domain, answer in found.items()} == {"test": "protected"}
    found = resolved(capsys, write("domains: {other: []}\n"), "--resolved", "--connect", DEFAULT_HOST, code=1)
    assert found["test"]["coverage"].startswith("unprotected: no entry")


@pytest.mark.parametrize(
    "word",
    ["test", DEFAULT_UUID, DEFAULT_UUID.upper()],
)
def test_with_libvirt_a_name_and_a_uuid_are_the_same_domain(capsys: Capture, write: Write, word: str) -> None:
    by_uuid = CONFIG.replace("test:", f"{DEFAULT_UUID}:")
    for text, entry in ((CONFIG, "test"), (by_uuid, DEFAULT_UUID)):
        found = resolved(capsys, write(text), "--connect", DEFAULT_HOST, "--resolved", word)
        assert found["test"]["entries"] == {entry: "kvmsnapd.yaml:7:3"}
        assert list(found["test"]["policies"]) == ["standard"]


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_with_libvirt_a_domain_that_it_does_not_have_is_called_so(
    capsys: Capture, write: Write, form: list[str]
) -> None:
    for word, hint in (("tset", "; did you mean 'test'?"), (UUID, "; `kvmsnapd status` lists all")):
        arguments = ["check-config", *form, "--config", write(CONFIG), "--connect", DEFAULT_HOST, "--resolved"]
        assert main([*arguments, "test", word]) == 1
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", f"kvmsnapd: libvirt has no domain {word!r}{hint}\n")


def test_an_unreachable_libvirt_ends_with_3(capsys: Capture, write: Write) -> None:
    where = "qemu+unix:///system?socket=/nonexistent"
    assert main(["check-config", "--config", write(CONFIG), "--resolved", "test", "--connect", where]) == 3
    captured = capsys.readouterr()
    assert (captured.out, captured.err.startswith("kvmsnapd: cannot reach libvirt at ")) == ("", True)


def test_libvirt_is_not_asked_about_a_configuration_that_is_refused(capsys: Capture, write: Write) -> None:
    where = "qemu+unix:///system?socket=/nonexistent"
    assert main(["check-config", "--config", write("tick: soon\n"), "--connect", where]) == 78
    assert "libvirt" not in capsys.readouterr().err


# schema


def test_the_schema_is_json_and_that_of_the_repository(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == SCHEMA.read_text(encoding="utf-8")
    assert json.loads(captured.out)["title"] == "kvmsnapd configuration"


def test_the_schema_needs_no_configuration(capsys: Capture, tmp_path: Path) -> None:
    assert main(["schema", "--config", str(tmp_path / "missing.yaml")]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"
