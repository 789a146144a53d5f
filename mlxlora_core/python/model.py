"""A model in Python: loaded, with an adapter put on it, and its adapter kept."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from mlxlora_core.errors import UsageError
from mlxlora_core.files import lock
from mlxlora_core.machine.device import prepare_device
from mlxlora_core.machine.signals import Interrupted
from mlxlora_core.model.located import locate_model
from mlxlora_core.options import explain, option, parse
from mlxlora_core.plugins import Registry, start_runtimes
from mlxlora_core.plugins import load as load_plugins
from mlxlora_core.plugins.blame import told
from mlxlora_core.plugins.defaults import DEFAULT_ADAPTER, DEFAULT_QUANTIZER
from mlxlora_core.plugins.sections import Quantization, configure
from mlxlora_core.training.events import Advanced

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxlora_core.model.adapters import Adapted, AdapterFile
    from mlxlora_core.model.loading import Model as Base
    from mlxlora_core.model.several import AdapterSet
    from mlxlora_core.training.outputs import Outputs
    from mlxlora_core.training.settings import SaveConfig

T = TypeVar("T")


class Model:
    """A model, with or without an adapter on it; :func:`load` makes one.

    Attributes:
        folder: where it was read.
        config: its config.json.
        note: how the weights are held, where that makes it slower; else nothing.
        runtimes: what the runtimes said of themselves.
    """

    def __init__(self, base: Base, registry: Registry, runtimes: Sequence[str]) -> None:
        self.base, self.registry, self.runtimes = base, registry, runtimes
        self.adapted: Adapted | None = None
        self._several: AdapterSet | None = None
        self.folder, self.config, self.note = base.folder, base.config, base.note

    def __repr__(self) -> str:
        held = ", ".join(self.adapters) or self.adapter or "none"
        return f"<mlxlora model {str(self.folder)!r}, adapter {held}>"

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that is on it, or None."""
        return self.adapted.choice.component.spec.name if self.adapted is not None else None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that :meth:`select` chooses from."""
        return tuple(self._several.adapted) if self._several is not None else ()

    def attach(self, adapter: str = DEFAULT_ADAPTER, *, seed: int = 0, **options: Any) -> Model:
        """Put a new adapter on the model; the base is frozen.

        Args:
            adapter: its name.
            seed: of its initial values; ``mlxlora train`` has one for these and for :func:`train`.
            options: ``layers``, ``targets``, ``overrides``, and those of the adapter, such as ``rank``.

        Returns:
            This model.

        Raises:
            UsageError: an adapter is on it already; an option that there is not or that is out of
                range; a target that matches nothing.
            PluginError: no such adapter, or one that breaks its contract.
        """
        from mlxlora_core.model import adapters

        self._bare()
        number = checked_seed(seed, "attach")
        choice, config = configure(self.registry.find("adapter", adapter), options)
        with told(self.registry.plugins):
            self.adapted = adapters.attach(self.base, choice, config, number)
        return self

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        adapter: str | None = None,
        *,
        name: str | None = None,
        base_mismatch: str = "refuse",
        **options: Any,
    ) -> Model:
        """Put the adapter in a file on the model that it was made for.

        Args:
            path: an adapter file, ``.safetensors`` or ``.npz``, or a folder or a file of another tool
                that an adapter loader knows, such as PEFT and mlx-lm.
            adapter: insist on this one.
            name: keep it beside others under this name, for :meth:`select`; left out, it is the
                one adapter of the model, and can be trained.
            base_mismatch: ``allow`` to put it on another base than its own, such as the same model
                in other bits.
            options: insist on these values; those of a file of another tool that does not say them.

        Returns:
            This model. What was assumed of the file is told in ``adapted.notes``.

        Raises:
            UsageError: an adapter is on it already.
            ModelError: the file is damaged, or of another base, adapter or set of options.
        """
        from mlxlora_core.model import adapters
        from mlxlora_core.model.several import AdapterSet

        with told(self.registry.plugins):
            file = file_of(path, base_mismatch, adapter, options)
            if name is None:
                self._bare()
                self.adapted = adapters.load_file(file, self.base, self.registry)
            else:
                self._alone()
                self._several = self._several or AdapterSet(self.base)
                self._several.load(name, file, self.registry)
        return self

    def select(self, adapters: str | Mapping[str, float] | Sequence[str | None] | None) -> Model:
        """Say which of the named adapters the model computes with from now on; nothing is read again.

        Args:
            adapters: a name; name -> factor on its change, to mix several; for each row of the
                batches to come a name or None; None for the base alone.

        Returns:
            This model.

        Raises:
            UsageError: a name that there is not, or a factor that is no finite number.
        """
        if self._several is None:
            raise UsageError(
                "no named adapter is on the model", fix='load one: model.load_adapter(…, name="first")'
            )
        self._several.select(adapters)
        return self

    @property
    def has_rows_selected(self) -> bool:
        """Whether adapters are selected for each row of a batch."""
        return self._several is not None and bool(self._several.selected.rows)

    def logits(self, tokens: Sequence[Sequence[int]]) -> mx.array:
        """Logits (B, T, V), float32, of B rows of T token ids each; row i under the adapter selected for it.

        Raises:
            UsageError: rows of different lengths, ids that the model does not have, or adapters
                that are selected for another number of rows.
        """
        import mlx.core as mx

        lengths = {len(row) for row in tokens}
        if len(lengths) != 1 or 0 in lengths:
            raise UsageError(f"logits: wanted rows of one length, got {sorted(lengths)[:5]}")
        most = self.base.language_model.vocab_size
        odd = [token for row in tokens for token in row if not 0 <= token < most]
        if odd:
            raise UsageError(f"logits: token id {odd[0]} is not one from 0 to {most - 1}")
        with told(self.registry.plugins):
            self.base.language_model.eval()
            logits: mx.array = self.base.language_model(mx.array([list(row) for row in tokens]))
            return logits.astype(mx.float32)

    def save_adapter(self, path: str | os.PathLike[str]) -> None:
        """Write the adapter that is on the model to ``.safetensors`` or ``.npz``.

        Raises:
            UsageError: none is on it.
            ModelError: a name that says no format.
            LockedError: a training writes this file.
            DivergedError: a parameter is not finite; an older file is left as it is.
            ResourceError: the disk is full, or the folder cannot be written.
        """
        from mlxlora_core.files import tensor_file
        from mlxlora_core.model import adapters

        target, adapted = Path(path), self.needed_adapter()
        tensor_file.check_ending(target)
        with told(self.registry.plugins), lock.hold(target):
            adapters.save(target, self.base, adapted)

    def needed_adapter(self) -> Adapted:
        """The adapter that is on the model.

        Raises:
            UsageError: none is.
        """
        if self._several is not None:
            raise UsageError("adapters with a name do not train", fix="load the model anew, and one without")
        if self.adapted is None:
            raise UsageError("no adapter is on the model", fix='put one on it: model.attach("lora")')
        return self.adapted

    def _bare(self) -> None:
        """Refuse a second adapter where there is to be one alone."""
        self._alone()
        if self._several is not None:
            raise UsageError(
                f"named adapters are on the model already ({', '.join(self.adapters)})",
                fix="give this one a name too, or load the model anew",
            )

    def _alone(self) -> None:
        """Refuse another one beside an adapter that has no name."""
        if self.adapted is not None:
            raise UsageError(f"adapter '{self.adapter}' is on the model already", fix="load the model anew")


def registry(plugins: Sequence[str] = ()) -> Registry:
    """The plugins that are there, and what they give.

    Args:
        plugins: as given with ``-P``: ``NAME`` requires one, ``no:NAME`` leaves one out,
            ``./file.py`` adds a file.

    Raises:
        UsageError: a name that no plugin has.
        PluginError: a plugin named here that cannot be loaded.
    """
    return load_plugins(texts(plugins, "plugins"))


def load(
    path: str | os.PathLike[str],
    *,
    adapter_file: str | os.PathLike[str] | None = None,
    base_mismatch: str = "refuse",
    quantize: str | Mapping[str, Any] | None = None,
    plugins: Sequence[str] = (),
) -> Model:
    """Read a model and, if it is named, the adapter for it.

    Args:
        path: a model folder, as ``mlxlora convert`` makes it, or any other model that
            ``--model`` takes: ``package:NAME/FILE``, or ``org/name`` on the Hub.
        adapter_file: an adapter file made for this model.
        base_mismatch: as for :meth:`Model.load_adapter`.
        quantize: quantize dense linears as they are read: the name of a quantizer, or a mapping such as
            ``{"use": "affine", "bits": 8}``, with ``head`` and the quantizer's options.
        plugins: as for :func:`registry`.

    Raises:
        UsageError: MLX has no backend here; an option that there is not; nothing that is quantized.
        ModelError: a part is absent, damaged or does not fit the others.
        ResourceError: it does not fit into memory.
        PluginError: no plugin builds its model_type or reads its tokenizer.
    """
    found = registry(plugins)
    quantization = quantization_of(quantize, found)
    runtimes = prepare(found)
    from mlxlora_core.model import loading

    with told(found.plugins):
        place = locate_model(path)
        base = loading.load(place.path, found, quantization)
        base = replace(base, name=place.name if place.revision else "")
        model = Model(base, found, runtimes)
    if adapter_file is None:
        return model
    return model.load_adapter(adapter_file, base_mismatch=base_mismatch)


def prepare(found: Registry) -> list[str]:
    """Make the machine ready for MLX; what the runtimes say.

    Raises:
        UsageError: MLX has no backend here.
    """
    prepare_device()
    return [note.text for note in start_runtimes(found)]


def parsed(kind: type[T], values: Mapping[str, Any], owner: str, beside: Sequence[type[Any]] = ()) -> T:
    """A value of options out of the keyword arguments of the function ``owner``.

    Args:
        kind: the dataclass of the options.
        values: the arguments.
        owner: which function.
        beside: dataclasses of further options that it has, for messages.

    Raises:
        UsageError: all that is wrong with them.
    """
    others = [known.name for config in beside for known in explain(config)]
    return parse(kind, values, owner=owner, spell=lambda name: f"{owner}: {name}", beside=others)


def checked_seed(seed: int, owner: str) -> int:
    """The seed that ``owner`` was given, if it is one.

    Raises:
        UsageError: it is none.
    """
    return parsed(_Seed, {"seed": seed}, owner).seed


def file_of(
    path: str | os.PathLike[str],
    base_mismatch: str,
    adapter: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> AdapterFile:
    """An adapter file, and what is insisted on of it.

    Raises:
        UsageError: ``base_mismatch`` is neither ``refuse`` nor ``allow``.
    """
    from mlxlora_core.model.adapters import AdapterFile

    if base_mismatch not in ("refuse", "allow"):
        raise UsageError(f"base_mismatch: wanted 'refuse' or 'allow', got {base_mismatch!r}")
    return AdapterFile(Path(path), adapter, options, base_mismatch == "allow")


def quantization_of(quantize: str | Mapping[str, Any] | None, found: Registry) -> Quantization | None:
    """How a model is to be quantized as it is read, from the argument that says it.

    Raises:
        UsageError: it is neither a name nor a mapping; options that there are not or that are out of range.
        PluginError: no such quantizer.
    """
    if quantize is None:
        return None
    given = quantize if isinstance(quantize, Mapping) else {"use": quantize}
    use = given.get("use", DEFAULT_QUANTIZER)
    if not isinstance(use, str):
        raise UsageError(f"quantize: wanted a name, or a mapping with use, got {quantize!r:.100}")
    values = {key: value for key, value in given.items() if key != "use"}
    return Quantization(*configure(found.find("quantizer", use), values))


def texts(given: Sequence[str], name: str) -> tuple[str, ...]:
    """Several texts; a single one, which Python takes for its letters, is refused.

    Raises:
        UsageError: one text instead of several.
    """
    if isinstance(given, str):
        raise UsageError(f"{name}: wanted a list of texts, got {given!r}", fix=f"write [{given!r}]")
    return tuple(given)


@dataclass(frozen=True)
class _Seed:
    seed: int = option(0, help="seed of what is random", minimum=0, maximum=2**32 - 1)


def followed(events: Iterator[T]) -> Generator[T, None, None]:
    """Events to their end, but for those that only move a bar; a signal becomes what Python raises for it."""
    try:
        yield from (event for event in events if not isinstance(event, Advanced))
    except Interrupted as fault:
        if fault.signum == signal.SIGINT:
            raise KeyboardInterrupt(str(fault)) from fault
        raise SystemExit(fault.exit_code) from fault


def outputs_of(
    adapter_file: str | os.PathLike[str] | None, metrics: str | os.PathLike[str] | None, saving: SaveConfig
) -> Outputs:
    """What a training writes: the adapter with checkpoints beside it, and a log."""
    from mlxlora_core.training.outputs import Outputs, checkpoints_of

    log, target = (Path(path) if path is not None else None for path in (metrics, adapter_file))
    folder = checkpoints_of(target) if target is not None else None
    return Outputs(target, folder, log, saving, resume_command="train(…, resume=True)")
