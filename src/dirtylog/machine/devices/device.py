"""The contract of devices: registers at some ports, and state that can be moved."""

from abc import abstractmethod

from dirtylog.memory import MemoryRegionOps


class Device(MemoryRegionOps):
    """A device on the port bus. The guest's accesses come one at a time for the whole machine, in a vCPU's thread.

    A callback may change the memory. It must not pause or close the machine, which would wait for the very thread that
    it runs in; it raises GuestError to end the guest.

    Attributes:
        name: unique in its machine; names its part of the machine's state.
        base: its first port.
        size: how many ports it has.
    """

    name: str
    base: int
    size: int

    @abstractmethod
    def save_state(self) -> dict[str, bytes]:
        """Its registers, by name."""

    @abstractmethod
    def load_state(self, state: dict[str, bytes]) -> None:
        """The reverse of `save_state`.

        Raises:
            UsageError: not such a state.
        """
