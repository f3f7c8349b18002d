"""QEMU's commands that migrate one machine (qapi/migration.json).

Names, arguments and results are QEMU's, with these differences. ``multifd-compression`` allows zstd, on however many
channels there are, where it saves time; batch by batch that is chosen here. ``xbzrle`` sends differences, which zstd
encodes; it works together with ``multifd``, and its cache need not be a power of two. ``events`` is about
MIGRATION_PASS only: MIGRATION is always told. ``tls-creds`` is a directory, not the name of an object, and used where
the URI is ``tls:HOST:PORT``. Of the modes, ``cpr-transfer`` shares the memory with the destination; it needs no second
channel, and both sides are started as for any other migration.
"""

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from dirtylog.control.controller import Controller
from dirtylog.control.incoming_info import IncomingInfo, describe_incoming
from dirtylog.control.migration_info import MigrationInfo, describe, ms
from dirtylog.control.qmp import Arguments, CommandRegistry, NoArguments
from dirtylog.control.settings import Capability
from dirtylog.errors import UsageError
from dirtylog.migration import Compression, IncomingMigration
from dirtylog.units import PAGE_SIZE

_MILLISECOND: Final = 1e-3

CAPABILITIES: Final = (
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "zero-blocks",
    "compress",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "block",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "switchover-ack",
    "dirty-limit",
    "mapped-ram",
)
"""QEMU's, in its order. What `Capability` does not have is always off here."""

_COMPRESSIONS: Final = {"none": Compression.NONE, "zstd": Compression.AUTO}


class MigrateArguments(Arguments, frozen=True):
    """Arguments of migrate. ``resume``: go on with postcopy that was paused.

    ``detach`` has no meaning in QMP, and is taken as QEMU takes it.
    """

    uri: str
    detach: bool | None = None
    resume: bool = False


class RecoverArguments(Arguments, frozen=True):
    """Arguments of migrate-recover."""

    uri: str


class ContinueArguments(Arguments, frozen=True):
    """Arguments of migrate-continue: the state that the migration waits in."""

    state: Literal["pre-switchover"]


class MigrationParameters(Arguments, frozen=True, omit_defaults=True):
    """Arguments of migrate-set-parameters, and result of query-migrate-parameters: milliseconds, bytes (a second).

    `Parameters` has the bounds; those here are QEMU's, and keep what is no reasonable number out of arithmetic.
    """

    mode: Literal["normal", "cpr-transfer"] | UnsetType = UNSET
    downtime_limit: Annotated[int, Meta(ge=0, le=2_000_000)] | UnsetType = UNSET
    max_bandwidth: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    max_postcopy_bandwidth: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    avail_switchover_bandwidth: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    multifd_channels: Annotated[int, Meta(ge=1, le=255)] | UnsetType = UNSET
    multifd_compression: Literal["none", "zstd"] | UnsetType = UNSET
    xbzrle_cache_size: Annotated[int, Meta(ge=PAGE_SIZE)] | UnsetType = UNSET
    throttle_trigger_threshold: Annotated[int, Meta(ge=1, le=100)] | UnsetType = UNSET
    cpu_throttle_initial: Annotated[int, Meta(ge=1, le=99)] | UnsetType = UNSET
    cpu_throttle_increment: Annotated[int, Meta(ge=1, le=99)] | UnsetType = UNSET
    cpu_throttle_tailslow: bool | UnsetType = UNSET
    max_cpu_throttle: Annotated[int, Meta(ge=1, le=99)] | UnsetType = UNSET
    vcpu_dirty_limit: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    x_vcpu_dirty_limit_period: Annotated[int, Meta(ge=1, le=1000)] | UnsetType = UNSET
    tls_creds: Annotated[str, Meta(max_length=4096)] | UnsetType = UNSET
    tls_hostname: Annotated[str, Meta(max_length=253)] | UnsetType = UNSET
    x_clear_chunk: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    x_verify: bool | UnsetType = UNSET
    x_postcopy_after: Annotated[int, Meta(ge=0)] | UnsetType = UNSET


_NAMES: Final = {
    "max_bandwidth": "max_bandwidth",
    "max_postcopy_bandwidth": "max_postcopy_bandwidth",
    "avail_switchover_bandwidth": "switchover_bandwidth",
    "multifd_channels": "channels",
    "xbzrle_cache_size": "delta_cache",
    "vcpu_dirty_limit": "vcpu_dirty_limit",
    "tls_creds": "tls_creds",
    "tls_hostname": "tls_hostname",
    "x_clear_chunk": "clear_chunk",
    "x_verify": "verify",
    "x_postcopy_after": "postcopy_after",
}
"""Fields of `MigrationParameters` whose values `Parameters` has as they are, by another name."""

_THROTTLE_NAMES: Final = {
    "throttle_trigger_threshold": "trigger",
    "cpu_throttle_initial": "initial",
    "cpu_throttle_increment": "increment",
    "cpu_throttle_tailslow": "tailslow",
    "max_cpu_throttle": "maximum",
}
"""Those that `Parameters.throttle` has."""


class CapabilityStatus(Struct, frozen=True, forbid_unknown_fields=True):
    """MigrationCapabilityStatus: one capability, and whether it is on."""

    capability: str
    state: bool


class CapabilitiesArguments(Arguments, frozen=True):
    """Arguments of migrate-set-capabilities."""

    capabilities: list[CapabilityStatus]


class MigrationCommands:
    """The commands about migrations of a controller's machine."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def register(self, registry: CommandRegistry) -> None:
        """Add them all to a registry."""
        controller = self._controller
        registry.add("migrate", MigrateArguments, lambda given: controller.migrate(given.uri, resume=given.resume))
        registry.add("migrate_cancel", NoArguments, lambda _: controller.cancel_migration())
        registry.add("migrate-start-postcopy", NoArguments, lambda _: controller.start_postcopy())
        registry.add("migrate-continue", ContinueArguments, lambda _: controller.continue_migration())
        registry.add("migrate-pause", NoArguments, lambda _: controller.pause_migration())
        registry.add("migrate-recover", RecoverArguments, lambda given: controller.recover_migration(given.uri))
        registry.add("migrate-set-parameters", MigrationParameters, self._set_parameters)
        registry.add("query-migrate-parameters", NoArguments, self._query_parameters)
        registry.add("migrate-set-capabilities", CapabilitiesArguments, self._set_capabilities)
        registry.add("query-migrate-capabilities", NoArguments, self._query_capabilities)
        registry.add("query-migrate", NoArguments, self._query_migrate)

    def _set_parameters(self, wanted: MigrationParameters) -> None:
        changes: dict[str, Any] = {
            ours: value for name, ours in _NAMES.items() if (value := getattr(wanted, name)) is not UNSET
        }
        throttle = {
            ours: value for name, ours in _THROTTLE_NAMES.items() if (value := getattr(wanted, name)) is not UNSET
        }
        if throttle:
            changes["throttle"] = throttle
        if not isinstance(wanted.downtime_limit, UnsetType):
            changes["downtime_limit"] = wanted.downtime_limit * _MILLISECOND
        if not isinstance(wanted.x_vcpu_dirty_limit_period, UnsetType):
            changes["dirty_limit_period"] = wanted.x_vcpu_dirty_limit_period * _MILLISECOND
        if not isinstance(wanted.mode, UnsetType):
            changes["share_memory"] = wanted.mode == "cpr-transfer"
        if not isinstance(wanted.multifd_compression, UnsetType):
            changes["compression"] = _COMPRESSIONS[wanted.multifd_compression]
        self._controller.change_parameters(**changes)

    def _query_parameters(self, _: NoArguments) -> MigrationParameters:
        now = self._controller.settings.parameters
        return MigrationParameters(
            mode="cpr-transfer" if now.share_memory else "normal",
            downtime_limit=ms(now.downtime_limit),
            multifd_compression="none" if now.compression is Compression.NONE else "zstd",
            x_vcpu_dirty_limit_period=ms(now.dirty_limit_period),
            **{name: getattr(now, ours) for name, ours in _NAMES.items()},
            **{name: getattr(now.throttle, ours) for name, ours in _THROTTLE_NAMES.items()},
        )

    def _set_capabilities(self, wanted: CapabilitiesArguments) -> None:
        for one in wanted.capabilities:
            if one.capability not in CAPABILITIES:
                raise UsageError(f"there is no capability {one.capability!r}")
            if one.state and not _has(one.capability):
                raise UsageError(f"the capability {one.capability!r} is not offered here")
        self._controller.change_capabilities(
            {Capability(one.capability): one.state for one in wanted.capabilities if _has(one.capability)}
        )

    def _query_capabilities(self, _: NoArguments) -> list[CapabilityStatus]:
        on = {capability.value for capability in self._controller.settings.capabilities}
        return [CapabilityStatus(name, name in on) for name in CAPABILITIES]

    def _query_migrate(self, _: NoArguments) -> MigrationInfo | IncomingInfo | None:
        outgoing, incoming = self._controller.outgoing, self._controller.incoming
        if outgoing is not None:
            return describe(outgoing)
        return describe_incoming(incoming) if isinstance(incoming, IncomingMigration) else None


def _has(capability: str) -> bool:
    return any(capability == one.value for one in Capability)
