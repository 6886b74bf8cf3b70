"""How the device images are made: the same bytes every time, checked parameters, the decoder of what is embedded."""

from __future__ import annotations

import dataclasses
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from cffi import FFI

from tritlstm import plan
from tritlstm.capi import aot, build, ptxas
from tritlstm.plan import DEVICES

SMALL = "sm_90,fp16,H32,step"


@pytest.fixture(scope="module")
def inflate(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("inflate") / "inflate.so"
    source = build.SOURCE / "src" / "cuda_inflate.c"
    flags = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    subprocess.run(["cc", *flags, "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    ffi = FFI()
    ffi.cdef("int tritlstm_inflate(const uint8_t *, size_t, uint8_t *, size_t);")
    lib = ffi.dlopen(str(path))

    def decode(data: bytes, size: int) -> bytes | None:
        out = ffi.new("uint8_t[]", size + 16)
        out[size : size + 16] = b"guard of 16 byte"
        failed = lib.tritlstm_inflate(ffi.from_buffer(data), len(data), out, size)
        assert bytes(out[size : size + 16]) == b"guard of 16 byte"
        return None if failed else bytes(ffi.buffer(out, size))

    return decode


def samples() -> list[bytes]:
    drawn = random.Random(0)
    words = [bytes(drawn.choices(b"abcdefgh", k=drawn.randrange(1, 9))) for _ in range(50)]
    return [b"", b"a", bytes(70000), drawn.randbytes(70000), b" ".join(drawn.choices(words, k=9000)),
            b"".join(drawn.randbytes(300) * 2 for _ in range(200))]  # fmt: skip


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY])
def test_inflate_reads_every_kind_of_block(inflate: Any, level: int, strategy: int) -> None:
    for data in samples():
        packer = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
        packed = packer.compress(data) + packer.flush()
        assert inflate(packed, len(data)) == data
        assert inflate(packed, len(data) + 1) is None
        assert inflate(packed + b"\0", len(data)) is None
        if data:
            assert inflate(packed, len(data) - 1) is None
            assert inflate(packed[:-1], len(data)) is None


def test_inflate_survives_damage(inflate: Any) -> None:
    drawn = random.Random(1)
    data = samples()[4]
    packed = aot.deflate(data)
    accepted = 0
    for _ in range(400):
        damaged = bytearray(packed)
        damaged[drawn.randrange(len(damaged))] ^= 1 << drawn.randrange(8)
        accepted += inflate(bytes(damaged), len(data)) is not None
        inflate(drawn.randbytes(drawn.randrange(200)), 1000)
    assert accepted < 400


# -- the same bytes every time ------------------------------------------------------------------------------


#: By itself ptxas 13.1 makes either of two codes of each of the six products for sm_100, as it happens.
VARYING = "sm_100,fp16,H32,step"


def built_files(prefix: Path, where: Path, images: str, **environment: str) -> dict[str, bytes]:
    """What build-c writes into ``prefix``, run from a folder of its own with nothing cached."""
    for name in ("home", "tmp"):
        (where / name).mkdir(parents=True)
    paths = {"HOME": str(where / "home"), "TMPDIR": str(where / "tmp")}
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_CACHE_DIR", "TRITON_HOME")}
    command = [sys.executable, "-m", "tritlstm", "build-c", prefix, "--engine", "aot", "--images", images]
    done = subprocess.run(
        command, cwd=where, env={**kept, **paths, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "note: " not in done.stdout
    assert not list((where / "tmp").iterdir())
    return {str(path.relative_to(prefix)): path.read_bytes() for path in sorted(prefix.rglob("*")) if path.is_file()}


@pytest.mark.timeout(600)
def test_the_same_bytes_in_every_build(tmp_path: Path) -> None:
    first = built_files(tmp_path / "first", tmp_path / "here", VARYING)
    where = tmp_path / "a much longer path" / "of another folder"
    second = built_files(tmp_path / "the" / "second one", where, VARYING, LARGE="x" * 30000, LC_ALL="C", CC="gcc -g0")
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []
    library = tmp_path / "first/lib/libtritlstm.so"
    done = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True)
    needed = {name.split(".")[0] for name in re.findall(r"\(NEEDED\)[^\[]*\[([^\]]+)\]", done.stdout)}
    if platform.machine() == "x86_64" and not build.accepts(build.compiler(), build.DESCRIPTORS):
        needed.discard("ld-linux-x86-64")
    assert needed == {"libc"}


def sass_of(ptx: Path, folder: Path, before: tuple[str, ...] = (), **environment: str) -> bytes:
    """What the ptxas that Triton is told of makes of ``ptx`` for sm_100, called as Triton does."""
    folder.mkdir(parents=True)
    source = folder / f"tmp{'y' * (len(environment) // 3)}.ptx"
    source.symlink_to(ptx)
    tool = triton.knobs.nvidia.ptxas_blackwell.path
    words = [*before, tool, "-v", "--gpu-name=sm_100a", source, "-o", f"{source}.o"]
    subprocess.run(words, check=True, cwd=folder, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    assert sorted(folder.iterdir()) == [source, Path(f"{source}.o")]
    return Path(f"{source}.o").read_bytes()


@pytest.mark.timeout(600)
def test_ptxas_makes_one_code_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = next(k for k in aot.kernels(aot.parse(VARYING)) if k.launch.kernel == "product")
    (tmp_path / "product.ptx").write_bytes(aot.compile_kernel(product).ptx)
    found = []
    for length in (1, 60):
        moved = tmp_path / ("m" * length) / "ptxas-blackwell"
        moved.parent.mkdir()
        shutil.copy(triton.knobs.nvidia.ptxas_blackwell.path, moved)
        with monkeypatch.context() as patch:
            patch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(moved))
            with ptxas.steady() as reason:
                assert reason is None
                for number in range(4):
                    extra = {f"X{k}": "y" * 211 for k in range(number * length)}
                    found.append(sass_of(tmp_path / "product.ptx", tmp_path / f"run-{length}-{number}", **extra))
                limited = ("sh", "-c", 'ulimit -s 1024; exec "$0" "$@"')
                found.append(sass_of(tmp_path / "product.ptx", tmp_path / f"run-{length}-limited", limited))
    assert len(set(found)) == 1


def test_steady_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache")
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    before, own = dict(os.environ), triton.knobs.nvidia.ptxas
    with ptxas.steady() as reason:
        assert reason is None
        steadied = triton.knobs.nvidia.ptxas
        assert steadied.path != own.path
        assert steadied.version == own.version
        assert Path(triton.knobs.cache.dir).parent == Path("/cache")
    assert os.environ == before
    assert not Path(steadied.path).exists()


def test_a_compiler_for_another_machine_is_not_taken_for_ptxas() -> None:
    with ptxas.steady("false") as reason:
        assert reason is None


def test_a_build_that_can_not_be_steady_goes_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "compile_all", lambda *_: [])
    before = dict(os.environ)
    for text, words in (
        ("#error no", r"cc can't compile heap\.c: "),
        ("int x;", r"/ptxas does not run with heap\.c by cc: it was not loaded"),
    ):
        (tmp_path / "heap.c").write_text(text)
        monkeypatch.setattr(ptxas, "HEAP", tmp_path / "heap.c")
        notes: list[str] = []
        aot.sources(tmp_path / "out", SMALL, note=notes.append)
        (note,) = notes
        assert re.match(rf"another build of these images may differ from this one, byte for byte: \S*{words}", note)
        with pytest.warns(UserWarning, match="another build of these images may differ"):
            aot.sources(tmp_path / "out", SMALL)
    assert os.environ == before


def test_ptxas_memory_lies_at_the_same_addresses_in_every_run(tmp_path: Path) -> None:
    user = Path(__file__).parent / "capi_hosts/ptxas_heap_user.c"
    strict = ["-std=c11", "-O1", "-fno-builtin", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *strict, "-o", tmp_path / "user", user], check=True)
    subprocess.run(["cc", *strict, "-shared", "-fPIC", "-o", tmp_path / "heap.so", ptxas.HEAP], check=True)
    said = []
    for extra in ({}, {"X": "y" * 5000}):
        environment = {"LD_PRELOAD": str(tmp_path / "heap.so"), **extra}
        done = subprocess.run([tmp_path / "user"], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        said.append(done.stdout)
    assert re.fullmatch(r"[0-9a-f]{16}\n", said[0])
    assert said[0] == said[1]


def test_images_are_small_and_know_no_path() -> None:
    images = aot.compile_all(aot.parse(SMALL), 1)
    assert all(str(build.SOURCE.parent).encode() not in image.code for _, image in images)
    assert max(len(image.code) for _, image in images) < 48 << 10


# -- what is refused ----------------------------------------------------------------------------------------


def launch_of(**changes: Any) -> aot.Kernel:
    (kernel,) = (k for k in aot.kernels(aot.parse(SMALL)) if k.launch.kernel == "clamp_lengths")
    return dataclasses.replace(kernel, **changes)


def test_parameters_that_the_ptx_does_not_have() -> None:
    kernel = launch_of()
    image = aot.compile_kernel(kernel)
    ptx = image.ptx.decode()
    aot.check_parameters(kernel.launch, ptx)
    assert [name for name, _, _ in aot.parameters(kernel.launch)] == ["lengths_ptr", "target_ptr", "T", "B"]
    assert [offset for _, offset, _ in aot.parameters(kernel.launch)] == [0, 8, 16, 20]
    first = ptx.index(".param .u32") if ".param .u32" in ptx else ptx.index(".param .b32")
    for wrong in (ptx.replace("clamp_lengths(", "clamp("), ptx[:first] + ptx[first:].replace("32", "64", 1)):
        with pytest.raises(aot.ImageError, match=r"clamp_lengths: its PTX takes \["):
            aot.check_parameters(kernel.launch, wrong)


def test_kernels_that_the_launcher_could_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = plan.recurrent("forward", 1, 16, 32, torch.float16, DEVICES["sm_90"])
    kernel = aot.Kernel("sm_90", torch.float16, aot._recurrent_launch(chosen), chosen)
    aot.compile_kernel(kernel)
    small = {**DEVICES, "sm_90": dataclasses.replace(DEVICES["sm_90"], shared_bytes=4096)}
    monkeypatch.setattr(aot, "DEVICES", small)
    with pytest.raises(aot.ImageError, match=r"for sm_90 needs \d+ bytes of shared memory, but a block has 4096: step"):
        aot.compile_kernel(kernel)


def test_ptx_for_later_devices_is_of_the_oldest_architecture() -> None:
    kernel = launch_of(family="ptx")
    ptx = aot.compile_kernel(kernel).ptx.decode()
    assert ".target sm_80\n" in ptx
    assert ".version 8.0\n" in ptx


@pytest.mark.timeout(600)
def test_code_assembled_from_the_ptx_of_another_architecture_is_its_own() -> None:
    """Of every kernel and dtype, at a size where all tiers occur."""
    selection = aot.parse("sm_80,sm_86,sm_89,H256,H1024")
    groups: dict[tuple, dict[str, aot.Kernel]] = {}
    for kernel in aot.kernels(selection):
        groups.setdefault(kernel.key, {}).setdefault(kernel.arch, kernel)
    kinds: dict[tuple, dict[str, aot.Kernel]] = {}
    for group in groups.values():
        (first, *others) = group.values()
        if others:
            kinds.setdefault((first.launch.kernel, first.dtype, first.plan and first.plan.tier), group)
    assert {tier for _, _, tier in kinds} >= {"step", "persistent", "streaming", None}
    for group in kinds.values():
        (first, *others) = group.values()
        image = aot.compile_kernel(first)
        for other in others:
            own, found = aot.compile_kernel(other), aot.assemble(image, other)
            assert found == own


def test_an_argument_that_the_engine_does_not_know_fails_to_compile() -> None:
    known = (build.SOURCE / "src" / "cuda_kernels.h").read_text()
    for kernel in aot.kernels(aot.parse("sm_90,sm_80,H32,H256")):
        for name, _, _ in aot.parameters(kernel.launch):
            assert f"X({name})" in known


def test_every_kernel_of_the_default_set_has_a_size_that_callers_can_pad_to() -> None:
    assert aot.HIDDEN[-1] == 2048
    assert all(h % 8 == 0 for h in aot.HIDDEN)
    for family in aot.DEFAULT.families:
        device = DEVICES[aot.FAMILIES[family]]
        for dtype in aot.DTYPES.values():
            for hidden in aot.HIDDEN:
                found = {
                    (p.direction, p.save, p.tier == "step") for p in aot.recurrent_plans(dtype, hidden, device, ())
                }
                assert found >= {("forward", False, True), ("forward", True, True), ("backward", True, True)}
