"""How the thread blocks of one launch hand each other a step's result: both protocols, behind one interface.

A step's producer calls :func:`publish` for each of its tiles and then :func:`announce`; a consumer calls
:func:`receive`, which returns the tiles once they are complete. ``PROTOCOL`` (a constexpr) says how it knows:

``NONE``     they were written before this launch; nothing to wait for.
``COUNTER``  blocks count themselves in with a release; the consumer spins on the count with an acquire.
``FLAG``     the buffer was filled with :data:`POISON` bits before the launch, which no ``publish`` ever stores;
             the consumer re-reads the data until none is left. Each element is its own flag.

Every spin is bounded by ``spin_limit`` turns. A consumer that runs out reports in ``status`` and returns
``alive = 0``: it and, through NaN, its successors then stop waiting. Memory-ordering argument: README.md.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(0)
COUNTER = tl.constexpr(1)
FLAG = tl.constexpr(2)
#: All bits set: a NaN that arithmetic does not produce and that ``publish`` replaces by ``0x7f…f``.
POISON = tl.constexpr(-1)
#: int32 words between two counters, so that no two groups spin on one cache line.
COUNTER_STRIDE = tl.constexpr(32)
#: Words of the status record: code, block, group, step.
STATUS_WORDS = tl.constexpr(4)
TIMED_OUT = tl.constexpr(1)


@triton.jit
def _as_bits(pointers):
    if pointers.dtype.element_ty.primitive_bitwidth == 16:
        return pointers.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        return pointers.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def publish(pointers, value, mask, AMD: tl.constexpr):
    """Stores ``value`` (already of the buffer's dtype) so that no element looks like poison.

    ``AMD`` writes past the L2 of one chiplet, which the others do not see; NVIDIA's L2 is the whole device's.
    """
    bit_pointers = _as_bits(pointers)
    bits = value.to(bit_pointers.dtype.element_ty, bitcast=True)
    canonical_nan: tl.constexpr = 0x7FFF if value.dtype.primitive_bitwidth == 16 else 0x7FFFFFFF
    bits = tl.where(bits == POISON, canonical_nan, bits)
    tl.store(bit_pointers, bits, mask=mask, cache_modifier=".wt" if AMD else "")


@triton.jit
def announce(counter, alive, PROTOCOL: tl.constexpr):
    """Counts this block in, after all its ``publish`` calls of the step.

    A block that gave up no longer counts: its turns would pass for those of the block that is missing.
    """
    if PROTOCOL == COUNTER:
        tl.debug_barrier()
        tl.atomic_add(counter, alive, sem="release", scope="gpu")


@triton.jit
def _load(bit_pointers, masks, N: tl.constexpr, AMD: tl.constexpr):
    tiles = ()
    for j in tl.static_range(N):
        # `volatile` alone still reads AMD's caches.
        bits = tl.load(bit_pointers[j], mask=masks[j], other=0, volatile=True, cache_modifier=".cv" if AMD else "")
        tiles = tiles + (bits,)
    return tiles


@triton.jit
def _missing(tiles, exempt, N: tl.constexpr):
    poisoned = tiles[0] == POISON
    for j in tl.static_range(1, N):
        poisoned = poisoned | (tiles[j] == POISON)
    if exempt is not None:
        poisoned = poisoned & (exempt == 0)
    return tl.max(poisoned.to(tl.int32))


@triton.jit
def await_count(counter, expected, alive, spin_limit, PROTOCOL: tl.constexpr):
    """Waits (``COUNTER`` only) until ``expected`` announcements were made; returns whether it must give up (0/1)."""
    missing = alive * 0
    if PROTOCOL == COUNTER:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        spins = alive * 0
        while (seen < expected) & (spins < spin_limit * alive):
            seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            spins += 1
        missing = (seen < expected).to(tl.int32)
    return missing


@triton.jit
def receive(
    pointers, masks, exempt, wanted, alive, spin_limit, N: tl.constexpr, PROTOCOL: tl.constexpr, AMD: tl.constexpr
):
    """Loads a tuple of ``N`` tiles of one shape; under ``FLAG``, until every element has arrived.

    Not waited for: elements outside their mask, which are zero; those where ``exempt`` (None, or
    broadcastable to a tile) is true; and none at all if ``wanted`` is 0. Returns ``(tiles, missing)``.
    """
    dtype = pointers[0].dtype.element_ty
    bit_pointers = ()
    for j in tl.static_range(N):
        bit_pointers = bit_pointers + (_as_bits(pointers[j]),)
    bits = _load(bit_pointers, masks, N, AMD)
    missing = alive * 0
    if PROTOCOL == FLAG:
        spins = alive * 0
        missing = _missing(bits, exempt, N) * wanted
        while (missing > 0) & (spins < spin_limit * alive):
            bits = _load(bit_pointers, masks, N, AMD)
            missing = _missing(bits, exempt, N) * wanted
            spins += 1
    tiles = ()
    for j in tl.static_range(N):
        tiles = tiles + (bits[j].to(dtype, bitcast=True),)
    return tiles, missing


@triton.jit
def report(status, missing, alive, block, group, step):
    """Records the first time-out of this program and returns its new ``alive``."""
    if (missing > 0) & (alive > 0):
        tl.store(status + 1, block)
        tl.store(status + 2, group)
        tl.store(status + 3, step)
        tl.store(status, TIMED_OUT)
    return tl.where(missing > 0, 0, alive)
