"""A frozen LLM that is too large for one device: its layers' weights spread over the processes (torch's FSDP2).

Each process holds a part of every layer and is sent the rest while the layer is computed. What is trained stays whole
in every process, so that steps, states and results are those of a run whose LLM is whole.
"""

from itertools import chain

from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from minigpt5_core.llm import FrozenLLM


def shard(llm: FrozenLLM, adapted: PeftModel, accelerator: Accelerator) -> None:
    """Spreads the LLM's layers over all processes and moves what stays whole to this one's device."""
    device = accelerator.device
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    whole = {p for name, p in adapted.named_parameters() if p.requires_grad or ".lora_" in name}
    for layer in _layers(llm):
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    parts = [llm.causal_lm] if llm.image_encoder is None else [llm.causal_lm, llm.image_encoder]
    for tensor in chain(*(chain(part.parameters(), part.buffers()) for part in parts)):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
    accelerator.print(_told(llm, accelerator.num_processes))


def _layers(llm: FrozenLLM) -> nn.ModuleList:
    layers = llm.decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def _told(llm: FrozenLLM, processes: int) -> str:
    weights = list(llm.causal_lm.parameters())
    here = sum((one.to_local() if isinstance(one, DTensor) else one).numel() for one in weights)
    whole = sum(one.numel() for one in weights)
    return f"the LLM is spread over {processes} processes: each holds {here:,} of its {whole:,} parameters"


def is_sharded(llm: FrozenLLM) -> bool:
    """Whether every process must run the LLM for any of them to."""
    return isinstance(_layers(llm)[0], FSDPModule)
