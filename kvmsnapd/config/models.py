"""The configuration as users write it.

Descriptions, defaults and examples here are the reference; nothing is said twice: config/README.md, the default file
and the JSON Schema are made from them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kvmsnapd.config.fields import (
    NUMBER,
    UTC_ZONE,
    AbsolutePath,
    Count,
    Duration,
    Flag,
    OrEmpty,
    PolicyName,
    PositiveDuration,
    PromFile,
    ScheduleText,
    Selector,
    Size,
    TimeZone,
    Uri,
    Within,
    between,
)
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.retention import KeepRules

NEEDS_RESTART = (
    "connect",
    "workers",
    "takes_per_storage",
    "merges_per_storage",
    "metrics",
    "state_directory",
    "runtime_directory",
)
"""Settings that a reload does not change, which the log then says."""


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


def _without_null(schema: dict[str, Any]) -> None:
    schema["anyOf"].remove({"type": "null"})
    del schema["default"]


class _Section(BaseModel):
    # A typing error in a key must never pass as "not set".
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, use_attribute_docstrings=True)


class KeepSettings(_Section):
    """Which snapshots stay: each rule claims some, and a snapshot stays while at least one rule claims it."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    last: Count | None = Field(default=None, examples=[2], json_schema_extra=_without_null)
    """The newest snapshots, whatever their age."""
    hourly: Count | None = Field(default=None, examples=[24], json_schema_extra=_without_null)
    """The newest snapshot of each of this many hours that have one."""
    daily: Count | None = Field(default=None, examples=[7], json_schema_extra=_without_null)
    """The newest snapshot of each of this many days that have one."""
    weekly: Count | None = Field(default=None, examples=[4], json_schema_extra=_without_null)
    """The newest snapshot of each of this many ISO weeks that have one."""
    monthly: Count | None = Field(default=None, examples=["all"], json_schema_extra=_without_null)
    """The newest snapshot of each of this many months that have one."""
    yearly: Count | None = Field(default=None, examples=[1], json_schema_extra=_without_null)
    """The newest snapshot of each of this many years that have one."""
    within: Within | None = Field(default=None, examples=["36h"], json_schema_extra=_without_null)
    """All snapshots younger than this, measured from the newest one."""

    @model_validator(mode="after")
    def _has_rules(self) -> KeepSettings:
        self.rules()
        return self

    def rules(self) -> KeepRules:
        """Return the rules as retention takes them; raise InvalidValueError if there is none."""
        return KeepRules(**{name: value for name, value in self if value is not None})


class DiskSettings(_Section):
    """Which disks of a domain the policy covers, by target (vdb) or source; * and ? as in patterns of domains.

    Internal snapshots cover all disks or none. What is left out is noted in the snapshot's description.
    """

    include: list[str] = Field(default=[], examples=[["vda", "/var/lib/libvirt/images/*"]])
    """Only these."""
    exclude: list[str] = Field(default=[], examples=[["vdb"]])
    """All but these."""


class HookSettings(_Section):
    """One program to run.

    It gets SNAPSHOT_DOMAIN, SNAPSHOT_DOMAIN_UUID, SNAPSHOT_POLICY, SNAPSHOT_NAME, SNAPSHOT_CONSISTENCY, SNAPSHOT_HOOK
    and SNAPSHOT_RESULT in its environment, CREDENTIALS_DIRECTORY if systemd gave credentials to the service, and
    nothing else of the daemon's own. So a secret that a hook needs comes from a file or a credential.
    """

    command: Annotated[list[str], Field(min_length=1, examples=[["/usr/local/sbin/flush-database", "now"]])]
    """The program and its arguments, as a list; no shell reads them."""
    timeout: PositiveDuration = Field(default=timedelta(minutes=1), json_schema_extra={"default": "1m"})
    """After this time it is ended, with all it has started."""


class BeforeHookSettings(HookSettings):
    """The program to run before a take; it gets the same environment."""

    required: Flag = False
    """Whether no snapshot is taken when it fails."""


class HooksSettings(_Section):
    """Programs to run around each take, under the daemon's own user."""

    before: BeforeHookSettings | None = Field(default=None, examples=[{"command": ["/usr/local/sbin/before"]}])
    """Before a snapshot is taken."""
    after: HookSettings | None = Field(default=None, examples=[{"command": ["/usr/local/sbin/after"], "timeout": "5m"}])
    """After one was taken, before old ones are deleted."""
    on_failure: HookSettings | None = Field(default=None, examples=[{"command": ["/usr/local/sbin/failed"]}])
    """After one was due, `before` had its turn, and none was taken."""


class VerifySettings(_Section):
    """A restore drill: a throw-away domain on overlays of the newest snapshot, without network, has to come up.

    It takes as much RAM of the host as the domain has, or `memory`, for as long as it boots; one at a time.
    """

    schedule: ScheduleText | None = Field(default=None, examples=["weekly"])
    """When it is tried by itself, written as a policy's; without it only `kvmsnapd verify` tries."""
    deadline: PositiveDuration = Field(default=timedelta(minutes=5), json_schema_extra={"default": "5m"})
    """How long the copy may take to come up."""
    console: Annotated[str, Field(min_length=1)] | None = Field(default=None, examples=["login:"])
    """The text on its serial console that shows that it is up; without it its guest agent has to answer."""
    memory: Size | None = Field(default=None, examples=["1GiB"])
    """RAM of the copy, if it is to have less than the domain."""
    max_age: PositiveDuration | None = Field(default=None, examples=["15d"])
    """Age of the last drill that did well which means trouble; twice the longest interval of `schedule` if absent."""


class PolicyKeys(_Section):
    """What a policy can say. Any of it may also stand under `defaults`, for all policies, or under a domain, for its.

    The nearest place decides: the domain's entry, then the policy, then what it extends, then `defaults`, then the
    default below. A key given in a nearer place replaces the other one whole: `keep` is never mixed from two places.
    Where a key may be `null`, that takes an inherited value back: its default applies.
    """

    schedule: ScheduleText = Field(default="", examples=["hourly"], json_schema_extra=_without_default)
    """hourly, daily, weekly, monthly or yearly; `every 15m`; or five cron fields such as "7 * * * *"."""
    keep: KeepSettings = Field(
        default=KeepSettings.model_construct(),
        json_schema_extra=_without_default,
        examples=[{"last": 2, "hourly": 6, "daily": 5, "weekly": 3}],
    )
    """The keep rules. A snapshot that no rule claims is deleted after the next successful one."""
    consistency: ConsistencyRule | None = Field(
        default=None, json_schema_extra={"default": str(ConsistencyRule.FILESYSTEM_PREFERRED)}
    )
    """What a snapshot of a running guest must be: filesystem (the guest agent freezes, or none is taken),
    filesystem-preferred (else crash-consistent, and said so), crash (the agent is never asked), or memory (with its
    RAM: needs memory: live, or kind: internal)."""
    timezone: TimeZone | None = Field(default=None, examples=["Europe/Berlin"])
    """Time zone of schedule and keep rules; by default the one at the top of the file."""
    kind: Literal["external", "internal"] = "external"
    """external: overlays, no pause, any disk format. internal: inside qcow2, stops a running guest meanwhile."""
    memory: Literal["live"] | None = Field(default=None, examples=["live"])
    """live: external snapshots hold the guest's RAM as well, saved while it runs on; each costs a file of its size."""
    max_pause: PositiveDuration = Field(default=timedelta(seconds=10), json_schema_extra={"default": "10s"})
    """How long saving RAM may stop a guest: an internal snapshot of one with too much RAM is refused; with memory: live
    QEMU is asked to keep to it, which it does roughly."""
    catch_up: Literal["once", "skip"] = "once"
    """After missed runs: once takes one snapshot at once, skip waits for the next scheduled time."""
    splay: Duration | None = Field(default=None, examples=["5m"])
    """Runs of different domains are spread over this time; by default a tenth of the interval, at most 5m."""
    max_age: PositiveDuration | None = Field(default=None, examples=["3h"])
    """Age of the newest snapshot that means trouble; by default twice the longest interval of the schedule, and the
    splay."""
    max_deletes_per_run: Annotated[int, Field(ge=1), NUMBER] = 10
    """The fuse: a run that releases more than this at once, beyond what had to wait before, deletes nothing and reports
    it."""
    max_chain_depth: Annotated[int, Field(ge=1, le=150), NUMBER] = 16
    """No external snapshot is taken when the backing chain is this deep, foreign overlays included."""
    min_free: Size = Field(default=ByteSize(1024**3), json_schema_extra={"default": "1GiB"})
    """No snapshot is taken when its storage has less free space than this; RAM to be saved comes on top."""
    overlay_directory: AbsolutePath | None = Field(default=None, examples=["/var/lib/libvirt/overlays"])
    """Where overlays and RAM go; by default beside each disk's image. Needed for block and network disks."""
    disks: Annotated[DiskSettings, OrEmpty()] = Field(default_factory=DiskSettings, examples=[{"exclude": ["vdb"]}])
    """Which disks are covered; by default all that can be written to."""
    hooks: Annotated[HooksSettings, OrEmpty()] = Field(
        default_factory=HooksSettings,
        examples=[{"before": {"command": ["/usr/local/sbin/flush-database"], "timeout": "30s", "required": True}}],
    )
    """Programs to run around each take."""
    verify: Annotated[VerifySettings, OrEmpty()] = Field(
        default_factory=VerifySettings, examples=[{"schedule": "weekly", "deadline": "5m"}]
    )
    """Restore drills: whether there is a way back."""


class PolicySettings(PolicyKeys):
    """When snapshots are taken, of what quality, and how long they stay.

    It needs `schedule` and `keep`, of its own or from one of the other places.
    """

    extends: PolicyName | None = Field(default=None, examples=["basic"])
    """Another policy, of which it takes everything that it does not say itself."""


def _form(value: Any) -> str:  # noqa: ANN401
    return "mapping" if isinstance(value, dict) else "list"


Overrides = Annotated[PolicyKeys, OrEmpty()]
DomainEntry = Annotated[
    Annotated[list[PolicyName], Field(json_schema_extra={"uniqueItems": True}), Tag("list")]
    | Annotated[dict[PolicyName, Overrides], Field(min_length=1), Tag("mapping")],
    Discriminator(_form),
]


class MetricsSettings(_Section):
    """The Prometheus endpoint."""

    enabled: Flag = True
    """Whether to serve metrics over HTTP."""
    listen: str = Field(default="127.0.0.1", examples=["::1"])
    """Address to listen on, or the absolute path of a unix socket."""
    port: Annotated[int, Field(ge=0, le=65535), NUMBER] = 9783
    """Port to listen on; 0 chooses a free one, which the log names."""
    web_config: AbsolutePath | None = Field(default=None, examples=["/etc/kvmsnapd/web.yaml"])
    """File in the way of Prometheus' web configuration: TLS, client certificates, users and passwords. It is read anew
    when it, or a certificate, changes."""
    textfile: PromFile | None = Field(default=None, examples=["/var/lib/prometheus/node-exporter/kvmsnapd.prom"])
    """File to write the metrics into at every tick, for the textfile collector of node_exporter; it ends in .prom. For
    hosts that open no port, together with `enabled: false`."""


class LogSettings(_Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe events to log."""
    format: Literal["auto", "json", "console", "journal"] = "auto"
    """json: one object a line; console: for people; journal: to systemd's journal, each key a field of its own; auto:
    console on a terminal, json elsewhere."""


class Settings(BaseSettings):
    """The whole configuration.

    Environment variables override single values: `KVMSNAPD_WATCH=true`, `KVMSNAPD_METRICS__PORT=9000`; sections,
    policies and domains belong into files. No setting holds a secret.
    """

    model_config = SettingsConfigDict(
        env_prefix="KVMSNAPD_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )

    timezone: TimeZone = Field(default=UTC_ZONE, examples=["Europe/Berlin"])
    """Time zone of schedules and keep rules."""
    policies: Annotated[dict[PolicyName, Annotated[PolicySettings, OrEmpty()]], OrEmpty()] = Field(
        default_factory=dict,
        examples=[
            {
                "standard": {
                    "schedule": "hourly",
                    "keep": {"last": 2, "hourly": 6, "daily": 5, "weekly": 3},
                    "consistency": "filesystem-preferred",
                }
            }
        ],
    )
    """Policies by name."""
    domains: Annotated[dict[Selector, DomainEntry], OrEmpty()] = Field(
        default_factory=dict,
        examples=[
            {
                "db01": ["standard"],
                "web-*": ["standard"],
                "/lab-[0-9]+/": {"standard": {"keep": {"last": 2}}},
                "scratch-*": [],
            }
        ],
    )
    """Names, UUIDs, patterns (web-*) or regular expressions (/web-[0-9]+/) of domains, each with the policies it gets;
    [] is unprotected on purpose. Instead of a list, a mapping overrides keys of the policies for these domains. Name
    and UUID come first, then the pattern that fixes most characters, and of those the one that asks for the longest
    name; two that are equal in that and disagree protect nothing, and that is reported. A pattern fits whole names."""
    defaults: Annotated[PolicyKeys, OrEmpty()] = Field(default_factory=PolicyKeys, examples=[{"max_chain_depth": 12}])
    """What all policies say that do not say it themselves; the keys of a policy."""
    connect: Uri = Field(default="qemu:///system", examples=["qemu:///system"])
    """URI of the libvirt to work on."""
    metrics: Annotated[MetricsSettings, OrEmpty()] = Field(default_factory=MetricsSettings)
    """Where Prometheus finds the metrics."""
    log: Annotated[LogSettings, OrEmpty()] = Field(default_factory=LogSettings)
    """Logging."""
    watch: Flag = False
    """Whether an edit is put in force by itself, a few seconds after the last change of the files."""
    tick: Annotated[Duration, between(timedelta(seconds=1), timedelta(minutes=10))] = Field(
        timedelta(seconds=30), json_schema_extra={"default": "30s"}
    )
    """How often all domains are looked at, whatever the schedules say."""
    workers: Annotated[int, Field(ge=1, le=4), NUMBER] = 4
    """How many domains are worked on at once."""
    takes_per_storage: Annotated[int, Field(ge=1), NUMBER] = 4
    """How many snapshots are taken at once on one storage (a folder of images)."""
    merges_per_storage: Annotated[int, Field(ge=1), NUMBER] = 1
    """How many merges of overlays, and saves of RAM, go on at once on one storage."""
    state_directory: AbsolutePath | None = Field(default=None, examples=["/var/lib/kvmsnapd"])
    """Where notes that must survive a reboot are kept; by default systemd's STATE_DIRECTORY or /var/lib/kvmsnapd."""
    runtime_directory: AbsolutePath | None = Field(default=None, examples=["/run/kvmsnapd"])
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
        """Let the environment override the files, which arrive as init arguments."""
        return (env_settings, init_settings)


class FileSettings(Settings):
    """The same without the environment."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        *others: PydanticBaseSettingsSource,  # noqa: ARG003
        **more: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what the files say."""
        return (init_settings,)
