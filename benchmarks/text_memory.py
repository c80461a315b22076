"""Peak memory of `qflux train` on a text of any size.

    python benchmarks/text_memory.py --megabytes 40 1000 --vocabulary char byte bpe
    python benchmarks/text_memory.py --megabytes 200 --vocabulary bpe --new-words

Lines of the text that comes with the package are repeated in random order until the text is large
enough; with `--new-words` half of the text is words that never came before, far more of them than a
natural text has. A process of its own trains a small network for a few steps, from the file to the
comparison with n-gram counts at the end; its largest resident set is what is printed, pages of the
mapped tokens included, beside that of a process that has only imported the program.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qflux.text.data import load_text

NETWORK = [
    "--num-layers=1", "--hidden-dim=32", "--context-length=64", "--num-cylinders=4",
    "--max-steps=5", "--eval-tokens=5000",
]  # fmt: skip


def write_text(path: Path, megabytes: int, new_words: bool = False) -> None:
    """Write lines in random order until there are so many million bytes, and new words as well."""
    lines, chosen = load_text().text.splitlines(keepends=True), random.Random(0)
    with open(path, "w", encoding="utf-8") as stream:
        size = 0
        while size < megabytes * 10**6:
            some = chosen.choices(lines, k=20000)
            if new_words:
                for _ in range(4000):
                    words = (f"{chosen.getrandbits(64):x}" for _ in range(12))
                    some.append(" ".join(words) + "\n")
            size += stream.write("".join(some))


def measure(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in 10^6 bytes of a run of the program."""
    start = time.perf_counter()
    program = [sys.executable, "-m", "qflux", *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        with subprocess.Popen(program, stdout=printed, stderr=subprocess.STDOUT) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            printed.seek(0)
            code = f"qflux {' '.join(arguments)} ended with {process.returncode}"
            raise SystemExit(f"{printed.read()}{code}")
    # In units of 1024 bytes on Linux and of bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit / 1e6


def main() -> None:
    """Print a line for each size and vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[40])
    parser.add_argument("--vocabulary", nargs="+", default=["char", "byte", "bpe"])
    parser.add_argument("--new-words", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        data, small = Path(root) / "text.txt", Path(root) / "small.txt"
        write_text(small, 1)
        _, least = measure(["train", f"--data={small}", f"--output-dir={root}/small", *NETWORK])
        print(f"1 MB: {least:.0f} MB", flush=True)
        for megabytes in arguments.megabytes:
            write_text(data, megabytes, arguments.new_words)
            for kind in arguments.vocabulary:
                folder = Path(root) / f"{kind}-{megabytes}"
                command = ["train", f"--data={data}", f"--output-dir={folder}", *NETWORK]
                seconds, peak = measure([*command, f"--vocabulary={kind}"])
                print(f"{megabytes} MB, {kind}: {peak:.0f} MB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
