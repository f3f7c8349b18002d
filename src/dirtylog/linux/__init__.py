"""The kernel's ABI: request numbers, structures, system calls and what their errors mean.

No other folder imports ``fcntl`` or ``ctypes``, or looks at an errno.
"""
