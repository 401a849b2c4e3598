"""From what is written to what applies: what wins over what, and which place a value is said to come from."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import pytest

from kvmsnapd.config import Config, load_config
from kvmsnapd.config.models import PolicyKeys
from kvmsnapd.errors import ConfigError
from kvmsnapd.matching import Coverage, assign
from kvmsnapd.model import Kind
from kvmsnapd.policy import ConsistencyRule, DiskSelection, Hooks
from kvmsnapd.retention import KeepRules
from tests.builders import an_inventory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a configuration of a main file, and of files of conf.d by their names without the ending."""

    def load(text: str, **parts: str) -> Config:
        path = tmp_path / "kvmsnapd.yaml"
        path.write_text(text, encoding="utf-8")
        for name, content in parts.items():
            (tmp_path / "conf.d").mkdir(exist_ok=True)
            (tmp_path / "conf.d" / f"{name}.yaml").write_text(content, encoding="utf-8")
        return load_config(path)

    return load


def explained(config: Config, selector: str, policy: str) -> dict[str, tuple[Any, str]]:
    """Return value and place of every key of a policy as it applies to a selector."""
    folder = f"{config.path.parent}/"
    return {s.key: (s.value, s.place.replace(folder, "")) for s in config.explain(selector, policy)}


LADDER = """\
timezone: Europe/Berlin
defaults:
  splay: 1m
  max_chain_depth: 12
  catch_up: skip
policies:
  basic:
    schedule: hourly
    keep: {last: 2, hourly: 6}
    kind: internal
    catch_up: once
  middle:
    extends: basic
    max_deletes_per_run: 5
  nightly:
    extends: middle
    schedule: daily
    max_chain_depth: 14
domains:
  db01:
    nightly:
      keep: {daily: 3}
  db02: [nightly]
"""


# What wins


@pytest.mark.parametrize(
    ("places", "depth"),
    [
        ("", 16),
        ("defaults", 1),
        ("defaults base", 2),
        ("defaults base policy", 3),
        ("defaults base policy override", 4),
        ("defaults override", 4),
        ("defaults policy", 3),
        ("base override", 4),
        ("base policy", 3),
    ],
)
def test_the_nearest_place_that_gives_a_key_decides(load: Load, places: str, depth: int) -> None:
    names = ("defaults", "base", "policy", "override")
    given = {
        name: f"max_chain_depth: {value}" if name in places.split() else "" for value, name in enumerate(names, start=1)
    }
    config = load(
        f"""\
defaults: {{{given["defaults"]}}}
policies:
  base: {{schedule: hourly, keep: {{last: 1}}, {given["base"]}}}
  policy: {{extends: base, {given["policy"]}}}
domains:
  db01: {{policy: {{{given["override"]}}}}}
"""
    )
    assert config.selectors["db01"][0].max_chain_depth == depth


def test_a_policy_takes_from_the_whole_line_of_those_it_extends(load: Load) -> None:
    policy = load(LADDER).policies["nightly"]
    assert (str(policy.schedule), str(policy.keep), policy.kind) == ("daily", "last=2 hourly=6", Kind.INTERNAL)
    assert (policy.max_deletes_per_run, policy.max_chain_depth, policy.catch_up) == (5, 14, True)
    assert (policy.splay, policy.timezone) == (timedelta(minutes=1), ZoneInfo("Europe/Berlin"))


def test_a_base_may_stand_below_what_extends_it(load: Load) -> None:
    config = load("policies:\n  b: {extends: a}\n  a: {schedule: daily, keep: {last: 4}}\n")
    assert config.policies["b"] == replace(config.policies["a"], name="b")


def test_a_key_replaces_the_farther_one_whole(load: Load) -> None:
    config = load(
        """\
defaults: {keep: {yearly: 9}, hooks: {after: {command: [a]}}}
policies:
  base: {schedule: hourly, keep: {last: 2, hourly: 6}, disks: {include: [vda], exclude: [vdb]}}
  near: {extends: base, keep: {daily: 5}}
domains:
  db01: {near: {disks: {exclude: [vdc]}, hooks: {}}}
  db02: {near: {keep: {weekly: 1}, disks: }}
"""
    )
    assert config.policies["base"].keep == KeepRules(last=2, hourly=6)
    assert config.policies["near"].keep == KeepRules(daily=5)
    (first,), (second,) = config.selectors["db01"], config.selectors["db02"]
    assert (first.keep, first.disks, first.hooks) == (KeepRules(daily=5), DiskSelection(exclude=("vdc",)), Hooks())
    assert (second.keep, second.disks) == (KeepRules(weekly=1), DiskSelection())
    assert second.hooks.after is not None


@pytest.mark.parametrize(
    ("farther", "field", "value"),
    [
        ("timezone: Asia/Tokyo", "timezone", ZoneInfo("Europe/Berlin")),
        ("memory: live", "memory_live", False),
        ("splay: 7s", "splay", timedelta(minutes=5)),
        ("max_age: 7d", "max_age", timedelta(hours=2, minutes=5)),
        ("overlay_directory: /srv", "overlay_directory", None),
        ("disks: {exclude: [vdb]}", "disks", DiskSelection()),
        ("hooks: {after: {command: [a]}}", "hooks", Hooks()),
    ],
)
@pytest.mark.parametrize("place", ["defaults", "base", "policy"])
def test_null_takes_back_what_a_farther_place_gives(
    load: Load, place: str, farther: str, field: str, value: object
) -> None:
    given = {name: f"{farther}" if name == place else "" for name in ("defaults", "base", "policy")}
    key = farther.partition(":")[0]
    config = load(
        f"""\
timezone: Europe/Berlin
defaults: {{{given["defaults"]}}}
policies:
  base: {{schedule: hourly, keep: {{last: 1}}, {given["base"]}}}
  policy: {{extends: base, {given["policy"]}}}
domains:
  db01: {{policy: {{{key}: null}}}}
"""
    )
    assert getattr(config.selectors["db01"][0], field) == value
    assert getattr(config.policies["policy"], field) != value


NULLABLE = {"timezone", "consistency", "memory", "splay", "max_age", "overlay_directory", "disks", "hooks", "verify"}


@pytest.mark.parametrize("key", sorted(PolicyKeys.model_fields.keys() - NULLABLE))
def test_null_for_a_key_that_needs_a_value_is_refused(load: Load, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"domains\.db01\.p\.{key}: "):
        load(f"policies: {{p: {{schedule: hourly, keep: {{last: 1}}}}}}\ndomains: {{db01: {{p: {{{key}: null}}}}}}\n")


def test_null_for_extends_is_none(load: Load) -> None:
    assert load("policies: {p: {extends: null, schedule: hourly, keep: {last: 1}}}").policies["p"].name == "p"


def test_a_value_that_is_the_default_still_wins_over_a_farther_one(load: Load) -> None:
    config = load("defaults: {catch_up: skip, max_chain_depth: 3}\n" + TWO.replace("}}", "}, catch_up: once}"))
    assert config.policies["often"].catch_up is True
    assert config.policies["often"].max_chain_depth == 3


TWO = """\
policies:
  often: {schedule: hourly, keep: {last: 2}}
  daily: {schedule: daily, keep: {last: 3}}
"""


def test_what_is_computed_follows_the_schedule_that_applies(load: Load) -> None:
    config = load(TWO + "domains: {db01: {often: {schedule: every 10m}}, db02: [often]}\n")
    (near,), (plain,) = config.selectors["db01"], config.selectors["db02"]
    assert (near.splay, near.max_age) == (timedelta(minutes=1), timedelta(minutes=21))
    assert (plain.splay, plain.max_age) == (timedelta(minutes=5), timedelta(hours=2, minutes=5))


def test_the_time_zone_of_an_override_is_that_of_its_schedule(load: Load) -> None:
    config = load(LADDER.replace("keep: {daily: 3}", "timezone: Asia/Tokyo"))
    (policy,) = config.selectors["db01"]
    assert policy.timezone == policy.schedule.timezone == ZoneInfo("Asia/Tokyo")
    assert config.policies["nightly"].schedule.timezone == ZoneInfo("Europe/Berlin")


def test_a_consistency_that_nobody_chose_does_not_contradict_a_kind_from_elsewhere(load: Load) -> None:
    config = load("defaults: {kind: internal}\n" + TWO + "domains: {db01: {often: {memory: null}}}\n")
    assert config.policies["often"].kind is Kind.INTERNAL


def test_an_override_may_heal_a_contradiction_only_of_its_own_domain(load: Load) -> None:
    text = "defaults: {overlay_directory: /srv}\n" + TWO
    config = load(text + "domains: {db01: {often: {kind: internal, overlay_directory: null}}, db02: [often]}\n")
    assert [config.selectors[name][0].overlay_directory for name in ("db01", "db02")] == [None, "/srv"]
    with pytest.raises(ConfigError, match="`overlay_directory` is given under defaults"):
        load(text + "domains: {db01: {often: {kind: internal}}}\n")


def test_a_contradiction_says_where_the_other_key_is_given(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"domains\.db01\.nightly\.overl.*given under policies\.basic\n"):
        load(LADDER.replace("keep: {daily: 3}", "overlay_directory: /srv"))


def test_memory_by_default_and_a_consistency_that_fits_are_no_contradiction(load: Load) -> None:
    config = load("defaults: {memory: live}\n" + TWO.replace("}}", "}, consistency: memory}"))
    assert config.policies["often"].consistency is ConsistencyRule.MEMORY


# Overrides


def test_an_override_makes_a_policy_of_its_own_and_leaves_the_others_untouched(load: Load) -> None:
    config = load(LADDER)
    (changed,), (plain,) = config.selectors["db01"], config.selectors["db02"]
    assert changed == replace(plain, keep=KeepRules(daily=3))
    assert plain is config.policies["nightly"]
    assert str(config.policies["nightly"].keep) == "last=2 hourly=6"
    assert changed.name == "nightly"


@pytest.mark.parametrize("body", ["", " {}", " null", " {keep: {last: 2}}"])
def test_an_override_of_nothing_is_the_policy_itself(load: Load, body: str) -> None:
    config = load(TWO + f"domains:\n  db01:\n    often:{body}\n")
    assert config.selectors["db01"] == (config.policies["often"],)
    assert config.all_policies == (config.policies["often"], config.policies["daily"])


def test_policies_of_a_mapping_keep_the_order_in_which_they_are_written(load: Load) -> None:
    config = load(TWO + "domains: {db01: {daily: , often: {splay: 1m}}}\n")
    assert [policy.name for policy in config.selectors["db01"]] == ["daily", "often"]


def test_all_policies_are_those_by_name_and_each_changed_one_once(load: Load) -> None:
    config = load(
        TWO
        + """\
domains:
  a: {often: {splay: 1m}}
  b: {often: {splay: 1m}}
  c: {often: {splay: 2m}}
  d: [often, daily]
  e: []
"""
    )
    (one,), (same,), (two,) = (config.selectors[name] for name in "abc")
    assert (one, one.splay, two.splay) == (same, timedelta(minutes=1), timedelta(minutes=2))
    assert config.all_policies == (*config.policies.values(), one, two)


def coverage(config: Config, name: str) -> Coverage:
    (assignment,) = assign(config.selectors, [an_inventory(name=name)])
    return assignment.coverage


def test_two_equal_patterns_with_the_same_overrides_agree(load: Load) -> None:
    config = load(
        TWO
        + """\
domains:
  web-*: {often: {keep: {last: 3}, splay: 60s}}
  "*eb-1": {often: {splay: 1m, keep: {last: "3"}}}
"""
    )
    assert coverage(config, "web-1") is Coverage.PROTECTED


def test_a_list_and_a_mapping_that_mean_the_same_agree(load: Load) -> None:
    config = load(TWO + 'domains: {web-*: [often], "*eb-1": {often: {schedule: hourly}}}\n')
    assert coverage(config, "web-1") is Coverage.PROTECTED


def test_two_lists_of_the_same_policies_in_another_order_agree(load: Load) -> None:
    config = load(TWO + 'domains: {web-*: [often, daily], "*eb-1": [daily, often], "*eb-2": [daily]}\n')
    assert coverage(config, "web-1") is Coverage.PROTECTED
    assert coverage(config, "web-2") is Coverage.AMBIGUOUS


def test_two_equal_patterns_with_different_overrides_are_ambiguous(load: Load) -> None:
    config = load(TWO + 'domains: {web-*: [often], "*eb-1": {often: {keep: {last: 3}}}}\n')
    assert coverage(config, "web-1") is Coverage.AMBIGUOUS


def test_an_empty_mapping_is_not_taken_for_unprotected_on_purpose(load: Load) -> None:
    with pytest.raises(ConfigError, match="unprotected on purpose"):
        load(TWO + "domains: {db01: {}}\n")


# Policies that are only extended


BASES = """\
policies:
  basic: {keep: {last: 2}}
  nightly: {extends: basic, schedule: daily}
  weekly: {extends: nightly, schedule: weekly}
  alone: {schedule: hourly, keep: {last: 1}}
domains:
  db01: [weekly]
"""


def test_policies_that_are_only_extended_need_not_be_complete_and_are_expected_nowhere(load: Load) -> None:
    config = load(BASES)
    assert list(config.policies) == ["nightly", "weekly", "alone"]
    assert config.expected_policies == ("weekly", "alone")


def test_a_policy_that_is_extended_and_used_is_expected(load: Load) -> None:
    config = load(BASES.replace("[weekly]", "{nightly: {splay: 1m}}"))
    assert config.expected_policies == ("nightly", "weekly", "alone")


def test_a_policy_that_is_extended_and_used_must_be_complete(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"policies\.basic\.schedule: `schedule` is missing"):
        load(BASES.replace("[weekly]", "[weekly, basic]"))


def test_a_policy_that_nobody_extends_and_nobody_uses_must_be_complete(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"policies\.p\.keep: `keep` is missing"):
        load("policies: {p: {schedule: hourly}}\n")


@pytest.mark.parametrize(
    ("own", "override"),
    [
        ("{schedule: hourly}", "{keep: {last: 1}}"),
        ("{keep: {last: 1}}", "{schedule: hourly}"),
        ("{}", "{schedule: hourly, keep: {last: 1}}"),
        ("", "{schedule: hourly, keep: {last: 1}}"),
    ],
)
def test_what_a_policy_lacks_may_come_from_every_use_of_it(load: Load, own: str, override: str) -> None:
    text = f"policies: {{p: {own}, q: {{schedule: daily, keep: {{last: 2}}}}}}\n"
    config = load(f"{text}domains: {{db01: {{p: {override}}}, db02: {{q: , p: {override}}}}}\n")
    (policy,) = config.selectors["db01"]
    assert (policy.name, str(policy.schedule), str(policy.keep)) == ("p", "hourly", "last=1")
    assert config.selectors["db02"] == (config.policies["q"], policy)
    assert list(config.policies) == ["q"]
    assert config.expected_policies == ("p", "q")
    assert config.all_policies == (config.policies["q"], policy)
    for use in ("[p]", "{p: }", "{p: {splay: 1m}}"):
        with pytest.raises(ConfigError, match=r"policies\.p\.(schedule|keep): `(schedule|keep)` is missing"):
            load(f"{text}domains: {{db01: {{p: {override}}}, db02: {use}}}\n")


def test_an_entry_that_says_nothing_else_does_not_complete_a_policy_and_is_told_once(load: Load) -> None:
    with pytest.raises(ConfigError) as refusal:
        load("policies: {p: {schedule: hourly}}\ndomains: {a: [p], b: [p], c: {p: {splay: 1m}}}\n")
    assert [problem.key for problem in refusal.value.problems] == ["policies.p.keep"]


def test_defaults_complete_every_policy(load: Load) -> None:
    config = load("defaults: {schedule: hourly, keep: {last: 1}}\npolicies: {p: {}, q: {extends: p}}\n")
    assert list(config.policies) == ["p", "q"]


def test_a_policy_that_says_nothing_of_its_own_may_stand_alone(load: Load) -> None:
    assert list(load("defaults: {schedule: hourly, keep: {last: 1}}\npolicies:\n  p:\n").policies) == ["p"]


# Where values come from


def test_every_key_of_a_policy_is_explained_in_the_order_of_the_reference(load: Load) -> None:
    config = load(LADDER)
    assert [setting.key for setting in config.explain("db01", "nightly")] == list(PolicyKeys.model_fields)
    assert {field.name for field in fields(config.policies["nightly"])} >= {"schedule", "keep"}


def test_each_value_has_the_place_that_gave_it(load: Load) -> None:
    assert explained(load(LADDER), "db01", "nightly") == {
        "schedule": ("daily", "kvmsnapd.yaml:17:5"),
        "keep": ({"daily": 3}, "kvmsnapd.yaml:22:7"),
        "consistency": ("filesystem-preferred", "default"),
        "timezone": ("Europe/Berlin", "kvmsnapd.yaml:1:1"),
        "kind": ("internal", "kvmsnapd.yaml:10:5"),
        "memory": (None, "default"),
        "max_pause": ("10s", "default"),
        "catch_up": ("once", "kvmsnapd.yaml:11:5"),
        "splay": ("1m", "kvmsnapd.yaml:3:3"),
        "max_age": ("2d2h1m", "from the schedule"),  # a day has 25 hours once a year
        "max_deletes_per_run": (5, "kvmsnapd.yaml:14:5"),
        "max_chain_depth": (14, "kvmsnapd.yaml:18:5"),
        "min_free": ("1GiB", "default"),
        "overlay_directory": (None, "default"),
        "disks": ({"include": [], "exclude": []}, "default"),
        "hooks": ({}, "default"),
        "verify": ({"deadline": "5m"}, "default"),
    }


def test_without_an_override_the_place_is_the_policy_or_what_it_extends(load: Load) -> None:
    assert explained(load(LADDER), "db02", "nightly")["keep"] == ({"last": 2, "hourly": 6}, "kvmsnapd.yaml:9:5")


def test_the_place_may_be_in_a_file_of_conf_d(load: Load) -> None:
    config = load(
        "policies:\n  p: {extends: q, schedule: hourly}\n",
        a="policies:\n  q:\n    keep: {last: 1}\n",
        b="# only this\ndefaults: {splay: 1m}\ntimezone: Europe/Berlin\n",
        c="domains:\n  db01:\n    p: {kind: internal}\n",
    )
    found = explained(config, "db01", "p")
    assert {key: found[key][1] for key in ("schedule", "keep", "splay", "timezone", "kind")} == {
        "schedule": "kvmsnapd.yaml:2:19",
        "keep": "conf.d/a.yaml:3:5",
        "splay": "conf.d/b.yaml:2:12",
        "timezone": "conf.d/b.yaml:3:1",
        "kind": "conf.d/c.yaml:3:9",
    }


def test_the_time_zone_of_a_policy_comes_from_the_policy_before_the_top(load: Load) -> None:
    config = load(LADDER.replace("extends: middle", "extends: middle\n    timezone: Asia/Tokyo"))
    assert explained(config, "db02", "nightly")["timezone"] == ("Asia/Tokyo", "kvmsnapd.yaml:17:5")


def test_a_time_zone_that_nobody_gives_is_the_default(load: Load) -> None:
    config = load(TWO + "domains: {db01: [often]}\n")
    assert explained(config, "db01", "often")["timezone"] == ("UTC", "default")


def test_a_time_zone_taken_back_by_null_is_that_of_the_top(load: Load) -> None:
    config = load("timezone: Asia/Tokyo\ndefaults: {timezone: UTC}\n" + TWO + "domains: {a: {often: {timezone: }}}\n")
    assert explained(config, "a", "often")["timezone"] == (
        "Asia/Tokyo",
        "kvmsnapd.yaml:1:1 (null in kvmsnapd.yaml:6:23)",
    )


def test_what_null_takes_back_is_computed_from_the_schedule_again(load: Load) -> None:
    config = load("defaults: {splay: 1m, max_age: 9d}\n" + TWO + "domains: {a: {often: {splay: , max_age: }}}\n")
    found = explained(config, "a", "often")
    assert found["splay"] == ("5m", "from the schedule (null in kvmsnapd.yaml:5:23)")
    assert found["max_age"] == ("2h5m", "from the schedule (null in kvmsnapd.yaml:5:32)")


def test_a_consistency_taken_back_by_null_is_the_default(load: Load) -> None:
    config = load("defaults: {consistency: crash}\n" + TWO + "domains: {a: {often: {consistency: null}}, b: [often]}\n")
    assert [config.selectors[name][0].consistency for name in "ab"] == [
        *(ConsistencyRule.FILESYSTEM_PREFERRED, ConsistencyRule.CRASH)
    ]
    found = explained(config, "a", "often")
    assert found["consistency"] == ("filesystem-preferred", "default (null in kvmsnapd.yaml:5:23)")


def test_a_consistency_taken_back_by_null_contradicts_no_kind(load: Load) -> None:
    text = "defaults: {consistency: crash}\n" + TWO
    config = load(text + "domains: {a: {often: {consistency: null, kind: internal}}}\n")
    assert config.selectors["a"][0].kind is Kind.INTERNAL
    with pytest.raises(ConfigError, match=r"`consistency` is given under defaults, `consistency: null` here takes"):
        load(text + "domains: {a: {often: {kind: internal}}}\n")


def test_null_itself_has_a_place(load: Load) -> None:
    config = load("defaults: {overlay_directory: /srv}\n" + TWO + "domains: {a: {often: {overlay_directory: null}}}\n")
    assert explained(config, "a", "often")["overlay_directory"] == (None, "kvmsnapd.yaml:5:23")


def test_the_environment_is_a_place(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMSNAPD_TIMEZONE", "Asia/Tokyo")
    found = explained(load(LADDER), "db01", "nightly")
    assert found["timezone"] == ("Asia/Tokyo", "environment KVMSNAPD_TIMEZONE")


def test_a_uuid_in_capitals_is_explained_by_its_small_letters(load: Load) -> None:
    uuid = "ABCDEFAB-2222-3333-4444-555555555555"
    config = load(TWO + f"domains:\n  {uuid}: {{often: {{splay: 1m}}}}\n")
    assert explained(config, uuid.lower(), "often")["splay"] == ("1m", "kvmsnapd.yaml:5:50")
    assert config.place_of(uuid.lower()).endswith("kvmsnapd.yaml:5:3")


def test_a_value_that_an_alias_repeats_has_the_place_of_its_key(load: Load) -> None:
    config = load(
        "policies:\n  a: {schedule: daily, keep: &k {last: 2}}\n  b: {schedule: daily, keep: *k}\ndomains: {x: [b]}\n"
    )
    assert explained(config, "x", "b")["keep"] == ({"last": 2}, "kvmsnapd.yaml:3:24")


def test_values_are_explained_as_people_write_them(load: Load) -> None:
    config = load(
        """\
policies:
  p:
    schedule: "*/5 * * * *"
    keep: {within: 90m, yearly: all}
    min_free: 1536MiB
    max_pause: 90s
    disks: {exclude: [vdb]}
    hooks: {before: {command: [a, b], required: yes}}
domains: {x: [p]}
"""
    )
    found = {key: value for key, (value, place) in explained(config, "x", "p").items() if place != "default"}
    assert found == {
        "schedule": "*/5 * * * *",
        "keep": {"within": "90m", "yearly": "all"},
        "min_free": "1536MiB",
        "max_pause": "90s",
        "disks": {"include": [], "exclude": ["vdb"]},
        "hooks": {"before": {"command": ["a", "b"], "timeout": "1m", "required": True}},
        "splay": "30s",
        "max_age": "10m30s",
    }
