"""The emulator's PTX: each instruction, lanes that part and meet again, and the assembly of the exchange itself."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tritlstm import emulator_ptx
from tritlstm.kernels import exchange

POISON = 0xFFFFFFFF


class Memory:
    """Words of 4 or 8 bytes by address; counts its reads, and calls ``tick`` before each."""

    def __init__(self, words: dict[int, int], tick: Any = None) -> None:
        self.words = words
        self.tick = tick
        self.reads = 0

    def load(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        self.reads += 1
        if self.tick:
            self.tick(self)
        words = [self.words[int(a)] if m else 0xDEAD for a, m in zip(addresses, mask, strict=True)]
        return np.array(words, f"u{size}")

    def store(self, addresses: np.ndarray, words: np.ndarray, mask: np.ndarray) -> None:
        for address, word, wanted in zip(addresses, words, mask, strict=True):
            if wanted:
                self.words[int(address)] = int(word)


def run(text: str, lanes: int = 1, memory: Memory | None = None, **registers: Any) -> dict[str, np.ndarray]:
    memory = memory or Memory({})
    given = {f"${name[1:]}": np.asarray(value) for name, value in registers.items()}
    return emulator_ptx.run(emulator_ptx.parse(text), given, lanes, (5, 3), memory.load, memory.store)


@pytest.mark.parametrize(
    ("statement", "operands", "result"),
    [
        ("mov.b32 r, $1;", [np.uint32([7])], 7),
        ("mov.b32 r, -1;", [], POISON),
        ("mov.b32 r, %ctaid.x;", [], 5),
        ("mov.b32 r, %ctaid.y;", [], 3),
        ("max.u32 r, $1, $2;", [np.uint32([POISON]), np.uint32([1])], POISON),
        ("add.u32 r, $1, 1;", [np.uint32([POISON])], 0),
        ("sub.u32 r, $1, $2;", [np.uint32([3]), np.uint32([4])], POISON),
        ("and.b32 r, $1, 63;", [np.uint32([130])], 2),
        ("cvt.rna.tf32.f32 r, $1;", [np.float32([1 + 2.0**-10 + 2.0**-11])], np.float32(1 + 2.0**-9).view(np.uint32)),
        ("cvt.rna.tf32.f32 r, $1;", [np.float32([-1 - 2.0**-12])], np.float32(-1).view(np.uint32)),
        ("cvt.u32.u64 r, $1;", [np.uint64([2**32 + 9])], 9),
        ("setp.lt.u32 r, $1, $2;", [np.uint32([1]), np.uint32([POISON])], True),
        ("setp.eq.s32 r, $1, -1;", [np.uint32([POISON])], True),
        ("setp.ne.s32 p, $1, 0; setp.eq.and.s32 r, $2, -1, p;", [np.uint32([0]), np.uint32([POISON])], False),
        ("setp.ne.s32 p, $1, 0; setp.eq.s32 q, $1, 0; or.pred r, p, q;", [np.uint32([4])], True),
        ("setp.eq.s32 p, $1, 4; selp.b32 r, 0x7FFF7FFF, $1, p;", [np.uint32([4])], 0x7FFF7FFF),
        ("mov.b64 r, {$1, $2};", [np.uint32([5]), np.uint32([POISON])], 0xFFFFFFFF00000005),
        ("mov.b64 {q, r}, $1;", [np.uint64([0x600000005])], 6),
        ("mov.b64 {r, q}, $1;", [np.uint64([0x600000005])], 5),
        ("setp.eq.s32 p, $2, 4; selp.b64 r, $1, $1, p;", [np.uint64([2**40]), np.uint32([4])], 2**40),
        ("ex2.approx.ftz.f32 r, $1;", [np.float32([3])], 8.0),
        ("ex2.approx.ftz.f32 r, $1;", [np.float32([1000])], np.inf),
        ("rcp.approx.ftz.f32 r, $1;", [np.float32([np.inf])], 0.0),
    ],
)
def test_an_instruction(statement: str, operands: list[np.ndarray], result: Any) -> None:
    registers = {f"_{n + 1}": value for n, value in enumerate(operands)}
    assert run(statement, **registers)["r"] == result


def test_lanes_part_at_a_guarded_jump_and_meet_again() -> None:
    text = """{
    mov.b32 n, 0;
    turn: add.u32 n, n, 1;
    setp.lt.u32 more, n, $1;
    @more bra turn;
    add.u32 n, n, 100;
    }"""
    assert run(text, lanes=3, _1=np.uint32([1, 4, 2]))["n"].tolist() == [101, 104, 102]


def test_a_guard_keeps_a_lane_from_writing() -> None:
    text = "mov.b32 r, 1; setp.ne.s32 p, $1, 0; @!p mov.b32 r, 2;"
    assert run(text, lanes=2, _1=np.uint32([0, 9]))["r"].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("mul.u32 r, $1, $1;", NotImplementedError, "does not know the PTX instruction mul.u32"),
        ("bra nowhere;", ValueError, "jump to the unknown place 'nowhere'"),
        ("add.u32 r, $8, 1;", ValueError, "reads \\$8, which nothing has set"),
        ("trap;", RuntimeError, "trapped"),
        ("- x;", ValueError, "not a PTX statement"),
    ],
)
def test_what_it_does_not_know_is_an_error(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(text, _1=np.uint32([1]))


# The assembly of the exchange

BASE, MARK, STATUS = 0x1000, 0x9000, 0xA000


def poll(memory: Memory, count: int = 2, lanes: int = 2, wanted: int = 1, last: int | None = None, limit: int = 1000,
         first: dict[int, int] | None = None, apart: int = 4,
         is_seen: int | None = None, exists: int = 1) -> list[list[list[int]]]:  # fmt: skip
    """Runs ``poll_program`` for ``lanes`` runs of ``count`` tiles 256 bytes apart; words by lane and tile."""
    memory.words.update({MARK: memory.words.get(MARK, 0), **{STATUS + 4 * n: 0 for n in range(4)}})
    registers: dict[str, np.ndarray] = {}

    def give(values: list[np.ndarray]) -> None:
        for value in values:
            registers[f"_{4 * count + len(registers)}"] = value

    seen = memory.words if first is None else first
    run_at = [BASE + 16 * lane for lane in range(lanes)]
    for tile in range(count):
        give([np.uint32([seen[at + 256 * tile + 4 * n] for at in run_at]) for n in range(4)])
    give([np.uint64([at + apart * n for at in run_at]) for n in range(4)])
    for value in (wanted, 1 if last is None else last):
        give([np.full(lanes, value, np.uint32)] * 4)
    give([np.full(lanes, MARK, np.uint64)] * 4)
    give([np.full(lanes, STATUS, np.uint64)] * 4)
    give([np.full(lanes, 17, np.uint32)] * 4)
    give([np.full(lanes, limit, np.uint32)] * 4)
    if is_seen is not None:
        give([np.full(lanes, is_seen, np.uint32)] * 4)
        give([np.full(lanes, exists, np.uint32)] * 4)
    program = exchange.poll_program(count, 1, 256, last is not None, is_seen is not None)
    after = run(program, lanes, memory, **registers)
    return [
        [[int(after[f"${4 * tile + n}"][lane]) for n in range(4)] for tile in range(count)] for lane in range(lanes)
    ]


def words(count: int = 2, lanes: int = 2) -> dict[int, int]:
    return {BASE + 256 * t + 16 * lane + 4 * n: 1000 * t + 100 * lane + n + 1
            for t in range(count) for lane in range(lanes) for n in range(4)}  # fmt: skip


EXPECTED = [[[1000 * t + 100 * lane + n + 1 for n in range(4)] for t in range(2)] for lane in range(2)]


def test_words_that_are_there_are_not_read_again() -> None:
    memory = Memory(words())
    assert poll(memory) == EXPECTED
    assert memory.reads == 0


@pytest.mark.parametrize("late", [BASE, BASE + 12, BASE + 256 + 16 + 8])
def test_one_missing_word_is_waited_for(late: int) -> None:
    there = words()
    there[late] = POISON

    def arrives(memory: Memory) -> None:
        if memory.reads == 30:
            memory.words[late] = words()[late]

    memory = Memory(there, arrives)
    assert poll(memory) == EXPECTED
    assert memory.reads >= 30
    assert memory.words[STATUS] == 0


def test_only_the_run_that_is_missing_is_read_again() -> None:
    memory = Memory(words() | {BASE + 256 + 16 + 8: POISON})
    poll(memory, limit=10)
    # Four words a turn and the mark, of eight that one lane waits for and eight of another.
    assert memory.reads <= (10 + exchange.PATIENCE.value) * 4 + 2
    assert memory.reads >= 40


def look(
    memory: Memory, lanes: int = 2, last: int | None = None, exists: int = 1
) -> list[list[list[int]]]:
    """Runs ``look_program`` as :func:`poll` does."""
    run_at = [BASE + 16 * lane for lane in range(lanes)]
    given = [np.uint64([at + 4 * n for at in run_at]) for n in range(4)]
    given += [np.full(lanes, exists, np.uint32)] * 4 + [np.full(lanes, 1 if last is None else last, np.uint32)] * 4
    given += [np.zeros(lanes, np.uint32)] * 4
    registers = {f"_{8 + n}": value for n, value in enumerate(given)}
    after = run(exchange.look_program(2, 1, 256, last is not None), lanes, memory, **registers)
    return [[[int(after[f"${4 * tile + n}"][lane]) for n in range(4)] for tile in range(2)] for lane in range(lanes)]


def test_a_look_returns_words_as_they_are() -> None:
    there = words() | {BASE: POISON}
    assert look(Memory(there))[0][0] == [POISON, 2, 3, 4]
    assert look(Memory(words())) == EXPECTED


def test_a_look_at_a_tile_that_ends_returns_zeros() -> None:
    there = {at: word for at, word in words().items() if at < BASE + 256}
    assert look(Memory(there), last=0) == [[EXPECTED[lane][0], [0, 0, 0, 0]] for lane in range(2)]
    assert look(Memory(words()), last=1) == EXPECTED


@pytest.mark.parametrize("last", [None, 0, 1])
def test_a_row_beyond_the_batch_is_not_read(last: int | None) -> None:
    memory = Memory({})
    assert look(memory, last=last, exists=0) == [[[0] * 4] * 2] * 2


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("pack", [1, 2])
def test_the_look_names_as_many_operands_as_its_constraints(pack: int, ragged: bool) -> None:
    constraints = exchange.look_constraints(3, pack).split(",")
    named = re.findall(r"\$(\d+)", exchange.look_program(3, pack, 512, ragged))
    assert max(map(int, named)) < len(constraints)
    assert constraints.count("=&r") == 3 * 4 * pack
    assert constraints[3 * 4 * pack] == "l"


def test_half_a_word_of_poison_is_a_value() -> None:
    there = words() | {BASE: 0xFFFF0001, BASE + 4: 0x7FFFFFFF}
    assert poll(Memory(there))[0][0][:2] == [0xFFFF0001, 0x7FFFFFFF]


def test_what_is_not_wanted_may_be_poison() -> None:
    assert poll(Memory(words() | {BASE: POISON}), wanted=0)[0][0][0] == POISON


def test_the_last_tile_may_lie_outside() -> None:
    there = {at: word for at, word in words().items() if at < BASE + 256}
    late = dict(there)
    late[BASE] = POISON
    # The second tile does not exist: its words are zero as they were first read, and never read again.
    zero = {BASE + 256 + 4 * n: 0 for n in range(8)}
    got = poll(Memory(there), last=0, first=late | zero)
    assert got == [[EXPECTED[lane][0], [0, 0, 0, 0]] for lane in range(2)]


def test_a_time_out_is_marked_and_reported_and_leaves_poison() -> None:
    memory = Memory(words() | {BASE + 256: POISON})
    assert poll(memory, limit=200)[0][1][0] == POISON
    assert memory.words[MARK] == 1
    assert [memory.words[STATUS + 4 * n] for n in range(4)] == [exchange.TIMED_OUT.value, 5, 3, 17]
    # 8 words a turn and the mark at every 64th: no spin goes on beyond the limit and the next look.
    assert memory.reads <= (200 + exchange.PATIENCE.value) * 9


def test_once_somebody_gave_up_nobody_waits_long() -> None:
    memory = Memory(words() | {BASE: POISON, MARK: 1})
    poll(memory, limit=1 << 22)
    assert memory.reads <= exchange.PATIENCE.value * 9
    assert memory.words[STATUS] == 0


def test_a_layout_that_scatters_a_run_is_trapped() -> None:
    with pytest.raises(RuntimeError, match="trapped"):
        poll(Memory(words()), apart=8)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_store_never_leaves_poison(count: int) -> None:
    memory = Memory({})
    values = {f"_{3 + n}": np.uint32([n + 1, POISON]) for n in range(count)}
    pointers = np.uint64([BASE, BASE + 64])
    run(exchange.store_program(count), 2, memory, _1=pointers, _2=np.uint32([1, 1]), **values)
    assert memory.words == {
        **{BASE + 4 * n: n + 1 for n in range(count)}, **{BASE + 64 + 4 * n: 0x7FFF7FFF for n in range(count)}
    }  # fmt: skip


def test_a_masked_store_stores_nothing() -> None:
    memory = Memory({})
    run(exchange.store_program(1), 1, memory, _1=np.uint64([BASE]), _2=np.uint32([0]), _3=np.uint32([1]))
    assert memory.words == {}


@pytest.mark.parametrize("last", [None, 1, 0], ids=["", "inside", "outside"])
def test_words_of_another_tile_are_read_anew(last: int | None) -> None:
    """What was seen counts only if it is this tile's; else the words are read, and zero where the tile ends."""
    stale = dict.fromkeys(words(), 9)
    expected = [[tile if last != 0 or n == 0 else [0] * 4 for n, tile in enumerate(lane)] for lane in EXPECTED]
    assert poll(Memory(words()), first=stale, last=last, is_seen=0) == expected
    assert poll(Memory(words()), first=stale, last=last, is_seen=1) == [[[9] * 4] * 2] * 2


def test_a_row_beyond_the_batch_is_not_read_anew() -> None:
    assert poll(Memory({}), first=dict.fromkeys(words(), 9), wanted=0, is_seen=0, exists=0) == [[[0] * 4] * 2] * 2


def test_words_of_another_tile_are_waited_for_as_well() -> None:
    memory = Memory(words() | {BASE: POISON})
    assert poll(memory, first=words(), is_seen=0, limit=64)[0][0][0] == POISON
    assert memory.words[MARK] == 1


@pytest.mark.parametrize("maybe", [False, True])
@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_program_names_as_many_operands_as_its_constraints(pack: int, ragged: bool, maybe: bool) -> None:
    text = exchange.poll_program(3, pack, 512, ragged, maybe)
    constraints = exchange.poll_constraints(3, pack, maybe).split(",")
    assert max(int(n) for n in re.findall(r"\$(\d+)", text)) < len(constraints)
    assert constraints.count("=&r") == 3 * 4 * pack
    # Words and pointers sit where the program looks for them.
    assert constraints[2 * 3 * 4 * pack] == "l"


TAG = 77
IN_MEMORY = exchange.IN_MEMORY.value
SPACES = [IN_MEMORY, exchange.IN_CLUSTER.value, exchange.IN_BLOCK.value]


def tagged(count: int = 4, lanes: int = 2, tag: int = TAG) -> dict[int, int]:
    return {BASE + 512 * t + 8 * lane: (tag << 32) + 100 * t + lane for t in range(count) for lane in range(lanes)}


def poll_tagged(
    memory: Memory, count: int = 4, lanes: int = 2, wanted: int = 1, limit: int = 1000, space: str = IN_MEMORY
) -> list[list[int]]:
    """Runs ``poll_tagged_program`` for a word a lane of ``count`` tiles 512 bytes apart; values by tile."""
    memory.words.update({MARK: memory.words.get(MARK, 0), **{STATUS + 4 * n: 0 for n in range(4)}})
    at = [BASE + 8 * lane for lane in range(lanes)]
    given: list[np.ndarray] = [np.zeros(lanes, np.uint64), np.uint64(at)]
    given += [np.full(lanes, wanted, np.uint32), np.full(lanes, TAG, np.uint32)]
    given += [np.full(lanes, MARK, np.uint64), np.full(lanes, STATUS, np.uint64)]
    given += [np.full(lanes, 17, np.uint32), np.full(lanes, limit, np.uint32)]
    registers = {f"_{count + n}": value for n, value in enumerate(given)}
    after = run(exchange.poll_tagged_program(count, 1, 512, space), lanes, memory, **registers)
    return [[int(word) & 0xFFFFFFFF for word in after[f"${tile}"]] for tile in range(count)]


TAGGED = [[100 * t + lane for lane in range(2)] for t in range(4)]


@pytest.mark.parametrize("space", SPACES)
def test_words_of_this_turn_are_read_once(space: str) -> None:
    memory = Memory(tagged())
    assert poll_tagged(memory, space=space) == TAGGED
    assert memory.reads == 4  # of both lanes


def test_only_the_word_that_is_missing_is_read_again() -> None:
    memory = Memory(tagged() | {BASE + 512: 5})
    poll_tagged(memory, limit=10)
    assert 4 + 10 <= memory.reads <= 4 + 10 + exchange.PATIENCE.value + 1


@pytest.mark.parametrize("late", [BASE, BASE + 8, BASE + 3 * 512 + 8])
def test_a_word_of_another_turn_is_waited_for(late: int) -> None:
    def arrives(memory: Memory) -> None:
        if memory.reads == 30:
            memory.words[late] = tagged()[late]

    memory = Memory(tagged() | {late: tagged(tag=TAG - 4)[late]}, arrives)
    assert poll_tagged(memory) == TAGGED
    assert memory.reads >= 30
    assert memory.words[STATUS] == 0


def test_an_unwanted_word_may_be_of_any_turn() -> None:
    memory = Memory(tagged(tag=3))
    poll_tagged(memory, wanted=0)
    assert memory.reads == 4  # of both lanes
    assert memory.words[STATUS] == 0


def test_a_missing_word_becomes_nan_and_is_reported() -> None:
    memory = Memory(tagged() | {BASE + 512: 5})
    got = poll_tagged(memory, limit=200)
    assert np.isnan(np.uint32(got[1][0]).view(np.float32))
    assert got[1][1] == TAGGED[1][1]
    assert got[0] == TAGGED[0]
    assert memory.words[MARK] == 1
    assert [memory.words[STATUS + 4 * n] for n in range(4)] == [exchange.TIMED_OUT.value, 5, 3, 17]


@pytest.mark.parametrize("space", SPACES)
def test_a_tagged_store_stores_value_and_turn_where_it_may(space: str) -> None:
    memory = Memory({})
    run(exchange.store_tagged_program(1, space), 2, memory, _1=np.uint64([BASE, BASE + 8]), _2=np.uint32([1, 0]),
        _3=np.uint32([POISON, 1]), _4=np.uint32([TAG, TAG]))  # fmt: skip
    assert memory.words == {BASE: (TAG << 32) | POISON}


@pytest.mark.parametrize("apart", [8, 16, -8])
@pytest.mark.parametrize("offset", [0, 8])
def test_two_tagged_words_are_stored_wherever_they_lie(apart: int, offset: int) -> None:
    """Neighbours at a multiple of 16 bytes at once, others one by one; each only where its predicate allows."""
    stored = [(1, 1), (1, 0), (0, 1), (0, 0)]
    base = np.uint64([BASE + offset + 64 * lane for lane in range(4)])
    first, second = np.uint32(list(zip(*stored, strict=True)))
    memory = Memory({})
    run(exchange.store_tagged_program(2, IN_MEMORY), 4, memory, _2=base, _3=np.uint64(base.astype(np.int64) + apart),
        _4=first, _5=second, _6=np.uint32([1, 2, 3, 4]), _7=np.uint32([5, 6, 7, 8]),
        _8=np.full(4, TAG, np.uint32), _9=np.full(4, TAG, np.uint32))  # fmt: skip
    expected = {}
    for lane, (one, other) in enumerate(stored):
        if one:
            expected[int(base[lane])] = (TAG << 32) | (lane + 1)
        if other:
            expected[int(base[lane]) + apart] = (TAG << 32) | (lane + 5)
    assert memory.words == expected


@pytest.mark.parametrize("pack", [1, 2])
def test_the_tagged_store_names_as_many_operands_as_its_constraints(pack: int) -> None:
    constraints = exchange.store_tagged_constraints(pack).split(",")
    named = re.findall(r"\$(\d+)", exchange.store_tagged_program(pack, IN_MEMORY))
    assert sorted({int(n) for n in named}) == list(range(len(constraints)))
    assert constraints[pack] == "l"


def test_fetching_ahead_changes_nothing() -> None:
    memory = Memory(words())
    run(exchange.prefetch_program(), 2, memory, _1=np.uint64([BASE, 0]), _2=np.uint32([1, 0]))
    assert memory.words == words()
    assert memory.reads == 0


@pytest.mark.parametrize("pack", [1, 2])
def test_the_tagged_program_names_as_many_operands_as_its_constraints(pack: int) -> None:
    text = exchange.poll_tagged_program(4, pack, 512, IN_MEMORY)
    constraints = exchange.poll_tagged_constraints(4, pack).split(",")
    assert max(int(n) for n in re.findall(r"\$(\d+)", text)) < len(constraints)
    assert constraints.count("=&l") == 4 * pack
    assert constraints[4 * pack] == constraints[5 * pack] == "l"


class OfThree:
    """A block of rank 1 in a cluster of three, with 256 bytes of shared memory."""

    memory, size, rank = 0x5000, 256, 1

    def __init__(self) -> None:
        self.calls: list[str] = []

    def arrive(self) -> None:
        self.calls.append("arrive")

    def wait(self) -> None:
        self.calls.append("wait")


def in_cluster(text: str, lanes: int, cluster: OfThree | None, **registers: np.ndarray) -> dict[str, np.ndarray]:
    given = {f"${name.lstrip('_')}": value for name, value in registers.items()}
    memory = Memory({})
    return emulator_ptx.run(emulator_ptx.parse(text), given, lanes, (5, 3), memory.load, memory.store, cluster)


@pytest.mark.parametrize("own", [False, True])
def test_the_last_bytes_of_a_clusters_blocks(own: bool) -> None:
    after = in_cluster(exchange.cluster_memory_program(64, own), 3, OfThree(), _1=np.uint32([0, 1, 2]))
    there = [0x5000 + 256 - 64] * 3 if own else [0x4F00 + 192, 0x5000 + 192, 0x5100 + 192]
    assert after["$0"].tolist() == there


def test_the_blocks_of_a_cluster_meet() -> None:
    cluster = OfThree()
    in_cluster(exchange.MEET.value, 1, cluster, _1=np.uint32([7]))
    assert cluster.calls == ["arrive", "wait"]


def test_ptx_for_a_cluster_says_when_there_is_none() -> None:
    with pytest.raises(RuntimeError, match="PTX for a cluster in a launch without"):
        in_cluster(exchange.MEET.value, 1, None, _1=np.uint32([7]))
