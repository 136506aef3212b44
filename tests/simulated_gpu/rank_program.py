"""What one rank does in test_collectives.py: `python -m simulated_gpu simulated_gpu.rank_program`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator


def main() -> None:
    accelerator = Accelerator()
    rank, device = accelerator.process_index, torch.device("sim", 0)
    assert accelerator.num_processes == 2 and accelerator.device.type == "sim"
    mine = torch.full((3,), rank + 1.0, device=device)

    total = mine.clone()
    dist.all_reduce(total)
    assert total.device == device and total.tolist() == [3, 3, 3]

    work = dist.all_reduce(total, op=dist.ReduceOp.MAX, async_op=True)
    assert work is not None
    work.wait()

    of_first = mine.clone()
    dist.broadcast(of_first, src=0)
    assert of_first.tolist() == [1, 1, 1]

    parts = [torch.empty(3, device=device) for _ in range(2)]
    dist.all_gather(parts, mine)
    assert [part[0].item() for part in parts] == [1, 2]

    gathered = torch.empty(6, device=device)
    dist.all_gather_into_tensor(gathered, mine)
    assert gathered.tolist() == [1, 1, 1, 2, 2, 2]
    assert accelerator.gather(mine).tolist() == gathered.tolist()

    objects = [{"rank": rank}]
    dist.broadcast_object_list(objects, src=1)
    assert objects == [{"rank": 1}]

    dist.barrier(device_ids=[0])
    accelerator.wait_for_everyone()
    weight = torch.ones(2, 2, device=device, requires_grad=True)
    (weight * (rank + 1)).sum().backward()
    dist.all_reduce(weight.grad)
    assert weight.grad is not None and weight.grad.tolist() == [[3, 3], [3, 3]]
    print(f"rank {rank} is right")
    accelerator.end_training()


if __name__ == "__main__":
    main()
