"""Coverage-guided fuzzing of the readers of files, with atheris: ``make fuzz-readers``.

Each reader of ``reader_cases.py`` runs in a process of its own, from the files in ``tests/corpus/``. An
exception other than ValueError and OSError, memory above the limit and a call of more than a minute are
failures. The input is then left in ``build/fuzz/``: mend the reader, and put the input into the corpus
as "bad-..." (or "good-...").
"""

from __future__ import annotations

import argparse
import pathlib
import random
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
#: torch and its libraries take about 500 MiB; a reader that needs more than that again for 8 KiB of input is
#: at fault.
LIMITS = ("-rss_limit_mb=1536", "-timeout=60", "-max_len=8192")


def fuzz(reader: str, seconds: int, faults: pathlib.Path) -> None:
    """Does not return: atheris ends the process, with status 0 where no fault was found."""
    import atheris

    with atheris.instrument_imports(include=["zokernels"]):
        from reader_cases import accepts, corpus_of, edited

    def one(data: bytes) -> None:
        accepts(reader, data)

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        """Half of the inputs change in their JSON, as a change of bytes hardly ever leaves JSON; half in
        some bytes.
        """
        rng = random.Random(seed)
        changed = edited(reader, data, rng) if rng.random() < 0.5 else atheris.Mutate(data, max_size)
        return changed if len(changed) <= max_size else data

    with tempfile.TemporaryDirectory() as found:
        options = (
            *LIMITS,
            f"-max_total_time={seconds}",
            f"-artifact_prefix={faults / reader}-",
            "-verbosity=0",
        )
        atheris.Setup(
            [sys.argv[0], *options, "-print_final_stats=1", found, str(corpus_of(reader))],
            one,
            custom_mutator=mutated,
        )
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=60, help="for all readers together (default 60)")
    parser.add_argument("--reader", nargs="+", help="default: all")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process of one reader
    args = parser.parse_args()
    faults = ROOT / "build" / "fuzz"
    faults.mkdir(parents=True, exist_ok=True)
    if args.inside:
        fuzz(args.reader[0], args.seconds, faults)
    from reader_cases import READERS  # not before: atheris instruments what is imported inside fuzz()

    readers, failed = args.reader or list(READERS), []
    if unknown := set(readers) - set(READERS):
        parser.error(f"--reader: expected some of {', '.join(READERS)}, got {', '.join(sorted(unknown))}")
    for reader in readers:
        print(f"--- {reader}", flush=True)
        seconds = max(1, args.seconds // len(readers))
        command = [sys.executable, __file__, "--inside", "--reader", reader, "--seconds", str(seconds)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(reader)
    print(
        f"fuzz-readers: {', '.join(failed)} failed: inputs in {faults}"
        if failed
        else "fuzz-readers: no fault"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
