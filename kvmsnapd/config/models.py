"""The configuration as users write it. Descriptions and defaults here are the reference; nothing is said twice."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kvmsnapd.durations import DURATION_PATTERN, format_duration, parse_duration
from kvmsnapd.errors import InvalidValueError
from kvmsnapd.naming import check_policy_name
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.retention import KeepRules, parse_count, parse_within
from kvmsnapd.schedule import parse_schedule

_UTC = ZoneInfo("UTC")
SIZE_PATTERN = r"^[0-9]+(\.[0-9]+)? *([kmgtpKMGTP]i?)?[bB]?$"


def _duration(value: Any) -> Any:  # noqa: ANN401  # before validation anything may come
    if isinstance(value, bool):
        msg = "write a duration, such as 90s or 15m"
        raise InvalidValueError(msg)
    return parse_duration(str(value)) if isinstance(value, (str, int)) else value


def _positive(value: timedelta) -> timedelta:
    if not value:
        msg = "write a duration above zero"
        raise InvalidValueError(msg)
    return value


def _between(shortest: timedelta, longest: timedelta) -> AfterValidator:
    def check(value: timedelta) -> timedelta:
        if not shortest <= value <= longest:
            msg = f"write a duration from {format_duration(shortest)} to {format_duration(longest)}"
            raise InvalidValueError(msg)
        return value

    return AfterValidator(check)


def _or_empty(value: Any) -> Any:  # noqa: ANN401
    return {} if value is None else value  # the key is there and all below it is commented out


def _count(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        msg = "write a whole number from 1, or all"
        raise InvalidValueError(msg)
    return parse_count(value)


def _within(value: Any) -> Any:  # noqa: ANN401
    return parse_within(str(value))


def _timezone(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, ZoneInfo):
        return value
    try:
        return ZoneInfo(value)
    except (KeyError, ValueError, OSError, TypeError) as error:
        msg = f"{value!r} is no time zone this host knows: write a name such as Europe/Berlin or UTC"
        raise InvalidValueError(msg) from error


def _schedule(value: Any) -> Any:  # noqa: ANN401
    return parse_schedule(str(value), _UTC).text  # in the policy's own zone once that is known


def _not_bool(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, bool):
        msg = "write a whole number"
        raise InvalidValueError(msg)
    return value


Duration = Annotated[
    timedelta,
    BeforeValidator(_duration),
    PlainSerializer(format_duration),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN}),
]
Within = Annotated[Duration, BeforeValidator(_within)]
Count = Annotated[
    int,
    BeforeValidator(_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "all"}]}),
]
TimeZone = Annotated[ZoneInfo, BeforeValidator(_timezone), PlainSerializer(str), WithJsonSchema({"type": "string"})]


def _size(value: Any) -> Any:  # noqa: ANN401
    # pydantic looks at the beginning only, and reads "1,5GiB" as one byte.
    if isinstance(value, bool) or (isinstance(value, str) and not re.fullmatch(SIZE_PATTERN, value)):
        msg = "write a size, such as 500MiB or 10GiB"
        raise InvalidValueError(msg)
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        msg = "write an absolute path"
        raise InvalidValueError(msg)
    return value


Size = Annotated[ByteSize, BeforeValidator(_size), WithJsonSchema({"type": "string", "pattern": SIZE_PATTERN})]
Number = Annotated[int, BeforeValidator(_not_bool)]
PolicyName = Annotated[str, BeforeValidator(check_policy_name)]


class _Section(BaseModel):
    # A typing error in a key must never pass as "not set".
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, use_attribute_docstrings=True)


class KeepSettings(_Section):
    """Which snapshots stay: each rule claims some, and a snapshot stays while at least one rule claims it."""

    last: Count | None = None
    """The newest snapshots, whatever their age."""
    hourly: Count | None = None
    """The newest snapshot of each of this many hours that have one."""
    daily: Count | None = None
    """The newest snapshot of each of this many days that have one."""
    weekly: Count | None = None
    """The newest snapshot of each of this many ISO weeks that have one."""
    monthly: Count | None = None
    """The newest snapshot of each of this many months that have one."""
    yearly: Count | None = None
    """The newest snapshot of each of this many years that have one."""
    within: Within | None = None
    """All snapshots younger than this, measured from the newest one."""

    def rules(self) -> KeepRules:
        """Return the rules as retention takes them; raise InvalidValueError if there is none."""
        return KeepRules(**{name: value for name, value in self if value is not None})


class DiskSettings(_Section):
    """Which disks of a domain the policy covers, by target (vdb) or source; * and ? as in patterns of domains.

    Internal snapshots cover all disks or none. What is left out is noted in the snapshot's description.
    """

    include: list[str] = []
    """Only these."""
    exclude: list[str] = []
    """All but these."""


class HookSettings(_Section):
    """One program to run.

    It gets SNAPSHOT_DOMAIN, SNAPSHOT_DOMAIN_UUID, SNAPSHOT_POLICY, SNAPSHOT_NAME, SNAPSHOT_CONSISTENCY, SNAPSHOT_HOOK
    and SNAPSHOT_RESULT in its environment, and nothing of the daemon's own.
    """

    command: Annotated[list[str], Field(min_length=1)]
    """The program and its arguments, as a list; no shell reads them."""
    timeout: Annotated[Duration, AfterValidator(_positive)] = Field(
        default=timedelta(minutes=1), json_schema_extra={"default": "1m"}
    )
    """After this time it is ended, with all it has started."""


class BeforeHookSettings(HookSettings):
    """The program to run before a take; it gets the same environment."""

    required: bool = False
    """Whether no snapshot is taken when it fails."""


class HooksSettings(_Section):
    """Programs to run around each take, under the daemon's own user."""

    before: BeforeHookSettings | None = None
    """Before a snapshot is taken."""
    after: HookSettings | None = None
    """After one was taken, before old ones are deleted."""
    on_failure: HookSettings | None = None
    """After one was due, `before` had its turn, and none was taken."""


class PolicySettings(_Section):
    """When snapshots are taken, of what quality, and how long they stay."""

    schedule: Annotated[str, BeforeValidator(_schedule)]
    """hourly, daily, weekly, monthly or yearly; `every 15m`; or five cron fields such as "7 * * * *"."""
    keep: KeepSettings
    """The keep rules. A snapshot that no rule claims is deleted after the next successful one."""
    timezone: TimeZone | None = None
    """Time zone of schedule and keep rules; by default the one at the top of the file."""
    kind: Literal["external", "internal"] = "external"
    """external: overlays, no pause, any disk format. internal: inside qcow2, stops a running guest meanwhile."""
    consistency: ConsistencyRule = ConsistencyRule.FILESYSTEM_PREFERRED
    """What a snapshot of a running guest must be: filesystem (the guest agent freezes, or none is taken),
    filesystem-preferred (else crash-consistent, and said so), crash (the agent is never asked), or memory (with its
    RAM: needs memory: live, or kind: internal)."""
    memory: Literal["live"] | None = None
    """live: external snapshots hold the guest's RAM as well, saved while it runs on; each costs a file of its size."""
    max_pause: Annotated[Duration, AfterValidator(_positive)] = Field(
        default=timedelta(seconds=10), json_schema_extra={"default": "10s"}
    )
    """How long saving RAM may stop a guest: an internal snapshot of one with too much RAM is refused; with memory: live
    QEMU is asked to keep to it, which it does roughly."""
    catch_up: Literal["once", "skip"] = "once"
    """After missed runs: once takes one snapshot at once, skip waits for the next scheduled time."""
    splay: Duration | None = None
    """Runs of different domains are spread over this time; by default a tenth of the interval, at most 5m."""
    max_age: Annotated[Duration, AfterValidator(_positive)] | None = None
    """Age of the newest snapshot that means trouble; by default twice the longest interval of the schedule, and the
    splay."""
    max_deletes_per_run: Annotated[Number, Field(ge=1)] = 10
    """The fuse: a run that releases more than this at once, beyond what had to wait before, deletes nothing and reports
    it."""
    max_chain_depth: Annotated[Number, Field(ge=1, le=150)] = 16
    """No external snapshot is taken when the backing chain is this deep, foreign overlays included."""
    min_free: Annotated[Size, Field(json_schema_extra={"default": "1GiB"})] = ByteSize(1024**3)
    """No snapshot is taken when its storage has less free space than this; RAM to be saved comes on top."""
    overlay_directory: Annotated[str, AfterValidator(_absolute)] | None = None
    """Where overlays and RAM go; by default beside each disk's image. Needed for block and network disks."""
    disks: Annotated[DiskSettings, BeforeValidator(_or_empty)] = Field(default_factory=DiskSettings)
    """Which disks are covered; by default all that can be written to."""
    hooks: Annotated[HooksSettings, BeforeValidator(_or_empty)] = Field(default_factory=HooksSettings)
    """Programs to run around each take."""


class MetricsSettings(_Section):
    """The Prometheus endpoint."""

    enabled: bool = True
    """Whether to serve metrics over HTTP."""
    listen: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[Number, Field(ge=0, le=65535)] = 9783
    """Port to listen on; 0 chooses a free one, which the log names."""


class LogSettings(_Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe events to log."""
    format: Literal["auto", "json", "console"] = "auto"
    """json: one object a line; console: for people; auto: console on a terminal, json elsewhere."""


class Settings(BaseSettings):
    """The whole configuration file. Environment variables `KVMSNAPD_…` override it: `KVMSNAPD_METRICS__PORT=9000`."""

    model_config = SettingsConfigDict(
        env_prefix="KVMSNAPD_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )

    timezone: TimeZone = _UTC
    """Time zone of schedules and keep rules."""
    connect: str = "qemu:///system"
    """URI of the libvirt to work on."""
    policies: Annotated[dict[PolicyName, PolicySettings], BeforeValidator(_or_empty)] = Field(default_factory=dict)
    """Policies by name."""
    domains: Annotated[dict[str, list[str]], BeforeValidator(_or_empty)] = Field(default_factory=dict)
    """Names, UUIDs or glob patterns of domains, each with the policies they get; [] is unprotected on purpose."""
    metrics: Annotated[MetricsSettings, BeforeValidator(_or_empty)] = Field(default_factory=MetricsSettings)
    """Where Prometheus finds the metrics."""
    log: Annotated[LogSettings, BeforeValidator(_or_empty)] = Field(default_factory=LogSettings)
    """Logging."""
    tick: Annotated[Duration, _between(timedelta(seconds=1), timedelta(minutes=10))] = Field(
        default=timedelta(seconds=30), json_schema_extra={"default": "30s"}
    )
    """How often all domains are looked at, whatever the schedules say."""
    workers: Annotated[Number, Field(ge=1, le=4)] = 4
    """How many domains are worked on at once."""
    takes_per_storage: Annotated[Number, Field(ge=1)] = 4
    """How many snapshots are taken at once on one storage (a folder of images)."""
    merges_per_storage: Annotated[Number, Field(ge=1)] = 1
    """How many merges of overlays, and saves of RAM, go on at once on one storage."""
    state_directory: Path | None = None
    """Where notes that must survive a reboot are kept; by default systemd's STATE_DIRECTORY or /var/lib/kvmsnapd."""
    runtime_directory: Path | None = None
    """Where the lock files are; by default systemd's RUNTIME_DIRECTORY or /run/kvmsnapd."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment override the file, which arrives as init arguments."""
        return (env_settings, init_settings)
