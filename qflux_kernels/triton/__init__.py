"""The operators in Triton, for GPUs of any vendor and users without a compiler.

Importing this package registers the ops `qflux_kernels::triton_*`, which have the schemas of the
compiled ones. Triton itself is first imported when one of them runs.
"""

from . import ops

ops.register()
