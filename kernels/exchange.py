"""How the thread blocks of one launch hand each other a step's result: both protocols, behind one interface.

A step's producer calls :func:`publish` for its results and then :func:`announce`; a consumer calls :func:`receive`,
which returns the tiles once they are complete. ``PROTOCOL`` (a constexpr) says how it knows:

``NONE``     they were written before this launch; nothing to wait for.
``COUNTER``  blocks count themselves in with a release; the consumer spins on the count with an acquire.
``FLAG``     the buffer was filled with :data:`POISON` before the launch, a 32-bit word that ``publish`` never
             stores; the consumer re-reads the words until none is left. Each word is its own flag.

Partial sums go from one block to one other, by :func:`publish_tagged` and :func:`receive_tagged`, whatever the
protocol: each is a 64-bit word of the value and the number of its turn, so that a slot can be used again. With
``CLUSTER`` the blocks are one cluster, and the words lie in the shared memory of the block that they are for.

Every spin is bounded by ``spin_limit`` turns. A consumer that runs out reports in ``status``; NaN then takes the
place of what is missing, and nobody waits as long again. Memory-ordering argument: README.md.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(0)
COUNTER = tl.constexpr(1)
FLAG = tl.constexpr(2)
#: All bits set: one NaN, or two, that arithmetic does not produce.
POISON = tl.constexpr(-1)
#: int32 words between two counters, so that no two groups spin on one cache line.
COUNTER_STRIDE = tl.constexpr(32)
#: From a counter's word for even turns to that for odd ones.
ODD_TURNS = tl.constexpr(16)
#: About what a turn of a spin takes, for `tl.atomic_poll`, whose limit is a time.
TURN_NS = tl.constexpr(700)
#: Whether this Triton has it (3.9 and later).
HAS_POLL = tl.constexpr(hasattr(tl, "atomic_poll"))
#: Words of the status record: code, block, group, step.
STATUS_WORDS = tl.constexpr(4)
TIMED_OUT = tl.constexpr(1)
#: Slots that the turns of tagged words take one after another: README.md says why four are enough.
TAGGED_SLOTS = tl.constexpr(4)
#: Steps between `fetch` and the use of what it fetches: a fetch from memory takes less than one.
DISTANCE = tl.constexpr(4)
#: 32-bit words that L2 fetches together.
SECTOR = tl.constexpr(8)
#: Turns of a spin between two looks at whether another thread has given up: a power of two.
PATIENCE = tl.constexpr(64)


@triton.constexpr_function
def store_program(words):
    """PTX of one thread's part of ``publish``: operands are a result of no meaning, pointer, predicate, the words."""
    values = [f"value{n}" for n in range(words)]
    lines = [".reg .pred stored, poison;", f".reg .b32 {', '.join(values)};", "setp.ne.s32 stored, $2, 0;"]
    for n, value in enumerate(values):
        lines += [f"setp.eq.s32 poison, ${3 + n}, -1;", f"selp.b32 {value}, 0x7FFF7FFF, ${3 + n}, poison;"]
    vector = f".v{words}" if words > 1 else ""
    lines += [f"@stored st.relaxed.gpu.global{vector}.b32 [$1], {{{', '.join(values)}}};", "mov.b32 $0, 0;"]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def patience_program(mark, status, step, limit, end):
    """PTX between a look at words and the next one at ``poll``; after too many it reports and goes to ``end``."""
    return [
        "add.u32 turns, turns, 1;",
        f"and.b32 value, turns, {PATIENCE.value - 1};",
        "setp.ne.s32 more, value, 0;",
        "@more bra poll;",
        f"ld.relaxed.gpu.global.b32 value, [{mark}];",
        "setp.ne.s32 more, value, 0;",
        f"@more bra {end};",
        f"setp.lt.u32 more, turns, {limit};",
        "@more bra poll;",
        "mov.b32 value, 1;",
        f"st.relaxed.gpu.global.b32 [{mark}], value;",
        "mov.b32 value, %ctaid.x;",
        f"st.relaxed.sys.global.b32 [{status}+4], value;",
        "mov.b32 value, %ctaid.y;",
        f"st.relaxed.sys.global.b32 [{status}+8], value;",
        f"st.relaxed.sys.global.b32 [{status}+12], {step};",
        f"mov.b32 value, {TIMED_OUT.value};",
        f"st.relaxed.sys.global.b32 [{status}], value;",
        f"bra {end};",
    ]


@triton.constexpr_function
def look_program(count, pack, stride, ragged):
    """PTX of one thread's part of ``look``: reads its ``pack`` runs of 16 bytes of ``count`` tiles once.

    Operands, in runs of 4 words: the words of all tiles; pointers to those of the first tile, the others lie ``stride``
    bytes apart; whether the run's row exists, and whether the last tile's run does (``ragged`` only; what does not
    exist is zero); and a word without use.
    """
    size = 4 * pack
    lines = [".reg .pred exists, lasts;", *(f"mov.b32 ${n}, 0;" for n in range(count * size))]
    for run in range(pack):
        lines.append(f"setp.ne.s32 exists, ${(count + 1) * size + run * 4}, 0;")
        for tile in range(count):
            guard = "exists"
            if ragged and tile == count - 1:
                lines.append(f"setp.ne.and.s32 lasts, ${(count + 2) * size + run * 4}, 0, exists;")
                guard = "lasts"
            to = ", ".join(f"${tile * size + run * 4 + n}" for n in range(4))
            at = f"[${count * size + run * 4}+{tile * stride}]"
            lines.append(f"@{guard} ld.relaxed.gpu.global.v4.b32 {{{to}}}, {at};")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def look_constraints(count, pack):
    kinds = ["=&r"] * count + ["l", "r", "r", "r"]
    return ",".join(kind for kind in kinds for _ in range(4 * pack))


@triton.constexpr_function
def poll_program(count, pack, stride, ragged, maybe):
    """PTX of one thread's part of ``receive``: reads its ``pack`` runs of 16 bytes of ``count`` tiles until all came.

    Operands, in runs of 4 words: the words of all tiles as they are at last, then as they were first read; pointers
    to those of the first tile, the others lie ``stride`` bytes apart; then, one a word too, whether to wait, whether
    the last tile's run exists (``ragged`` only); and pointers to the mark of a time-out and to the status record,
    the step, and the limit; then, if ``maybe``, whether the words first read are these tiles' at all, and whether the
    run's row exists.
    """
    size = 4 * pack

    def word(tile, n, run):
        return f"${tile * size + run * 4 + n}"

    def given(which, run=0):
        return f"${(count + which) * size + run * 4}"

    pointer, wanted, last = (lambda run, which=which: given(count + which, run) for which in range(3))
    mark, status, step, limit = (given(count + which) for which in range(3, 7))
    lines = [".reg .pred again, more, late, lasts, wait;", ".reg .b32 turns, one, other, value;"]
    # The compiler's layout must give a thread the four words of a run, in order; as it is the same for all runs, the
    # pointers of one tell.
    lines.append(f"cvt.u32.u64 one, {pointer(0)};")
    for n in (1, 3):
        lines += [f"cvt.u32.u64 other, ${2 * count * size + n};", "sub.u32 value, other, one;"]
        lines += [f"setp.ne.s32 more, value, {4 * n};", "@more trap;"]
    lines += [f"mov.b32 ${n}, ${count * size + n};" for n in range(count * size)]
    lines.append("mov.b32 turns, 0;")

    def read(tile, run, guard=""):
        to = ", ".join(word(tile, n, run) for n in range(4))
        return f"{guard}ld.relaxed.gpu.global.v4.b32 {{{to}}}, [{pointer(run)}+{tile * stride}];"

    runs = [(tile, run) for run in range(pack) for tile in range(count)]
    if maybe:
        lines += [f"setp.ne.s32 again, {given(count + 7)}, 0;", "@again bra poll;"]
        for tile, run in runs:
            lines += [f"mov.b32 {word(tile, n, run)}, 0;" for n in range(4)]
            lines.append(f"setp.ne.s32 lasts, {given(count + 8, run)}, 0;")
            if ragged and tile == count - 1:
                lines.append(f"setp.ne.and.s32 lasts, {last(run)}, 0, lasts;")
            lines.append(read(tile, run, "@lasts "))
    lines.append("poll:")
    for tile, run in runs:
        # Only what is missing is read again: what has come would delay it, for this block and for the others. A run
        # that does not exist is zero, so it is never missing.
        a, b, c, d = (word(tile, n, run) for n in range(4))
        late = "again" if (tile, run) == (0, 0) else "late"
        lines += [
            f"max.u32 one, {a}, {b};", f"max.u32 other, {c}, {d};", "max.u32 one, one, other;",
            f"setp.ne.s32 wait, {wanted(run)}, 0;", f"setp.eq.and.s32 {late}, one, -1, wait;",
            read(tile, run, f"@{late} "),
        ]  # fmt: skip
        if late == "late":
            lines.append("or.pred again, again, late;")
    lines += ["@!again bra done;", *patience_program(mark, status, step, limit, "done"), "done:"]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def prefetch_program():
    """PTX of ``fetch``: operands are a result of no meaning, pointer, predicate."""
    return (
        "{\n.reg .pred wanted;\nsetp.ne.s32 wanted, $2, 0;\n@wanted prefetch.global.L2 [$1];\nmov.b32 $0, 0;\n}"
    )


@triton.constexpr_function
def store_tagged_program(pack, space):
    """PTX of ``publish_tagged`` for 1 or 2 words: operands, in runs of ``pack``, are results of no meaning, pointers,
    predicates, values, tags. Two that are neighbours, as in the tile of a product, are stored at once. ``space``: scope
    and state space of the stores."""
    results = [f"mov.b32 ${n}, 0;" for n in range(pack)]
    if pack == 1:
        lines = [
            ".reg .pred stored;", ".reg .b64 word;", "setp.ne.s32 stored, $2, 0;", "mov.b64 word, {$3, $4};",
            f"@stored st.relaxed.{space}.b64 [$1], word;", *results,
        ]  # fmt: skip
    else:
        lines = [
            ".reg .pred both, stored, later;", ".reg .b32 one, other;", ".reg .b64 word, next;",
            "mov.b64 word, {$6, $8};", "mov.b64 next, {$7, $9};",
            "cvt.u32.u64 one, $2;", "cvt.u32.u64 other, $3;", "sub.u32 other, other, one;", "and.b32 one, one, 15;",
            "setp.eq.s32 both, other, 8;", "setp.eq.and.s32 both, one, 0, both;",
            "setp.ne.s32 stored, $4, 0;", "setp.ne.s32 later, $5, 0;",
            "setp.ne.and.s32 both, $4, 0, both;", "setp.ne.and.s32 both, $5, 0, both;",
            "@both bra pair;",
            f"@stored st.relaxed.{space}.b64 [$2], word;", f"@later st.relaxed.{space}.b64 [$3], next;",
            "bra end;",
            "pair:", f"st.relaxed.{space}.v2.b64 [$2], {{word, next}};",
            "end:", *results,
        ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def store_tagged_constraints(pack):
    return ",".join(kind for kind in ("=r", "l", "r", "r", "r") for _ in range(pack))


@triton.constexpr_function
def poll_tagged_program(count, pack, stride, space):
    """PTX of one thread's part of ``receive_tagged``: reads its ``pack`` words of ``count`` tiles until all came.

    Operands, in runs of ``pack``: the words of all tiles; a word without use; pointers to the words of the first tile,
    the others lie ``stride`` bytes apart; then whether to wait, the tag, pointers to the mark of a time-out and to the
    status record, the step, and the limit. ``space``: scope and state space of the words.
    """

    def word(tile, n):
        return f"${tile * pack + n}"

    def given(which, n=0):
        return f"${(count + 1 + which) * pack + n}"

    def read(tile, n, guard=""):
        return f"{guard}ld.relaxed.{space}.b64 {word(tile, n)}, [{given(0, n)}+{tile * stride}];"

    tag, mark, status, step, limit = (given(which) for which in range(2, 7))
    words = [(tile, n) for n in range(pack) for tile in range(count)]
    lines = [".reg .pred again, more, late, wait;", ".reg .b32 turns, value, other;", ".reg .b64 lost;"]
    lines += [read(tile, n) for tile, n in words]
    lines += ["mov.b32 turns, 0;", "poll:"]
    for tile, n in words:
        # Only what is missing is read again, as in `poll_program`.
        late = "again" if (tile, n) == (0, 0) else "late"
        lines += [
            f"setp.ne.s32 wait, {given(1, n)}, 0;", f"mov.b64 {{value, other}}, {word(tile, n)};",
            f"setp.ne.and.s32 {late}, other, {tag}, wait;", read(tile, n, f"@{late} "),
        ]  # fmt: skip
        if late == "late":
            lines.append("or.pred again, again, late;")
    lines += ["@!again bra done;", *patience_program(mark, status, step, limit, "late_words")]
    lines += ["late_words:", "mov.b64 lost, {0x7FC00000, 0};"]
    for tile, n in words:
        lines.append(f"mov.b64 {{value, other}}, {word(tile, n)};")
        lines.append(f"setp.ne.s32 late, other, {tag};")
        lines.append(f"selp.b64 {word(tile, n)}, lost, {word(tile, n)}, late;")
    lines.append("done:")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def poll_tagged_constraints(count, pack):
    kinds = ["=&l"] * count + ["l", "l", "r", "r", "l", "l", "r", "r"]
    return ",".join(kind for kind in kinds for _ in range(pack))


@triton.constexpr_function
def cluster_memory_program(size, own):
    """PTX of ``cluster_memory``: operands are the address and a block's rank in the cluster."""
    end = "mov.b64 $0, base;" if own else "mapa.shared::cluster.u64 $0, base, $1;"
    lines = [
        ".reg .b64 base, bytes;", ".reg .b32 all;",
        "mov.u64 base, global_smem;", "mov.u32 all, %dynamic_smem_size;",
        "cvt.u64.u32 bytes, all;", "add.u64 base, base, bytes;", f"sub.u64 base, base, {size};", end,
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


#: Scope and state space of tagged words: in memory, in the shared memory of a cluster's blocks, in a block's own.
IN_MEMORY = tl.constexpr("gpu.global")
IN_CLUSTER = tl.constexpr("cluster.shared::cluster")
IN_BLOCK = tl.constexpr("cluster.shared::cta")
#: PTX of ``meet``: operands are a result of no meaning and a word without use.
MEET = tl.constexpr(
    "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\nmov.b32 $0, $1;"
)


@triton.constexpr_function
def words_a_thread(words, warps):
    return max(1, words // (32 * warps))


@triton.constexpr_function
def int64s(count):
    return (tl.int64,) * count


@triton.constexpr_function
def store_constraints(words):
    return "=r,l,r" + ",r" * words


@triton.constexpr_function
def poll_constraints(count, pack, maybe):
    kinds = ["=&r"] * count + ["r"] * count + ["l", "r", "r", "l", "l", "r", "r"] + ["r"] * (2 * maybe)
    return ",".join(kind for kind in kinds for _ in range(4 * pack))


@triton.constexpr_function
def int32s(count):
    return (tl.int32,) * count


@triton.constexpr_function
def runs_a_thread(words, warps):
    """Of a tile's runs of 16 bytes, those of one thread."""
    return max(1, words // (4 * 32 * warps))


@triton.jit
def pack_words(low, high):
    """Two tiles of a 16-bit dtype to one of 32-bit words."""
    return (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) | (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)


@triton.jit
def publish(pointers, words, mask, AMD: tl.constexpr):
    """Stores a tuple of 1, 2 or 4 tiles of 32-bit words, side by side from ``pointers`` on, so that none is poison.

    The stores are strong, since a consumer's reads race with them. ``AMD`` writes past the L2 of one chiplet, which
    the others do not see; NVIDIA's L2 is the whole device's.
    """
    COUNT: tl.constexpr = len(words)
    if AMD:
        for n in tl.static_range(COUNT):
            word = tl.where(words[n] == POISON, 0x7FFF7FFF, words[n])
            tl.store(pointers + n, word, mask=mask, cache_modifier=".wt")
    else:
        tl.inline_asm_elementwise(
            store_program(COUNT), store_constraints(COUNT), (pointers, mask.to(tl.int32)) + words,
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def fetch(pointers, mask, AMD: tl.constexpr):
    """Fetches into L2 what lies at ``pointers``, which will be read some steps later."""
    if not AMD:
        tl.inline_asm_elementwise(
            prefetch_program(), "=r,l,r", (pointers, mask.to(tl.int32)), dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def prepare(pointers, mask, PROTOCOL: tl.constexpr, AMD: tl.constexpr):
    """:func:`fetch` of what will be published and polled: under ``FLAG`` every word was written once before the launch,
    and may have left for memory since."""
    if PROTOCOL == FLAG:
        fetch(pointers, mask, AMD)


@triton.jit
def announce(counter, step, alive, PROTOCOL: tl.constexpr):
    """Counts this block in, after all its ``publish`` calls of the step.

    A block that gave up no longer counts: its turns would pass for those of the block that is missing.
    """
    if PROTOCOL == COUNTER:
        tl.debug_barrier()
        tl.atomic_add(counter + (step & 1) * ODD_TURNS, alive, sem="release", scope="gpu")


@triton.jit
def _report(status, step):
    tl.store(status + 1, tl.program_id(0))
    tl.store(status + 2, tl.program_id(1))
    tl.store(status + 3, step)
    tl.store(status, TIMED_OUT)


@triton.jit
def await_count(
    counter, n_blocks, turns, alive, status, step, spin_limit, PROTOCOL: tl.constexpr, AHEAD: tl.constexpr = False
):
    """Waits (``COUNTER`` only) until ``n_blocks`` blocks have announced ``turns`` steps each.

    Steps take turns between two words: no block announces its next step of the same word before all have seen this
    one, so the word is waited for to be equal. Not so where the blocks waited for may be ``AHEAD``, another layer's.
    Returns ``alive``, or 0 if it had to give up.
    """
    if PROTOCOL == COUNTER:
        word = counter + ((turns + 1) & 1) * ODD_TURNS
        expected = n_blocks * ((turns + 1) >> 1)
        if HAS_POLL and not AHEAD:
            limit = (spin_limit * alive).to(tl.int64) * TURN_NS
            missing = tl.atomic_poll(word, expected, sem="acquire", scope="gpu", timeout_ns=limit) == 0
        else:
            seen = tl.atomic_add(word, 0, sem="acquire", scope="gpu")
            spins = alive * 0
            while (seen < expected) & (spins < spin_limit * alive):
                seen = tl.atomic_add(word, 0, sem="acquire", scope="gpu")
                spins += 1
            missing = seen < expected
        if missing & (alive > 0):
            _report(status, step)
        alive = tl.where(missing, 0, alive)
    return alive


@triton.jit
def _load_words(pointers, inside, SPAN: tl.constexpr, COUNT: tl.constexpr, AMD: tl.constexpr):
    words = ()
    for j in tl.static_range(COUNT):
        # `volatile` alone still reads AMD's caches.
        if inside is not None and j == COUNT - 1:
            w = tl.load(
                pointers + j * SPAN, mask=inside, other=0, volatile=True, cache_modifier=".cv" if AMD else ""
            )
        else:
            w = tl.load(pointers + j * SPAN, volatile=True, cache_modifier=".cv" if AMD else "")
        words = words + (w,)
    return words


@triton.jit
def _any_poison(words, wanted, COUNT: tl.constexpr):
    poisoned = words[0] == POISON
    for j in tl.static_range(1, COUNT):
        poisoned = poisoned | (words[j] == POISON)
    return tl.max((poisoned & wanted).to(tl.int32))


@triton.jit
def _as_values(words, dtype: tl.constexpr):
    """Words ``[..., 4]``, four a read, to values ``[..., 4]`` or ``[..., 8]``."""
    if dtype.primitive_bitwidth == 16:
        halves = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        words = tl.reshape(halves, words.shape[:-1] + [8])
    return words.to(dtype, bitcast=True)


@triton.jit
def _look(pointers, exists, inside, SPAN: tl.constexpr, COUNT: tl.constexpr, WARPS: tl.constexpr, AMD: tl.constexpr):
    """The words of ``COUNT`` tiles as they are now; zero where ``exists``, and of the last one where ``inside``, unless
    None, is false."""
    if AMD:
        words = _load_words(pointers, inside, SPAN, COUNT, AMD)
    else:
        # A load that never happens tells the compiler which words a thread should hold: runs of 16 bytes.
        never = tl.load(pointers, mask=tl.broadcast_to(tl.program_id(0) < 0, pointers.shape), other=0)
        pack: tl.constexpr = runs_a_thread(pointers.numel, WARPS)
        last = 1
        if inside is not None:
            last = inside.to(tl.int32)
        words = tl.inline_asm_elementwise(
            look_program(COUNT, pack, 4 * SPAN, inside is not None), look_constraints(COUNT, pack),
            (pointers, exists.to(tl.int32), last, never), dtype=int32s(COUNT), is_pure=False, pack=4 * pack,
        )  # fmt: skip
    return words


@triton.jit
def look(reads, exists, inside, WARPS: tl.constexpr, AMD: tl.constexpr):
    """The words of one tile as they are now: a tuple. ``exists`` and ``inside`` are those of :func:`receive`."""
    pointers = tl.expand_dims(reads, -1) + tl.arange(0, 4)
    exists = tl.broadcast_to(tl.expand_dims(exists, -1), pointers.shape)
    inside = tl.broadcast_to(tl.expand_dims(inside, -1), pointers.shape)
    return _look(pointers, exists, inside, 0, 1, WARPS, AMD)


@triton.jit
def receive(
    reads, exists, wanted, inside, mark, status, step, spin_limit, dtype: tl.constexpr,
    SPAN: tl.constexpr, COUNT: tl.constexpr, PROTOCOL: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr,
    seen=None, is_seen=None,
):  # fmt: skip
    """A tuple of ``COUNT`` tiles ``[..., R * n]``; under ``FLAG``, once every wanted word has arrived.

    ``reads`` [..., R] points to the first tile's runs of 16 bytes (``n`` values) as int32; a tile lies ``SPAN`` words
    after the one before. Where ``exists`` (of a shape that broadcasts) is false, and then ``wanted`` is too, nothing
    need be read: rows that repeat another would crowd where it lies. Where ``wanted`` is false nothing is waited for;
    ``inside``, None or likewise, says which reads of the last tile exist: the others are zero. ``seen`` (``FLAG``, not
    AMD; one tile): what :func:`look` returned for this tile, if the scalar ``is_seen`` is true, or for another. Then no
    look at the words is left to the compiler, which would make copies of its own of them in a loop that it pipelines.
    """
    pointers = tl.expand_dims(reads, -1) + tl.arange(0, 4)
    wanted = tl.broadcast_to(tl.expand_dims(wanted, -1), pointers.shape)
    exists = tl.broadcast_to(tl.expand_dims(exists, -1), pointers.shape)
    if inside is not None:
        inside = tl.broadcast_to(tl.expand_dims(inside, -1), pointers.shape)
    MAYBE: tl.constexpr = seen is not None
    if MAYBE:
        words = seen
        is_seen = (tl.where(is_seen, 1, 0), exists.to(tl.int32))
    else:
        if PROTOCOL == FLAG:
            words = _look(pointers, exists, inside, SPAN, COUNT, WARPS, AMD)
        else:
            words = _load_words(pointers, inside, SPAN, COUNT, AMD)
        is_seen = ()
    if PROTOCOL == FLAG and not AMD:
        # Each thread waits for its own words: no vote, and no barrier but the one that the product needs.
        pack: tl.constexpr = runs_a_thread(pointers.numel, WARPS)
        last = 1
        if inside is not None:
            last = inside.to(tl.int32)
        words = tl.inline_asm_elementwise(
            poll_program(COUNT, pack, 4 * SPAN, inside is not None, MAYBE), poll_constraints(COUNT, pack, MAYBE),
            words + (pointers, wanted.to(tl.int32), last, mark, status, step, spin_limit) + is_seen,
            dtype=int32s(COUNT), is_pure=False, pack=4 * pack,
        )  # fmt: skip
    elif PROTOCOL == FLAG:
        missing = _any_poison(words, wanted, COUNT)
        spins = missing * 0
        gave_up = tl.load(mark, volatile=True)
        while (missing > 0) & (spins < spin_limit) & (gave_up == 0):
            words = _load_words(pointers, inside, SPAN, COUNT, AMD)
            missing = _any_poison(words, wanted, COUNT)
            gave_up = tl.load(mark, volatile=True)
            spins += 1
        if (missing > 0) & (gave_up == 0):
            tl.store(mark, 1)
            _report(status, step)
    tiles = ()
    for j in tl.static_range(COUNT):
        tiles = tiles + (_rows(_as_values(words[j], dtype)),)
    return tiles


@triton.jit
def cluster_memory(rank, SIZE: tl.constexpr, OWN: tl.constexpr = False):
    """Pointers to the last ``SIZE`` bytes of the shared memory of the cluster's blocks of these ranks, as int64: for
    tagged words with ``CLUSTER`` alone. ``OWN``: ``rank`` is this block's, which may read there."""
    address = tl.inline_asm_elementwise(
        cluster_memory_program(SIZE, OWN), "=l,r", (rank,), dtype=tl.int64, is_pure=True, pack=1
    )
    return address.to(tl.pointer_type(tl.int64))


@triton.jit
def meet(rank):
    """Waits for all blocks of the cluster. What one of them stored in another's shared memory before is there then."""
    tl.inline_asm_elementwise(MEET, "=r,r", (rank,), dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def publish_tagged(
    pointers, values, tag, mask, AMD: tl.constexpr, WARPS: tl.constexpr, CLUSTER: tl.constexpr = False
):
    """Stores a tile of fp32 ``values`` with their ``tag`` to int64 ``pointers``; with ``CLUSTER``, of
    :func:`cluster_memory`."""
    bits = values.to(tl.int32, bitcast=True)
    if AMD:
        word = (bits.to(tl.int64) & 0xFFFFFFFF) | (tag.to(tl.int64) << 32)
        tl.store(pointers, word, mask=mask, cache_modifier=".wt")
    else:
        pack: tl.constexpr = 2 if words_a_thread(pointers.numel, WARPS) > 1 else 1
        tl.inline_asm_elementwise(
            store_tagged_program(pack, IN_CLUSTER if CLUSTER else IN_MEMORY), store_tagged_constraints(pack),
            (pointers, mask.to(tl.int32), bits, tag),
            dtype=tl.int32, is_pure=False, pack=pack,
        )  # fmt: skip


@triton.jit
def _load_tagged(pointers, SPAN: tl.constexpr, COUNT: tl.constexpr):
    words = ()
    for j in tl.static_range(COUNT):
        words = words + (tl.load(pointers + j * SPAN, volatile=True, cache_modifier=".cv"),)
    return words


@triton.jit
def _missing_tagged(words, wanted, tag, COUNT: tl.constexpr):
    missing = (words[0] >> 32).to(tl.int32) != tag
    for j in tl.static_range(1, COUNT):
        missing = missing | ((words[j] >> 32).to(tl.int32) != tag)
    return tl.max((missing & wanted).to(tl.int32))


@triton.jit
def receive_tagged(
    pointers, wanted, tag, mark, status, step, spin_limit,
    SPAN: tl.constexpr, COUNT: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr, CLUSTER: tl.constexpr = False,
):  # fmt: skip
    """A tuple of ``COUNT`` fp32 tiles that others published with ``tag``, once every wanted element has arrived.

    ``pointers`` are int64 ones to the first tile, with ``CLUSTER`` of the block's own :func:`cluster_memory`; a tile
    lies ``SPAN`` words after the one before. What is not ``wanted`` is not waited for, and may be anything.
    """
    if AMD:
        words = _load_tagged(pointers, SPAN, COUNT)
        missing = _missing_tagged(words, wanted, tag, COUNT)
        spins = missing * 0
        gave_up = tl.load(mark, volatile=True)
        while (missing > 0) & (spins < spin_limit) & (gave_up == 0):
            words = _load_tagged(pointers, SPAN, COUNT)
            missing = _missing_tagged(words, wanted, tag, COUNT)
            gave_up = tl.load(mark, volatile=True)
            spins += 1
        if (missing > 0) & (gave_up == 0):
            tl.store(mark, 1)
            _report(status, step)
    else:
        # As in `_look`.
        never = tl.load(pointers, mask=tl.broadcast_to(tl.program_id(0) < 0, pointers.shape), other=0)
        pack: tl.constexpr = words_a_thread(pointers.numel, WARPS)
        words = tl.inline_asm_elementwise(
            poll_tagged_program(COUNT, pack, 8 * SPAN, IN_BLOCK if CLUSTER else IN_MEMORY),
            poll_tagged_constraints(COUNT, pack),
            (never, pointers, wanted.to(tl.int32), tag, mark, status, step, spin_limit),
            dtype=int64s(COUNT), is_pure=False, pack=pack,
        )  # fmt: skip
    tiles = ()
    for j in tl.static_range(COUNT):
        value = words[j].to(tl.int32).to(tl.float32, bitcast=True)
        if AMD:
            value = tl.where((words[j] >> 32).to(tl.int32) == tag, value, float("nan"))
        tiles = tiles + (value,)
    return tiles


@triton.jit
def _rows(values):
    """``[..., R, n]`` to ``[..., R * n]``."""
    return tl.reshape(values, values.shape[:-2] + [values.shape[-2] * values.shape[-1]])
