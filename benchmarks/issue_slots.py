"""Issue slots a pair of the CUDA loops, counted in their machine code: no GPU is needed.

    python benchmarks/issue_slots.py [--arch sm_90] [--units forward products] [--filter float]

Compiles units of csrc/cuda/dense with nvcc and reads them back with cuobjdump (of the CUDA toolkit,
or of Triton). A kernel's innermost loops are listed: the one without masks, and that of the edge of
the causal triangle. The pairs of an iteration follow from its multiply-adds, or for the gate from
its reciprocals. Where tensor cores multiply the values, only the score is multiply-adds.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "dense"
UNITS = ["forward", "products", "backward", "row_products"]
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
# The least multiply-adds of a loop over pairs; others add up, or stage: these store.
FEWEST = 6


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, without predicates, by name."""

    names: tuple[str, ...]

    def count(self, *prefixes: str) -> int:
        return sum(name.startswith(prefixes) for name in self.names)

    @property
    def multiply_adds(self) -> int:
        return self.count("FFMA", "DFMA")

    @property
    def products(self) -> int:
        return self.count("HMMA")


def innermost_loops(listing: str) -> list[Loop]:
    """Those over pairs in the listing of one function by cuobjdump, in their order."""
    code = [(int(at, 16), text.strip()) for at, text in INSTRUCTION.findall(listing)]
    place = {at: n for n, (at, _) in enumerate(code)}
    spans = []
    for n, (_, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        begin = place.get(int(target[1], 16)) if target else None
        if begin is not None and begin <= n:
            spans.append((begin, n))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [
        Loop(tuple(re.sub(r"^@!?U?P\d+\s+", "", text) for _, text in code[begin : end + 1]))
        for begin, end in inner
    ]
    loops = [loop for loop in loops if loop.multiply_adds >= FEWEST and not loop.count("STS")]
    # Beside those of tensor cores are others, over what these leave out.
    return [loop for loop in loops if loop.products] or loops


def kernels(sass: str) -> dict[str, list[Loop]]:
    """The loops of every function of what cuobjdump -sass prints, by mangled name."""
    parts = re.split(r"\n\s*Function : ", sass)[1:]
    return {part.split("\n", 1)[0].strip(): innermost_loops(part) for part in parts}


def find_cuobjdump() -> str:
    """The program's path; SystemExit where there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or [] if spec else []:
        tool = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return str(tool)
    raise SystemExit("cuobjdump is not there: it comes with the CUDA toolkit and with Triton")


def machine_code(unit: str, arch: str, tool: str) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc is not there: issue slots are counted in what it compiles")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{unit}.cubin"
        source = SOURCES / f"{unit}.cu"
        command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-o", cubin, source]
        subprocess.run(command, check=True)
        listing = subprocess.run(
            [tool, "-sass", cubin], check=True, capture_output=True, text=True
        ).stdout
    return listing


def readable(names: list[str]) -> list[str]:
    """The passes that kernels are made of, as C++ spells them, and whether of a part of sources."""
    listed = subprocess.run(
        ["c++filt", *names], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    found = [re.search(r"gather\w*<qflux::cuda::(.+), (true|false)>\(", name) for name in listed]
    return [
        match[1].replace("qflux::", "") + (", a part" if match[2] == "true" else "")
        if match
        else name
        for match, name in zip(found, listed, strict=True)
    ]


def pairs_of(name: str, loop: Loop) -> float | None:
    """Pairs of an iteration; None for a kernel that is not one of a pass over pairs."""
    match = re.match(
        r"(Forward|RowPass|KeyPass)<\w+, (\w+)<\w+>, (\d+)(?:, \w+, (true|false))?", name
    )
    if not match:
        return None
    if match[2] == "InverseGate":
        return loop.count("MUFU.RCP") or None
    columns = 0 if loop.products else int(match[3]) or 2
    # Two for the score and, in a backward, two for the gradient of what owns the pair. A forward
    # that keeps sums for the backward has three products of the key among them.
    kept = 3 if match[4] == "true" else 0
    adds = {"Forward": 2 + columns + kept, "RowPass": 4 + columns, "KeyPass": 4 + 2 * columns}
    return loop.multiply_adds / adds[match[1]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--units", nargs="+", default=UNITS)
    parser.add_argument("--filter", default="<float", help="only kernels with this in their name")
    options = parser.parse_args(arguments)
    tool = find_cuobjdump()
    header = ("instructions", "multiply-adds", "products", "slots a pair")
    print(f"{'kernel':60}" + "".join(f"{title:>15}" for title in header))
    for unit in options.units:
        found = kernels(machine_code(unit, options.arch, tool))
        for name, loops in zip(readable(list(found)), found.values(), strict=True):
            if options.filter not in name:
                continue
            for loop in loops:
                pairs = pairs_of(name, loop)
                slots = f"{len(loop.names) / pairs:.2f}" if pairs else ""
                counts = (len(loop.names), loop.multiply_adds, loop.products, slots)
                print(f"{name:60}" + "".join(f"{count:>15}" for count in counts))


if __name__ == "__main__":
    main()
