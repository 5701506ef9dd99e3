"""The peer: torch and PEFT, one adapter and one text at a time, as one would write it with them."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from seal_jax.models import Model
from seal_jax.models.config import FAMILIES, config_to_hf
from seal_jax.models.names import param_table


def has_peft() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "peft", "accelerate"))


def make_peft_step(
    model: Model, *, dtype: str, rank: int, alpha: float, targets: Sequence[str], num_steps: int
) -> Callable[[Sequence[int], int], float]:
    """Return `step(tokens, padded_length) -> loss`: one optimizer step on one text.

    As the authors' Trainer does: AdamW without weight decay, linear decay, clipping at 1, and
    labels that are the padded inputs, so that padding is in the loss. With padded_length 0 the text
    is taken as it is, which is the fastest loop that this library allows at batch 1.
    """
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = transformers.AutoConfig.for_model(**config_to_hf(model.config))
    base_class = getattr(transformers, FAMILIES[model.config.family].architecture)
    base = base_class(config)
    missing, unexpected = base.load_state_dict(_state_dict(model), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    base = base.to(getattr(torch, dtype))
    lora = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none"
    )
    net = peft.get_peft_model(base, lora)  # keeps adapters in float32
    net.train()
    trainable = [p for p in net.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(tx, lambda step: max(0.0, 1.0 - step / num_steps))
    pad = model.tokenizer.pad_id

    def step(tokens: Sequence[int], padded_length: int) -> float:
        padding = max(0, padded_length - len(tokens))
        ids = torch.tensor([[*tokens, *[pad] * padding]])
        mask = torch.tensor([[1] * len(tokens) + [0] * padding])
        loss = net(input_ids=ids, attention_mask=mask, labels=ids).loss
        tx.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        tx.step()
        rate.step()
        return float(loss.detach())

    return step


def _state_dict(model: Model) -> dict[str, Any]:
    import torch

    state = {}
    for param in param_table(model.config):
        leaf = model.params
        for key in param.path:
            leaf = leaf[key]
        array = np.asarray(jax.device_get(leaf), np.float32)
        state[param.hf_name] = torch.from_numpy(np.array(array.T if param.is_kernel else array))
    return state
