"""The CUDA side of ``libtritlstm``: compiles the Triton kernels ahead of time and writes what the C sources embed.

:func:`sources` makes three files: ``cuda_images.bin``, all kernels as machine code (cubin) or PTX, each compressed by
deflate; ``cuda_images.S``, which embeds it; and ``cuda_table.c``, which says of every kernel what it computes, how it
is launched, where its arguments lie, and what the planner's cost model predicts of it. ``cuda_kernels.h`` declares
these tables. Nothing here needs a GPU.

The kernels know H at compile time. They are built for the sizes :data:`HIDDEN`, and an LSTM of another H runs at the
next larger one, its weights and states padded with zeros: a unit whose weights and bias are zero has i = f = o = 1/2
and g = 0, so its c and h stay 0 when they begin at 0, and no gradient reaches it or passes through it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import re
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritlstm import inspect_kernels, plan
from tritlstm.kernels import exchange
from tritlstm.kernels.launch import Launch, kernel_function
from tritlstm.plan import DEVICES, Device, RecurrentPlan

from . import ptxas
from .build import BuildError

__all__ = ["DEFAULT", "FAMILIES", "HIDDEN", "ImageError", "Kernel", "Selection", "kernels", "parse", "sources"]

#: Hidden sizes that kernels are built for.
HIDDEN = (32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Kinds of machine code, and the architecture each is compiled for. PTX of sm_80 is for devices later than these: the
#: driver compiles it. (PTX that Triton makes for sm_90 and later is of that architecture alone.)
FAMILIES = {**{arch: arch for arch in DEVICES if arch.startswith("sm_")}, "ptx": "sm_80"}
#: Architectures for which Triton writes the same PTX, up to the target's name, as for another: a kernel that both have
#: is translated once and then assembled for each, which takes a fifth of the time.
SAME_PTX = {"sm_86": "sm_80", "sm_89": "sm_80"}
#: The batch sizes whose plans are built: one of the smallest tiles, one that fills the device.
BATCHES = (16, 128)
#: Two pointers that Triton appends to every kernel's parameters; zero here, since no kernel uses them.
SCRATCH_POINTERS = 2
#: PTX that drivers since CUDA 11.0 accept.
PTX_VERSION = 80
#: A kernel's row of the product's orders: the plain one, or one operand given by columns.
ORDERS = (("nt", False, True), ("nn", False, False), ("tn", True, False))
#: Kernels whose pointers may be a caller's, aligned to an element only.
ANY_ALIGNMENT = {"rearrange", "clamp_lengths"}


class ImageError(BuildError):
    """A kernel can't be built as it must be, or a selection names nothing that there is."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """What to build: ``families`` of :data:`FAMILIES`, ``dtypes`` of :data:`DTYPES`, sizes, and tiers if not the
    planner's own choice."""

    families: tuple[str, ...] = tuple(FAMILIES)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    hidden: tuple[int, ...] = HIDDEN
    tiers: tuple[str, ...] = ()


DEFAULT = Selection()


def parse(text: str) -> Selection:
    """A selection from words with commas between them: ``default``, or any of ``sm_90``, ``ptx``, ``fp16``, ``H1024``,
    ``persistent``. What no word speaks of stays as in ``default``.

    Raises:
        ImageError: a word is none of these.
    """
    found: dict[str, list[Any]] = {"families": [], "dtypes": [], "hidden": [], "tiers": []}
    for word in text.split(","):
        if word in FAMILIES:
            found["families"].append(word)
        elif word in DTYPES:
            found["dtypes"].append(word)
        elif word in plan.TIERS:
            found["tiers"].append(word)
        elif re.fullmatch(r"H[1-9]\d*", word) and int(word[1:]) % 8 == 0:
            found["hidden"].append(int(word[1:]))
        elif word != "default":
            raise ImageError(
                f"images: {word!r} is not known: use default or, with commas, {', '.join(FAMILIES)}; "
                f"{', '.join(DTYPES)}; H with a multiple of 8, such as H1024; {', '.join(plan.TIERS)}"
            )
    return dataclasses.replace(DEFAULT, **{key: tuple(sorted(set(v))) for key, v in found.items() if v})


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a family. ``variant`` tells apart what the launch's name and ``dtype`` do not."""

    family: str
    dtype: torch.dtype
    launch: Launch
    plan: RecurrentPlan | None = None
    variant: int = 0
    #: Row and column extents of a program's tile; of a recurrent kernel BLOCK_H and the sequences it has room for.
    tile: tuple[int, int] = (0, 0)

    @property
    def arch(self) -> str:
        return FAMILIES[self.family]

    @property
    def key(self) -> tuple:
        """What decides the machine code of an architecture."""
        types, constants, attributes = signature(self.launch)
        return (self.launch.kernel, tuple(types.items()), tuple(sorted(constants.items())), str(attributes),
                tuple(sorted(self.launch.options.items())))  # fmt: skip


def _meta(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(1, dtype=dtype, device="meta")


def _recurrent_launch(chosen: RecurrentPlan) -> Launch:
    """Lengths and all upstream gradients are always given, and every cell state outside a kernel is fp32."""
    launch = inspect_kernels.recurrent_launch(chosen, lengths=True)
    single = _meta(torch.float32)
    arguments = dict(launch.arguments)
    arguments.update({name: single for name in ("c0_ptr", "c_n_ptr", "grad_c_n_ptr") if name in arguments})
    return dataclasses.replace(launch, arguments=arguments)


def _plain_launch(
    kernel: str, types: dict[str, torch.dtype], constants: dict[str, Any], num_warps: int = 4, num_stages: int = 1
) -> Launch:
    names = kernel_function(kernel).arg_names
    arguments = {n: _meta(types[n]) if n in types else 3 for n in names if n not in constants}
    return Launch(kernel, (1,), arguments, constants, num_warps, num_stages)


def recurrent_plans(dtype: torch.dtype, hidden: int, device: Device, tiers: tuple[str, ...]) -> list[RecurrentPlan]:
    """What is built for a hidden size: the planner's choices at :data:`BATCHES`, and the step tier; or the best of each
    of ``tiers``."""
    found: dict[tuple, RecurrentPlan] = {}
    for direction, save in (("forward", False), ("forward", True), ("backward", True)):
        asked: list[tuple[int, int, dict[str, Any]]] = [*((2, batch, {}) for batch in BATCHES), (1, BATCHES[0], {})]
        if tiers:
            asked = [(1 if t == "step" else 2, batch, {"tier": t}) for t in tiers for batch in BATCHES]
        for length, batch, overrides in asked:
            # The launcher in C makes no clusters, and its kernel for one step runs longer sequences as well.
            overrides = {**overrides, "clustered": False, "alone": False}
            try:
                best = plan.recurrent(direction, length, batch, hidden, dtype, device, "ieee", save, overrides)
            except plan.PlanError:
                continue
            key = (direction, save, best.num_warps, tuple(best.constants.items()))
            found.setdefault(key, best)
    return list(found.values())


def _product_tiles(dtype: torch.dtype, device: Device) -> list[tuple[int, int, int, int, int]]:
    """Rows, columns and depth of a tile, warps and stages: small tiles first."""
    if dtype == torch.float32:
        return [(64, 64, 32, 8, 2)]
    roomy = device.shared_bytes >= 128 << 10
    return [(64, 64, 64 if roomy else 32, 4, 3), (128, 128, 64 if roomy else 32, 8, 3)]


def kernels(selection: Selection) -> list[Kernel]:
    """Every kernel of a selection, in the order of the table."""
    return [kernel for family in selection.families for kernel in _family(family, selection)]


def _family(family: str, selection: Selection) -> Iterator[Kernel]:
    device = DEVICES[FAMILIES[family]]
    single, word = torch.float32, torch.int32
    yield Kernel(family, word, _plain_launch(
        "clamp_lengths", {"lengths_ptr": word, "target_ptr": word}, {"ROWS": 128}
    ), tile=(128, 1))  # fmt: skip
    rows, columns = 8, 128
    blocks = {"ROWS": rows, "COLUMNS": columns}
    for name in selection.dtypes:
        dtype = DTYPES[name]
        for hidden in selection.hidden:
            for chosen in recurrent_plans(dtype, hidden, device, selection.tiers):
                tile = (chosen.block_h, chosen.places)
                yield Kernel(family, dtype, _recurrent_launch(chosen), chosen, int(chosen.save), tile)
        for (order, (_, trans_a, trans_b)), (size, (m, n, k, warps, stages)) in itertools.product(
            enumerate(ORDERS), enumerate(_product_tiles(dtype, device))
        ):
            constants = {"TRANS_A": trans_a, "TRANS_B": trans_b, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k,
                         "GROUP_M": 8, "PRECISION": "ieee"}  # fmt: skip
            types = {"a_ptr": dtype, "b_ptr": dtype, "bias_ptr": single, "c_ptr": dtype}
            launch = _plain_launch("product", types, constants, num_warps=warps, num_stages=stages)
            yield Kernel(family, dtype, launch, None, order + len(ORDERS) * size, (m, n))
        sums = _plain_launch("column_sums", {"a_ptr": dtype, "out_ptr": single}, {"BLOCK_K": 128, "BLOCK_N": 32})
        yield Kernel(family, dtype, sums, tile=(1, 32))
        pairs = [(dtype, dtype), (dtype, single), (single, dtype)]
        for variant, (source, target) in enumerate(pairs if dtype != single else pairs[:1]):
            launch = _plain_launch("rearrange", {"source_ptr": source, "target_ptr": target}, blocks)
            yield Kernel(family, dtype, launch, None, variant, (rows, columns))
        given = {"source_ptr": dtype, "lengths_ptr": word, "target_ptr": dtype, "h_ptr": dtype, "h0_ptr": dtype}
        for kernel in ("take_first", "add_first", "previous_states", "keep_empty", "zero_ends"):
            yield Kernel(family, dtype, _plain_launch(kernel, given, blocks), tile=(rows, columns))


# -- compiling --------------------------------------------------------------------------------------------------


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list]]:
    """As :func:`tritlstm.inspect_kernels.signature`, with what the C side promises of pointers and integers: the
    kernels' own arrays begin at multiples of 16 bytes, and their rows have a multiple of 8 elements."""
    types, constants, attributes = inspect_kernels.signature(launch)
    if launch.kernel in ANY_ALIGNMENT:
        return types, constants, {}
    eights: set[str] = set()
    if launch.kernel == "product":
        eights = {"N", "a_stride", "b_stride", "c_stride", "M" if constants["TRANS_A"] else "K"}
    elif launch.kernel not in plan.KERNELS.values():
        eights = {"W", "N"}
    for position, name in enumerate(types):
        if name in eights and types[name] == "i32":
            attributes[(position,)] = [["tt.divisibility", 8]]
    return types, constants, attributes


@dataclasses.dataclass(frozen=True)
class Image:
    """A compiled kernel."""

    code: bytes
    ptx: bytes
    shared_bytes: int


def compile_kernel(kernel: Kernel) -> Image:
    """Compiles one kernel and checks that it can be launched as the table says.

    Raises:
        ImageError: its parameters, its shared memory or its scratch are not what the C side takes them for.
    """
    import triton
    from triton.compiler import ASTSource

    launch, arch = kernel.launch, kernel.arch
    types, constants, attributes = signature(launch)
    source = ASTSource(kernel_function(launch.kernel), types, constexprs=constants, attrs=attributes)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = NO_LINES
        compiled = triton.compile(source, target=_target(arch), options=_options(kernel))
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    check_parameters(launch, ptx)
    _check_shared(kernel, metadata.shared)
    scratch = getattr(metadata, "global_scratch_size", 0), getattr(metadata, "profile_scratch_size", 0)
    if any(scratch) or metadata.num_warps != launch.num_warps or metadata.name != launch.kernel:
        raise ImageError(
            f"{launch.kernel} for {arch} became {metadata.name} with {metadata.num_warps} warps and {scratch} bytes of "
            "scratch, which the C side does not give"
        )
    return Image(compiled.asm["cubin"], ptx.encode(), metadata.shared)


#: Without line information code is four times smaller and has no path of this machine inside.
NO_LINES = True


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _options(kernel: Kernel) -> dict[str, Any]:
    options: dict[str, Any] = {**kernel.launch.options, "enable_fp_fusion": True}
    if SAME_PTX.get(kernel.arch, kernel.arch) == FAMILIES["ptx"]:
        options["ptx_version"] = PTX_VERSION
    return options


def _check_shared(kernel: Kernel, found: int) -> None:
    limit = DEVICES[kernel.arch].shared_bytes
    if found > limit:
        raise ImageError(
            f"{kernel.launch.kernel} for {kernel.arch} needs {found} bytes of shared memory, but a block has {limit}: "
            f"{kernel.plan.describe() if kernel.plan else kernel.launch.constants}"
        )


def assemble(image: Image, kernel: Kernel) -> Image:
    """``image``, whose architecture is one of :data:`SAME_PTX` with that of ``kernel``, for the latter.

    Raises:
        ImageError: its shared memory is more than the architecture has.
    """
    import triton
    from triton.compiler import make_backend

    _check_shared(kernel, image.shared_bytes)
    target = _target(kernel.arch)
    backend = make_backend(target)
    ptx = re.sub(r"\.target sm_\d+", f".target {kernel.arch}", image.ptx.decode())
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = NO_LINES
        code = backend.make_cubin(ptx, {}, backend.parse_options(_options(kernel)), target.arch)
    return Image(code, ptx.encode(), image.shared_bytes)


def check_parameters(launch: Launch, ptx: str) -> None:
    """Compares the parameters of a kernel's PTX with those that :func:`parameters` says.

    Raises:
        ImageError: they differ.
    """
    found = re.search(rf"\.entry\s+{launch.kernel}\s*\((.*?)\)", ptx, re.S)
    kinds = re.findall(r"\.param\s+\.(\w+)", found.group(1)) if found else []
    expected = ["u64" if size == 8 else "u32" for _, _, size in parameters(launch)] + ["u64"] * SCRATCH_POINTERS
    if [kind.replace("b", "u") for kind in kinds] != expected:
        raise ImageError(f"{launch.kernel}: its PTX takes {kinds}, but {expected} would be given")


def parameters(launch: Launch) -> list[tuple[str, int, int]]:
    """Name, offset and size of every argument in the kernel's parameter block."""
    types = signature(launch)[0]
    offsets = inspect_kernels.parameter_offsets(launch)
    return [(name, offset, 8 if types[name].startswith("*") else 4) for name, offset in offsets.items()]


@functools.lru_cache(maxsize=4)
def _listed(selection: Selection) -> list[Kernel]:
    return kernels(selection)


def _compile_listed(selection: Selection, indices: tuple[int, ...]) -> list[Image]:
    """Kernels of one PTX."""
    first, *others = (_listed(selection)[index] for index in indices)
    image = compile_kernel(first)
    return [image, *(assemble(image, kernel) for kernel in others)]


def compile_all(
    selection: Selection, jobs: int | None = None, progress: Callable[[int, int], None] | None = None
) -> list[tuple[Kernel, Image]]:
    """Compiles a selection in ``jobs`` processes (default: one a processor). PTX is compiled with sm_80, once."""
    listed = _listed(selection)
    groups: dict[tuple, dict[str, int]] = {}  # by what decides the PTX: of each architecture the first kernel
    places = []
    for index, kernel in enumerate(listed):
        group = groups.setdefault((SAME_PTX.get(kernel.arch, kernel.arch), *kernel.key), {})
        places.append(group.setdefault(kernel.arch, index))
    wanted = [tuple(group.values()) for group in groups.values()]
    total = len(set(places))
    # A process takes as long to start as a handful of kernels to compile.
    jobs = min(jobs or len(os.sched_getaffinity(0)), 1 + total // 64)
    images: dict[int, Image] = {}

    def keep(indices: tuple[int, ...], found: list[Image]) -> None:
        images.update(zip(indices, found, strict=True))
        if progress is not None:
            progress(len(images), total)

    if jobs <= 1:
        for indices in wanted:
            keep(indices, _compile_listed(selection, indices))
    else:
        context = multiprocessing.get_context("spawn")
        # Ctrl-C is the parent's: a ptxas that it ends would be reported as a failure of the kernel.
        ignore = (signal.SIGINT, signal.SIG_IGN)
        with concurrent.futures.ProcessPoolExecutor(jobs, context, signal.signal, ignore) as pool:
            running = {pool.submit(_compile_listed, selection, indices): indices for indices in wanted}
            try:
                for done in concurrent.futures.as_completed(running):
                    keep(running[done], done.result())
            finally:
                pool.shutdown(cancel_futures=True)
    return [(kernel, images[place]) for kernel, place in zip(listed, places, strict=True)]


# -- the cost model, as coefficients -------------------------------------------------------------------------------


def costs(chosen: RecurrentPlan, device: Device) -> tuple[float, ...]:
    """Coefficients of the planner's prediction for a kernel, so that C computes it at any batch and device size.

    With ``rows`` sequences in a tile, ``groups`` groups, ``waves`` of blocks, and ``q`` µs a byte that a block reads
    from L2, a step of a tile takes ``a0 + a1 rows groups + waves (b0 + b1 rows + q (d0 + d1 rows))`` µs. Returns a0 of
    one step alone, then a0, a1, b0, b1, d0, d1.

    Raises:
        ImageError: the planner's cost model is not of this form any more.
    """
    samples, results = [], []
    for rows, groups, l2, part in itertools.product((1, 3, chosen.places), (1, 2, 5), (1e12, 3e4, 1e3), (1, 2, 3)):
        blocks = chosen.n_blocks * groups
        sms = max(1, -(-blocks // part))
        samples.append(terms(rows, groups, blocks, sms, l2, device.constants.sm_l2_bytes_per_us))
        results.append(_predicted(chosen, device, rows, groups, sms, l2, False))
    matrix, wanted = np.array(samples), np.array(results)
    scale = np.abs(matrix).max(0)
    solved = np.linalg.lstsq(matrix / scale, wanted, rcond=None)[0] / scale
    if np.abs(matrix @ solved - wanted).max() > 1e-9 * np.abs(wanted).max():
        raise ImageError(
            "plan.StepCost has a term that capi/aot.py does not know: extend costs(), terms() and predicted() in "
            f"capi/src/cuda_plan.c ({chosen.describe()})"
        )
    alone = _predicted(chosen, device, 1, 1, 10**6, 1e12, True) - _predicted(chosen, device, 1, 1, 10**6, 1e12, False)
    return (float(solved[0] + alone), *map(float, solved))


def terms(
    rows: int, groups: int, blocks: int, sms: int, l2_bytes_per_us: float, sm_l2_bytes_per_us: float
) -> list[float]:
    waves = -(-blocks // sms)
    q = max(1 / sm_l2_bytes_per_us, min(blocks, sms) / l2_bytes_per_us)
    return [1.0, rows * groups, waves, waves * rows, waves * q, waves * q * rows]


def _predicted(
    chosen: RecurrentPlan, device: Device, rows: int, groups: int, sms: int, l2: float, one_step: bool
) -> float:
    device = dataclasses.replace(device, sms=sms, l2_bytes_per_us=l2)
    problem = plan._Problem(chosen.direction, rows, chosen.hidden, chosen.dtype, chosen.precision, device, chosen.save,
                            one_step)  # fmt: skip
    return plan._cost(problem, dataclasses.replace(chosen, n_groups=groups, tile_rows=chosen.places)).total


def rebatched(chosen: RecurrentPlan, device: Device, batch: int, one_step: bool) -> RecurrentPlan | None:
    """A built plan at another batch size, on a device of other limits; None if it does not fit there."""
    if chosen.places > 16 and chosen.places >= 2 * plan._power_of_two(batch, 16):
        return None
    if chosen.shared_bytes > device.shared_bytes or (chosen.tier != "step" and chosen.n_blocks > device.sms):
        return None
    rows = chosen.places
    if chosen.tier in ("persistent", "streaming"):
        rows = plan.tile_rows(batch, chosen.places, device.sms // chosen.n_blocks)
    n_tiles = -(-batch // rows)
    n_groups = n_tiles if chosen.tier == "step" else min(n_tiles, device.sms // chosen.n_blocks)
    there = dataclasses.replace(chosen, n_tiles=n_tiles, n_groups=n_groups, tile_rows=rows)
    problem = plan._Problem(chosen.direction, batch, chosen.hidden, chosen.dtype, chosen.precision, device, chosen.save,
                            one_step)  # fmt: skip
    return dataclasses.replace(there, cost=plan._cost(problem, there))


def choose(built: list[RecurrentPlan], device: Device, batch: int, one_step: bool) -> RecurrentPlan | None:
    """The planner's choice among built plans of one direction, mode, dtype and hidden size; None if none fits.

    A single step runs in the step tier where that was built, as in :func:`tritlstm.plan.recurrent`.
    """
    fitting = [there for p in built if (there := rebatched(p, device, batch, one_step)) is not None]
    steps = [p for p in fitting if p.tier == "step"]
    key = lambda p: (p.us_per_step, p.num_warps, p.places, p.block_h)  # noqa: E731
    return min(steps if one_step and steps else fitting, key=key, default=None)


# -- files ------------------------------------------------------------------------------------------------------


def deflate(data: bytes) -> bytes:
    """Raw deflate (RFC 1951), which ``cuda_inflate.c`` reads."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return packer.compress(data) + packer.flush()


def sources(
    folder: str | Path,
    images: str | Selection = DEFAULT,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cc: str | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> list[Path]:
    """Builds ``images`` into ``folder``; returns the files to compile together with ``src/cuda_*.c``.

    ``progress`` is called with the number of kernels compiled and of all; by default a terminal is told. ``cc`` is the
    C compiler, and ``note`` is called with words where another build's bytes may differ: see :func:`ptxas.steady`.

    Raises:
        ImageError: see :func:`parse` and :func:`compile_kernel`.
    """
    selection = parse(images) if isinstance(images, str) else images
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if progress is None and sys.stderr.isatty():
        progress = _tell
    with ptxas.steady(cc) as reason:
        if reason is not None:
            note(f"another build of these images may differ from this one, byte for byte: {reason}")
        built = compile_all(selection, jobs, progress)
    write(folder, selection, built)
    return [folder / "cuda_images.S", folder / "cuda_table.c"]


def _tell(done: int, of: int) -> None:
    print(f"\rkernels compiled: {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


def write(folder: Path, selection: Selection, built: list[tuple[Kernel, Image]]) -> None:
    """The three generated files."""
    stored: dict[str, tuple[int, int, int]] = {}
    blob = bytearray()
    rows: list[str] = []
    parameter_rows: list[str] = []
    numbers: dict[str, int] = {}
    for kernel, image in built:
        code = image.ptx + b"\0" if kernel.family == "ptx" else image.code
        digest = hashlib.sha256(code).hexdigest()
        if digest not in stored:
            packed = deflate(code)
            numbers[digest] = len(stored)
            stored[digest] = (len(blob), len(packed), len(code))
            blob += packed
        given = parameters(kernel.launch)
        rows.append(_row(kernel, image, numbers[digest], len(parameter_rows), given))
        parameter_rows += [f"{{PARAMETER_{name}, {size}, {offset}}}" for name, offset, size in given]
    (folder / "cuda_images.bin").write_bytes(bytes(blob))
    (folder / "cuda_images.S").write_text(
        "/* Generated by tritlstm.capi.aot. */\n"
        "    .section .rodata\n    .balign 16\n    .globl tritlstm_image_bytes\n"
        "    .hidden tritlstm_image_bytes\n    .type tritlstm_image_bytes, %object\n"
        f'tritlstm_image_bytes:\n    .incbin "{folder / "cuda_images.bin"}"\n'
        "    .size tritlstm_image_bytes, . - tritlstm_image_bytes\n"
        '    .section .note.GNU-stack, "", %progbits\n'
    )
    families, first = [], 0
    for family in selection.families:
        count = sum(kernel.family == family for kernel, _ in built)
        device = DEVICES[FAMILIES[family]]
        number = int(device.arch.removeprefix("sm_"))
        families.append(f'{{"{family}", {number // 10}, {number % 10}, {int(family == "ptx")}, '
                        f"{device.l2_bytes_per_us!r}, {device.constants.sm_l2_bytes_per_us!r}, {first}, {count}}}")
        first += count
    text = [
        "/* Generated by tritlstm.capi.aot. */",
        '#include "cuda_kernels.h"',
        f"const int32_t tritlstm_spin_limit = {plan.SPIN_LIMIT};",
        f"const int tritlstm_tagged_slots = {exchange.TAGGED_SLOTS.value};",
        _array("tritlstm_cuda_family tritlstm_families", families),
        f"const int tritlstm_families_count = {len(families)};",
        _array("tritlstm_cuda_image tritlstm_images", [f"{{{a}, {b}, {c}}}" for a, b, c in stored.values()]),
        f"const int tritlstm_images_count = {len(stored)};",
        _array("tritlstm_cuda_parameter tritlstm_parameters", parameter_rows),
        _array("tritlstm_cuda_kernel tritlstm_kernels", rows),
        f"const int tritlstm_kernels_count = {len(rows)};",
    ]
    (folder / "cuda_table.c").write_text("\n".join(text) + "\n")


def _array(name: str, items: list[str]) -> str:
    return f"const {name}[] = {{\n" + "".join(f"    {item},\n" for item in items) + "};"


def _row(kernel: Kernel, image: Image, number: int, first: int, given: list[tuple[str, int, int]]) -> str:
    chosen, launch = kernel.plan, kernel.launch
    end = max(offset + size for _, offset, size in given)
    total = -(-end // 8) * 8 + 8 * SCRATCH_POINTERS
    dtype = {torch.float32: "TRITLSTM_FLOAT32", torch.float16: "TRITLSTM_FLOAT16",
             torch.bfloat16: "TRITLSTM_BFLOAT16", torch.int32: "0"}[kernel.dtype]  # fmt: skip
    fields = [
        f"KERNEL_{launch.kernel}", dtype, kernel.variant, *kernel.tile, launch.num_warps, image.shared_bytes,
        number, first, len(given), total,
    ]  # fmt: skip
    if chosen is not None:
        predicted = ", ".join(repr(c) for c in costs(chosen, DEVICES[kernel.arch]))
        fields += [
            chosen.hidden, f"TIER_{chosen.tier}", f"PROTOCOL_{chosen.protocol}", chosen.n_blocks,
            chosen.shared_bytes, chosen.resident, chosen.chunks, chosen.parts, f"{{{predicted}}}",
        ]  # fmt: skip
    else:
        fields += [0, "TIER_single", "PROTOCOL_none", 0, image.shared_bytes, 0, 0, 1, "{0}"]
    return "{" + ", ".join(str(field) for field in fields) + "}"
