"""What `kvmsnapd init` proposes for which domains, and what it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsnapd.cli import EXIT_CONFIG, EXIT_USAGE, main
from kvmsnapd.cli import init as init_command
from kvmsnapd.cli.init import propose
from kvmsnapd.config import load_contents
from kvmsnapd.config.reference import render_default_file
from kvmsnapd.demo import write_test_host
from kvmsnapd.first_config import POLICIES, choose
from kvmsnapd.matching import Coverage, assign
from kvmsnapd.model import DomainState, Kind, Restoring
from tests.builders import ANY_LIBVIRT, a_disk, a_domain, a_snapshot, at

if TYPE_CHECKING:
    from kvmsnapd.config import Config
    from kvmsnapd.model import Domain

NOW = at("2026-11-22T12:00:00Z")
OFFERED = load_contents([(Path("offered"), f"policies:\n{''.join(POLICIES.values())}".encode())]).policies


def proposed(*domains: Domain) -> tuple[str, Config]:
    text = propose(domains, ANY_LIBVIRT, now=NOW, timezone="Europe/Berlin", connect=None).text
    return text, load_contents([(Path("init"), text.encode())])


def policies_of(config: Config) -> dict[str, list[str]]:
    return {selector: [policy.name for policy in policies] for selector, policies in config.selectors.items()}


def test_a_domain_gets_what_fits_it_and_the_comment_says_what_that_is_worth() -> None:
    text, config = proposed(
        a_domain(name="db", uuid="1", agent_connected=True),
        a_domain(name="old", uuid="2", agent_connected=False),
        a_domain(name="off", uuid="3", state=DomainState.SHUT_OFF),
        a_domain(a_snapshot(kind=Kind.INTERNAL), name="inner", uuid="4"),
        a_domain(name="brief", uuid="5", persistent=False),
        a_domain(name="saved", uuid="6", managed_save=True),
    )
    assert policies_of(config) == {
        "db": ["standard"],
        "old": ["standard"],
        "off": ["standard"],
        "inner": ["inside"],
        "brief": [],
        "saved": ["standard"],
    }
    before = {
        line.strip().partition(":")[0]: above
        for above, line in zip(text.splitlines(), text.splitlines()[1:], strict=False)
    }
    assert "frozen for each snapshot" in before["db"]
    assert "virt-manager: Add Hardware" in before["old"]
    assert "Shut off now" in before['"off"']
    assert "virsh define" in before["brief"]
    assert "Not now: " in text
    assert str(config.policies["standard"].timezone) == "Europe/Berlin"


@pytest.mark.parametrize(
    "passing",
    [
        {"managed_save": True, "state": DomainState.SHUT_OFF},
        {"state": DomainState.UNSETTLED, "state_detail": "crashed"},
        {"disks": (a_disk(block_job=True),)},
    ],
)
def test_what_passes_does_not_hide_that_the_domain_needs_the_other_kind(passing: dict[str, Any]) -> None:
    text, config = proposed(a_domain(a_snapshot(kind=Kind.INTERNAL), name="inner", **passing))
    assert policies_of(config) == {"inner": ["inside"]}
    assert "Not now: " in text


def test_what_passes_does_not_hide_that_nothing_is_possible() -> None:
    text, config = proposed(
        a_domain(name="brief", persistent=False, state=DomainState.UNSETTLED, state_detail="crashed")
    )
    assert policies_of(config) == {"brief": []}
    assert "Not now: " not in text


def test_names_that_differ_in_their_number_become_a_pattern_if_it_fits_nobody_else() -> None:
    _, config = proposed(*(a_domain(name=name, uuid=name) for name in ("web-1", "web-2", "db1", "db2", "dbase", "x7")))
    assert set(config.selectors) == {"web-*", "db1", "db2", "x7"} | {"dbase"}


def test_a_pattern_is_for_those_of_one_kind_only() -> None:
    _, config = proposed(
        *(a_domain(name=f"web-{number}", uuid=str(number), agent_connected=number < 3) for number in (1, 2, 3))
    )
    assert set(config.selectors) == {"web-1", "web-2", "web-3"}


def test_a_domain_whose_restore_was_cut_off_is_not_given_up() -> None:
    snapshot = a_snapshot()
    assert snapshot.mark
    mark = replace(snapshot.mark, restoring=Restoring(NOW, (), ran=False))
    text, config = proposed(a_domain(replace(snapshot, mark=mark), name="db", uuid="1"))
    assert policies_of(config) == {"db": ["standard"]}
    assert "Not now: " in text


def test_a_host_without_domains_gets_a_beginning() -> None:
    text, config = proposed()
    assert dict(config.selectors) == {}
    assert "libvirt has no domain yet" in text


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
            | st.sampled_from(
                [
                    "yes",
                    "null",
                    "a*",
                    "[x]",
                    "-",
                    "?",
                    "#",
                    "a: b",
                    "1",
                    "1e3",
                    "~",
                    "!x",
                    "&a",
                    "web-1",
                    "web-2",
                    "web-03",
                ]
            )
            | st.from_regex(r"[a-c][-_.]?[0-9]{1,2}", fullmatch=True),
            st.booleans(),
            st.booleans(),
            st.sampled_from(DomainState),
            st.booleans(),
        ),
        unique_by=lambda facts: facts[0],
        max_size=12,
    )
)
def test_every_domain_gets_what_was_meant_for_it_whatever_its_name(
    facts: list[tuple[str, bool, bool, DomainState, bool]],
) -> None:
    domains = [
        a_domain(
            *([a_snapshot(kind=Kind.INTERNAL)] if inner else []),
            name=name,
            uuid=f"{number:08x}-0000-4000-8000-000000000000",
            agent_connected=agent,
            persistent=persistent,
            state=state,
        )
        for number, (name, agent, persistent, state, inner) in enumerate(facts)
    ]
    _, config = proposed(*domains)
    for assignment, domain in zip(assign(config.selectors, domains), domains, strict=True):
        expected = Coverage.PROTECTED if domain.persistent else Coverage.UNPROTECTED_ON_PURPOSE
        assert assignment.coverage is expected, (domain.name, dict(config.selectors))
        chosen = choose(domain, OFFERED, ANY_LIBVIRT, now=NOW).policy
        assert [policy.name for policy in assignment.policies] == ([chosen] if chosen else [])


def test_it_prints_and_writes_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = write_test_host(tmp_path, {"db01": True, "web-1": True, "web-2": False})
    config = tmp_path / "kvmsnapd.yaml"
    command = ["init", "--config", str(config), "--connect", uri]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "3 of 3 domain(s) protected; nothing was written" in printed.err
    assert not config.exists()
    assert main([*command, "--write"]) == 0
    assert config.read_text() == printed.out
    assert config.stat().st_mode & 0o777 == 0o644
    assert capsys.readouterr().out.startswith(f"{config}: written, 3 of 3 domain(s) protected")
    assert main(["check-config", "--config", str(config), "--connect", uri]) == 0


def test_it_takes_the_place_of_the_shipped_file_and_of_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = write_test_host(tmp_path, {"db01": True})
    config = tmp_path / "kvmsnapd.yaml"
    command = ["init", "--config", str(config), "--connect", uri, "--write"]
    config.write_text(render_default_file())
    assert main(command) == 0
    written = config.read_text() + "# mine\n"
    config.write_text(written)
    assert main(command) == EXIT_USAGE
    assert "exists and is not the file that is shipped; nothing was written" in capsys.readouterr().err
    assert config.read_text() == written


def test_where_it_cannot_write_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = write_test_host(tmp_path, {"db01": True})
    config = tmp_path / "nowhere/kvmsnapd.yaml"
    assert main(["init", "--config", str(config), "--connect", uri, "--write"]) == EXIT_USAGE
    assert f"{config}: cannot be written: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("shipped", [True, False])
def test_it_leaves_alone_what_conf_d_protects_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, shipped: bool
) -> None:
    uri = write_test_host(tmp_path, {"db01": True})
    config, part = tmp_path / "kvmsnapd.yaml", tmp_path / "conf.d/mine.yaml"
    if shipped:
        config.write_text(render_default_file())
    part.parent.mkdir()
    part.write_text("log: {level: debug}\ndomains: {db01: []}\n")
    assert main(["init", "--config", str(config), "--connect", uri, "--write"]) == EXIT_USAGE
    assert f"{part}:2:1: `domains` is given already; nothing was written" in capsys.readouterr().err
    assert config.exists() is shipped


def test_it_writes_beside_a_conf_d_that_is_about_something_else(tmp_path: Path) -> None:
    uri = write_test_host(tmp_path, {"db01": True})
    config, part = tmp_path / "kvmsnapd.yaml", tmp_path / "conf.d/mine.yaml"
    part.parent.mkdir()
    part.write_text("log: {level: debug}\n")
    assert main(["init", "--config", str(config), "--connect", uri, "--write"]) == 0
    assert main(["check-config", "--config", str(config), "--connect", uri]) == 0


def test_a_conf_d_that_cannot_be_understood_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, part = tmp_path / "kvmsnapd.yaml", tmp_path / "conf.d/mine.yaml"
    part.parent.mkdir()
    part.write_text("log: {level: debug\n")
    assert main(["init", "--config", str(config), "--write"]) == EXIT_CONFIG
    assert str(part) in capsys.readouterr().err
    assert not config.exists()


def test_a_configuration_that_cannot_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--config", str(tmp_path), "--write"]) == EXIT_USAGE
    assert f"{tmp_path}: cannot be read: Is a directory; nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["/usr/share/zoneinfo/Mars/Phobos", "/nowhere", None])
def test_a_host_whose_time_zone_is_not_known_gets_utc_and_is_told(
    target: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    localtime = tmp_path / "localtime"
    if target:
        localtime.symlink_to(target)
    monkeypatch.setattr(init_command, "_LOCALTIME", localtime)
    uri = write_test_host(tmp_path, {"db01": True})
    assert main(["init", "--connect", uri]) == 0
    assert "no name that is known here; change this if need be.\ntimezone: UTC\n" in capsys.readouterr().out


def test_a_disk_that_cannot_be_covered_is_named() -> None:
    text, config = proposed(
        a_domain(name="san", uuid="1", disks=(a_disk(path=None, source_type="network", format="raw"),))
    )
    assert policies_of(config) == {"san": []}
    assert "vda" in text
