"""Run a script without the rights by which root may write everywhere: python -m tests.unprivileged SCRIPT ..."""

import ctypes
import runpy
import sys

CAPABILITIES_VERSION_3 = 0x20080522  # linux/capability.h

header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION_3, 0)
if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
    raise OSError(ctypes.get_errno(), "capset")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
