"""The few devices that small guests need, on x86 port I/O."""
