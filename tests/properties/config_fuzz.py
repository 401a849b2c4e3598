"""Feeds `load_config` with hostile configurations, thousands in one process, and tells which claims did not hold.

`python -m tests.properties.config_fuzz INPUTS` prints one JSON object. Input number N is the same in every run as long
as the samples are, so a failure is seen again with `--first N 1`; its files are part of what is printed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import resource
import signal
import tempfile
import time
import unicodedata
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from kvmsnapd.config import load_config
from kvmsnapd.config.schema import render_schema
from kvmsnapd.errors import ConfigError, Problem
from kvmsnapd.matching import assign
from kvmsnapd.model import Inventory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmsnapd.config import Config

ROOT = Path(__file__).parents[2]
SECONDS = 5
"""More than this for one configuration counts as a hang."""
MOST_TEXT = 2000
"""Characters of one problem, which somebody has to read."""
_ADDRESS_SPACE = 400 * 2**20
"""On top of what the process has when it begins; more becomes a MemoryError instead of a dead machine."""
_KEPT = 5
"""Examples of each failure that are printed."""

CLAIMS = {
    "crash": "load_config returns or raises ConfigError",
    "slow": f"it does so within {SECONDS} s",
    "place": "each problem stands inside its file",
    "caret": "the caret is below the line's own characters",
    "short": f"no problem has more than {MOST_TEXT} characters",
    "text": "each problem is UTF-8 and JSON",
    "config": "what is loaded can be explained and assigned, and is the same when loaded again",
}

DOMAINS = tuple(
    Inventory(f"00000000-0000-4000-8000-{index:012x}", name)
    for index, name in enumerate(["db01", "web-1", "web-db-02", "lab-7", "scratch-x", "[key]", "\u6f22", "a" * 255])
)


class TooSlowError(BaseException):
    """Nothing that catches `Exception` may catch it."""


class Case(NamedTuple):
    """One configuration: the files by name, the first one the main file, and the environment."""

    files: dict[str, bytes]
    environment: dict[str, str]


@dataclass
class Outcome:
    """What came of one case."""

    loaded: bool = False
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Claim and what happened instead."""


# ---- what is fed -------------------------------------------------------------------------------------------------


def samples() -> list[bytes]:
    """Return real configurations: the samples, the example files, the blocks in README."""
    paths = [
        *sorted(path for path in (ROOT / "tests/samples").glob("**/*.yaml") if path.is_file()),
        ROOT / "config/kvmsnapd.yaml",
        *sorted((ROOT / "config/examples").glob("*.yaml")),
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```ya?ml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    return [path.read_bytes() for path in paths] + [block.encode() for block in blocks]


_TOKENS = [
    *(b"&a ", b"*a", b"<<: *a", b"<<: {}", b"!!python/object/apply:os.system ", b"!!binary ", b"!x ", b"! ", b"!!int "),
    *(b"? ", b": ", b"- ", b"|\n", b">\n", b"|-2\n", b"\n---\n", b"\n...\n", b"%YAML 1.3\n", b"%TAG ! !\n", b"{", b"}"),
    *(b"[", b"]", b",", b"'", b'"', b"#", b"\t", b"@", b"`", b"*", b"\\", b'"\\ud800"', b'"\\0"', b'"\\U0001f600"'),
    *(b"\0", b"\xed\xa0\x80", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\x85", b"\x1b[31m", b"\x7f"),
    *(sign.encode() for sign in "\x85\u2028\u2029\u202e\u0301\u200b\u6f22\U0001f600\ufffe\u0130\ufeff\xa0"),
    *(b"1e999", b".inf", b".nan", b"9" * 19, b"9" * 400, b"-0", b"0x10", b"0o7", b"1_000", b"22:30", b"2026-01-01"),
    *(b"true", b"no", b"~", b"null", b"[key]", b"list", b"mapping", b"/(a|b)*/", b"/[/", b"''", b"[]", b"{}"),
    *(b"&a [*a, *a]", b"&a {a: *a}", b"*a : 1\n", b"&a a: 1\n", b"? [a]\n: 1\n", b"? {a: 1}\n", b"extends: standard\n"),
]


def _long(rng: random.Random) -> bytes:
    """Return what is long, deep or repeated; by thousands and not more, as this is one input of many."""
    many = rng.choice([30, 300, 3000])
    return rng.choice(
        [
            b"x" * many * 3,
            b"\n" + b"y" * 900 + b": 1\n",
            b"[" * many,
            b"{a: " * many,
            b"? " * many,
            b"\n- " * many,
            b"&b " * many,
            b"1s" * many,
            "\u0301\u6f22".encode() * many,
            b"'" + b"z" * many * 3 + b"'",
            b"\n" * many,
            b"".join(b"\nk%d: 1" % number for number in range(min(many, 300))),
            b"".join(b"%%TAG !a%d! !a\n" % number for number in range(min(many, 300))),
        ]
    )


def _somewhere(rng: random.Random, text: bytes) -> int:
    return rng.randint(0, len(text))


def _replace(rng: random.Random, text: bytes, new: bytes, most: int = 0) -> bytes:
    at = _somewhere(rng, text)
    return text[:at] + new + text[at + rng.randint(0, most) :]


def _flip(rng: random.Random, text: bytes, _pool: list[bytes]) -> bytes:
    at = _somewhere(rng, text)
    return text[:at] + bytes([byte ^ 1 << rng.randrange(8) for byte in text[at : at + 1]]) + text[at + 1 :]


def _splice(rng: random.Random, text: bytes, pool: list[bytes]) -> bytes:
    lines = rng.choice(pool).splitlines(keepends=True) or [b""]
    start = rng.randrange(len(lines))
    own = text.splitlines(keepends=True)
    at = rng.randint(0, len(own))
    return b"".join([*own[:at], *lines[start : start + rng.randint(1, 8)], *own[at:]])


def _duplicate_line(rng: random.Random, text: bytes, _pool: list[bytes]) -> bytes:
    lines = text.splitlines(keepends=True) or [b""]
    at = rng.randrange(len(lines))
    return b"".join([*lines[:at], *[lines[at]] * rng.choice([2, 2, 3, 50]), *lines[at + 1 :]])


def _swap_indentation(rng: random.Random, text: bytes, _pool: list[bytes]) -> bytes:
    lines = text.splitlines(keepends=True)
    if len(lines) < 2:  # two make a swap
        return text
    one, two = rng.sample(range(len(lines)), 2)
    first, second = lines[one], lines[two]
    blanks = [line[: len(line) - len(line.lstrip(b" "))] for line in (first, second)]
    lines[one], lines[two] = blanks[1] + first.lstrip(b" "), blanks[0] + second.lstrip(b" ")
    return b"".join(lines)


def _swap_words(rng: random.Random, text: bytes, pool: list[bytes]) -> bytes:
    """Put a word of another sample, or a wrong value, in the place of a word."""
    words = list(re.finditer(rb"[\w./-]+", text))
    if not words:
        return text
    word = rng.choice(words)
    other = re.findall(rb"[\w./*-]+", rng.choice(pool)) or [b"x"]
    new = rng.choice([rng.choice(other), rng.choice(_TOKENS), json.dumps(_wrong(rng)).encode()])
    return text[: word.start()] + new + text[word.end() :]


_Mutation = Callable[[random.Random, bytes, list[bytes]], bytes]
_MUTATIONS: list[_Mutation] = [
    _flip,
    lambda rng, text, _pool: _replace(rng, text, rng.randbytes(rng.randint(1, 4)), 4),
    lambda rng, text, _pool: _replace(rng, text, b"", 30),
    lambda rng, text, _pool: text[: _somewhere(rng, text)],
    lambda rng, text, _pool: _replace(rng, text, rng.choice(_TOKENS)),
    lambda rng, text, _pool: _replace(rng, text, rng.choice(_TOKENS), 8),
    _duplicate_line,
    _swap_indentation,
    _swap_words,
    _swap_words,
    _swap_words,
    _splice,
]


def mutated(rng: random.Random, pool: list[bytes]) -> bytes:
    """Return a real configuration with some damage."""
    text = rng.choice(pool)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        text = rng.choice(_MUTATIONS)(rng, text, pool)
    return _replace(rng, text, _long(rng)) if rng.random() < 0.05 else text


_WORDS = [
    *("a", "b", "standard", "web-*", "db01", "*", "[key]", "list", "mapping", "/web-[0-9]+/", "/(a|b)+/", "lab-?"),
    *("00000000-0000-4000-8000-000000000001", "ABCDEFAB-0000-4000-8000-000000000001", "10GiB", "1h30m", "every 15m"),
    *("hourly", "7 * * * *", "0 0 29 2 *", "60 * * * *", "Europe/Berlin", "UTC", "../UTC", "localtime", "/srv", "5m"),
    *("qemu:///system", "qemu+ssh://me:secret@host/system", "all", "0", "on", "1", "127.0.0.1", "", " ", "x", "keep"),
    *("schedule", "\u6f22\u5b57", "\u202eb\u0301", "\x85", "\U0001f600", "a" * 33, "1e999", "0.5", "every 0s"),
    *("9" * 12 + "d", "<<", "1s"),
]
_WRONG: list[Any] = [
    *(None, True, False, -1, 0, 10**17, 10**30, 1.5, float("inf"), "", "*", [], {}, [[]], [None], [1], [{}], {"": 1}),
    *({"[key]": 1}, {"a": {"foo": 1}}, {"hooks": {"before": {"foo": 1}}}, [["a", "a"], {"a": [1]}], "z" * 3000),
    *({"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}, ["a", "a"], {"a": None}, {"extends": "a"}, {"extends": "b"}),
]


def _wrong(rng: random.Random) -> Any:  # noqa: ANN401  # anything may come
    return rng.choice([rng.choice(_WRONG), rng.choice(_WORDS), rng.choice(_WRONG)])


SCHEMA: dict[str, Any] = json.loads(render_schema())


def generated(rng: random.Random, schema: dict[str, Any], wrong: float) -> Any:  # noqa: ANN401  # JSON data
    """Return data as the schema describes it, with a wrong value wherever chance has it."""
    if rng.random() < wrong:
        return _wrong(rng)
    if "$ref" in schema:
        return generated(rng, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], wrong)
    if "examples" in schema and rng.random() < 0.3:
        return rng.choice(schema["examples"])
    choices = schema.get("oneOf", []) if "type" in schema else schema.get("anyOf", schema.get("oneOf", []))
    if choices:
        return generated(rng, rng.choice(choices), wrong)
    if schema.get("type") == "object":
        return _generated_mapping(rng, schema, wrong)
    if schema.get("type") == "array":
        return [generated(rng, schema["items"], wrong) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    return _generated_scalar(rng, schema)


def _generated_scalar(rng: random.Random, schema: dict[str, Any]) -> Any:  # noqa: ANN401  # JSON data
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema.get("type") == "integer":
        return rng.randint(schema.get("minimum", 0), schema.get("maximum", 9))
    if schema.get("type") == "boolean":
        return rng.random() < 0.5
    patterns = [part["pattern"] for part in [schema, *schema.get("anyOf", [])] if "pattern" in part]
    fit = [word for word in _WORDS if any(re.search(pattern, word) for pattern in patterns)]
    return rng.choice(fit or _WORDS) if schema.get("type") == "string" else None


def _generated_mapping(rng: random.Random, schema: dict[str, Any], wrong: float) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in schema.get("properties", {}).items():
        if rng.random() < (0.85 if key in {"schedule", "keep", "policies", "domains", "command"} else 0.12):
            data[key] = generated(rng, value, wrong)
    entries = list(schema.get("patternProperties", {}).items())
    if isinstance(schema.get("additionalProperties"), dict):
        entries.append(("", schema["additionalProperties"]))
    for pattern, value in entries:
        names = [word for word in _WORDS if re.search(pattern, word)][: 3 if pattern else None]
        for name in rng.sample(names, rng.randint(0, min(3, len(names)))):
            data[name] = generated(rng, value, wrong)
    if rng.random() < wrong:
        data[rng.choice(_WORDS)] = _wrong(rng)
    return data


def rendered(rng: random.Random, data: object) -> bytes:
    """Return data as YAML, as one writes it or as a machine does."""
    if rng.random() < 0.3:
        return json.dumps(data, ensure_ascii=rng.random() < 0.5).encode()
    return yaml.safe_dump(data, default_flow_style=rng.choice([None, True, False]), allow_unicode=True).encode()


_KEYS = sorted({key for part in [SCHEMA, *SCHEMA["$defs"].values()] for key in part.get("properties", {})})


def variables(rng: random.Random) -> dict[str, str]:
    """Return some environment variables of our prefix."""
    given = {}
    for _ in range(rng.choice([1, 1, 2])):
        parts = [rng.choice([*SCHEMA["properties"], "\udcff"])]
        words = [*_KEYS, "a", "[key]", "x", "", "0", "\udcff"]
        parts += [rng.choice(words) for _ in range(rng.choice([0, 0, 1, 1, 2, 3, 5]))]
        name = "KVMSNAPD_" + rng.choice(["__", "__", "__", "__", "_"]).join(parts)
        value = rng.choice(
            [
                json.dumps(_wrong(rng)),
                json.dumps(generated(rng, SCHEMA["properties"].get(parts[0], SCHEMA), 0.2)),
                rng.choice(_WORDS),
                "\udcff",
                '{"\\ud800(/": ["\\ud800"]}',
                "[" * rng.choice([3, 3000]),
                "9" * 5000,
            ]
        )
        given[rng.choice([name, name.upper(), name.lower()])] = value
    return given


def make_case(rng: random.Random, pool: list[bytes]) -> Case:
    """Return one input of the run."""

    def text() -> bytes:
        if rng.random() < 0.7:
            return mutated(rng, pool)
        return rendered(rng, generated(rng, SCHEMA, rng.choice([0.0, 0.0, 0.01, 0.05, 0.2])))

    files = {"kvmsnapd.yaml": text()}
    if rng.random() < 0.15:
        files |= {f"conf.d/{index}.yaml": text() for index in range(rng.randint(1, 3))}
    return Case(files, variables(rng) if rng.random() < 0.2 else {})


# ---- what is claimed ---------------------------------------------------------------------------------------------


def judge(case: Case, folder: Path) -> Outcome:
    """Load one configuration and hold what comes of it to all claims."""
    outcome = Outcome()
    texts = {}
    for name, content in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        texts[str(folder / name)] = content
    with _environment(case.environment), deadline():
        try:
            config = load_config(folder / "kvmsnapd.yaml")
            outcome.loaded = True
            outcome.failures += [("config", wrong) for wrong in _wrong_with_config(config)]
        except ConfigError as error:
            outcome.failures += _wrong_with_error(error, texts)
        except TooSlowError:
            outcome.failures.append(("slow", "deadline"))
        except Exception as error:  # noqa: BLE001  # this is the claim
            outcome.failures.append(("config" if outcome.loaded else "crash", _signature(error)))
    for name in case.files:
        (folder / name).unlink()
    if len(case.files) > 1:
        (folder / "conf.d").rmdir()
    return outcome


def _signature(error: Exception) -> str:
    """Return the error and the last of our own functions it came through."""
    functions = []
    trace = error.__traceback__
    while trace:
        if "/kvmsnapd/" in trace.tb_frame.f_code.co_filename:
            functions.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return f"{type(error).__name__} in {functions[-1] if functions else 'a library'}: {ascii(str(error))[:200]}"


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    variables = {name: value for name, value in variables.items() if "\0" not in name + value and "=" not in name}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


@contextmanager
def deadline(seconds: float = SECONDS, timer: int = signal.ITIMER_REAL) -> Iterator[None]:
    """Raise TooSlowError when the time is over: of the clock, or with ITIMER_PROF of the processor."""

    def too_slow(*_: object) -> None:
        raise TooSlowError

    number = signal.SIGPROF if timer == signal.ITIMER_PROF else signal.SIGALRM
    before = signal.signal(number, too_slow)
    left, _ = signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, before)
        signal.setitimer(timer, left)  # pytest's own


def _wrong_with_error(error: ConfigError, texts: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    if not error.problems:
        yield "text", "no problem"
    for problem in error.problems:
        if len(str(problem)) > MOST_TEXT:
            yield "short", f"{len(str(problem))} characters: {ascii(problem.message)[:80]}"
        try:
            str(problem).encode()
            json.loads(json.dumps(asdict(problem), ensure_ascii=False).encode())
        except ValueError as refused:
            yield "text", f"{type(refused).__name__}: {ascii(problem.message)[:80]}"
        if problem.file.startswith("environment "):
            if problem.line or problem.column or problem.excerpt:
                yield "place", f"an environment variable has no lines: {problem.place}"
        elif problem.file not in texts:
            yield "place", f"no such file: {problem.file}"
        elif problem.line:
            yield from _wrong_with_place(problem, texts[problem.file])


_BREAKS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


def _width(text: str) -> int:
    wide = {"W": 2, "F": 2}
    return sum(0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1) for c in text)


def _wrong_with_place(problem: Problem, content: bytes) -> Iterator[tuple[str, str]]:
    text = content.decode(errors="replace").removeprefix("\ufeff")
    # What is no text has no lines of YAML, but still those that editors count.
    lines = text.split("\n") if problem.message.startswith("is not UTF-8") else _BREAKS.split(text)
    if not 1 <= problem.line <= len(lines):
        yield "place", f"line {problem.line} of {len(lines)}: {problem.message[:80]}"
        return
    line = lines[problem.line - 1]
    if not 1 <= problem.column <= len(line) + 1:
        yield "place", f"column {problem.column} of {len(line)}: {problem.message[:80]}"
    if not problem.excerpt:
        return
    above, _, below = problem.excerpt.rpartition("\n")
    shown, caret = above[len("      | ") + max(0, len(str(problem.line)) - 5) :], below[len("      | ") :]
    blanks = len(caret) - len(caret.lstrip(" "))
    if "\n" in above or not re.fullmatch(r" *\^+", caret):
        yield "caret", f"not a line and a caret: {ascii(problem.excerpt)[:200]}"
    elif blanks > _width(line[: problem.column - 1]) or len(caret) > blanks + max(1, _width(shown), len(line[:110])):
        yield "caret", f"outside: {ascii(problem.excerpt)[:300]}"


def _wrong_with_config(config: Config) -> Iterator[str]:
    for selector, policies in config.selectors.items():
        config.place_of(selector)
        for policy in policies:
            explained = config.explain(selector, policy.name)
            for setting in explained:
                json.dumps(setting.value)
                if not setting.place:
                    yield f"no place: {setting}"
    assigned = assign(config.selectors, DOMAINS)
    if len(assigned) != len(DOMAINS):
        yield "not every domain is assigned"
    again = load_config(config.path)
    if again.settings != config.settings or again.selectors != config.selectors:
        yield "another configuration when loaded again"


# ---- the run -----------------------------------------------------------------------------------------------------


def _memory(name: str) -> int:
    """Return a line of the process's status in bytes; rusage would count what the parent had before exec as well."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def run(inputs: int, first: int) -> dict[str, Any]:
    """Feed them all; return what there is to tell."""
    pool = samples()
    found: dict[str, dict[str, Any]] = {}
    counts = {"loaded": 0, "refused": 0}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        judge(Case({"kvmsnapd.yaml": b""}, {}), Path(name))  # so that what is made once does not count
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + _ADDRESS_SPACE,) * 2)
        before, start = _memory("VmHWM"), time.perf_counter()
        for number in range(first, first + inputs):
            if number % 50 == 0:  # for what no signal interrupts
                faulthandler.dump_traceback_later(30 * SECONDS, exit=True)
            case = make_case(random.Random(number), pool)  # noqa: S311  # the same in every run
            began = time.perf_counter()
            outcome = judge(case, Path(name))
            slowest = max(slowest, time.perf_counter() - began)
            counts["loaded" if outcome.loaded else "refused"] += 1
            for claim, wrong in outcome.failures:
                entry = found.setdefault(f"{claim}: {wrong[:40]}", {"claim": claim, "count": 0, "examples": []})
                entry["count"] += 1
                if len(entry["examples"]) < _KEPT and number not in [e["input"] for e in entry["examples"]]:
                    shown = {file: ascii(text)[:3000] for file, text in case.files.items()}
                    environment = {ascii(key): ascii(value)[:200] for key, value in case.environment.items()}
                    example = {"input": number, "wrong": wrong, "files": shown, "environment": environment}
                    entry["examples"].append(example)
        seconds = time.perf_counter() - start
    faulthandler.cancel_dump_traceback_later()
    return {
        "inputs": inputs,
        **counts,
        "seconds": round(seconds, 1),
        "slowest": round(slowest, 2),
        "peak_mb": round(_memory("VmHWM") / 2**20),
        "grown_mb": round((_memory("VmHWM") - before) / 2**20),
        "failures": found,
    }


# ---- hostile files ------------------------------------------------------------------------------------------------

_STANDARD = "policies:\n  a: {schedule: hourly, keep: {last: 1}}\n"
_DEFAULTS = "defaults: {schedule: hourly, keep: {last: 1}}\npolicies:\n"


def _lines(line: Callable[[int], str], count: int) -> str:
    return "".join(line(number) + "\n" for number in range(count))


HOSTILE: dict[str, Callable[[], str]] = {
    "a file of the largest size without any line": lambda: "#" * 4_000_000,
    "a file of nothing but lines": lambda: "\n" * 4_000_000,
    "millions of brackets": lambda: "[" * 4_000_000,
    "millions of documents": lambda: "---\n" * 1_000_000,
    "a bomb of aliases": lambda: "a: &a0 [x]\n" + _lines(lambda n: f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]", 9),
    "as many anchors as are allowed": lambda: f"a: [{''.join(f'&a{n} 1,' for n in range(190_000))}]",
    "20,000 domains": lambda: f"{_STANDARD}domains:\n{_lines(lambda n: f'  d{n}: [a]', 20_000)}",
    "3,000 policies": lambda: _DEFAULTS + _lines(lambda n: f"  p{n}: {{}}", 3000),
    "1,000 schedules": lambda: _DEFAULTS + _lines(lambda n: f"  p{n}: {{schedule: '{n % 60} {n // 60} * * *'}}", 1000),
    "a selector of many brackets": lambda: f"{_STANDARD}domains:\n  ? '{'[' * 5000}'\n  : [a]\n",
    "a cron list of 300 kB": lambda: (
        f"policies:\n  a: {{schedule: '{'0-59/1,' * 43_000}1 * * * *', keep: {{last: 1}}}}\n"
    ),
    "a regular expression of 1.6 MB": lambda: f"domains:\n  ? '/{'a' * 1_600_000}/'\n  : []\n",
    "35,000 tag directives": lambda: _lines(lambda n: f"%TAG !{n}! !", 35_000) + "--- {}\n",
    "a key given 8,000 times": lambda: _STANDARD + "  a: {}\n" * 8000,
    "10,000 unknown tags": lambda: "a:\n" + _lines(lambda n: f"  - !x{n} b", 10_000),
    "1,500 policies that extend each other in a row": lambda: (
        _STANDARD + _lines(lambda n: f"  p{n}: {{extends: {f'p{n - 1}' if n else 'a'}}}", 1500)
    ),
    "1,000 policies that extend each other in a circle": lambda: (
        _DEFAULTS + _lines(lambda n: f"  p{n}: {{extends: p{(n - 1) % 1000}}}", 1000)
    ),
    "3,000 policies with a key missing and 3,000 with a wrong one": lambda: (
        "policies:\n" + _lines(lambda n: f"  p{n}: {{schedule: hourly}}\n  q{n}: {{min_free: x}}", 3000)
    ),
    "500 names that are almost those of policies": lambda: (
        f"{_DEFAULTS}{_lines(lambda n: f'  policy-of-web-{n}: {{}}', 500)}"
        f"domains:\n{_lines(lambda n: f'  d{n}: [policy-of-wbe-{n}]', 500)}"
    ),
    "20,000 unknown keys": lambda: _lines(lambda n: f"k{n}: 1", 20_000),
    "200 aliased sections of 200 unknown keys": lambda: (
        f"a: &x {{{','.join(f'k{n}: 1' for n in range(200))}}}\n"
        f"policies: {{{','.join(f'p{n}: *x' for n in range(200))}}}"
    ),
    "a wrong value of 1 MB": lambda: f"workers: {'9' * 1_000_000}",
    "a wrong value of 100 kB, aliased 200 times": lambda: (
        f'state_directory: &a "{"x" * 100_000}"\ndomains:\n  x: [{"*a," * 200}]\n'
    ),
    "a key of 100 kB with 500 problems below it": lambda: (
        f"policies:\n  ? {'x' * 100_000}\n  : {{{', '.join(f'k{n}: 1' for n in range(500))}}}\n"
    ),
}
"""Small files that could cost much, by what they are."""


def budget(size: int) -> float:
    """Return the seconds of processor time that a file of so many bytes may cost."""
    return 1 + size / 500_000


def measure(hostile: str) -> dict[str, Any]:
    """Load one hostile file in a process of its own; return what it cost."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "kvmsnapd.yaml")
        file.write_text(HOSTILE[hostile](), encoding="utf-8")
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            os.write(writer, json.dumps(_cost(file)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, encoding="ascii") as answer:
            told = answer.read()
        os.waitpid(child, 0)
    return dict(json.loads(told or '{"outcome": "the process died"}'))


def _cost(file: Path) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest mark begins anew
    before, start = _memory("VmHWM"), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 2 * _ADDRESS_SPACE,) * 2)
    text, longest = "", 0
    try:
        with deadline(1.1 * budget(file.stat().st_size), signal.ITIMER_PROF):
            load_config(file)
        outcome = "loaded"
    except ConfigError as error:
        outcome, text, longest = "refused", str(error), max(len(str(problem)) for problem in error.problems)
    except TooSlowError:
        outcome = "too slow"
    except Exception as error:  # noqa: BLE001  # one of them is MemoryError
        outcome = _signature(error)
    seconds, grown = time.process_time() - start, (_memory("VmHWM") - before) / 2**20
    return {
        "outcome": outcome,
        "bytes": file.stat().st_size,
        "seconds": round(seconds, 2),
        "grown_mb": round(grown),
        "text": len(text),
        "longest": longest,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--hostile", type=int, choices=(0, 1), help="measure this half of the hostile files instead")
    arguments = parser.parse_args()
    if arguments.hostile is None:
        answer = run(arguments.inputs, arguments.first)
    else:
        answer = {hostile: measure(hostile) for hostile in list(HOSTILE)[arguments.hostile :: 2]}
    print(json.dumps(answer, indent=2))
