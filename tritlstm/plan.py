"""stub, grows into the planner"""
from __future__ import annotations
import dataclasses, torch
from typing import Any
from .kernels.launch import Launch
PROTOCOLS = {"none": 0, "counter": 1, "flag": 2}

@dataclasses.dataclass(frozen=True)
class Device:
    name: str
    sms: int

@dataclasses.dataclass(frozen=True)
class RecurrentPlan:
    kernel: str
    tier: str
    protocol: str
    n_blocks: int
    n_groups: int
    n_tiles: int
    constants: dict
    num_warps: int
    spin_limit: int = 20000
    def launch(self, arguments, constants):
        return Launch(self.kernel, (self.n_blocks, self.n_groups), {**arguments, "n_tiles": self.n_tiles, "spin_limit": self.spin_limit}, {**self.constants, **constants}, self.num_warps, cooperative=True)

@dataclasses.dataclass(frozen=True)
class GemmPlan:
    grid: tuple
    constants: dict
    def launch(self, arguments):
        return Launch("gate_gemm", self.grid, arguments, self.constants, 4, 3)

def dot_precision(x): return "ieee"
def device_of(x): return Device("emu", 4)
def _common(kind, hidden, batch, o):
    HX = -(-hidden//8)*8
    bh = o.get("block_h", 16); bb = o.get("block_b", 16)
    tier = o.get("tier", "persistent")
    protocol = "none" if tier in ("step","single") else o.get("protocol", "flag")
    if tier == "single":
        bh = max(16, 1 << (hidden-1).bit_length())
    nb = -(-HX//bh); nt = -(-batch//bb)
    return HX, bh, bb, tier, protocol, nb, nt
def forward(length, batch, hidden, dtype, device, precision, save, overrides=None):
    o = overrides.overrides if overrides else {}
    HX, bh, bb, tier, protocol, nb, nt = _common("f", hidden, batch, o)
    bk = bh if tier == "single" else o.get("block_k", 16)
    nc = -(-hidden//bk)
    res = o.get("resident", nc)
    c = dict(H=hidden, HX=HX, BLOCK_H=bh, BLOCK_B=bb, BLOCK_K=bk, RESIDENT=res, POLL=o.get("poll", res), PROTOCOL=PROTOCOLS[protocol], SINGLE=tier=="single", PRECISION=precision)
    return RecurrentPlan("recurrent_forward", tier, protocol, nb, min(nt, o.get("groups", 2)), nt, c, 4, overrides.spin_limit)
def backward(length, batch, hidden, dtype, device, precision, overrides=None):
    o = overrides.overrides if overrides else {}
    HX, bh, bb, tier, protocol, nb, nt = _common("b", hidden, batch, o)
    bk = o.get("block_k_backward", 16); sp = o.get("split", 2)
    nc = -(-4*HX//(bk*sp))
    res = o.get("resident_backward", nc)
    c = dict(H=hidden, HX=HX, BLOCK_H=bh, BLOCK_B=bb, BLOCK_K=bk, SPLIT=sp, RESIDENT=res, POLL=o.get("poll", res), PROTOCOL=PROTOCOLS[protocol], SINGLE=tier=="single", PRECISION=precision)
    return RecurrentPlan("recurrent_backward", tier, protocol, nb, min(nt, o.get("groups", 2)), nt, c, 4, overrides.spin_limit)
def gate_gemm(rows, D, hidden, dtype, device, precision):
    HX = -(-hidden//8)*8
    bm, bn, bk = 16, 64, 16
    return GemmPlan((-(-rows//bm)*(-(-4*HX//bn)),), dict(D=D, H=hidden, HX=HX, BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk, GROUP_M=4, PRECISION=precision))
