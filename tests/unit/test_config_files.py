"""The files of a configuration: which are read, in which order, which are refused, and what their fingerprint tells."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.config import fingerprint, load_config, load_contents, read_contents
from kvmsnapd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

POLICY = "policies:\n  standard: {schedule: hourly, keep: {last: 2}}\n"
FOUR_MEBIBYTES = 4 * 2**20


@pytest.fixture
def main_file(tmp_path: Path) -> Path:
    """Provide a main file with one policy, and an empty conf.d beside it."""
    path = tmp_path / "kvmsnapd.yaml"
    path.write_text(POLICY, encoding="utf-8")
    (tmp_path / "conf.d").mkdir()
    return path


def add(main_file: Path, name: str, text: str = "") -> Path:
    """Write a file of conf.d and return its path."""
    path = main_file.parent / "conf.d" / name
    path.write_text(text, encoding="utf-8")
    return path


def files(main_file: Path) -> list[str]:
    """Return the files that are read, relative to the folder of the main one."""
    return [str(Path(file).relative_to(main_file.parent)) for file in load_config(main_file).files]


def problems(main_file: Path) -> list[str]:
    """Return the first line of each problem with which a configuration is refused."""
    with pytest.raises(ConfigError) as refusal:
        load_config(main_file)
    return [
        str(problem).split("\n")[0].replace(f"{main_file.parent}/", "").replace(str(main_file.parent), ".")
        for problem in refusal.value.problems
    ]


def fingerprint_of(main_file: Path) -> str:
    """Return the fingerprint of what is in the files now; of files that cannot be read, what is wrong with them."""
    try:
        return fingerprint(read_contents(main_file)[0])
    except ConfigError as error:
        return f"unreadable: {error}"


# Which files are read


def test_without_conf_d_the_main_file_is_all(main_file: Path) -> None:
    (main_file.parent / "conf.d").rmdir()
    assert files(main_file) == ["kvmsnapd.yaml"]


def test_an_empty_conf_d_adds_nothing(main_file: Path) -> None:
    assert files(main_file) == ["kvmsnapd.yaml"]


def test_files_are_read_in_the_order_of_their_names_whenever_they_were_written(main_file: Path) -> None:
    for name in ("b.yaml", "10-web.yaml", "a.yaml", "2-db.yaml", "B.yaml", "a-b.yaml"):
        add(main_file, name)
    names = ("10-web.yaml", "2-db.yaml", "B.yaml", "a-b.yaml", "a.yaml", "b.yaml")
    assert files(main_file) == ["kvmsnapd.yaml", *(f"conf.d/{name}" for name in names)]


def test_entries_come_in_the_order_of_the_files(main_file: Path) -> None:
    add(main_file, "b.yaml", "domains: {b: [standard], c: []}\n")
    add(main_file, "a.yaml", "domains: {z: [standard]}\npolicies: {other: {schedule: daily, keep: {last: 1}}}\n")
    config = load_config(main_file)
    assert list(config.selectors) == ["z", "b", "c"]
    assert list(config.policies) == ["standard", "other"]


@pytest.mark.parametrize(
    "name",
    [
        *(".hidden.yaml", ".a.yaml.swp", ".#a.yaml", "#a.yaml#", "a.yaml~", "a.yaml.bak", "a.yaml.dpkg-old"),
        *("a.yaml.dpkg-new", "a.yaml.dpkg-dist", "a.yaml.ucf-old", "a.yaml.rpmsave", "a.yaml.rpmnew", "README", "yaml"),
        *("a.json", ".yml", ".a.yml", ".a.YAML", "#a.yml", "a.yml.bak", "yml", "#.yaml", "a.yaml.#"),
    ],
)
def test_what_others_leave_behind_is_passed_over_without_a_word(main_file: Path, name: str) -> None:
    add(main_file, name, "{ no yaml: [\n")
    config = load_config(main_file)
    assert (files(main_file), config.warnings) == (["kvmsnapd.yaml"], ())


@pytest.mark.parametrize("name", ["a.yml", "a.YML", "a.YAML", "a.Yaml"])
def test_a_file_of_almost_the_right_name_is_warned_of_and_not_read(main_file: Path, name: str) -> None:
    path = add(main_file, name, "{ no yaml: [\n")
    assert load_config(main_file).warnings == (f"{path}: is not read; files of conf.d end in .yaml",)
    assert files(main_file) == ["kvmsnapd.yaml"]


def test_a_folder_within_conf_d_is_not_looked_into(main_file: Path) -> None:
    folder = main_file.parent / "conf.d" / "disabled"
    folder.mkdir()
    (folder / "a.yaml").write_text("{ no yaml: [\n", encoding="utf-8")
    assert files(main_file) == ["kvmsnapd.yaml"]


def test_a_link_is_read_as_what_it_points_to(main_file: Path) -> None:
    elsewhere = main_file.parent / "elsewhere"
    elsewhere.write_text("domains: {db01: [standard]}\n", encoding="utf-8")
    (main_file.parent / "conf.d" / "a.yaml").symlink_to(elsewhere)
    assert list(load_config(main_file).selectors) == ["db01"]
    assert load_config(main_file).place_of("db01") == f"{main_file.parent}/conf.d/a.yaml:1:11"


def test_conf_d_is_looked_for_beside_the_main_file_as_it_is_named(main_file: Path, tmp_path: Path) -> None:
    add(main_file, "a.yaml", "domains: {db01: [standard]}\n")
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "kvmsnapd.yaml").symlink_to(main_file)
    assert load_config(folder / "kvmsnapd.yaml").selectors == {}


def test_a_main_file_may_be_named_without_its_folder(main_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(main_file, "a.yaml", "domains: {db01: [standard]}\n")
    monkeypatch.chdir(main_file.parent)
    config = load_config(Path(main_file.name))
    assert config.files == ("kvmsnapd.yaml", "conf.d/a.yaml")
    assert fingerprint_of(Path(main_file.name)) == fingerprint(config.contents)


def test_a_policy_of_any_file_may_be_used_in_any_file(main_file: Path) -> None:
    add(main_file, "a.yaml", "domains: {db01: [nightly]}\n")
    add(main_file, "b.yaml", "policies: {nightly: {extends: standard, schedule: daily}}\n")
    (policy,) = load_config(main_file).selectors["db01"]
    assert (str(policy.schedule), str(policy.keep)) == ("daily", "last=2")


def test_sections_are_merged_key_by_key_and_no_deeper(main_file: Path) -> None:
    add(main_file, "a.yaml", "defaults: {splay: 1m}\nmetrics: {port: 1}\nlog:\n")
    add(main_file, "b.yaml", "defaults: {max_chain_depth: 5}\nmetrics: {listen: '::1'}\nlog: {level: debug}\n")
    settings = load_config(main_file).settings
    assert (settings.metrics.port, settings.metrics.listen, settings.log.level) == (1, "::1", "debug")
    assert settings.defaults.model_fields_set == {"splay", "max_chain_depth"}
    add(main_file, "c.yaml", "policies: {standard: {splay: 2m}}\n")
    assert problems(main_file) == [
        "conf.d/c.yaml:1:12: policies.standard: `standard` is given twice, first in kvmsnapd.yaml:2:3; keep one of them"
    ]


# What cannot be read


def test_a_directory_called_like_a_file_is_refused(main_file: Path) -> None:
    (main_file.parent / "conf.d" / "x.yaml").mkdir()
    assert problems(main_file) == ["conf.d/x.yaml: cannot be read: Is a directory; nothing was changed"]


def test_a_conf_d_that_is_a_file_is_refused(main_file: Path) -> None:
    folder = main_file.parent / "conf.d"
    folder.rmdir()
    folder.write_text(POLICY, encoding="utf-8")
    assert problems(main_file) == ["conf.d: cannot be read: Not a directory; nothing was changed"]


def test_a_conf_d_that_points_nowhere_is_refused(main_file: Path) -> None:
    folder = main_file.parent / "conf.d"
    folder.rmdir()
    folder.symlink_to("not-mounted")
    assert problems(main_file) == ["conf.d: leads to nothing; nothing was changed"]


def test_a_conf_d_that_points_to_itself_is_refused(main_file: Path) -> None:
    folder = main_file.parent / "conf.d"
    folder.rmdir()
    folder.symlink_to("conf.d")
    assert problems(main_file) == ["conf.d: cannot be read: Too many levels of symbolic links; nothing was changed"]


def test_a_link_to_nowhere_is_refused_and_not_passed_over(main_file: Path) -> None:
    (main_file.parent / "conf.d" / "a.yaml").symlink_to("nowhere")
    assert problems(main_file) == ["conf.d/a.yaml: cannot be read: No such file or directory; nothing was changed"]


def test_a_link_to_itself_is_refused(main_file: Path) -> None:
    (main_file.parent / "conf.d" / "a.yaml").symlink_to("a.yaml")
    assert problems(main_file) == [
        "conf.d/a.yaml: cannot be read: Too many levels of symbolic links; nothing was changed"
    ]


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_and_not_waited_for(main_file: Path) -> None:
    os.mkfifo(main_file.parent / "conf.d" / "a.yaml")
    main_file.unlink()
    os.mkfifo(main_file)
    assert problems(main_file) == [
        "kvmsnapd.yaml: cannot be read: it is no regular file; nothing was changed",
        "conf.d/a.yaml: cannot be read: it is no regular file; nothing was changed",
    ]


def test_a_socket_is_refused(main_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(main_file.parent / "conf.d")  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("a.yaml")
    (line,) = problems(main_file)
    assert line.startswith("conf.d/a.yaml: cannot be read: ")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("device", ["zero", "null", "tty"])
def test_a_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"^/dev/{device}: cannot be read: .*; nothing was changed$"):
        load_config(Path("/dev") / device)


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*embedded null .*; nothing was changed"):
        load_config(Path("a\0b"))


def test_every_file_that_cannot_be_read_is_named_at_once(main_file: Path) -> None:
    add(main_file, "a.yaml", "domains: {db01: [standard\n")
    (main_file.parent / "conf.d" / "b.yaml").symlink_to("nowhere")
    add(main_file, "c.yaml").chmod(0o666)
    (main_file.parent / "conf.d" / "d.yaml").mkdir()
    assert [line.split(": ")[0] for line in problems(main_file)] == [f"conf.d/{name}.yaml" for name in "bcd"]


def test_every_file_that_cannot_be_understood_is_named_at_once(main_file: Path) -> None:
    add(main_file, "a.yaml", "domains: {db01: [standard\n")
    add(main_file, "c.yaml").write_bytes("büro: 1\n".encode("latin-1"))
    add(main_file, "d.yaml", "tick: 1s\ntick: 2s\n")
    places = {line.split(": ")[0] for line in problems(main_file)}
    assert places == {"conf.d/a.yaml:1:17", "conf.d/c.yaml:1:2", "conf.d/d.yaml:2:1"}


def test_without_the_main_file_the_others_that_cannot_be_read_are_named_as_well(main_file: Path) -> None:
    main_file.unlink()
    (main_file.parent / "conf.d" / "b.yaml").symlink_to("nowhere")
    assert [line.split(": ")[0] for line in problems(main_file)] == ["kvmsnapd.yaml", "conf.d/b.yaml"]


def test_a_missing_main_file_is_not_blamed_on_a_conf_d_that_is_a_link(main_file: Path) -> None:
    main_file.unlink()
    folder = main_file.parent / "conf.d"
    folder.rename(main_file.parent / "elsewhere")
    folder.symlink_to("elsewhere")
    assert problems(main_file) == ["kvmsnapd.yaml: cannot be read: No such file or directory; nothing was changed"]


def test_problems_come_in_the_order_of_the_files_if_one_is_no_yaml_as_well(main_file: Path) -> None:
    add(main_file, "a.yaml", "tick: 1s\ntick: 2s\n")
    add(main_file, "b.yaml", "domains: [\n")
    add(main_file, "c.yaml", "workers: 1\nworkers: 2\n")
    assert [line.split(":")[0] for line in problems(main_file)] == [f"conf.d/{name}.yaml" for name in "abc"]


def test_a_file_name_that_is_no_utf_8_can_be_warned_of(main_file: Path) -> None:
    path = os.fsencode(main_file.parent) + b"/conf.d/b\xfcro.yml"
    with open(path, "wb"):  # noqa: PTH123  # no Path has such a name
        pass
    command = [sys.executable, "-m", "kvmsnapd", "check-config", "--config", str(main_file)]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in every locale but C
    answer = subprocess.run(command, capture_output=True, check=False, env=strict)
    assert (answer.returncode, answer.stderr) == (0, b"")


# Who may write into them


@pytest.mark.parametrize("name", ["kvmsnapd.yaml", "conf.d/a.yaml", "conf.d"])
@pytest.mark.parametrize("mode", [0o646, 0o602, 0o777, 0o1777])
def test_what_everybody_may_write_into_is_refused(main_file: Path, name: str, mode: int) -> None:
    add(main_file, "a.yaml", "tick: 10s\n")
    (main_file.parent / name).chmod(mode)
    assert problems(main_file) == [
        f"{name}: can be written to by everybody; `chmod o-w` it; nothing was changed",
    ]


@pytest.mark.parametrize(("name", "mode"), [("kvmsnapd.yaml", 0o664), ("conf.d/a.yaml", 0o460), ("conf.d", 0o775)])
def test_what_a_group_may_write_into_is_read(main_file: Path, name: str, mode: int) -> None:
    add(main_file, "a.yaml", "tick: 10s\n")
    (main_file.parent / name).chmod(mode)
    assert files(main_file) == ["kvmsnapd.yaml", "conf.d/a.yaml"]


def test_all_that_everybody_may_write_into_is_named_at_once(main_file: Path) -> None:
    add(main_file, "a.yaml").chmod(0o666)
    add(main_file, "b.yaml").chmod(0o644)
    add(main_file, "c.yaml").chmod(0o666)
    main_file.chmod(0o666)
    assert [line.split(":")[0] for line in problems(main_file)] == ["kvmsnapd.yaml", "conf.d/a.yaml", "conf.d/c.yaml"]


def test_of_a_link_the_file_that_it_leads_to_counts(main_file: Path) -> None:
    elsewhere = main_file.parent / "elsewhere"
    elsewhere.write_text("tick: 10s\n", encoding="utf-8")
    link = main_file.parent / "conf.d" / "a.yaml"
    link.symlink_to(elsewhere)
    assert files(main_file) == ["kvmsnapd.yaml", "conf.d/a.yaml"]
    elsewhere.chmod(0o666)
    assert [line.split(":")[0] for line in problems(main_file)] == ["conf.d/a.yaml"]


def test_leftovers_may_belong_to_anybody(main_file: Path) -> None:
    add(main_file, "a.yaml~").chmod(0o666)
    add(main_file, ".a.yaml").chmod(0o666)
    assert files(main_file) == ["kvmsnapd.yaml"]


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@as_root
@pytest.mark.parametrize("name", ["conf.d/a.yaml", "conf.d"])
def test_what_belongs_to_somebody_else_is_refused(main_file: Path, name: str) -> None:
    add(main_file, "a.yaml", "tick: 10s\n")
    os.chown(main_file.parent / name, 4321, -1)
    assert problems(main_file) == [
        f"{name}: belongs to user 4321, not to root or the owner of the main file; nothing was changed"
    ]


@as_root
def test_the_owner_of_the_main_file_may_own_the_others(main_file: Path) -> None:
    parts = [add(main_file, "a.yaml", "tick: 10s\n"), add(main_file, "b.yaml", "workers: 1\n")]
    for path in (main_file, main_file.parent / "conf.d", parts[0]):
        os.chown(path, 4321, -1)
    assert files(main_file) == ["kvmsnapd.yaml", "conf.d/a.yaml", "conf.d/b.yaml"]  # the last is of root
    os.chown(parts[1], 4322, -1)
    assert [line.split(":")[0] for line in problems(main_file)] == ["conf.d/b.yaml"]


# What was read is what is loaded


def test_contents_are_the_files_as_they_were_read(main_file: Path) -> None:
    part = add(main_file, "a.yaml", "domains: {db01: [standard]}\n")
    missed = add(main_file, "b.yml")
    contents, warnings = read_contents(main_file)
    assert contents == [(main_file, POLICY.encode()), (part, b"domains: {db01: [standard]}\n")]
    assert warnings == [f"{missed}: is not read; files of conf.d end in .yaml"]
    part.unlink()
    main_file.unlink()
    config = load_contents(contents, warnings)
    assert (config.contents, config.warnings, list(config.selectors)) == (contents, tuple(warnings), ["db01"])
    assert (config.path, config.files) == (main_file, (str(main_file), str(part)))
    assert config.place_of("db01") == f"{part}:1:11"


def test_contents_that_were_never_files_are_loaded_as_well() -> None:
    config = load_contents([(Path("/nowhere/kvmsnapd.yaml"), POLICY.encode())])
    assert (list(config.policies), config.warnings) == (["standard"], ())
    with pytest.raises(ConfigError, match=r"^/nowhere/kvmsnapd\.yaml:1:7: tick: 'soon' is not a duration"):
        load_contents([(Path("/nowhere/kvmsnapd.yaml"), b"tick: soon\n")])


# Limits


TOO_LARGE = "the file is larger than 4194304 bytes, or makes all files larger than that"


def fill(main_file: Path, *sizes: int) -> None:
    """Write files of these sizes, a.yaml, b.yaml and so on, that hold nothing but comments."""
    for name, size in zip("abcdef", sizes, strict=False):
        add(main_file, f"{name}.yaml", "#".ljust(size - 1, "x") + "\n")


def test_files_of_four_mebibytes_together_are_read(main_file: Path) -> None:
    rest = FOUR_MEBIBYTES - len(POLICY)
    fill(main_file, rest // 2, rest - rest // 2)
    assert files(main_file) == ["kvmsnapd.yaml", "conf.d/a.yaml", "conf.d/b.yaml"]


def test_with_one_byte_more_the_file_that_is_too_much_is_refused(main_file: Path) -> None:
    rest = FOUR_MEBIBYTES - len(POLICY)
    fill(main_file, rest // 2, rest - rest // 2 + 1)
    assert problems(main_file) == [f"conf.d/b.yaml: {TOO_LARGE}"]


def test_a_file_that_is_too_large_leaves_its_room_to_the_others(main_file: Path) -> None:
    fill(main_file, FOUR_MEBIBYTES, FOUR_MEBIBYTES - len(POLICY), 1000)
    assert problems(main_file) == [f"conf.d/a.yaml: {TOO_LARGE}", f"conf.d/c.yaml: {TOO_LARGE}"]


def test_a_thousand_files_are_read_and_not_one_more(main_file: Path) -> None:
    for number in range(1000):
        add(main_file, f"{number:04}.yaml")
    add(main_file, "a.yaml~")
    add(main_file, "a.yml")
    assert len(files(main_file)) == 1001
    add(main_file, "z.yaml")
    assert problems(main_file) == ["conf.d: has more than 1000 files; nothing was changed"]


def test_the_limit_of_values_is_one_for_all_files(main_file: Path) -> None:
    for name in "abc":
        add(main_file, f"{name}.yaml", f"{name}: [" + "1, " * 70_000 + "]\n")
    assert problems(main_file) == ["conf.d/c.yaml: the files up to this one have more than 200000 values"]


def test_as_many_values_as_ten_thousand_domains_need_are_read(main_file: Path) -> None:
    for name in "abc":
        domains = "".join(f"  {name}-{n}: {{standard: {{keep: {{last: {n % 9 + 1}}}}}}}\n" for n in range(3_000))
        add(main_file, f"{name}.yaml", f"domains:\n{domains}")
    assert len(load_config(main_file).selectors) == 9_000


# The fingerprint


def test_the_fingerprint_of_what_was_loaded_is_that_of_the_files(main_file: Path) -> None:
    add(main_file, "a.yaml", "tick: 10s\n")
    assert fingerprint(load_config(main_file).contents) == fingerprint_of(main_file)


def append(text: str) -> Callable[[Path], object]:
    """Return what adds text to the main file."""
    return lambda main_file: main_file.write_text(f"{POLICY}{text}", encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        append("# a comment\n"),
        append("\n"),
        append("tick: 10s\n"),
        append("{ no yaml: [\n"),
        lambda main_file: main_file.write_bytes(b"\xff"),
        lambda main_file: main_file.write_bytes(b""),
        Path.unlink,
        lambda main_file: add(main_file, "a.yaml", "tick: 11s\n"),
        lambda main_file: add(main_file, "b.yaml"),
        lambda main_file: add(main_file, "0.yaml", "# nothing\n"),
        lambda main_file: (main_file.parent / "conf.d" / "a.yaml").unlink(),
        lambda main_file: (main_file.parent / "conf.d" / "a.yaml").rename(main_file.parent / "conf.d" / "b.yaml"),
        lambda main_file: (main_file.parent / "conf.d" / "a.yaml").rename(main_file.parent / "conf.d" / "a.yaml.off"),
        lambda main_file: (main_file.parent / "conf.d" / "b.yaml").mkdir(),
    ],
    ids=[
        *("comment", "blank line", "key", "no yaml", "no text", "emptied", "deleted", "part", "empty part", "new part"),
        *("deleted part", "renamed part", "disabled part", "part that cannot be read"),
    ],
)
def test_the_fingerprint_changes_with_every_change_of_content(
    main_file: Path, change: Callable[[Path], object]
) -> None:
    add(main_file, "a.yaml", "tick: 10s\n")
    before = fingerprint_of(main_file)
    change(main_file)
    assert fingerprint_of(main_file) != before
    assert fingerprint_of(main_file) == fingerprint_of(main_file)


@pytest.mark.parametrize(
    "change",
    [
        lambda main_file: os.utime(main_file, (1, 1)),
        lambda main_file: main_file.chmod(0o600),
        append(""),
        lambda main_file: add(main_file, "a.yml", "tick: 11s\n"),
        lambda main_file: add(main_file, "a.yaml~", "tick: 11s\n"),
        lambda main_file: add(main_file, ".a.yaml.swp", "tick: 11s\n"),
        lambda main_file: (main_file.parent / "conf.d" / "disabled").mkdir(),
        lambda main_file: (main_file.parent / "conf.e").mkdir(),
        lambda main_file: os.replace(  # noqa: PTH105  # as an editor does
            add(main_file, "new", "tick: 10s\n"), main_file.parent / "conf.d" / "a.yaml"
        ),
    ],
    ids=["touched", "mode", "written again", "yml", "backup", "swap file", "folder", "beside", "replaced by the same"],
)
def test_the_fingerprint_stays_with_the_content(main_file: Path, change: Callable[[Path], object]) -> None:
    add(main_file, "a.yaml", "tick: 10s\n")
    before = fingerprint_of(main_file)
    change(main_file)
    assert fingerprint_of(main_file) == before


def test_the_fingerprint_tells_where_one_file_ends_and_the_next_begins(main_file: Path) -> None:
    add(main_file, "a.yaml", "tick: 10s\nworkers: 2\n")
    add(main_file, "b.yaml", "watch: true\n")
    before = fingerprint_of(main_file)
    add(main_file, "a.yaml", "tick: 10s\n")
    add(main_file, "b.yaml", "workers: 2\nwatch: true\n")
    assert fingerprint_of(main_file) != before


def test_what_was_unreadable_has_its_old_fingerprint_once_it_is_as_before(main_file: Path) -> None:
    part = add(main_file, "a.yaml", "tick: 10s\n")
    before = fingerprint_of(main_file)
    part.unlink()
    part.symlink_to("nowhere")
    assert (
        fingerprint_of(main_file)
        == f"unreadable: {part}: cannot be read: No such file or directory; nothing was changed"
    )
    part.unlink()
    add(main_file, "a.yaml", "tick: 10s\n")
    assert fingerprint_of(main_file) == before
