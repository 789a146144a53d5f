"""What a training is made of, and whether another one may go on from where it stands."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mlxlora_core.errors import ModelError, SettingsChanged
from mlxlora_core.machine.processors import thread_count
from mlxlora_core.options import plain
from mlxlora_core.plugins.sources import source_digest
from mlxlora_core.training.checkpoints import Checkpoint
from mlxlora_core.version import __version__

if TYPE_CHECKING:
    from mlxlora_core.model.adapters import Adapted
    from mlxlora_core.model.loading import Model
    from mlxlora_core.training.examples import Example
    from mlxlora_core.training.loop import Training

#: settings that a checkpoint of before lacks -> what they were then
BEFORE: Mapping[str, Any] = {
    "compile": "off",
    "compute": "float32",
    "grad_checkpoint": "off",
    "group_by_length": True,
    "packing": "off",
    "prefix_type": "compute",
    "reuse_prefix": "off",
}

#: of :func:`~mlxlora_core.training.batches.epoch_order`
ORDER_OF_ROWS = "3"

#: of what rows drop, where anything does; before there was this number, a batch drew as a whole
DROPOUT = "2"

SOURCE = "source of plugin "  # before the name of one whose code is told
_ABSENT = "none"


@dataclass(frozen=True)
class Identity:
    """What decides the result of a training.

    Attributes:
        base: fingerprint of the base with its tokenizer.
        tokenizer: fingerprint of the tokenizer alone.
        data: split -> fingerprint of its tokens and masks.
        settings: name -> value of all that can be set.
        plugins: name -> distribution and version of those it needs.
        versions: what computes it; other ones may round otherwise.
    """

    base: str
    tokenizer: str
    data: Mapping[str, str]
    settings: Mapping[str, Any]
    plugins: Mapping[str, Mapping[str, str]]
    versions: Mapping[str, str]

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is of this very training, computed by the same versions."""
        held = {**checkpoint.manifest, "settings": settings_of(checkpoint)}
        others = {key: value for key, value in asdict(self).items() if key != "versions"}
        same = all(held.get(key) == value for key, value in others.items())
        return same and held["versions"] == self._comparable(held["versions"])

    def compare(self, checkpoint: Checkpoint, fix: str) -> list[str]:
        """Refuse a checkpoint of another training; warnings for what may round otherwise.

        Args:
            checkpoint: to go on from.
            fix: what to do about other settings.

        Raises:
            SettingsChanged: it was begun with other settings.
            ModelError: it is of another base or of other data.
        """
        held = checkpoint.manifest
        if held["base"] != self.base:
            raise ModelError(
                f"was made with another base ({held['base'][:12]}, this one is {self.base[:12]}; tokenizer "
                f"{str(held.get('tokenizer'))[:12]}, this one {self.tokenizer[:12]})",
                where=checkpoint.folder,
                fix="use the model that it was begun with, in the same bits (--quantize)",
            )
        old, new = settings_of(checkpoint), self.settings
        names = sorted(old.keys() | new.keys())
        changed = [name for name in names if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
        fixed = [name for name in changed if name not in _free(old, new, checkpoint.step)]
        if fixed:
            rows = [(name, str(old.get(name, _ABSENT)), str(new.get(name, _ABSENT))) for name in fixed]
            raise SettingsChanged(rows, checkpoint.folder, fix)
        splits = ("train", "valid") if new["patience"] is not None else ("train",)
        for split in splits:
            was, now = held["data"].get(split, _ABSENT), self.data.get(split, _ABSENT)
            if was != now:
                raise ModelError(
                    f"the {split} rows have changed since ({was[:12]}, now {now[:12]})",
                    where=checkpoint.folder,
                    fix="put the rows back that it was begun with",
                )
        versions = held["versions"]
        return [
            _word_on_version(name, versions.get(name), now)
            for name, now in self._comparable(versions).items()
            if versions.get(name) != now
        ]

    def going_on_from(self, checkpoint: Checkpoint, names: Sequence[str]) -> Identity:
        """This identity with some settings as a checkpoint has them."""
        return replace(self, settings={**self.settings, **{n: settings_of(checkpoint)[n] for n in names}})

    def _comparable(self, held: Mapping[str, str]) -> dict[str, str]:
        """The versions; without the sources of plugins where a checkpoint of before tells none."""
        return {name: v for name, v in self.versions.items() if name in held or not name.startswith(SOURCE)}


def settings_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The settings that a checkpoint was made with."""
    settings = {**BEFORE, **checkpoint.manifest["settings"]}
    if isinstance(settings["packing"], bool):  # as it was told before it could be left to itself
        settings["packing"] = "on" if settings["packing"] else "off"
    return settings


def identify(
    model: Model,
    adapted: Adapted,
    training: Training,
    splits: Mapping[str, Sequence[Example]],
    runtimes: Sequence[str] = (),
) -> Identity:
    """The identity of a training.

    Args:
        model: the base with the adapter on it.
        adapted: the adapter.
        training: settings and seed.
        splits: ``train`` and, where there is one, ``valid``.
        runtimes: what the runtimes said of themselves.
    """
    from mlxlora_core.model.dropout import drops

    adapter = adapted.choice
    components = [adapter.component, model.architecture]
    if model.quantization is not None:
        components.append(model.quantization.component)
    settings = plain(training.config) | {
        "compile": "on" if training.compiled else "off",
        "packing": "on" if training.packed else "off",
        "reuse_prefix": "on" if training.prefix is not None and training.prefix.reuse.on else "off",
        "seed": training.seed,
        "adapter": adapter.component.id,
        **{f"adapter.{name}": value for name, value in plain(adapter.options).items()},
        **{f"adapter.{name}": value for name, value in plain(adapted.config).items() if value != []},
        "adapted": list(adapted.paths),
    }
    del settings["prefix_memory_mb"]  # where something is kept changes nothing
    plugins = {c.plugin.name: c.plugin for c in components}
    foreign = [plugin for plugin in plugins.values() if plugin.origin != "built-in"]
    return Identity(
        base=model.fingerprint,
        tokenizer=model.tokenizer.fingerprint,
        data={name: _data_fingerprint(examples) for name, examples in splits.items()},
        settings=json.loads(json.dumps(settings)),
        plugins={n: {"distribution": p.distribution, "version": p.version} for n, p in plugins.items()},
        versions={
            "mlxlora": __version__,
            **{f"plugin {p.name}": p.version for p in foreign},
            **{f"{SOURCE}{p.name}": source_digest(p) for p in foreign},
            "mlx": version("mlx"),
            "python": platform.python_version(),
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": str(thread_count()),  # which rows are dealt to
            "order of rows": ORDER_OF_ROWS,
            **({"dropout": DROPOUT} if drops(model.module) else {}),
            "runtimes": "; ".join(runtimes),
        },
    )


def _word_on_version(name: str, held: str | None, now: str) -> str:
    if name.startswith(SOURCE):
        plugin = name.removeprefix(SOURCE)
        return (
            f"warning: the code of plugin {plugin} has changed since ({held}, now {now}); it goes on with it"
        )
    return f"warning: the result may not be bit-exact across {name} {held or 'of before'} -> {now}"


def _data_fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(example.tokens.tobytes())
        digest.update(example.mask.tobytes())
    return digest.hexdigest()


def _free(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> set[str]:
    """The settings that cannot change what comes after ``step``."""
    # A layer that is computed again has the same bits, and a training that ends ends the same with
    # either policy.
    free = {"steps_per_report", "on_nonfinite"}
    if new["compile"] != "on":
        free.add("grad_checkpoint")
    if old["reuse_prefix"] == new["reuse_prefix"] == "off":
        free.add("prefix_type")
    if old.get("patience", _ABSENT) is None and new["patience"] is None:
        free |= {"steps_per_eval", "val_batches"}
        if old.get("schedule") == new["schedule"] == "constant" and new["iters"] >= step:
            free.add("iters")
    return free
