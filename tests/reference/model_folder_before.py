"""Makes ``tests/core/model/before``: a model folder and an adapter as an earlier mlxlora wrote them.

Run it with mlxlora of commit f9bfb80, whose config.json does not name the
tokenizer's files; what came of it is kept, so that such folders go on working::

    git archive f9bfb80 | tar -x -C OLD
    PYTHONPATH=OLD:OLD/plugins:OLD/tests python tests/reference/model_folder_before.py tests/core/model/before
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path


def main(target: Path) -> None:
    """Write the folder, its adapter and what they compute into ``target``."""
    import mlx.core as mx
    import sentencepiece
    from conftest import sentences, write_checkpoint
    from mlx.utils import tree_map

    from mlxlora_core import adapter_file, convert, model_folder
    from mlxlora_core import plugins as registry

    plugins = registry.load(environ={"MLXLORA_PLUGINS": ""})
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model_bytes = io.BytesIO()  # a file would have its own path inside
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences()),
            model_writer=model_bytes,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
        (work / "tokenizer.model").write_bytes(model_bytes.getvalue())
        checkpoint = write_checkpoint(
            work / "checkpoint",
            work / "tokenizer.model",
            n_layers=1,
            params={"rope_theta": 50000.0, "max_seq_len": 128},
        )
        affine = plugins.find("quantizer", "affine")
        packed = model_folder.Quantization(affine, affine.spec.options(group_size=32, bits=4))
        convert.convert(checkpoint, work / "model", plugins, quantization=packed)
        model = model_folder.load(work / "model", plugins)
        lora = plugins.find("adapter", "lora")
        adapted = adapter_file.attach(model, lora, lora.spec.options(rank=2), seed=1)
        tokens = mx.array([[1, 300, 7, 41]])
        said = {"fingerprint": model.fingerprint, "base": model.language_model(tokens)[0, -1, :8].tolist()}
        model.module.update(tree_map(lambda t: t + 0.05, model.module.trainable_parameters()))
        said["adapted"] = model.language_model(tokens)[0, -1, :8].tolist()
        adapter_file.save(work / "adapter.safetensors", model, adapted)
        shutil.copytree(work / "model", target / "model", dirs_exist_ok=True)
        shutil.copy(work / "adapter.safetensors", target)
        (target / "said.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
