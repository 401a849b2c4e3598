"""Whatever the configuration's files hold: they are loaded or refused, soon, in little memory, in readable words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kvmsnapd.config import load_config
from kvmsnapd.errors import ConfigError, InvalidValueError
from kvmsnapd.matching import Coverage, assign, check_selector, fits, is_pattern, weight
from kvmsnapd.model import Inventory
from tests.builders import a_policy
from tests.properties.config_fuzz import (
    CLAIMS,
    HOSTILE,
    ROOT,
    SCHEMA,
    Case,
    TooSlowError,
    budget,
    deadline,
    generated,
    judge,
    rendered,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

INPUTS = 20_000 if os.environ.get("CI") else 3000
MOST_MB = 200


# ---- thousands of inputs -----------------------------------------------------------------------------------------


class Runs:
    """Thousands of inputs, and the hostile files, in processes of their own that run at once."""

    def __init__(self) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.upper().startswith("KVMSNAPD_")}
        environment |= {"STATE_DIRECTORY": "", "RUNTIME_DIRECTORY": "", "PYTHONPATH": str(ROOT)}
        program = [sys.executable, "-m", "tests.properties.config_fuzz", str(INPUTS)]
        self._processes = {
            name: subprocess.Popen([*program, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            for name, options in {"mutated": [], "hostile 0": ["--hostile=0"], "hostile 1": ["--hostile=1"]}.items()
        }
        self._answers: dict[str, dict[str, Any]] = {}

    def answer(self, name: str) -> dict[str, Any]:
        """Wait for what one of them has to tell."""
        if name not in self._answers:
            process = self._processes[name]
            told, _ = process.communicate(timeout=280)
            assert process.returncode == 0, "the run itself broke off: the trace above shows which input hangs"
            self._answers[name] = json.loads(told)
        return self._answers[name]

    def stop(self) -> None:
        """Leave nothing running."""
        for process in self._processes.values():
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """Provide the answers."""
    started = Runs()
    yield started
    started.stop()


def test_thousands_of_damaged_configurations_take_little_memory(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    told = runs.answer("mutated")
    with capsys.disabled():
        words = ("inputs", "loaded", "refused", "seconds", "slowest", "peak_mb", "grown_mb")
        print("\nconfiguration fuzz:", ", ".join(f"{word} {told[word]}" for word in words))
    assert told["inputs"] == told["loaded"] + told["refused"] == INPUTS
    assert told["loaded"] > INPUTS / 20, "too few are valid for the claims about these to mean anything"
    assert told["grown_mb"] < MOST_MB


@pytest.mark.parametrize("claim", CLAIMS)
def test_of_every_damaged_configuration_it_holds_that(claim: str, runs: Runs) -> None:
    broken = {key: entry for key, entry in runs.answer("mutated")["failures"].items() if entry["claim"] == claim}
    assert not broken, f"{CLAIMS[claim]}, but: {json.dumps(broken, indent=1)[:6000]}"


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_file_costs_little(hostile: str, runs: Runs) -> None:
    cost = runs.answer(f"hostile {list(HOSTILE).index(hostile) % 2}")[hostile]
    assert cost["outcome"] in {"loaded", "refused"}, cost
    assert cost["seconds"] < budget(cost["bytes"]), cost
    assert cost["grown_mb"] < MOST_MB, cost
    assert cost["text"] <= 1_000_000, cost
    assert cost["longest"] <= 2000, cost


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False), st.sampled_from([0.0, 0.0, 0.02, 0.2]))
def test_data_by_the_schema_with_wrong_values_in_it_is_loaded_or_refused(rng: random.Random, wrong: float) -> None:
    text = rendered(rng, generated(rng, SCHEMA, wrong))
    with tempfile.TemporaryDirectory() as folder:
        outcome = judge(Case({"kvmsnapd.yaml": text}, {}), Path(folder))
    assert not outcome.failures


# ---- small reproductions of what the run has found ---------------------------------------------------------------


VALID = "policies: {a: {schedule: hourly, keep: {last: 1}}}\ndomains: {x: [a]}\n"


def problems(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch | None = None, **variables: str) -> list[str]:
    """Return what is wrong with a configuration."""
    file = folder / "kvmsnapd.yaml"
    file.write_text(text, encoding="utf-8")
    for name, value in variables.items():
        assert monkeypatch
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    return [str(problem).replace(f"{folder}/", "") for problem in error.value.problems]


MARKED = {
    "at the top": '"[key]": 1',
    "policy": 'policies: {"[key]": {hooks: {before: {foo: 1}}}}',
    "domain": 'policies: {a: {schedule: daily, keep: {last: 1}}}\ndomains: {"[key]": {a: {hooks: {before: {foo: 1}}}}}',
}


@pytest.mark.parametrize("where", MARKED)
def test_a_name_that_pydantic_uses_as_a_mark_is_like_any_other(where: str, tmp_path: Path) -> None:
    assert any("unknown key" in problem and "[key]" in problem for problem in problems(tmp_path, MARKED[where]))


def test_deep_json_in_a_variable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems(tmp_path, VALID, monkeypatch, KVMSNAPD_METRICS="[" * 5000)
    assert problem.startswith("environment KVMSNAPD_METRICS: ")


def test_a_lone_surrogate_in_the_json_of_a_variable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems(tmp_path, VALID, monkeypatch, KVMSNAPD_DOMAINS='{"/\\ud800(/": []}')
    assert problem.encode().startswith(b"environment KVMSNAPD_DOMAINS: ")


def test_a_variable_whose_name_is_no_text_is_refused_in_words_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (problem,) = problems(tmp_path, VALID, monkeypatch, **{"KVMSNAPD_\udcff": "1"})
    assert problem.encode()


def test_a_file_whose_name_is_no_text_is_refused_in_words_that_are(tmp_path: Path) -> None:
    part = tmp_path / "conf.d" / os.fsdecode(b"\xff.yaml")
    part.parent.mkdir()
    part.write_text("colour: blue", encoding="utf-8")
    (problem,) = problems(tmp_path, VALID)
    assert problem.encode()


def test_what_is_missing_at_the_end_of_a_file_is_shown_in_its_last_line(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "policies: {")
    assert problem.startswith("kvmsnapd.yaml:1:12: ")


@pytest.mark.parametrize(("value", "columns"), [("\u6f22\u5b57", 4), ("e\u0301", 1)])
def test_the_carets_are_as_wide_as_what_they_mark(value: str, columns: int, tmp_path: Path) -> None:
    problem = next(p for p in problems(tmp_path, f"timezone: {value}") if "timezone: " in p.partition("\n")[0])
    assert problem.endswith(f"\n      | {' ' * 10}{'^' * columns}")


GIANT = {
    "number": f"workers: {'9' * 5000}",
    "zone": f"timezone: {'x' * 5000}",
    "duration": f"tick: {'x' * 5000}",
    "word": f"log: {{level: {'x' * 5000}}}",
    "schedule": f"defaults: {{schedule: {'x' * 5000}}}",
    "count": f"defaults: {{keep: {{last: {'x' * 5000}}}}}",
    "policy": f"domains: {{x: [{'x' * 5000}]}}",
    "selector": f"domains:\n  ? /{'(' * 5000}/\n  : []",
    "key": f"? {'x' * 5000}\n: 1",
    "tag": f"connect: !{'x' * 5000} 1",
}


@pytest.mark.parametrize("giant", GIANT)
def test_a_giant_value_is_not_repeated_whole(giant: str, tmp_path: Path) -> None:
    assert max(map(len, problems(tmp_path, GIANT[giant]))) <= 2000


# ---- selectors ---------------------------------------------------------------------------------------------------

POLICIES = [(), (a_policy("hourly"),), (a_policy("daily", schedule="daily"),)]
names = st.text(st.characters(exclude_characters="/\n\0", exclude_categories=["Cs"]), min_size=1, max_size=255)
likely_names = st.one_of(st.text("ab-1.", min_size=1, max_size=12), st.integers(200, 255).map(lambda n: "a" * n), names)
pieces = st.sampled_from(["a", "b", ".", "[ab]", "[^b]", "a*", ".*?", "a?", "a{2,9}", "(a|)", "(a|aa)", "(|b)", "\\d"])
regexes = st.lists(pieces, max_size=10).map("".join) | st.text("ab|()*+?{}12,[]^-.$\\d", max_size=20)
globs = st.text("ab*?[]!-1", min_size=1, max_size=60) | st.lists(st.sampled_from(["*a", "*", "?", "[ab]"])).map("".join)
selectors = st.one_of(regexes.map("/{}/".format), globs, names)


def accepted(selector: str) -> bool:
    """Tell whether the selector may be used."""
    try:
        check_selector(selector)
    except InvalidValueError:
        return False
    return True


@settings(deadline=None)
@given(selectors, likely_names)
def test_an_accepted_selector_matches_any_name_soon(selector: str, name: str) -> None:
    assume(accepted(selector))
    with deadline():
        fits(selector, name)


@pytest.mark.parametrize(
    "selector",
    [
        "/.*a.*a.*a.*b/",
        "*a" * 127 + "b",
        "*[a-z]" * 100 + "b",
        f"/{'(a|)' * 30}b/",
        f"/{'(a|aa)' * 30}b/",
        f"/{'(a|[a])' * 22}a*b/",
        "/(a|)(a|)(a|).*a.*ab/",
    ],
)
def test_no_accepted_selector_takes_for_ever_to_match(selector: str) -> None:
    if not accepted(selector):
        return
    try:
        with deadline(4):
            fits(selector, "a" * 255)
    except TooSlowError:
        pytest.fail("it takes for ever")


def test_no_accepted_selector_takes_for_ever_to_compile() -> None:
    selector = "[" * 16_000
    if not accepted(selector):
        return
    try:
        with deadline(1):
            fits(selector, "a")
    except TooSlowError:
        pytest.fail("it takes for ever")


@given(selectors)
def test_every_accepted_pattern_has_a_weight(selector: str) -> None:
    assume(accepted(selector))
    fixed, shortest = weight(selector)
    assert 0 <= fixed <= shortest


@given(st.text("ab-1", min_size=1, max_size=9), st.data())
def test_a_pattern_that_fits_asks_for_no_longer_a_name(name: str, data: st.DataObject) -> None:
    selector = data.draw(selectors.filter(accepted).filter(is_pattern))
    assert not fits(selector, name) or weight(selector)[1] <= len(name)


entries = st.dictionaries(selectors.filter(accepted), st.sampled_from(POLICIES), max_size=6)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(entries, st.lists(likely_names, min_size=1, max_size=4, unique=True), st.randoms(use_true_random=False))
def test_the_order_of_the_selectors_decides_nothing(
    entries: dict[str, Any], names: list[str], rng: random.Random
) -> None:
    domains = [Inventory(str(uuid.UUID(int=number)), name) for number, name in enumerate(names)]
    shuffled = list(entries.items())
    rng.shuffle(shuffled)
    assert assign(dict(shuffled), domains) == assign(entries, domains)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(entries, likely_names, st.sampled_from(POLICIES))
def test_an_exact_name_always_wins(entries: dict[str, Any], name: str, policies: tuple[Any, ...]) -> None:
    domain = Inventory(str(uuid.UUID(int=1)), name)
    (found,) = assign({**entries, name: policies}, [domain])
    assert found.policies == policies
    assert found.patterns == (name,)
    assert found.coverage is (Coverage.PROTECTED if policies else Coverage.UNPROTECTED_ON_PURPOSE)
