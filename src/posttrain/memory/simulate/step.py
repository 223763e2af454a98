"""posttrain's own training step on fake tensors: the model of a config, its adapters, a stream, GRPO's loss, backward
and the optimizer.

The CPU plays the device and "meta" plays the host: fake tensors of a device that this torch was not built for have no
autograd. Ops are told what the CPU stands for, so dtypes, tile sizes and the way through attention are those of the
device. The gradient of the log-probs is not given ahead, since numbers would have to be compared: a head that is
trained in float32 is passed twice, which takes smaller tiles of logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedConfig

from posttrain.data.stream import PackItem, pack
from posttrain.errors import UserError
from posttrain.losses.policy import OBJECTIVES, PolicyOptions, policy_terms
from posttrain.memory.job import ATTENTION, TrainingJob
from posttrain.memory.simulate.live import LiveStorages
from posttrain.memory.simulate.stand_ins import EightBitAdam, put_in_4bit
from posttrain.models.adapters import add_lora
from posttrain.models.forward import logprobs
from posttrain.models.head import base_model
from posttrain.models.load import prepare_model
from posttrain.models.tiles import tiled
from posttrain.ops.offload import ActivationOffload
from posttrain.ops.precision import standing_for

HOST = "meta"
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit")
KEPT = ("weights", "adapters", "gradients", "optimizer")  # what is there between the micro-batches too


@dataclass(frozen=True)
class SimulatedStep:
    """Bytes. `parts` say what the device held at its peak: weights, adapters, gradients, optimizer, checkpoints (what
    the forward leaves for the backward, the layers' inputs above all) and rest."""

    device: int  # at the peak
    host: int  # at its own peak: what was offloaded
    parts: Mapping[str, int]

    @property
    def above(self) -> int:
        """What the step takes for itself: the peak without weights, adapters, gradients and optimizer."""
        return self.device - sum(self.parts.get(name, 0) for name in KEPT)


def simulate_step(config: PreTrainedConfig, job: TrainingJob, completions: tuple[int, ...] | None = None) -> SimulatedStep:
    """The memory of one micro-batch of a later step of the run, and of the optimizer step after it. Seconds for 8B
    parameters; nothing is allocated.

    completions: the length of every completion behind the one prompt; None: as many of `job.completion_length` as a
    micro-batch holds. Raises UserError for a model that trainers refuse too, and for what only the closed form knows:
    other optimizers, adapters on some layers.
    """
    if job.optim not in OPTIMIZERS or job.lora_targets is not None:
        raise UserError(f"only {', '.join(OPTIMIZERS)}, and adapters on all linear layers, can be simulated; `plan` knows others")
    model = shaped_model(config, job)
    is_fused = (job.attention or ATTENTION[job.device]) == "fused"
    with standing_for(job.device, has_fused_attention=is_fused), FakeTensorMode(allow_non_fake_inputs=True):
        return measured_step(model, job, completions)


def measured_step(model: nn.Module, job: TrainingJob, completions: tuple[int, ...] | None = None) -> SimulatedStep:
    """The step of a model without weights (`shaped_model`), which get real ones that hold anything, or fake ones where
    the caller sees to that."""
    completions = (job.completion_length,) * job.rows_in_stream if completions is None else completions
    with LiveStorages(HOST) as live:
        _materialise(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        live.label([*model.parameters(), *model.buffers()], "weights")
        if job.lora_r is not None:
            live.label(trained, "adapters")
        update = _optimizer(model, trained, job, live)
        live.restart_peaks()
        _forward_and_backward(model, job, completions, live)
        update()
    return SimulatedStep(live.peak, live.host_peak, live.peak_parts)


def shaped_model(config: PreTrainedConfig, job: TrainingJob) -> nn.Module:
    """The model as it is trained, on "meta": adapters are moved while they are made, which fake tensors do not
    allow."""
    with torch.device("meta"):
        model = _with_adapters(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job.dtype)), job)
    if job.gradient_checkpointing:
        base_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _materialise(model: nn.Module) -> None:
    """Parameters and buffers on the CPU instead; what was tied stays tied."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    empty = torch.empty_like(tensor, device="cpu", requires_grad=False)
                    made[tensor] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                held[name] = made[tensor]  # type: ignore[assignment]


def _with_adapters(model: Any, job: TrainingJob) -> nn.Module:
    prepare_model(model)
    if job.load_in_4bit:
        put_in_4bit(model, getattr(torch, job.dtype), skip=[model.get_output_embeddings()])
    if job.lora_r is not None:
        from peft import LoraConfig

        model = add_lora(model, LoraConfig(r=job.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"), dtype=getattr(torch, job.adapter_dtype))
    return model


def _optimizer(model: nn.Module, trained: list[nn.Parameter], job: TrainingJob, live: LiveStorages) -> Any:
    """Gradients and state as they are after an earlier step; what a further step does."""
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    live.label([parameter.grad for parameter in trained if parameter.grad is not None], "gradients")
    if job.optim == "adamw_8bit":
        state = EightBitAdam(trained, in_32_bits=[module.weight for module in model.modules() if isinstance(module, nn.Embedding)]).state
        live.label(state, "optimizer")
        return lambda: state  # which lives until then; it is changed in place
    optimizer = torch.optim.AdamW(trained, foreach=False)
    optimizer.step()
    live.label([value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)], "optimizer")
    return optimizer.step


def _forward_and_backward(model: nn.Module, job: TrainingJob, completions: tuple[int, ...], live: LiveStorages) -> None:
    stream = pack([PackItem([0] * job.prompt_length, [[0] * length for length in completions])])
    offload = ActivationOffload(host=HOST) if job.activation_offloading else None

    def kept(tensor: torch.Tensor) -> Any:
        if not isinstance(tensor, nn.Parameter) and tensor._base is None:
            live.label([tensor], "checkpoints")
        return tensor if offload is None else offload.pack(tensor)

    with ExitStack() as stack:
        if job.tile_rows is not None:
            stack.enter_context(tiled(model, job.tile_rows))
        with saved_tensors_hooks(kept, (lambda tensor: tensor) if offload is None else offload.unpack):
            with torch.autocast("cpu", torch.bfloat16, enabled=job.bf16 and not job.emulates_bf16):
                logps = logprobs(model, stream, entropy_grad=False).logps  # (B, T)
            mask = torch.ones_like(logps, dtype=torch.bool)
            advantages = torch.ones(len(logps))
            terms = policy_terms(logps, None, advantages, mask, objective=OBJECTIVES["dapo"], options=PolicyOptions())
            loss = terms.per_token.sum()
        del logps, mask, terms
        loss.backward()
