"""A smaller student by leaving layers out."""

import copy
import json
import re
from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def layers_to_drop(drop: str, num_layers: int) -> list[int]:
    """
    The layers that an option names.

    Args:
        drop (`str`):
            `"middle:N"`, the N layers in the middle, or `"every_second"`, the second, fourth and so on.
        num_layers (`int`):
            Layers of the model.

    Returns:
        `list[int]`: Their indices.

    Raises:
        `ValueError`: If it names neither, or would leave no layer.
    """
    if drop == "every_second" and num_layers > 1:
        return list(range(1, num_layers, 2))
    found = re.fullmatch(r"middle:(\d+)", drop)
    if found and 0 < int(found[1]) < num_layers:
        first = (num_layers - int(found[1])) // 2
        return list(range(first, first + int(found[1])))
    raise ValueError(
        f"`drop` must be 'every_second', or 'middle:N' with N from 1 to {num_layers - 1}, since the model has "
        f"{num_layers} layers; got {drop!r}."
    )


def drop_layers(model: PreTrainedModel, drop: str) -> PreTrainedModel:
    """
    A copy of a causal language model without some of its layers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model, which stays as it is.
        drop (`str`):
            Layers to leave out, see [`layers_to_drop`].

    Returns:
        [`~transformers.PreTrainedModel`]: The smaller model.

    Raises:
        `ValueError`: If the layers are not one list of modules, as in an encoder-decoder.
    """
    num_layers = model.config.num_hidden_layers
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and name.count(".") < 3
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} lists of {num_layers} layers, and needs one: {stacks}"
        )
    dropped = set(layers_to_drop(drop, num_layers))
    kept = [index for index in range(num_layers) if index not in dropped]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config._name_or_path = len(kept), ""  # it is no longer the model of that name
    if getattr(config, "layer_types", None):  # where some layers attend to a window
        config.layer_types = [config.layer_types[index] for index in kept]
    student = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    position = {str(index): str(number) for number, index in enumerate(kept)}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(f"{stacks[0]}."):
            index, rest = name.removeprefix(f"{stacks[0]}.").split(".", 1)
            if index not in position:
                continue
            name = f"{stacks[0]}.{position[index]}.{rest}"
        weights[name] = tensor
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


def claim_folder(folder: Path, **made_from: str) -> None:
    """
    Note what a student is made from, before it is saved.

    Args:
        folder (`Path`):
            Folder of the student, made if need be.
        **made_from (`str`):
            The options that decide it.

    Raises:
        `ValueError`: If the folder is that of another student, whose groups and adapters would be taken for this one's.
    """
    note = folder / "made_from.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != made_from:
        raise ValueError(
            f"{folder} holds a student that was made from {note.read_text(encoding='utf-8')}, and not from "
            f"{json.dumps(made_from)}. Choose another `--output_dir`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(made_from), encoding="utf-8")
