"""A GPU without a GPU: `torch.device("sim", i)`, for tests that must see what a CPU forgives.

On a CPU every copy is done at once, every tensor is on the same device, memory never ends. A program written
for GPUs can be wrong in each of these points and pass all its tests there. This package simulates an
accelerator on torch's free dispatch key PrivateUse1, in Python alone, as strict as CUDA where CUDA is strict:

* Tensors on it are plain `torch.Tensor`s with storages of their own (memory.py). Operators run the CPU's
  kernels on the same bytes (operators.py), so results are the CPU's bit for bit. Mixing devices raises.
* `torch.sim` has the functions of `torch.cuda` (device_module.py): the same signatures, and an index-less
  device is refused where CUDA refuses it.
* Work on side streams is done as late as the program allows (streams.py), and every access to memory is
  entered in vector clocks (hazards.py): two accesses without an order are found whatever the timing.
* Fresh memory is poisoned. A model of CUDA's caching allocator (allocator.py) counts allocated and reserved
  bytes, keeps limits, and runs out of memory when told to.
* What makes the host wait for the device is counted, with file and line (host_reads.py).
* Pinning by `cudart().cudaHostRegister` can be refused (pinning.py). bitsandbytes' operators and managed
  memory (libraries.py, managed_memory.py), flash attention of variable length (flash.py) and collectives
  (collectives.py) work on it, and the storages that torch makes without the dispatcher (storages.py).

Tests take the fixture `simulated_gpu` (fixture.py); whole commands in processes of their own run under
`python -m simulated_gpu`. Everything is off otherwise: `torch.sim.is_available()` is False, and CPU tests in
the same process do not notice.

What it cannot do:

* One device per process trains. Forward passes and copies work on `sim:1`; a backward pass there ends in an
  INTERNAL ASSERT of torch, because a device guard written in Python counts as one device. For the same
  reason the C++ side takes "sim" without an index for sim:0, whatever the current device is.
* `torch.accelerator`'s memory and waits, `Tensor.pin_memory()` and `torch.Generator("sim")` cannot be offered
  from Python: they raise. `torch.Stream("sim")` is the default stream, and `torch.accelerator` changes no
  device. Programs take streams, events, memory and pinning from `torch.get_device_module(device)`. Random
  numbers are the CPU generator's.
* Backward passes that autograd's engine runs are on the default stream, also where the forward was not.
* No Triton, no CUDA graphs, no autocast, no sparse tensors: these raise. No time, no scratch
  memory inside kernels, no expandable segments.
* Work on the default stream is never late (copies to pinned memory are). The host's own reads and writes of
  pinned memory are seen only by the checksums of copies' sources and by poison. A view of several dimensions
  counts as the span from its first byte to its last.
"""
