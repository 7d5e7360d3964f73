"""Models inside wrappers: of PEFT, of `torch.compile`, and of data-parallel training.

Pruning works on the model of transformers inside. What a wrapper has put into it stays in force:
the layers of PEFT's adapters, the hooks of accelerate. The caller goes on calling the wrapper.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from torch import nn

from tokenprune.errors import UnsupportedModelError

__all__ = ["unwrapped"]

_OTHER_ROWS: Final = {
    # Kinds of PEFT's adapters that do more than to change weights: what.
    "ADAPTION_PROMPT": "reads prompts of its own in each attention",
    "XLORA": "weighs its adapters token by token in a forward before each forward",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers inside wrappers, `model` itself if there are none.

    Raises:
        UnsupportedModelError: A wrapper adds tokens, or is of a kind that is not known.
    """
    from transformers import PreTrainedModel  # heavy

    known: type[nn.Module] = PreTrainedModel
    while not isinstance(model, known):
        inner = _inside(model)
        if inner is None:
            _check_wraps_nothing(model, known)
            return model
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper holds; None if it is none that is known."""
    # What was not imported has wrapped nothing, and importing it takes long.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(model, compiler.OptimizedModule):
        found: nn.Module = model._orig_mod
        return found
    if isinstance(model, nn.parallel.DistributedDataParallel):
        found = model.module
        return found
    if isinstance(model, nn.DataParallel):
        if len(model.device_ids) > 1:
            raise UnsupportedModelError(
                f"cannot prune a DataParallel over {len(model.device_ids)} devices, which copies "
                "the model for each; give it one of them, or use DistributedDataParallel"
            )
        found = model.module
        return found
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return _inside_peft(model)
    return None


def _inside_peft(model: Any) -> nn.Module:
    for name in model.active_adapters:
        config = model.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        why = _OTHER_ROWS.get(kind)
        if config.is_prompt_learning:
            why = "puts virtual tokens before the prompt"
        elif getattr(config, "alora_invocation_tokens", None):
            why = "begins at a token of the unpruned prompt"
        if why is not None:
            raise UnsupportedModelError(
                f"cannot prune with the {kind} adapter {name!r} of PEFT, which {why}; use an "
                "adapter that only changes weights, such as LoRA, or the model without it"
            )
    inner: nn.Module = model.base_model.model  # between them is what put the adapters in
    return inner


def _check_wraps_nothing(model: nn.Module, architecture: type[nn.Module]) -> None:
    if not isinstance(model, nn.Module):
        return
    inner = next((one for one in model.modules() if isinstance(one, architecture)), None)
    if inner is not None:
        raise UnsupportedModelError(
            f"cannot prune a {type(model).__name__}, a wrapper that is not known; give the "
            f"{type(inner).__name__} inside it, or wrap it in DistributedDataParallel instead"
        )
