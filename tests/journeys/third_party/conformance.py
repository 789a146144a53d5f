"""What their authors would test them with: mlxlora's suites, over the five as pip has installed them."""

from __future__ import annotations

import json

import acme_bytes
import acme_eventlog
import acme_int8
import acme_mosaic
import acme_rawbin
import mlx.core as mx
import mosaic_model
import numpy as np

from mlxlora_core.testing.architecture import ArchitectureSuite
from mlxlora_core.testing.exporter import ExporterSuite
from mlxlora_core.testing.observer import ObserverSuite
from mlxlora_core.testing.quantizer import QuantizerSuite
from mlxlora_core.testing.tokenizer import TokenizerSuite
from mlxlora_core.testing.weight_loader import WeightLoaderSuite


class TestBytes(TokenizerSuite):
    (spec,) = acme_bytes.mlxlora_tokenizers()

    def write(self, folder):
        (folder / "bytes.json").write_text('{"end_of_turn": 256, "end_of_text": 257}')
        return {"bytes.json": folder / "bytes.json"}

    def damage(self):
        return {
            "no JSON": lambda folder: (folder / "bytes.json").write_text("{"),
            "other ids": lambda folder: (folder / "bytes.json").write_text('{"end_of_turn": 3}'),
        }

    def reference(self, messages):
        ids = []
        for message in messages:
            text = message["content"].encode()
            if message["role"] == "assistant":
                ids += [*text, 256]
            else:
                ids += b"# " + text + b"\n" if message["role"] == "system" else b"? " + text + b"\n! "
        return ids


class TestInt8(QuantizerSuite):
    (spec,) = acme_int8.mlxlora_quantizers()
    option_sets = ({}, {"min_inputs": 9})
    left_alone = ((8, 6),)

    def error_bound(self, weight, parts, options):
        largest = np.abs(weight).max(axis=-1, keepdims=True)
        return largest / 254 * (1 + 1e-5) + 1e-37  # a scale below the normal numbers is flushed to zero


class TestMosaic(ArchitectureSuite):
    (spec,) = acme_mosaic.mlxlora_architectures()
    raw = mosaic_model.CONFIG
    smooth = False
    checkpoint = mosaic_model.shapes()
    sizes = tuple(key for key, value in mosaic_model.CONFIG.items() if isinstance(value, int))

    def reference(self, weights, tokens):
        return mosaic_model.logits(weights, tokens, self.raw)


class TestMosaicWithEveryExpert(TestMosaic):
    raw = mosaic_model.CONFIG | {"k_experts": mosaic_model.CONFIG["n_experts"]}
    smooth = True


class TestMosaicFiles(WeightLoaderSuite):
    (spec,) = acme_mosaic.mlxlora_weight_loaders()

    def write(self, folder):
        weights = mosaic_model.random_weights()
        mosaic_model.write(folder, weights)
        return {name: mx.array(weight) for name, weight in weights.items()}

    def path(self, folder):
        return folder / "base.npz"

    def write_large(self, folder, total_bytes):
        weight = np.ones((1024, 2048), dtype=np.float32)
        count = total_bytes // weight.nbytes
        mosaic_model.write(folder, {f"blocks.{i}.attn.out.weight": weight for i in range(count)})

    def damage(self):
        def cut(folder):
            path = folder / "base.npz"
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

        def flip(folder):
            path = folder / "base.npz"
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

        return {"cut": cut, "a bit": flip, "no JSON": lambda folder: (folder / "base.json").write_text("[")}


class TestRawbin(ExporterSuite):
    (spec,) = acme_rawbin.mlxlora_exporters()

    def read(self, folder, options):
        index = json.loads((folder / "index.json").read_text())["tensors"]
        found = {}
        for name, entry in index.items():
            kind = np.uint16 if entry["dtype"] == "bfloat16" else entry["dtype"]
            array = np.fromfile(folder / entry["file"], dtype=kind)
            if entry["dtype"] == "bfloat16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            found[name] = array.reshape(entry["shape"])
        return found


class TestEventlog(ObserverSuite):
    (spec,) = acme_eventlog.mlxlora_observers()

    def check(self, folder, events):
        (path,) = folder.glob("*.events.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [event["step"] for event in events if event["kind"] == "train"]
        assert [line["step"] for line in lines if line["kind"] == "train"] == steps
