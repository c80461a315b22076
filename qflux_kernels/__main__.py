"""`python -m qflux_kernels`: print what this installation can do."""

from . import diagnostics

for name, value in diagnostics().items():
    if isinstance(value, list):
        value = ", ".join(value) or "none"
    print(f"{name:20} {value}")
