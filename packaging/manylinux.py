"""A CMake toolchain whose libraries run on every Linux with glibc 2.28, made from the compiler that is there.

    python packaging/manylinux.py --arch aarch64 --out build/manylinux_2_28_aarch64

A library asks at run time for the versions of glibc's and libstdc++'s functions that it was linked with.
These are the newest that the building machine has, so the libraries of a new machine do not load on an old
one, although the old versions of the functions, which the new libraries still contain, would do. Here the
linker gets *stubs* instead: libraries that have the names and versions of the real ones, but nothing newer
than the policy ``manylinux_2_28`` allows (glibc 2.28, GLIBCXX 3.4.24, CXXABI 1.3.11, GCC 7), and no code.
What a compiler newer than that needs beyond these is linked from its static libstdc++, hidden inside the
library, as Red Hat's own compilers for old systems do it (``libstdc++_nonshared.a``). Exceptions are thrown
by the system's libstdc++ all the same, so torch catches ours.

Needs the compiler and the binutils of the architecture: ``g++``, or Debian's package ``g++-aarch64-linux-
gnu``.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator

#: The newest version of each family of symbols that manylinux_2_28 allows (auditwheel's policies).
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
LOADER = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
#: What headers and libstdc++ of a newer glibc refer to and 2.28 does not have, in C that includes no header.
#: ``__libc_single_threaded`` (2.32) is read by inline functions of libstdc++; 0 means: count references
#: atomically.  ``__isoc23_strtol`` and its relatives (2.38) are what the headers make of ``strtol``; they
#: differ in that they also read binary numbers ("0b101") where the base is 0 or 2.
COMPATIBLE = """\
#define HIDDEN __attribute__((visibility("hidden")))
#define AS_BEFORE(type, name, letter)              \\
  type name(const letter*, letter**, int);         \\
  HIDDEN type __isoc23_##name(const letter* text, letter** end, int base) { return name(text, end, base); }
HIDDEN char __libc_single_threaded = 0;
AS_BEFORE(long, strtol, char)
AS_BEFORE(unsigned long, strtoul, char)
AS_BEFORE(long long, strtoll, char)
AS_BEFORE(unsigned long long, strtoull, char)
AS_BEFORE(__INTMAX_TYPE__, strtoimax, char)
AS_BEFORE(__UINTMAX_TYPE__, strtoumax, char)
AS_BEFORE(long, wcstol, __WCHAR_TYPE__)
AS_BEFORE(unsigned long, wcstoul, __WCHAR_TYPE__)
AS_BEFORE(long long, wcstoll, __WCHAR_TYPE__)
AS_BEFORE(unsigned long long, wcstoull, __WCHAR_TYPE__)
"""
TOOLCHAIN = """\
# Written by packaging/manylinux.py: libraries for every Linux with glibc 2.28.
{cross}set(CMAKE_CXX_COMPILER {compiler})
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-L{stubs} -Wl,-z,defs -Wl,--exclude-libs,libstdc++_nonshared.a")
set(CMAKE_MODULE_LINKER_FLAGS_INIT "-L{stubs} -Wl,--exclude-libs,libstdc++_nonshared.a")
"""


class Tools:
    """The compiler and the binutils for one architecture."""

    def __init__(self, arch: str) -> None:
        if arch not in LOADER:
            sys.exit(f"manylinux: arch: expected one of {', '.join(LOADER)}, got {arch}")
        self.arch, self.native = arch, arch == platform.machine()
        prefix = "" if self.native else f"{arch}-linux-gnu-"
        found = {tool: shutil.which(prefix + tool) for tool in ("g++", "ar", "readelf")}
        if missing := [prefix + tool for tool, path in found.items() if path is None]:
            package = "g++" if self.native else f"g++-{arch.replace('_', '-')}-linux-gnu"
            sys.exit(
                f"manylinux: {', '.join(missing)}: not found; install a compiler, in Debian: apt "
                f"install {package}"
            )
        self.compiler, self.ar, self.readelf = (str(path) for path in found.values())

    def library(self, name: str) -> pathlib.Path:
        """Where the compiler finds a library.  It answers with the bare name where it finds none."""
        path = pathlib.Path(run(self.compiler, f"-print-file-name={name}").strip())
        if not path.is_absolute():
            sys.exit(f"manylinux: {name}: expected with {self.compiler}, got none")
        return path.resolve()

    def _dynamic(self, library: pathlib.Path | str) -> Iterator[tuple[str, str, str, str, str]]:
        """(section, binding, name, version or "", type) of the symbols that the loader sees in a library.

        The section of one that the library wants of others is "UND".
        """
        for line in run(self.readelf, "-W", "--dyn-syms", library).splitlines():
            row = line.split()
            if len(row) >= 8 and row[0].endswith(":"):
                name, _, version = row[7].partition("@")
                yield row[6], row[4], name, version.lstrip("@"), row[3]

    def symbols(self, library: pathlib.Path | str) -> list[tuple[str, str, str]]:
        """What a library defines for others: (name, version or "", type) of every symbol and version."""
        found = self._dynamic(library)
        shared = ("GLOBAL", "WEAK", "UNIQUE")
        return [(name, version, kind) for section, binding, name, version, kind in found
                if section != "UND" and binding in shared]  # fmt: skip

    def undefined(self, library: pathlib.Path | str) -> set[tuple[str, str]]:
        """What a library cannot do without: (name, version or "") of each symbol that others must define."""
        found = self._dynamic(library)
        return {(name, version) for section, binding, name, version, _ in found
                if section == "UND" and binding == "GLOBAL"}  # fmt: skip


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"manylinux: {' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def number(version: str) -> tuple[str, tuple[int, ...]] | None:
    """Family and number of a version: "GLIBC_2.28" -> ("GLIBC", (2, 28)); None for those that are no
    release.
    """
    found = re.fullmatch(r"([A-Z]+)_([\d.]+)", version)
    return (found[1], tuple(map(int, found[2].split(".")))) if found else None


def allowed(version: str) -> bool:
    parsed = number(version)
    return parsed is not None and parsed[0] in NEWEST and parsed[1] <= NEWEST[parsed[0]]


def chosen(symbols: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Every symbol that has an allowed version, with the newest of these."""
    newest: dict[str, tuple[str, str, str]] = {}
    for name, version, kind in symbols:
        if allowed(version) and (name not in newest or number(version) > number(newest[name][1])):  # type: ignore[operator]
            newest[name] = name, version, kind
    return list(newest.values())


def write_stub(
    tools: Tools,
    soname: str,
    symbols: Iterable[tuple[str, str, str]],
    folder: pathlib.Path,
    body: str = ".byte 0",
    versions: Iterable[str] = (),
) -> None:
    """A library ``folder/soname`` that has these symbols and no code of its own.

    ``symbols``: (name, version, type) of each; a version of "" means none.  ``body``: what stands at each of
    them, in the assembler's language.  ``versions``: more of them, which the library defines without symbols.
    """
    symbols = sorted(symbols)
    sections = {"OBJECT": (".data", "object"), "TLS": ('.section .tdata,"awT"', "tls_object")}
    lines = []
    for i, (name, version, kind) in enumerate(symbols):
        local = f"zk_stub_{i}" if version else name
        section, mark = sections.get(kind, (".text", "function"))
        lines += [section, f".globl {local}", f".type {local}, %{mark}", f"{local}: {body}"]
        lines += [f".size {local}, .-{local}"]
        if version:
            lines.append(f".symver {local}, {name}@@@{version}")
    source, script = folder / f"{soname}.s", folder / f"{soname}.map"
    source.write_text("\n".join(lines) + "\n")
    defined = sorted({version for _, version, _ in symbols if version}.union(versions))
    script.write_text("".join(f'"{version}" {{}};\n' for version in defined))
    options = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}"]
    options += [f"-Wl,--version-script={script}"] if defined else []
    run(tools.compiler, *options, source, "-o", folder / soname)
    source.unlink()
    script.unlink()


def make(arch: str, folder: pathlib.Path, torch: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the stubs and the toolchain for an architecture; returns the toolchain's path, ``folder``'s name
    + .cmake.

    ``torch``: a folder with libtorch_cpu.so of the building machine's architecture.  Its C functions are what
    the stubs of libtorch have, for each architecture: they are the same there.  The library itself must not
    be linked with, because it also exports parts of its own libstdc++, of which another torch has others."""
    tools = Tools(arch)
    stubs = folder / "stubs"
    shutil.rmtree(stubs, ignore_errors=True)
    stubs.mkdir(parents=True)
    for soname in ("libc.so.6", "libm.so.6", LOADER[arch], "libstdc++.so.6", "libgcc_s.so.1"):
        write_stub(tools, soname, chosen(tools.symbols(tools.library(soname))), stubs)
    if torch is not None:
        theirs = Tools(platform.machine()).symbols(torch / "libtorch_cpu.so")
        names = {n: (n, "", kind) for n, _, kind in theirs
                 if kind == "FUNC" and re.match(r"(aoti_)?torch_\w+$", n)}  # fmt: skip
        write_stub(tools, "libtorch_cpu.so", names.values(), stubs)
        write_stub(tools, "libtorch.so", (), stubs)
    (stubs / "compatible.c").write_text(COMPATIBLE)
    run(tools.compiler, "-x", "c", "-O2", "-fPIC", "-c", stubs / "compatible.c", "-o", stubs / "compatible.o")
    shutil.copy(tools.library("libstdc++.a"), stubs / "libstdc++_nonshared.a")
    run(tools.ar, "rD", stubs / "libstdc++_nonshared.a", stubs / "compatible.o")
    static = tools.library("libc_nonshared.a")
    scripts = {
        "libstdc++.so": f"INPUT ( {stubs}/libstdc++.so.6 {stubs}/libstdc++_nonshared.a )",
        "libgcc_s.so": f"GROUP ( {stubs}/libgcc_s.so.1 -lgcc )",
        "libm.so": f"INPUT ( {stubs}/libm.so.6 )",
        "libc.so": f"GROUP ( {stubs}/libc.so.6 {static} AS_NEEDED ( {stubs}/{LOADER[arch]} ) )",
    }
    for name, text in scripts.items():
        (stubs / name).write_text(text + "\n")
    cross = "" if tools.native else f"set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR {arch})\n"
    toolchain = folder / f"{folder.name}.cmake"
    toolchain.write_text(TOOLCHAIN.format(cross=cross, compiler=tools.compiler, stubs=stubs))
    return toolchain


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", required=True, choices=LOADER)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--torch", type=pathlib.Path, help="the folder lib/ of an installed torch")
    arguments = parser.parse_args()
    print(make(arguments.arch, arguments.out.resolve(), arguments.torch))
