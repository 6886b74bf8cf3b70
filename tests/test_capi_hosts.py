"""The C library as its users meet it: built, linked, opened, run by programs of their own."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capi_harness import shared_build
from safetensors.torch import save_file
from torch import nn

import tritlstm
from tritlstm.capi import build, call_cost

HOSTS = Path(__file__).resolve().parent / "capi_hosts"
STRICT = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-pedantic", "-Werror"]
UNAVAILABLE = 10

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    settings = {"capture_output": True, "text": True, "timeout": 60, "check": False, **options}
    return subprocess.run([str(word) for word in command], **settings)


def compile_(*command: Any) -> None:
    done = run(list(command))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built() -> build.Built:
    return shared_build("python")


@pytest.fixture(scope="module")
def built_aot() -> build.Built:
    return shared_build("aot")


@pytest.fixture(scope="module", params=list(build.NAMES))
def either(request) -> build.Built:
    """The library of each engine in turn."""
    return request.getfixturevalue("built_aot" if request.param == "aot" else "built")


@pytest.fixture(scope="module")
def probe(built, tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("hosts") / "probe"
    include = f"-I{built.header.parent}"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", include]
    compile_(*build.compiler(), *flags, HOSTS / "probe.c", "-o", program, "-ldl", "-pthread")
    return program


# -- the header ---------------------------------------------------------------------------------------------

USE = """
#include <tritlstm.h>
#include <tritlstm.h>
int main(void)
{
    tritlstm_options options;
    return tritlstm_options_init(&options, sizeof options) || options.num_layers != 1
        || tritlstm_version() != TRITLSTM_VERSION;
}
"""
NAMES_C = ("c89", "iso9899:199409", "c99", "c11", "c17", "c2x", "c23", "gnu89", "gnu17", "gnu2x")
NAMES_CPP = ("c++98", "c++03", "c++11", "c++14", "c++17", "c++20", "c++2b", "c++23", "c++26", "gnu++98", "gnu++20")
LANGUAGES = [(name, standard) for name in ("gcc", "clang") for standard in NAMES_C]
LANGUAGES += [(name, standard) for name in ("g++", "clang++") for standard in NAMES_CPP]


def installed(name: str) -> str | None:
    """A compiler's command: Debian's clang has its version in its name."""
    words = (name, f"{name}-14", f"{name}-16", f"{name}-19")
    return next((found for word in words if (found := shutil.which(word))), None)


@pytest.mark.parametrize(("compiler", "standard"), LANGUAGES)
def test_the_header_compiles_and_links(built_aot, tmp_path, compiler, standard):
    command = installed(compiler)
    if command is None:
        pytest.skip(f"{compiler} is not installed (Debian: apt install {compiler.replace('clang++', 'clang')})")
    source = tmp_path / ("use.cpp" if "+" in standard else "use.c")
    source.write_text("")
    if run([command, f"-std={standard}", "-fsyntax-only", source]).returncode:
        pytest.skip(f"{compiler} does not know -std={standard}")
    source.write_text(USE)
    compile_(command, f"-std={standard}", *STRICT, source, *built_aot.flags(), "-o", tmp_path / "use")
    assert run([tmp_path / "use"]).returncode == 0


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_header_for_cpp_compiles(built_aot, compiler):
    command = installed(compiler)
    if command is None:
        pytest.skip(f"{compiler} is not installed (Debian: apt install {compiler.replace('clang++', 'clang')})")
    for standard in ("c++17", "c++20", "c++2b"):
        options = [f"-std={standard}", *STRICT, "-fsyntax-only", f"-I{built_aot.header.parent}"]
        compile_(command, *options, build.SOURCE / "examples/fit.cpp")


def test_header_package_and_library_have_one_version(either):
    built = either
    major, minor, patch = tritlstm.__version__.split(".")
    for name, number in (("MAJOR", major), ("MINOR", minor), ("PATCH", patch)):
        assert re.search(rf"^#define TRITLSTM_VERSION_{name} {number}$", built.header.read_text(), re.M)
    assert f"Version: {tritlstm.__version__}\n" in built.pkg_config.read_text()


def test_every_argument_is_documented():
    text = (build.SOURCE / "include" / "tritlstm.h").read_text()
    for function in re.findall(r"TRITLSTM_API[^;]*?(tritlstm_\w+)\(", text):
        before = text[: re.search(rf"TRITLSTM_API[^;]*?\b{function}\(", text).start()].rstrip()
        # Two functions of one kind may share the comment above the first.
        assert before.endswith(("*/", ";")), f"{function} has no comment"


# -- what is built ------------------------------------------------------------------------------------------


def exported(library: Path) -> set[str]:
    done = run(["nm", "-D", "--defined-only", library])
    assert done.returncode == 0, done.stderr
    return {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}


def dynamic(library: Path, key: str) -> list[str]:
    done = run(["readelf", "-d", library])
    return re.findall(rf"\({key}\)[^\[]*\[([^\]]+)\]", done.stdout)


def test_only_the_functions_of_the_header_are_exported(either):
    declared = set(re.findall(r"\b(tritlstm_\w+)\(", build.declarations()))
    assert len(declared) == 27
    assert (
        exported(either.library) - {"tritlstm_0"} == declared
    )  # the other is the name of the symbols' version


def test_the_symbols_and_their_versions_are_the_committed_ones(either):
    """A symbol that changes its version or goes away breaks hosts that are built already."""
    done = run(["nm", "-D", "--defined-only", either.library])
    found = sorted(" ".join(line.split()[1:]) for line in done.stdout.splitlines())
    committed = (HOSTS.parent / "data/libtritlstm.symbols").read_text().splitlines()
    assert found == committed


def test_the_python_engine_exports_its_start_alone(built):
    assert exported(built.directory / "lib/tritlstm/python_engine.so") == {"tritlstm_python_start"}


def test_the_library_needs_libc_alone_and_knows_no_path(either):
    assert dynamic(either.library, "SONAME") == [f"lib{either.name}.so.0"]
    engine = [either.directory / "lib/tritlstm/python_engine.so"] if either.engine == "python" else []
    # Without descriptors thread-local storage is found through a function of ld.so.
    described = platform.machine() != "x86_64" or build.accepts(build.compiler(), build.DESCRIPTORS)
    loader = set() if described else {"ld-linux-x86-64"}
    for library in (either.library, *engine):
        assert {name.split(".")[0] for name in dynamic(library, "NEEDED")} - loader == {"libc"}
        assert not dynamic(library, "RPATH")
        assert not dynamic(library, "RUNPATH")
        content = library.read_bytes()
        for path in (either.directory, build.SOURCE, sys.prefix):
            assert str(path).encode() not in content


def test_a_moved_prefix_works_through_pkg_config(either, tmp_path):
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed (Debian: apt install pkg-config)")
    prefix = tmp_path / "moved"
    shutil.copytree(either.directory, prefix, symlinks=True)
    environment = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig")}
    done = run(["pkg-config", "--cflags", "--libs", either.name], env=environment)
    flags = done.stdout.split()
    assert [os.path.realpath(flag[2:]) for flag in flags[:2]] == [f"{prefix}/include", f"{prefix}/lib"]
    assert flags[2:] == [f"-l{either.name}"]
    version = run(["pkg-config", "--modversion", either.name], env=environment)
    assert version.stdout.strip() == tritlstm.__version__
    program = tmp_path / "train_step"
    source = build.SOURCE / "examples/train_step.c"
    compile_(*build.compiler(), "-Wall", "-Wextra", "-Werror", source, *flags, "-lm", "-o", program)
    done = run([program], env={"LD_LIBRARY_PATH": str(prefix / "lib"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


PROJECT = """
cmake_minimum_required(VERSION 3.16)
project(host C CXX)
find_package(tritlstm 0.1 REQUIRED COMPONENTS @NAMES@)
foreach(name @NAMES@)
  add_executable(train_step_${name} "@EXAMPLES@/train_step.c")
  target_link_libraries(train_step_${name} PRIVATE tritlstm::${name} m)
endforeach()
add_executable(fit "@EXAMPLES@/fit.cpp")
target_compile_features(fit PRIVATE cxx_std_17)
target_link_libraries(fit PRIVATE tritlstm::tritlstm)
"""


def cmake_project(folder: Path, prefix: Path, names: str, text: str = PROJECT) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    text = text.replace("@NAMES@", names).replace("@EXAMPLES@", str(build.SOURCE / "examples"))
    (folder / "CMakeLists.txt").write_text(text)
    return run(["cmake", "-S", folder, "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}"])


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed (Debian: apt install cmake)")
def test_a_moved_prefix_works_through_cmake(built, built_aot, tmp_path):
    """Both libraries in one prefix, used by one project."""
    prefix = tmp_path / "moved away"
    for one in (built, built_aot):
        shutil.copytree(one.directory, prefix, symlinks=True, dirs_exist_ok=True)
    done = cmake_project(tmp_path / "host", prefix, "tritlstm tritlstm_python")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(["cmake", "--build", tmp_path / "host/build"])
    assert done.returncode == 0, done.stdout + done.stderr
    for program in ("train_step_tritlstm", "train_step_tritlstm_python", "fit"):
        done = run([tmp_path / "host/build" / program])
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed (Debian: apt install cmake)")
def test_cmake_refuses_what_the_prefix_lacks(built_aot, tmp_path):
    done = cmake_project(tmp_path / "one", built_aot.directory, "tritlstm_python")
    assert done.returncode != 0
    assert "build it with `tritlstm build-c`" in " ".join(done.stderr.split())
    for wrong in ("0.2", "1.0", "0.1.1"):
        text = PROJECT.replace("tritlstm 0.1 ", f"tritlstm {wrong} ")
        done = cmake_project(tmp_path / wrong, built_aot.directory, "tritlstm", text)
        assert done.returncode != 0
        assert f'requested version "{wrong}"' in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed (Debian: apt install make)")
def test_make_install_stages_a_prefix(built_aot, tmp_path):
    root = HOSTS.parents[1]
    settings = [f"DESTDIR={tmp_path}/stage", "PREFIX=/opt/tritlstm", f"BIN={Path(sys.executable).parent}"]
    done = run(["make", "-s", "-C", root, "-o", "setup", "install", *settings])
    assert done.returncode == 0, done.stdout + done.stderr
    prefix = tmp_path / "stage/opt/tritlstm"
    installed_, wanted = (
        {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
        for base in (prefix, built_aot.directory)
    )
    assert installed_ == wanted
    for path in prefix.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"stage"}


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    build.add_arguments(parser)
    return parser.parse_args(list(words))


def test_build_c_builds_over_what_is_there_and_says_how_to_go_on(built, probe, tmp_path, capsys):
    prefix = tmp_path / "with sp\u00e4ce"
    shutil.copytree(built.directory, prefix, symlinks=True)
    assert build.run(arguments(str(prefix), "--engine", "both", "--examples")) == 0
    said = capsys.readouterr().out
    names = ["include/tritlstm.h", "lib/libtritlstm_python.so", "lib/pkgconfig/tritlstm_python.pc"]
    names += ["lib/libtritlstm.so", "lib/pkgconfig/tritlstm.pc"]
    for name in [*names, "bin/generate", "bin/train_step"]:
        assert (prefix / name).is_file()
        assert str(prefix / name) in said
    for name in ("tritlstm", "tritlstm_python"):
        assert f"pkg-config --cflags --libs {name})" in said
        assert run([probe, prefix / f"lib/lib{name}.so", "local"]).returncode == 0
    assert not list(prefix.rglob(".*")), "scratch files are left"


# -- what is missing ----------------------------------------------------------------------------------------


def refusal(capsys, *words: str) -> str:
    assert build.run(arguments(*words)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("tritlstm build-c: ")
    return said.err


def test_a_missing_compiler(capsys, tmp_path):
    assert "no C compiler 'no-such-cc -m64': install one" in refusal(
        capsys, str(tmp_path), "--cc", "no-such-cc -m64"
    )


def test_a_compiler_that_fails(capsys, tmp_path):
    said = refusal(capsys, str(tmp_path), "--cc", "gcc -DTRITLSTM_API=nonsense")
    assert said.startswith("tritlstm build-c: compiling the library failed: gcc -DTRITLSTM_API=nonsense")
    assert "error: unknown type name" in said
    assert list(tmp_path.iterdir()) == []


def test_missing_headers(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: "/nowhere")
    version = sysconfig.get_python_version()
    said = refusal(capsys, str(tmp_path))
    assert "/nowhere/Python.h is missing" in said
    assert f"apt install python{version}-dev" in said


def test_no_libpython_at_all(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "shared_libpython", lambda: None)
    monkeypatch.setattr(build, "static_libpython", list)
    said = refusal(capsys, str(tmp_path))
    assert "has neither a shared nor a static libpython" in said
    assert f"apt install libpython{sysconfig.get_python_version()}" in said


def archive(folder: Path, source: str, *flags: str) -> Path:
    (folder / "a.c").write_text(source)
    compile_(*build.compiler(), "-c", *flags, folder / "a.c", "-o", folder / "a.o")
    compile_("ar", "rc", folder / "liba.a", folder / "a.o")
    return folder / "liba.a"


def test_a_static_libpython_becomes_a_shared_one_where_it_can(tmp_path):
    output = tmp_path / "libpython.so"
    good = archive(tmp_path, "int number; int Py_Number(void) { return number; }", "-fPIC")
    build.link_libpython(build.compiler(), [good], output)
    assert {"Py_Number", "number"} <= exported(output)
    bad = archive(
        tmp_path,
        "int number; int *address = &number; int f(void) { return number; }",
        "-fno-pic",
        "-mcmodel=large",
    )
    with pytest.raises(build.BuildError, match=r"can't be shared") as caught:
        # Text relocations are what a linker refuses only when it is asked to.
        build.link_libpython([*build.compiler(), "-Wl,-z,text"], [bad], output)
    assert "Use a Python that has a shared one" in str(caught.value)


def test_libpython_is_found_beside_the_interpreter(monkeypatch):
    """Relocated Pythons remember the folder of the machine that built them."""
    found = build.shared_libpython()
    if found is None:
        pytest.skip("this Python has no shared libpython")
    true = sysconfig.get_config_var
    gone = {"LIBDIR": "/install/lib", "LIBPL": "/install/lib/config"}
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: gone.get(name) or true(name))
    assert build.shared_libpython() == found


def test_a_prefix_that_can_not_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "can't write to" in refusal(capsys, str(tmp_path / "file" / "prefix"))


def test_cffi_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cffi", None)
    assert "-m pip install cffi" in refusal(capsys, str(tmp_path))


def test_another_system(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "for Linux only, not for darwin" in refusal(capsys, str(tmp_path))


# -- hosts that open it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answer(built, probe) -> str:
    done = run([probe, built.library, "local"])
    assert done.returncode == 0, done.stdout + done.stderr
    torch.manual_seed(7)
    module = nn.LSTM(4, 5)
    x = (torch.arange(24) % 7).float().div(7).view(3, 2, 4)
    assert float(done.stdout) == pytest.approx(float(module(x)[0].detach().double().sum()), rel=1e-6)
    return done.stdout


def hostile(folder: Path) -> dict[str, str]:
    """Everything in a shell that has ever led an embedded Python astray."""
    for name in ("torch", "numpy", "tritlstm", "sitecustomize", "usercustomize", "cffi", "os"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported from the wrong place')")
    libraries = folder / "lib"
    libraries.mkdir()
    (folder / "empty.c").write_text("int nothing;")
    name = sysconfig.get_config_var("INSTSONAME")
    compile_(*build.compiler(), "-shared", folder / "empty.c", f"-Wl,-soname,{name}", "-o", libraries / name)
    variables = dict.fromkeys(
        ("PYTHONPATH", "PYTHONUSERBASE", "VIRTUAL_ENV", "HOME", "PYTHONPLATLIBDIR"), str(folder)
    )
    variables |= {"PYTHONHOME": "/nowhere", "LD_LIBRARY_PATH": f"{libraries}:/usr/lib/x86_64-linux-gnu"}
    variables["__PYVENV_LAUNCHER__"] = str(folder / "os.py")
    variables |= {
        "PYTHONSTARTUP": str(folder / "torch.py"),
        "PYTHONEXECUTABLE": "/bin/false",
        "PYTHONVERBOSE": "1",
    }
    return {
        **variables,
        "PATH": str(folder),
        "PYTHONWARNINGS": "error",
        "PYTHONMALLOC": "debug",
        "LC_ALL": "C",
    }


def test_the_environment_comes_from_the_library_not_from_the_shell(built, probe, answer, tmp_path):
    done = run([probe, built.library, "local"], env=hostile(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, answer, "")
    link = tmp_path / "elsewhere.so"
    link.symlink_to(built.library)
    done = run([probe, link, "local"], env={"OMP_NUM_THREADS": "1"}, cwd="/", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (0, answer, "")


def test_a_host_without_standard_streams(built, probe):
    done = run(["sh", "-c", f'"{probe}" "{built.library}" local <&- >&- 2>&-'])
    assert done.returncode == 0


def test_many_threads_use_it_for_the_first_time_at_once(built, probe):
    done = run([probe, built.library, "threads"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "threads 0 failures\n", "")


@pytest.mark.parametrize("order", ["fork", "fork-first"])
def test_after_a_fork(built, probe, order):
    done = run([probe, built.library, order], timeout=90)  # a hang takes for ever, a busy machine long
    assert (done.returncode, done.stdout, done.stderr) == (0, "fork ok\n", "")


def test_the_engine_without_python_opens_locally_forks_and_threads(built_aot, probe, answer, tmp_path):
    """The same host as above; a child of a process that used the library on a CPU may go on using it."""
    done = run([probe, built_aot.library, "local"], env=hostile(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) == pytest.approx(float(answer), rel=1e-6)
    for mode, said in (("threads", "threads 0 failures\n"), ("fork-first", "fork ok\n"), ("fork-free", "fork ok\n")):
        done = run([probe, built_aot.library, mode])
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


BROKEN = {
    "no interpreter": (r"^python = .*", "python = /nowhere/python", "interpreter '/nowhere/python'"),
    "no package": (r"^python = .*", f"python = {sys.base_prefix}/bin/python3", "has no usable tritlstm"),
    "not a python": (r"^python = .*", "python = /bin/ls", "has no usable tritlstm"),
    "no libpython": (r"^libpython = .*", "libpython = gone.so", "libpython can not be loaded"),
    "another library": (r"^libpython = .*", "libpython = python_engine.so", "libpython can not be loaded"),
    "another version": (r"^version = .*", "version = 3.1", "but the engine was built for 3.1"),
    "a key is missing": (r"^version = .*", "", "lacks python, libpython or version"),
}


@pytest.mark.parametrize("change", BROKEN)
def test_a_broken_environment_is_a_status_each_time_and_prints_nothing(built, probe, tmp_path, change):
    prefix = tmp_path / "prefix"
    shutil.copytree(built.directory, prefix, symlinks=True)
    pattern, replacement, words = BROKEN[change]
    settings = prefix / "lib/tritlstm/python_engine.conf"
    settings.write_text(re.sub(pattern, replacement, settings.read_text(), flags=re.M))
    expect_unavailable(probe, prefix, words)


@pytest.mark.parametrize("name", ["python_engine.so", "python_engine.conf"])
def test_a_missing_part_is_a_status(built, probe, tmp_path, name):
    prefix = tmp_path / "prefix"
    shutil.copytree(built.directory, prefix, symlinks=True)
    (prefix / "lib/tritlstm" / name).unlink()
    expect_unavailable(probe, prefix, name)


def expect_unavailable(probe: Path, prefix: Path, words: str) -> None:
    done = run([probe, prefix / "lib/libtritlstm_python.so", "retry"])
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) == 2
    for line in lines:  # a second try is no success either
        assert line.startswith(f"{UNAVAILABLE} 0 ")
        assert words in line
    assert done.stderr == ""


def test_an_environment_whose_package_does_not_import(built, probe, tmp_path):
    """A package that ends Python, prints and raises: the host lives and gets the words."""
    site = tmp_path / "venv/lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "tritlstm/capi").mkdir(parents=True)
    (tmp_path / "venv/bin").mkdir()
    (tmp_path / "venv/bin/python").symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "venv/pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\n")
    (site / "_cffi_backend.py").write_text("")
    (site / "tritlstm/__init__.py").write_text("")
    (site / "tritlstm/capi/__init__.py").write_text("")
    (site / "tritlstm/capi/host.py").write_text("raise SystemExit('a bad day')")
    prefix = tmp_path / "prefix"
    shutil.copytree(built.directory, prefix, symlinks=True)
    settings = prefix / "lib/tritlstm/python_engine.conf"
    python = f"python = {tmp_path}/venv/bin/python"
    settings.write_text(re.sub(r"^python = .*", python, settings.read_text(), flags=re.M))
    expect_unavailable(probe, prefix, "SystemExit: a bad day")


# -- the examples -------------------------------------------------------------------------------------------

TEXT = "def f(x):\n    return x"
LETTERS = sorted(set(TEXT.encode()))


@pytest.fixture(scope="module")
def programs(either, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("examples")
    return {name: build.build_example(name, either, folder / name) for name in ("generate", "train_step")}


class Character(nn.Module):
    def __init__(self, proj_size: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), 7)
        self.lstm = nn.LSTM(7, 9, 2, proj_size=proj_size)
        self.head = nn.Linear(proj_size or 9, len(LETTERS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


def save_model(path: Path, metadata: dict[str, str] | None = None, **options: Any) -> Character:
    torch.manual_seed(5)
    model = Character(**options)
    vocabulary = torch.tensor(LETTERS, dtype=torch.uint8)
    save_file({**model.state_dict(), "vocabulary": vocabulary}, path, metadata)
    return model


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([LETTERS.index(byte) for byte in text.encode()])


@pytest.fixture(scope="module")
def generate(built_aot, tmp_path_factory) -> Path:
    """The program on the engine that starts at once, for what does not depend on the engine."""
    return build.build_example("generate", built_aot, tmp_path_factory.mktemp("example") / "generate")


@pytest.mark.parametrize("proj_size", [0, 4])
def test_generate_gives_pytorchs_logits(programs, tmp_path, proj_size):
    model = save_model(tmp_path / "m", proj_size=proj_size)
    command = [programs["generate"], tmp_path / "m", "--prompt", TEXT, "--logits", tmp_path / "logits"]
    done = run(command)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = np.fromfile(tmp_path / "logits", "<f4").reshape(len(TEXT), len(LETTERS))
    with torch.no_grad():
        own = model(ids_of(TEXT)).numpy()
        base = model.double()(ids_of(TEXT)).numpy()
    budget = 2 * np.abs(own - base).max() + 0.5 * np.finfo(np.float32).eps * np.abs(base).max()
    assert np.abs(found - base).max() <= budget


def test_generate_follows_the_likeliest_or_the_seed(programs, tmp_path):
    model = save_model(tmp_path / "m")
    command = [programs["generate"], tmp_path / "m", "--prompt", "def "]
    greedy = run([*command, "--length", "20", "--temperature", "0"]).stdout
    text = "def "
    with torch.no_grad():
        for _ in range(20):
            text += chr(LETTERS[int(model(ids_of(text))[-1].argmax())])
    assert greedy == text + "\n"
    drawn = [run([*command, "--length", "40", "--seed", seed]).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(one) == len("def ") + 41 and set(one.encode()) <= set(LETTERS) for one in drawn)


def test_generate_draws_with_the_models_probabilities(generate, tmp_path):
    """A model whose logits are its head's biases draws ids as often as their softmax says."""
    tensors = {name: torch.zeros_like(value) for name, value in Character().state_dict().items()}
    tensors["vocabulary"] = torch.tensor(LETTERS, dtype=torch.uint8)
    tensors["head.bias"] = torch.linspace(-1, 1, len(LETTERS))
    save_file(tensors, tmp_path / "m")
    command = [generate, tmp_path / "m", "--prompt", "d", "--temperature", "0.5"]
    text = run([*command, "--length", "6000"]).stdout[1:-1].encode()
    counts = np.array([text.count(bytes([byte])) for byte in LETTERS])
    expected = 6000 * (2 * tensors["head.bias"]).softmax(0).double().numpy()
    assert len(text) == 6000
    # chi-squared with V - 1 degrees of freedom: five standard deviations above its mean
    spare = len(LETTERS) - 1
    assert ((counts - expected) ** 2 / expected).sum() < spare + 5 * (2 * spare) ** 0.5


def test_generate_knows_the_id_of_all_other_bytes(generate, tmp_path):
    model = save_model(tmp_path / "m", {"unknown_id": "3"})
    run([generate, tmp_path / "m", "--prompt", "dZ", "--logits", tmp_path / "logits"])
    found = np.fromfile(tmp_path / "logits", "<f4").reshape(2, -1)
    expected = model(torch.tensor([LETTERS.index(ord("d")), 3])).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    drawn = run(
        [generate, tmp_path / "m", "--prompt", "d", "--length", "300", "--temperature", "50"]
    ).stdout
    assert chr(LETTERS[3]) not in drawn[1:-1]


def change(**changes: torch.Tensor | None) -> Any:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value

    return apply


BAD_MODELS = [
    (change(vocabulary=None), "no tensor 'vocabulary'"),
    (change(vocabulary=torch.zeros(300, dtype=torch.uint8)), "no tensor 'vocabulary' of 2 to 256 bytes"),
    (change(vocabulary=torch.zeros(len(LETTERS))), "no tensor 'vocabulary' of 2 to 256 bytes"),
    (change(embedding__weight=None), "no tensor 'embedding.weight'"),
    (
        change(embedding__weight=torch.zeros(3, 7)),
        f"'embedding.weight' does not have 2 extents, the first {len(LETTERS)}",
    ),
    (change(embedding__weight=torch.zeros(len(LETTERS), 7).int()), "is I32, not a floating-point type"),
    (change(head__weight=torch.zeros(len(LETTERS), 5)), "embedding, lstm and head do not fit together"),
    (change(head__bias=torch.zeros(len(LETTERS), 1)), "'head.bias' does not have 1 extents"),
    (change(lstm__weight_ih_l0=None), "TRITLSTM_ERROR_WEIGHTS"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD_MODELS, ids=[words for _, words in BAD_MODELS])
def test_generate_refuses_other_models(generate, tmp_path, spoil, words):
    save_model(tmp_path / "m")
    tensors = {**Character().state_dict(), "vocabulary": torch.tensor(LETTERS, dtype=torch.uint8)}
    spoil(tensors)
    save_file(tensors, tmp_path / "m")
    done = run([generate, tmp_path / "m"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("generate: ")
    assert words in done.stderr


COMMAND_LINES = [
    ([], 2, "usage: generate MODEL.safetensors"),
    (["m", "other"], 2, "usage:"),
    (["m", "--prompt"], 2, "usage:"),
    (["m", "--nonsense", "1"], 2, "usage:"),
    (["m", "--prompt", ""], 2, "at least one byte"),
    (["m", "--length", "ten"], 2, "--length 'ten' is not a number"),
    (["m", "--length", "-1"], 2, "--length is -1"),
    (["m", "--length", "99999999999999999999"], 2, "is not a number"),
    (["m", "--temperature", "nan"], 2, "--temperature must be"),
    (["m", "--temperature", "-1"], 2, "--temperature must be"),
    (["m", "--seed", "1x"], 2, "--seed '1x' is not a number"),
    (["missing"], 1, "missing: No such file or directory"),
    (["m", "--prompt", "Z"], 1, "byte 0x5a of the prompt is not in the model's vocabulary"),
    (["m", "--logits", "/nowhere/logits", "--prompt", "d"], 1, "/nowhere/logits: No such file or directory"),
    (["m", "--logits", "/dev/full", "--prompt", "d"], 1, "/dev/full: No space left"),
]


@pytest.mark.parametrize(("words", "status", "said"), COMMAND_LINES, ids=lambda value: str(value)[:40])
def test_generates_command_line(generate, tmp_path, words, status, said):
    save_model(tmp_path / "m")
    done = run([generate, *words], cwd=tmp_path)
    assert done.returncode == status
    assert said in done.stderr
    assert done.stdout == ""


def test_train_step_checks_every_gradient(programs):
    done = run([programs["train_step"]])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    rows = re.findall(r"^(\w+) +(\S+) +(\S+) +(\S+)  ok$", done.stdout, re.M)
    names = [name for name, _ in nn.LSTM(4, 6, 2, bidirectional=True).named_parameters()]
    assert [row[0] for row in rows] == ["x", "h0", "c0", *names]
    assert all(float(row[3]) <= 1e-8 and float(row[1]) != 0 for row in rows)
    assert "19 of 19 gradients agree" in done.stdout
    assert "WRONG" not in done.stdout


def fitted(descents: int) -> list[float]:
    """What fit.cpp does, by torch: the loss before and after so many steps of gradient descent."""
    torch.manual_seed(3)
    module = nn.LSTM(1, 8, dtype=torch.float64)
    x = 2 * torch.arange(12 * 4, dtype=torch.float64).mul(0.6180339887498949).fmod(1).view(12, 4, 1) - 1
    losses = []
    for _ in range(descents + 1):
        loss = (module(x)[0][1:, :, :1] - x[:-1] / 2).square().mean()
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(module.parameters(), gradients, strict=True):
                weight -= 0.5 * gradient
    return [losses[0], losses[-1]]


def test_fit_descends_as_torch_does(either, tmp_path):
    try:
        build.example_compiler("fit")
    except build.BuildError as error:
        pytest.skip(str(error))
    program = build.build_example("fit", either, tmp_path / "fit")
    done = run([program, "40"])
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    before, after = re.search(r"^loss (\S+) before, (\S+) after 40 steps$", done.stdout, re.M).groups()
    # Equal but for rounding: what 40 steps of a smooth function can make of it.
    assert [float(before), float(after)] == pytest.approx(fitted(40), abs=2e-12)
    assert f"engine: {either.engine}" in done.stdout
    assert "refused: TRITLSTM_ERROR_ARGUMENT: hidden_size is -1, but must be at least 1" in done.stdout


def test_stream_in_rust_gives_pytorchs_outputs(either, tmp_path):
    try:
        build.example_compiler("stream")
    except build.BuildError as error:
        pytest.skip(str(error))
    program = build.build_example("stream", either, tmp_path / "stream")
    torch.manual_seed(8)
    module = nn.LSTM(3, 5, 2, proj_size=4)
    save_file({f"m.{name}": value for name, value in module.state_dict().items()}, tmp_path / "m")
    done = run([program, tmp_path / "m", "m.", "9"])
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    found = np.array([[float(word) for word in line.split()] for line in lines[:9]])
    x = (torch.arange(9)[:, None] + torch.arange(3)).double().sin()
    with torch.no_grad():
        expected = module.double()(x)[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert lines[9].startswith(f"engine: {either.engine}")
    for words, said in (
        (["missing", "", "1"], "stream: 'missing': No such file or directory"),
        ([tmp_path / "m", "x.", "1"], "set prefix to \"m.\""),
        (["m"], "stream: usage: stream MODEL.safetensors PREFIX STEPS"),
    ):
        done = run([program, *words], cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr


def test_a_missing_compiler_of_an_example_is_named(built_aot, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-c++")
    monkeypatch.setenv("RUSTC", "no-such-rustc")
    words = r"no C\+\+ compiler 'no-such-c\+\+' for the example fit: .*apt install g\+\+"
    with pytest.raises(build.BuildError, match=words):
        build.build_example("fit", built_aot, tmp_path / "fit")
    assert build.run(arguments(str(tmp_path / "prefix"), "--engine", "aot", "--examples")) == 0
    said = capsys.readouterr().out
    assert "left out: no Rust compiler 'no-such-rustc' for the example stream" in said
    assert {path.name for path in (tmp_path / "prefix/bin").iterdir()} == {"generate", "train_step", "call_cost"}


def test_train_step_notices_a_wrong_gradient(either, tmp_path):
    """The same program, linked with a backward that is a thousandth too large."""
    source = (build.SOURCE / "examples/train_step.c").read_text()
    spoilt = source.replace("    backward();\n", "    backward();\n    inputs[5].gradient[2] *= 1.001;\n")
    assert spoilt != source
    (tmp_path / "spoilt.c").write_text(spoilt)
    compile_(*build.compiler(), tmp_path / "spoilt.c", *either.flags(), "-lm", "-o", tmp_path / "spoilt")
    done = run([tmp_path / "spoilt"])
    assert done.returncode == 1
    assert len(re.findall(r"^bias_ih_l0 .*WRONG$", done.stdout, re.M)) == 1
    assert "18 of 19 gradients agree" in done.stdout


def test_examples_have_only_their_names(built, tmp_path):
    with pytest.raises(ValueError, match="no example 'nothing': one of generate, train_step, call_cost, fit, stream"):
        build.build_example("nothing", built, tmp_path / "nothing")


# -- the reader ---------------------------------------------------------------------------------------------


def test_the_reader_survives_damaged_files(tmp_path):
    tensors = {f"lstm.{name}": value for name, value in nn.LSTM(2, 3).state_dict().items()}
    tensors |= {
        "half": torch.ones(5).half(),
        "brain": torch.ones(5).bfloat16(),
        "wide": torch.ones(5).double(),
    }
    tensors |= {"empty": torch.ones(0, 3), 'quo"te\u20ac': torch.ones(3, dtype=torch.bool)}
    save_file(tensors, tmp_path / "base", {"format": "pt", "note": "a\nb"})
    program = tmp_path / "mutate"
    command = [
        *build.compiler(),
        "-std=c11",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{build.SOURCE}/src",
    ]
    command += [HOSTS / "mutate.c", build.SOURCE / "src/safetensors.c", "-o", program]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if run([*command, *sanitizers]).returncode:
        compile_(*command)  # a compiler without the sanitizers' libraries: still no crash, no hang
    done = run([program, tmp_path / "base", "30000"])
    assert done.returncode == 0, done.stdout + done.stderr
    accepted, refused = (int(number) for number in re.findall(r"\d+", done.stdout))
    assert accepted + refused == 30000
    assert accepted > 100  # damage to the tensors' own bytes is no damage to the file


# -- the page -----------------------------------------------------------------------------------------------


def hosts_on_the_page() -> list[str]:
    page = (HOSTS.parents[1] / "docs/c.md").read_text(encoding="utf-8")
    found = re.findall(r"^```c\n(.*?)^```$", page, re.S | re.M)
    assert len(found) == 2
    return found


def test_the_host_with_options_on_the_page_runs(either, tmp_path):
    (tmp_path / "host.c").write_text(hosts_on_the_page()[1])
    compile_(*build.compiler(), *STRICT, tmp_path / "host.c", *either.flags(), "-o", tmp_path / "host")
    done = run([tmp_path / "host"])
    if either.engine == "python":
        said = "10 weights, the last is weight_ch_l1 [48]\n"
        page = (HOSTS.parents[1] / "docs/c.md").read_text(encoding="utf-8")
        assert f"It prints `{said.strip()}`." in page
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith('more is "peephole=True, cell_clip=3.0')
        assert done.stderr.endswith("leave it NULL, or link libtritlstm_python\n")


def test_the_host_on_the_page_runs(either, tmp_path):
    (tmp_path / "host.c").write_text(hosts_on_the_page()[0])
    compile_(*build.compiler(), *STRICT, tmp_path / "host.c", *either.flags(), "-o", tmp_path / "host")
    done = run([tmp_path / "host"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "'model.safetensors': No such file or directory\n"
    weights = {f"lstm.{name}": value for name, value in nn.LSTM(64, 128).state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    done = run([tmp_path / "host"], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- the cost of a call -------------------------------------------------------------------------------------


@pytest.fixture
def built_before(built_aot, monkeypatch) -> None:
    """call_cost finds the library of the engine aot built."""
    monkeypatch.setattr(build, "build", lambda directory, engine, cblas: built_aot)


def test_call_cost_prints_a_row_for_each_call_beside_torch(built_before, capsys):
    before = os.sched_getaffinity(0)
    assert call_cost.main(["--engine", "aot", "--calls", "2", "--rounds", "1"]) == 0
    assert os.sched_getaffinity(0) == before
    said = capsys.readouterr().out
    number = r"(\d+\.\d\d)"
    rows = re.findall(rf"^(\S.*?)  +(step|forward|train) +{number} +{number} +{number} +{number}$", said, re.M)
    assert [row[:2] for row in rows] == [(case, kind) for case in call_cost.CASES for kind in call_cost.KINDS]
    assert all(float(time) > 0 for row in rows for time in row[2:5])
    for row in rows:
        ours, _, torchs, ratio = map(float, row[2:])
        assert ratio == pytest.approx(ours / torchs, abs=0.02)  # of figures rounded to 0.01
    assert re.search(r"^network +call +aot +torch op +torch +aot/torch$", said, re.M)


@pytest.mark.timeout(600)
def test_call_cost_times_the_launcher_on_a_driver_that_does_nothing(capsys, monkeypatch):
    monkeypatch.setattr(call_cost, "CASES", {"no work": call_cost.CASES["no work"]})
    monkeypatch.setattr(call_cost, "LAUNCHER_IMAGES", "sm_90,fp32,H32,step")
    assert call_cost.main(["--engine", "aot", "--calls", "2", "--rounds", "1", "--launcher"]) == 0
    said = capsys.readouterr().out.partition("on a CUDA device whose driver does nothing\n")[2]
    rows = re.findall(r"^no work +(step|forward|train) +(\d+\.\d\d)$", said, re.M)
    assert [kind for kind, _ in rows] == list(call_cost.KINDS)
    assert all(0 < float(time) < 10_000 for _, time in rows)


def test_call_cost_shows_no_figure_of_a_wrong_host(built_before, monkeypatch, capsys):
    torch_ = call_cost.Torch(call_cost.CASES["no work"])
    torch_.total = 123.0
    monkeypatch.setattr(call_cost, "Torch", lambda case: torch_)
    assert call_cost.main(["--engine", "aot", "--calls", "1"]) == 1
    said = capsys.readouterr()
    assert "torch's to 123.0" in said.err
    assert "step" not in said.out
    assert "no work" not in said.out
