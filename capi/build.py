"""Builds the C library: ``tritlstm build-c DIR``.

``DIR`` becomes a prefix that can be moved as a whole. With ``--engine aot``, a library that needs no Python::

    DIR/include/tritlstm.h
    DIR/include/tritlstm.hpp                    the same for C++17
    DIR/lib/libtritlstm.so
    DIR/lib/pkgconfig/tritlstm.pc
    DIR/lib/cmake/tritlstm/                     find_package(tritlstm)

With ``--engine python``, one that runs this Python environment::

    DIR/include, DIR/lib/cmake                  as above
    DIR/lib/libtritlstm_python.so               the library, free of Python itself
    DIR/lib/tritlstm/python_engine.so, .conf    what it opens on first use, and where the environment is
    DIR/lib/pkgconfig/tritlstm_python.pc
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tritlstm._version import __version__

SOURCE = Path(__file__).resolve().parent
NAMES = {"aot": "tritlstm", "python": "tritlstm_python"}  # of the libraries, by engine
DESCRIPTIONS = {
    "aot": "LSTM for CUDA devices and CPUs, without Python",
    "python": "LSTM in Triton, run by an embedded Python",
}
COMMON = ("front.c", "safetensors.c")
HOST = ("aot_engine.c", "host_engine.c", "host_walk.c", "host_kernels.c", "host_numbers.c")
NO_IMAGES = "none"
SOVERSION = "0"
HEADERS = ("tritlstm.h", "tritlstm.hpp")
EXAMPLES = {"generate": "c", "train_step": "c", "call_cost": "c", "fit": "cpp", "stream": "rs"}  # and their languages
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# Without errno a square root is an instruction, and libm is not needed.
COMPILE = ["-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", *WARNINGS]
# Thread-local storage found through a descriptor, not through ld.so's __tls_get_addr: then libc is all that is needed.
# GCC for x86 and Clang since 19 take the option; elsewhere descriptors are the default, or there are none.
DESCRIPTORS = "-mtls-dialect=gnu2"
LINK = ["-shared", "-Wl,-z,now", "-Wl,-z,noexecstack", "-Wl,-z,nodelete", "-Wl,--as-needed"]


class BuildError(RuntimeError):
    """The C library can't be built here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Built:
    """Where ``build`` put things."""

    directory: Path
    engine: str = "python"
    #: What is not as it should be, though the library works.
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a linker and pkg-config call the library."""
        return NAMES[self.engine]

    @property
    def header(self) -> Path:
        return self.directory / "include" / "tritlstm.h"

    @property
    def library(self) -> Path:
        return self.directory / "lib" / f"lib{self.name}.so"

    @property
    def pkg_config(self) -> Path:
        return self.directory / "lib" / "pkgconfig" / f"{self.name}.pc"

    def flags(self) -> list[str]:
        """Compiler flags of a host that finds the library where it stands now."""
        lib = self.library.parent
        return [f"-I{self.header.parent}", f"-L{lib}", f"-l{self.name}", f"-Wl,-rpath,{lib}"]


def declarations(functions: bool = True) -> str:
    """The header as ``cffi.FFI().cdef`` wants it: without preprocessor lines.

    With ``functions=False`` only types and constants are left.
    """
    text = (SOURCE / "include" / "tritlstm.h").read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"^#ifdef __cplusplus$.*?^#endif$", "", text, flags=re.S | re.M)
    text = re.sub(r"^#.*$", "", text, flags=re.M)
    return re.sub(r"TRITLSTM_API\b" if functions else r"TRITLSTM_API[^;]*;", "", text)


def compiler(command: str | None = None) -> list[str]:
    """The C compiler as a command line: ``command``, else ``$CC``, else ``cc``.

    Raises:
        BuildError: there is none.
    """
    words = shlex.split(command or os.environ.get("CC") or "cc")
    if not words or shutil.which(words[0]) is None:
        raise BuildError(
            f"no C compiler {' '.join(words)!r}: install one (Debian and Ubuntu: apt install gcc) or name it with --cc"
        )
    return words


def _failure(command: list[str]) -> str | None:
    """Runs a command; None if it succeeded, otherwise the command and what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{shlex.join(command)}\n{done.stdout}{done.stderr}".rstrip() if done.returncode else None


def _run(command: list[str], what: str) -> None:
    error = _failure(command)
    if error is not None:
        raise BuildError(f"{what} failed: {error}")


def accepts(cc: list[str], option: str) -> bool:
    """Whether a C compiler knows an option."""
    return _failure([*cc, "-Werror", option, "-S", "-x", "c", os.devnull, "-o", os.devnull]) is None


def _python_include() -> str:
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        version = sysconfig.get_python_version()
        raise BuildError(
            f"{include}/Python.h is missing, which embedding this Python needs: install its headers "
            f"(Debian and Ubuntu: apt install python{version}-dev; Fedora: dnf install python3-devel)"
        )
    return include


def shared_libpython() -> Path | None:
    """The shared libpython of the Python that runs this, or None if there is none."""
    names = [sysconfig.get_config_var("INSTSONAME"), sysconfig.get_config_var("LDLIBRARY")]
    version = sysconfig.get_python_version()
    names += [f"libpython{version}.so.1.0", f"libpython{version}.so"]
    base = Path(sys.base_prefix, "lib")
    folders = [sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL"), base]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    if multiarch:
        folders.append(base / multiarch)
    for folder in folders:
        for name in names:
            if folder and name and ".so" in name and Path(folder, name).is_file():
                return Path(folder, name).resolve()
    return None


def static_libpython() -> list[Path]:
    """Static libraries of the Python that runs this, those that are sure to be position-independent first."""
    version = sysconfig.get_python_version()
    folders = [sysconfig.get_config_var("LIBPL"), sysconfig.get_config_var("LIBDIR")]
    names = [f"libpython{version}-pic.a", f"libpython{version}.a"]
    found = [Path(folder, name) for name in names for folder in folders if folder]
    return [path for path in found if path.is_file()]


def link_libpython(cc: list[str], archives: list[Path], output: Path) -> None:
    """Makes a shared libpython out of a static one.

    Raises:
        BuildError: there is none, or none is position-independent.
    """
    version = sysconfig.get_python_version()
    remedy = (
        f"Use a Python that has a shared one: Debian and Ubuntu, apt install libpython{version}; "
        "pyenv, PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install; conda's and uv's have it"
    )
    if not archives:
        raise BuildError(f"Python {version} at {sys.base_prefix} has neither a shared nor a static libpython. {remedy}")
    variables = [sysconfig.get_config_var(name) or "" for name in ("LIBS", "SYSLIBS", "MODLIBS")]
    libraries = dict.fromkeys(shlex.split(" ".join(variables)))
    errors = []
    for archive in archives:
        whole = ["-Wl,--whole-archive", str(archive), "-Wl,--no-whole-archive"]
        # -Bsymbolic: code compiled for an executable then links, because its own symbols can't be replaced.
        options = ["-shared", f"-Wl,-soname,{output.name}", "-Wl,-Bsymbolic", "-Wl,-z,noexecstack"]
        error = _failure([*cc, *options, *whole, "-o", str(output), *libraries, "-lpthread"])
        if error is None:
            return
        errors.append("\n".join(error.splitlines()[:6]))
    raise BuildError("\n".join([f"The static libpython of Python {version} can't be shared.", *errors, remedy]))


def _engine_source(output: Path) -> None:
    """Has cffi write the C source of the embedded module."""
    try:
        import cffi
    except ImportError as error:
        raise BuildError(f"cffi is missing ({error}): {sys.executable} -m pip install cffi") from error
    ffi = cffi.FFI()
    calls = (SOURCE / "src" / "python_calls.h").read_text()
    ffi.cdef(declarations(functions=False))
    ffi.cdef("void tritlstm_py_report(const char *message);")
    ffi.embedding_api(calls)
    ffi.embedding_init_code(
        "from _tritlstm_python import ffi, lib\nfrom tritlstm.capi import host\nhost.bind(ffi, lib)\n"
    )
    ffi.set_source("_tritlstm_python", (SOURCE / "src" / "python_engine.c").read_text())
    with contextlib.redirect_stdout(io.StringIO()):  # it announces every file
        ffi.emit_c_code(str(output))


def _interpreter() -> str:
    """The environment's own. From the link in it, not from what that points to, Python finds it."""
    if not sys.executable:
        raise BuildError("this Python does not know its own executable: run tritlstm build-c from a terminal")
    return os.path.abspath(sys.executable)


def _build_engine(cc: list[str], folder: Path) -> None:
    include = _python_include()
    source = folder / "python_engine.c"
    _engine_source(source)
    includes = [f"-I{SOURCE / 'include'}", f"-I{SOURCE / 'src'}", f"-I{include}"]
    engine_map = folder / "engine.map"
    engine_map.write_text("{ global: tritlstm_python_start; local: *; };\n")
    # What cffi generates leaves parameters unused.
    no_path = f"-ffile-prefix-map={folder}=."  # assertions name their file
    compile_ = [*cc, *COMPILE, "-Wno-unused-parameter", no_path, *includes, str(source)]
    link = [*LINK, f"-Wl,--version-script={engine_map}", "-o", str(folder / "python_engine.so")]
    _run([*compile_, *link], "compiling the Python engine")
    source.unlink()
    engine_map.unlink()
    libpython = shared_libpython()
    if libpython is None:
        private = folder / f"libpython{sysconfig.get_python_version()}.so"
        link_libpython(cc, static_libpython(), private)
    settings = [
        "# Which Python the engine runs in. Paths that do not begin with / are relative to this folder.",
        f"python = {_interpreter()}",
        f"libpython = {libpython or private.name}",
        f"version = {sysconfig.get_python_version()}",
    ]
    (folder / "python_engine.conf").write_bytes(os.fsencode("\n".join(settings) + "\n"))


def _cuda_sources(folder: Path, images: str, cc: list[str], notes: list[str]) -> list[Path]:
    """C and assembly files of the CUDA side with the device images `images`."""
    if images == NO_IMAGES:
        return [SOURCE / "src" / "cuda_absent.c"]
    try:
        aot = importlib.import_module("tritlstm.capi.aot")
    except ImportError as error:
        raise BuildError(f"--images {images}: device images can't be made here: {error}") from error
    written = [path for path in sorted((SOURCE / "src").glob("cuda_*.c")) if path.name != "cuda_absent.c"]
    return [*written, *aot.sources(folder, images, cc=shlex.join(cc), note=notes.append)]


def _fill_templates(built: Built, lib: Path) -> None:
    """Writes what pkg-config and CMake read."""
    major, minor, _ = __version__.split(".", 2)
    values = {"NAME": built.name, "DESCRIPTION": DESCRIPTIONS[built.engine], "VERSION": __version__}
    values |= {"MAJOR": major, "MINOR": minor, "SOVERSION": SOVERSION}
    targets = {"tritlstm.pc.in": lib / "pkgconfig" / f"{built.name}.pc"}
    for name in ("tritlstmConfig.cmake", "tritlstmConfigVersion.cmake"):
        targets[f"cmake/{name}.in"] = lib / "cmake" / "tritlstm" / name
    for template, target in targets.items():
        text = (SOURCE / template).read_text()
        for key, value in values.items():
            text = text.replace(f"@{key}@", value)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def _build_library(cc: list[str], lib: Path, engine: str, images: str, cblas: str | None) -> list[str]:
    """Compiles the library into ``lib``; returns notes."""
    notes: list[str] = []
    name = f"lib{NAMES[engine]}.so"
    soname = f"{name}.{SOVERSION}"
    includes = [f"-I{SOURCE / 'include'}", f"-I{SOURCE / 'src'}"]
    exports = f"-Wl,--version-script={SOURCE / 'libtritlstm.map'}"
    link = [*LINK, "-Wl,-z,defs", f"-Wl,-soname,{soname}", exports, "-o", str(lib / soname), "-pthread", "-ldl"]
    with tempfile.TemporaryDirectory(prefix=".generated-", dir=lib) as generated:
        if engine == "python":
            sources = [SOURCE / "src" / source for source in (*COMMON, "python_loader.c")]
        else:
            sources = [SOURCE / "src" / source for source in (*COMMON, *HOST)]
            sources += _cuda_sources(Path(generated), images, cc, notes)
            # -std=c11 alone would forbid a multiplication and an addition in one instruction.
            includes += ["-ffp-contract=fast", f"-ffile-prefix-map={generated}=."]
            includes += ["-DTRITLSTM_CBLAS"] if cblas else []
            link += ["-lm", *shlex.split(cblas or "")]
        descriptors = [DESCRIPTORS] if accepts(cc, DESCRIPTORS) else []
        compile_ = [*cc, *COMPILE, *descriptors, "-pedantic", *includes, *map(str, sources)]
        _run([*compile_, *link], "compiling the library")
    (lib / name).symlink_to(soname)
    return notes


def build(
    directory: str | Path,
    cc: str | None = None,
    engine: str = "python",
    images: str = NO_IMAGES,
    cblas: str | None = None,
) -> Built:
    """Builds library, header and pkg-config file into the prefix ``directory``, made if it is missing.

    Files of an earlier build are replaced one by one, whole; a host that runs keeps what it has open.

    Args:
        directory: the prefix.
        cc: C compiler as a command line; None: ``$CC``, else ``cc``.
        engine: ``"python"``, which will run the Python environment that this is called in, or ``"aot"``.
        images: device images of the engine ``"aot"``; ``"none"``: it runs on CPUs only.
        cblas: linker options of a CBLAS for large products on a CPU (engine ``"aot"``); None: its own loops.

    Raises:
        ValueError: no engine has that name.
        BuildError: a compiler, Python.h or libpython is missing, or compiling failed.
    """
    if engine not in NAMES:
        raise ValueError(f"no engine {engine!r}: one of {', '.join(NAMES)}")
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the C library is built for Linux only, not for {sys.platform}")
    command = compiler(cc)
    built = Built(Path(directory).resolve(), engine)
    try:
        built.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=built.directory) as name:
            scratch = Path(name)
            for folder in ("include", "lib/tritlstm"):
                (scratch / folder).mkdir(parents=True)
            for header in HEADERS:
                shutil.copyfile(SOURCE / "include" / header, scratch / "include" / header)
            _fill_templates(built, scratch / "lib")
            notes = _build_library(command, scratch / "lib", engine, images, cblas)
            if engine == "python":
                _build_engine(command, scratch / "lib" / "tritlstm")
            for path in sorted(scratch.rglob("*")):
                if path.is_symlink() or path.is_file():
                    target = built.directory / path.relative_to(scratch)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
    except OSError as error:
        raise BuildError(f"can't write to {built.directory}: {error}") from error
    return replace(built, notes=tuple(notes))


def example_compiler(name: str, cc: str | None = None) -> list[str]:
    """The compiler of an example as a command line: for C `compiler`, for C++ ``$CXX`` or ``c++``, for Rust ``rustc``.

    Raises:
        BuildError: there is none.
    """
    if EXAMPLES[name] == "c":
        return compiler(cc)
    variable, default, what, package = {
        "cpp": ("CXX", "c++", "C++", "g++"),
        "rs": ("RUSTC", "rustc", "Rust", "rustc"),
    }[EXAMPLES[name]]
    words = shlex.split(os.environ.get(variable) or default)
    if shutil.which(words[0]) is None:
        raise BuildError(
            f"no {what} compiler {words[0]!r} for the example {name}: install one (Debian and Ubuntu: apt install "
            f"{package}) or name it in ${variable}"
        )
    return words


def build_example(name: str, built: Built, output: str | Path, cc: str | None = None) -> Path:
    """Compiles the example `name` against a built library into the program ``output``.

    Raises:
        ValueError: no example has that name.
        BuildError: its compiler is missing, or compiling failed.
    """
    if name not in EXAMPLES:
        raise ValueError(f"no example {name!r}: one of {', '.join(EXAMPLES)}")
    language = EXAMPLES[name]
    words = example_compiler(name, cc)
    sources = [str(SOURCE / "examples" / f"{name}.{language}")]
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    if language == "rs":
        lib = built.library.parent
        link = ["-L", str(lib), "-l", built.name, "-C", f"link-arg=-Wl,-rpath,{lib}"]
        command = [*words, "-O", "-D", "warnings", *sources, *link, "-o", str(target)]
    else:
        standard = "-std=c11" if language == "c" else "-std=c++17"
        if name == "generate":
            sources.append(str(SOURCE / "src" / "safetensors.c"))
        compile_ = [*words, standard, "-O2", *WARNINGS, f"-I{SOURCE / 'src'}", *sources]
        command = [*compile_, *built.flags(), "-lm", "-o", str(target)]
    _run(command, f"compiling the example {name}")
    return target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``tritlstm build-c``."""
    parser.add_argument("directory", metavar="DIR", help="prefix to build into: DIR/include, DIR/lib")
    parser.add_argument(
        "--engine",
        choices=[*NAMES, "both"],
        default="python",
        help="aot: libtritlstm, which needs no Python; python: libtritlstm_python, which runs this environment "
        "with every option of it (default)",
    )
    parser.add_argument(
        "--images",
        metavar="SET",
        default=NO_IMAGES,
        help="device images in libtritlstm: none (default; CPUs only), default (all of them, some minutes), or with "
        "commas some of them, such as sm_90,fp16,H1024",
    )
    parser.add_argument(
        "--cblas",
        metavar="OPTIONS",
        help='linker options of a CBLAS for the CPU path of libtritlstm, such as "-lopenblas" (default: its own loops)',
    )
    parser.add_argument("--cc", metavar="COMMAND", help="C compiler (default: $CC, else cc)")
    parser.add_argument("--examples", action="store_true", help="compile the examples into DIR/bin as well")


def _build_examples(built: Built, cc: str | None) -> tuple[list[Path], list[str]]:
    """The programs, and for each example whose language has no compiler here the reason."""
    programs, left_out = [], []
    for name in EXAMPLES:
        try:
            example_compiler(name, cc)
        except BuildError as error:
            left_out.append(str(error))
            continue
        programs.append(build_example(name, built, built.directory / "bin" / name, cc))
    return programs, left_out


def run(args: argparse.Namespace) -> int:
    """Runs ``tritlstm build-c``; returns the exit status."""
    engines = list(NAMES) if args.engine == "both" else [args.engine]
    try:
        libraries = [
            build(args.directory, args.cc, engine, args.images, args.cblas)
            if engine == "aot"
            else build(args.directory, args.cc, engine)
            for engine in engines
        ]
        built = libraries[0]
        programs, left_out = _build_examples(built, args.cc) if args.examples else ([], [])
    except BuildError as error:
        print(f"tritlstm build-c: {error}", file=sys.stderr)
        return 1
    print(built.header)
    for library in libraries:
        print(library.library, library.pkg_config, sep="\n")
    for path in programs:
        print(path)
    for reason in left_out:
        print(f"left out: {reason}")
    for text in (text for library in libraries for text in library.notes):
        print(f"note: {text}")
    if "python" in engines:
        print(f"\nlibtritlstm_python runs the environment of {_interpreter()}.")
    print("\nTo compile a host:\n")
    print(f"  export PKG_CONFIG_PATH={built.pkg_config.parent}")
    for library in libraries:
        flags = f"$(pkg-config --cflags --libs {library.name}) -Wl,-rpath,{library.library.parent}"
        print(f"  cc host.c {flags} -o host")
    return 0
