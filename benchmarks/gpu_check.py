"""Everything a GPU has to show, in one command: `make gpu-check`.

Runs the whole test suite on the GPU, memcheck and racecheck of compute-sanitizer over a short
selection, the kernel benchmark, and dense kernels beside the sweep over lengths, and writes what
they print to `benchmarks/results/`. Without a GPU it says so and exits with 3.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from common import write_atomically

import qflux_kernels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHORT = "test_equals_the_cpu and not 5000"


def run(name: str, command: list[str], report: list[str]) -> bool:
    """Run one part, keep its output for the report, and tell whether it passed."""
    print(f"gpu-check: {name}", flush=True)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    tail = "\n".join(done.stdout.splitlines()[-60:])
    verdict = "passed" if done.returncode == 0 else f"FAILED with {done.returncode}"
    report.append(f"## {name}: {verdict}\n\n    {' '.join(command)}\n\n```\n{tail}\n```\n")
    print(f"gpu-check: {name}: {verdict}", flush=True)
    return done.returncode == 0


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA GPU is available to torch here, nothing was checked")
        return 3
    gpu = torch.cuda.get_device_name()
    facts = "\n".join(f"- {name}: {value}" for name, value in qflux_kernels.diagnostics().items())
    report = [f"# GPU check on {gpu}\n", f"{datetime.date.today()}\n\n{facts}\n"]
    pytest = [sys.executable, "-m", "pytest"]
    passed = run("tests", [*pytest, "tests"], report)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(sanitizer).exists():
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
            command += [*pytest, "tests/kernels/test_gpu.py", "-k", SHORT]
            passed &= run(f"compute-sanitizer {tool}", command, report)
    else:
        passed = False
        report.append("## compute-sanitizer: not found, not run\n")
    slug = "".join(c if c.isalnum() else "-" for c in gpu.lower()).strip("-")
    # A figure is only worth having beside green tests.
    if passed:
        sizes = [str(1 << n) for n in range(16, 21)]
        for name, options in [
            ("kernels", ["--full"]),
            ("scaling", ["--sizes", *sizes, "--providers", "dense", "sweep"]),
        ]:
            output = str(RESULTS / f"{name}-{slug}.csv")
            command = [sys.executable, f"benchmarks/{name}.py", "--device", "cuda", *options]
            passed &= run(f"benchmark {name}", [*command, "--output", output], report)
    path = RESULTS / f"gpu-check-{slug}.md"
    write_atomically(path, "\n".join(report))
    print(f"gpu-check: report in {path.relative_to(ROOT)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
