"""Which part of a model reads text, where it sees or hears too."""

from typing import Any

from torch import nn


def text_config(module: nn.Module) -> Any:
    """The configuration of a module, or of its part that reads text; whatever else a module calls ``config``; or None."""
    config = getattr(module, "config", None)
    find = getattr(config, "get_text_config", None)
    return config if find is None else find()


def other_parts(module: nn.Module) -> list[str]:
    """The parts beside the one that reads text, of a model that sees or hears too: its towers and what projects from them.

    There are none where the configuration tells of no text part, or of an encoder and a decoder.
    """
    model: Any = module
    config, text = getattr(module, "config", None), text_config(module)
    if text is config or getattr(config, "is_encoder_decoder", False) or not hasattr(module, "get_decoder"):
        return []
    reads, head = model.get_decoder(), model.get_output_embeddings()
    path = next((name for name, m in module.named_modules() if m is reads), "")
    heads, steps, found = set() if head is None else set(head.modules()), path.split("."), []
    for depth in range(len(steps) if path else 0):
        above = ".".join(steps[:depth])
        for name, m in module.get_submodule(above).named_children():
            if name != steps[depth] and m not in heads and next(m.parameters(), None) is not None:
                found.append(f"{above}.{name}".lstrip("."))
    return found


def inside(name: str, parts: list[str]) -> str | None:
    """The part that a module or a parameter of this name belongs to."""
    return next((part for part in parts if name.startswith(f"{part}.")), None)
