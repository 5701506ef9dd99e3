"""The peer: torch and PEFT, one adapter and one text at a time, as one would write it with them.

On the processor, or on the GPU where JAX is on it.
"""

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax

from seal_jax.bench.timing import TooLarge
from seal_jax.models.config import FAMILIES, config_to_hf
from seal_jax.models.model import Model
from seal_jax.models.names import param_table


def has_peft() -> bool:
    """Whether the peer is installed, and can use what JAX uses."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "peft", "accelerate")):
        return False
    if jax.default_backend() == "gpu":
        import torch

        return torch.cuda.is_available()
    return jax.default_backend() == "cpu"


def _device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def make_peft_steps(
    model: Model, *, dtype: str, rank: int, alpha: float, targets: Sequence[str], num_steps: int
) -> Callable[[Sequence[Sequence[int]], int], None]:
    """Return `steps(texts, padded_length)`: one optimizer step on each text.

    As the authors' Trainer does: AdamW without weight decay, linear decay, clipping at 1, and
    labels that are the padded inputs, so that padding is in the loss; none where padded_length = 0.
    """
    import peft
    import torch

    base = torch_model(model, dtype)
    net = peft.get_peft_model(base, _lora_config(rank, alpha, targets))  # keeps these in float32
    net.train()
    trainable = [p for p in net.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.0, fused=_device() == "cuda")
    rate = torch.optim.lr_scheduler.LambdaLR(tx, lambda step: max(0.0, 1.0 - step / num_steps))
    pad = model.tokenizer.pad_id

    @_to_its_end()
    def steps(texts: Sequence[Sequence[int]], padded_length: int) -> None:
        for tokens in texts:
            padding = max(0, padded_length - len(tokens))
            ids = torch.tensor([[*tokens, *[pad] * padding]], device=_device())
            mask = torch.tensor([[1] * len(tokens) + [0] * padding], device=_device())
            loss = net(input_ids=ids, attention_mask=mask, labels=ids).loss
            tx.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            tx.step()
            rate.step()

    return steps


@contextlib.contextmanager
def _to_its_end() -> Generator[None]:
    """Wait for the GPU; say of memory that it ran out in the bench's words."""
    import torch

    try:
        yield
        if _device() == "cuda":
            torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError as error:
        raise TooLarge(str(error).partition(".")[0]) from error


def make_peft_generate(
    model: Model, *, dtype: str, rank: int, alpha: float, targets: Sequence[str]
) -> Callable[[Sequence[Sequence[Sequence[int]]], int], None]:
    """Return `write(groups, num_tokens)`: `generate` with a cache, a batch for every group.

    One group is written by the base model; of several, each by the next of two adapters.
    """
    import peft
    import torch

    base = torch_model(model, dtype).eval()
    again = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # of the same parameters
    adapted = peft.get_peft_model(again, _lora_config(rank, alpha, targets), adapter_name="0")
    adapted.add_adapter("1", _lora_config(rank, alpha, targets))
    adapted.eval()
    pad = model.tokenizer.pad_id

    @_to_its_end()
    def write(groups: Sequence[Sequence[Sequence[int]]], num_tokens: int) -> None:
        for i, prompts in enumerate(groups):
            if len(groups) > 1:
                adapted.set_adapter(str(i % 2))
            longest = max(map(len, prompts))
            ids = [[*[pad] * (longest - len(p)), *p] for p in prompts]
            mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
            ids, mask = (torch.tensor(x, device=_device()) for x in (ids, mask))
            with torch.no_grad():
                (adapted if len(groups) > 1 else base).generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=True,
                    top_k=0,
                    min_new_tokens=num_tokens,
                    max_new_tokens=num_tokens,
                    pad_token_id=pad,
                )

    return write


def torch_model(model: Model, dtype: str) -> Any:
    """Return the same model, of transformers, in that dtype."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = transformers.AutoConfig.for_model(**config_to_hf(model.config))
    make = getattr(transformers, FAMILIES[model.config.family].architecture)._from_config
    with torch.device(_device()):
        base = make(config, dtype=getattr(torch, dtype))
    missing, unexpected = base.load_state_dict(_state_dict(model), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return base


def _lora_config(rank: int, alpha: float, targets: Sequence[str]) -> Any:
    import peft

    return peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none"
    )


def _state_dict(model: Model) -> dict[str, Any]:
    """Return torch's view of the parameters, which stay where they are."""
    import torch

    state = {}
    for param in param_table(model.config):
        leaf = model.params
        for key in param.path:
            leaf = leaf[key]
        tensor = torch.from_dlpack(leaf)
        state[param.hf_name] = tensor.T if param.is_kernel else tensor
    return state
