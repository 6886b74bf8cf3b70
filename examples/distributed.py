"""The demo's character model on several GPUs, machines or CPU processes, by torch.distributed alone.

    torchrun --nproc-per-node 2 examples/distributed.py                  # a copy of the model on every rank (DDP)
    torchrun --nproc-per-node 2 examples/distributed.py --shard          # every rank keeps a part of it (FSDP2)
    torchrun --nproc-per-node 4 examples/distributed.py --shard --checkpoint runs/model    # saved, or taken up again

`--batch` streams of text are dealt out to the ranks, so the losses are those of one rank, whatever their number. Each
rank carries the states of its own streams from segment to segment (truncated backpropagation). A checkpoint holds
weights, optimizer and states, and can be taken up by another number of ranks, sharded or not.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from tritlstm.demo import data
from tritlstm.demo.model import CharacterModel


def distribute(model: nn.Module, shard: bool, mesh: DeviceMesh) -> nn.Module:
    """The same model, to be called the same way: its gradients are averaged over the ranks."""
    if not shard:
        on_gpu = mesh.device_type == "cuda"
        return DistributedDataParallel(model, device_ids=[torch.cuda.current_device()] if on_gpu else None)
    for part in model.children():
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def segments(text: Tensor, steps: int) -> Iterator[Tensor]:
    """[T + 1, B] after [T + 1, B] of text [N, B], again and again."""
    while True:
        yield from (text[begin : begin + steps + 1].long() for begin in range(0, len(text) - steps, steps))


def train(options: argparse.Namespace, device: torch.device) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps, averaged over ranks, and the whole weights; the process group is there already."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rank, count = mesh.get_rank(), mesh.size()
    if options.batch % count:
        raise SystemExit(f"--batch must be a multiple of the {count} ranks, got {options.batch}")
    corpus = data.load(options.text)
    mine = slice(rank * options.batch // count, (rank + 1) * options.batch // count)
    text = torch.from_numpy(data.streams(corpus.train, options.batch)[:, mine]).to(device)

    torch.manual_seed(options.seed)  # on every rank alike: DDP and FSDP begin with equal copies
    dtype = getattr(torch, options.dtype)
    model = CharacterModel(len(corpus.vocabulary), 32, options.hidden, options.layers).to(device, dtype)
    model = distribute(model, options.shard, mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    shape = (options.layers, options.batch // count, options.hidden)
    states: tuple[Tensor, Tensor] = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in "hc")  # type: ignore[assignment]
    progress, losses = {"step": torch.zeros((), dtype=torch.int64)}, []

    def everything() -> dict[str, object]:
        weights, moments = get_state_dict(model, optimizer)
        # A rank's states are its part of those of the whole batch: so another number of ranks can read them.
        whole = {name: DTensor.from_local(part, mesh, [Shard(1)]) for name, part in zip("hc", states, strict=True)}
        return {"model": weights, "optimizer": moments, "states": whole, "progress": progress}

    if options.checkpoint and (options.checkpoint / ".metadata").exists():
        saved = everything()
        checkpoint.load(saved, checkpoint_id=options.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        states = tuple(saved["states"][name].to_local() for name in "hc")

    per_pass = (len(text) - 1) // options.sequence
    for step, ids in enumerate(segments(text, options.sequence)):
        if step < int(progress["step"]):
            continue
        if step >= options.steps:
            break
        if step % per_pass == 0:
            states = (torch.zeros_like(states[0]), torch.zeros_like(states[1]))
        optimizer.zero_grad()
        logits, (h, c) = model(ids[:-1], states)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        states = (h.detach(), c.detach())
        progress["step"] += 1
        average = loss.detach().clone()
        dist.all_reduce(average)
        losses.append(average.item() / count)
        if rank == 0:
            print(f"step {step + 1}  loss {losses[-1]:.6f}", flush=True)
    if options.checkpoint:
        checkpoint.save(everything(), checkpoint_id=options.checkpoint)
    return losses, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true", help="FSDP2 in the place of DDP")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32, help="streams of text of all ranks together")
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=data.standard_library(), help="a folder of Python files")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from, where it has one, and to save to")
    parser.add_argument("--result", type=Path, help="file for the losses and the whole weights, by torch.save")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start this with torchrun --nproc-per-node N examples/distributed.py")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group()
    losses, weights = train(options, device)
    if options.result and dist.get_rank() == 0:
        torch.save({"losses": losses, "weights": weights}, options.result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
