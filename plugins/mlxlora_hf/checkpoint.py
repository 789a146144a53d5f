"""Open a folder: what it states, its tensors still unread, and the files of its tokenizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mlxlora_core.api import ForeignModel, ModelError
from mlxlora_hf.config import read_config
from mlxlora_hf.folder import CONFIG, HUGGING_FACE, MISTRAL, PARAMS, Kind, kind_of, read_table
from mlxlora_hf.names import find_names, renamed, short_names
from mlxlora_hf.packed import join_packed
from mlxlora_hf.shards import find_tensors
from mlxlora_hf.tokenizer_files import hugging_face_files, mistral_files


def open_checkpoint(folder: Path) -> ForeignModel:
    """The model in a folder of Hugging Face, mlx-lm or Mistral.

    Raises:
        ModelError: a part is absent, damaged, or of a kind that is not read, which is named.
        SafetyError: the config names a file of code, or the index files outside the folder.
    """
    return _mistral(folder) if kind_of(folder) is Kind.MISTRAL else _hugging_face(folder)


def _hugging_face(folder: Path) -> ForeignModel:
    config = read_config(folder)
    found = find_tensors(folder, HUGGING_FACE)
    try:
        names = find_names(found.tensors)
        short, told = short_names(found.tensors, names)
    except ModelError as fault:
        raise ModelError(fault.what, where=folder) from fault
    tensors = {short[name]: tensor for name, tensor in found.tensors.items() if name in short}
    rename = partial(renamed, names=names)
    return ForeignModel(
        config=config.text,
        tokenizer=hugging_face_files(folder, config.ends),
        tensors=join_packed(tensors, config.quantization, rename, folder / CONFIG),
        notes=[*config.notes, *found.notes, *told],
        layout="hf",
    )


def _mistral(folder: Path) -> ForeignModel:
    """The model in the folder as Mistral gives it, whose names and rows are Meta's."""
    path = folder / PARAMS
    if not path.exists():
        raise ModelError(f"there is no {PARAMS}", where=folder, fix="download the whole folder")
    params = read_table(path)
    if params.get("quantization"):
        method = params["quantization"]
        named = next(iter(method.values()), method) if isinstance(method, dict) else method
        raise ModelError(
            f"is quantized as {named}, which is not read; bf16, f16 and f32 weights are",
            where=path,
            fix="take the model that it was made of, and quantize that: --quantize",
        )
    found = find_tensors(folder, MISTRAL)
    tokenizer, notes = mistral_files(folder)
    return ForeignModel(
        config=params, tokenizer=tokenizer, tensors=found.tensors, notes=[*found.notes, *notes]
    )
