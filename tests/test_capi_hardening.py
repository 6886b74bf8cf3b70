"""libtritlstm under valgrind, sanitizers, failing allocations and the fuzzers' corpus."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from aot_world import make_standin
from capi_harness import shared_build
from safetensors.torch import save_file
from torch import nn

from tritlstm.capi import aot, build

TESTS = Path(__file__).resolve().parent
SOURCES = [build.SOURCE / "src" / name for name in (*build.COMMON, *build.HOST, "cuda_absent.c")]
FLAGS = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=fast"]
FLAGS += [f"-I{build.SOURCE}/include", f"-I{build.SOURCE}/src"]
#: Some kernels' address layout is too random for older thread sanitizers.
UNRANDOMISED = ["setarch", "-R"] if shutil.which("setarch") else []
TARGETS = {"safetensors_reader": ["safetensors.c"], "argument_checks": ["front.c", "safetensors.c"]}
TARGETS["load_file"] = TARGETS["argument_checks"]


def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    settings = {"capture_output": True, "text": True, "timeout": 170, "check": False, **options}
    return subprocess.run([str(word) for word in command], **settings)


def compile_(target: Path, *words: Any) -> Path:
    done = run(*build.compiler(), *words, "-o", target)
    assert done.returncode == 0, done.stderr
    return target


def sanitizer_flags(folder: Path, sanitizer: str) -> list[str]:
    """Skips the test where the compiler has no library for it."""
    (folder / "empty.c").write_text("int main(void) { return 0; }")
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = [*build.compiler(), *flags, folder / "empty.c", "-o", folder / "empty"]
    if run(*command).returncode or run(folder / "empty").returncode:
        pytest.skip(f"this compiler has no -fsanitize={sanitizer} (Debian: apt install libgcc-12-dev)")
    return flags


def sanitized(folder: Path, sanitizer: str, *words: Any) -> Path:
    """Compiles with a sanitizer."""
    return compile_(folder / "program", *sanitizer_flags(folder, sanitizer), *words, "-pthread", "-lm")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "lstm.safetensors"
    save_file(nn.LSTM(4, 6, 2).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def built() -> build.Built:
    return shared_build("aot")


def succeeded(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.fullmatch(rf"engine aot\n{said}\n", done.stdout), done.stdout


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed (Debian: apt install valgrind)")
def test_valgrind_finds_no_leak_and_no_invalid_access(built, model, tmp_path):
    program = compile_(tmp_path / "exercise", *FLAGS, TESTS / "capi_hosts/exercise.c", *built.flags(), "-pthread")
    check = ["valgrind", "-q", "--leak-check=full", "--errors-for-leak-kinds=all", "--show-leak-kinds=all"]
    done = run(*check, "--error-exitcode=9", program, "everything", model)
    succeeded(done, r"everything: \d+ cases")
    # It does find one: the same host without its last destroy.
    source = (TESTS / "capi_hosts/exercise.c").read_text()
    last = "        last = stream(lstm, a);\n"
    leaking = source.replace(last + "    tritlstm_destroy(lstm);\n", last)
    assert leaking != source
    (tmp_path / "leaking.c").write_text(leaking.replace("bits < 128; bits++", "bits < 4; bits++"))
    program = compile_(tmp_path / "leaking", *FLAGS, tmp_path / "leaking.c", *built.flags(), "-pthread")
    done = run(*check, "--error-exitcode=9", program, "everything", model)
    assert done.returncode == 9
    assert "definitely lost" in done.stderr


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers_find_nothing(model, tmp_path):
    program = sanitized(tmp_path, "address,undefined", *FLAGS, TESTS / "capi_hosts/exercise.c", *SOURCES)
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1:detect_stack_use_after_return=1"}
    done = run(program, "everything", model, env=environment)
    # The allocator tells of the request that is far too large, which is meant to fail.
    told = r"^==\d+==WARNING: AddressSanitizer failed to allocate 0x\w+ bytes\n"
    done.stderr = re.sub(told, "", done.stderr, flags=re.M)
    succeeded(done, r"everything: \d+ cases")


def test_the_thread_sanitizer_finds_no_race(model, tmp_path):
    words = [*FLAGS, "-DTRITLSTM_HOST_LEVEL=0", TESTS / "capi_hosts/exercise.c", *SOURCES]  # quick to compile
    program = sanitized(tmp_path, "thread", *words)
    succeeded(run(*UNRANDOMISED, program, "threads", model), "threads: all agree")


CUDA = [build.SOURCE / "src" / f"cuda_{name}.c" for name in ("driver", "engine", "inflate", "plan")]


def cuda_threads(folder: Path, *changed: Path) -> subprocess.CompletedProcess[str]:
    """Runs the host of many threads on the stand-in driver, with ``changed`` files in the place of those so named."""
    standin = make_standin(folder / "standin.so", *sanitizer_flags(folder, "thread"), "-g")
    names = {path.name for path in changed} | {"cuda_absent.c"}
    sources = [path for path in (*SOURCES, *CUDA) if path.name not in names]
    words = [*FLAGS, "-DTRITLSTM_HOST_LEVEL=0", f'-DTRITLSTM_LIBCUDA="{standin}"']
    words += [TESTS / "capi_hosts/cuda_threads.c", *sources, *changed, *aot.sources(folder, "sm_90,fp16,H32,step", 1)]
    program = sanitized(folder, "thread", *words, standin, "-ldl")
    return run(*UNRANDOMISED, program)


def test_the_thread_sanitizer_finds_no_race_on_cuda_devices(tmp_path):
    done = cuda_threads(tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout == "8 threads on 2 devices: nothing is left\n"


def test_the_thread_sanitizer_notices_kernels_loaded_without_the_lock(tmp_path):
    source = (build.SOURCE / "src/cuda_driver.c").read_text()
    begin = source.index("int cuda_load(")
    loading = source[begin : source.index("\n}\n", begin)]
    unlocked = re.sub(r"\n    pthread_mutex_\w+\(&mutex\);", "", loading)
    assert loading.count("&mutex") == 2
    (tmp_path / "cuda_driver.c").write_text(source.replace(loading, unlocked))
    done = cuda_threads(tmp_path, tmp_path / "cuda_driver.c")
    assert done.returncode != 0
    assert "data race" in done.stderr


@pytest.fixture(scope="module")
def counting(built, tmp_path_factory) -> Path:
    """The host with a malloc of its own in front of the C library's, on the library as it is shipped."""
    target = tmp_path_factory.mktemp("counting") / "exercise"
    flags = [*FLAGS, "-fno-builtin", "-DCOUNT_ALLOCATIONS", TESTS / "capi_hosts/exercise.c", *built.flags()]
    done = run(*build.compiler(), *flags, "-pthread", "-lm", "-o", target)
    if "__libc_malloc" in done.stderr:
        pytest.skip("this C library has no __libc_malloc: only glibc's can be stood in front of")
    assert done.returncode == 0, done.stderr
    return target


def test_calls_after_create_allocate_nothing(counting, model):
    succeeded(run(counting, "no-allocation", model), r"no-allocation: \d+ cases")


def test_each_allocation_that_fails_is_a_status_and_leaves_nothing_behind(counting, model):
    done = run(counting, "out-of-memory", model)
    succeeded(done, r"out-of-memory: \d+ failures, each a status, nothing left behind")
    (failures,) = re.findall(r"(\d+) failures", done.stdout)
    # a network is four allocations, a state two, a file of eight tensors some fifty
    assert int(failures) > 60


@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzzers_corpus_runs_clean(target, tmp_path):
    corpus = sorted((TESTS / "fuzz/corpus" / target).iterdir())
    assert len(corpus) >= 10
    sources = [TESTS / "fuzz" / f"{target}.c", TESTS / "fuzz/replay.c"]
    sources += [build.SOURCE / "src" / name for name in TARGETS[target]]
    program = sanitized(tmp_path, "address,undefined", *FLAGS, *sources)
    done = run(program, *corpus)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{len(corpus)} files\n", "")


SPOILT = {
    "safetensors_reader": ("safetensors.c", "if (order[k]->begin != at)", "if (order[k]->begin > st->data_bytes)"),
    "argument_checks": ("front.c", "if (hit) return fail(", "if (hit && !now->end) return fail("),
    "load_file": ("front.c", "(same_dtype && dtypes[k] != lstm->options.dtype)", "(same_dtype && !dtypes[k])"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_notices_a_missing_check(target, tmp_path):
    """Without the look for what overlaps, in a file or in a call, or for weights of two types in one file."""
    name, check, nothing = SPOILT[target]
    source = (build.SOURCE / "src" / name).read_text()
    assert source.count(check) == 1
    (tmp_path / name).write_text(source.replace(check, nothing))
    others = [build.SOURCE / "src" / other for other in TARGETS[target] if other != name]
    words = [TESTS / "fuzz" / f"{target}.c", TESTS / "fuzz/replay.c", tmp_path / name, *others]
    program = compile_(tmp_path / "program", *FLAGS, *words)
    done = run(program, *sorted((TESTS / "fuzz/corpus" / target).iterdir()))
    assert done.returncode < 0, done.stdout  # aborted
