"""torch-pth: tensors exactly as torch has them, shards joined, and what is wrong with a folder told."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlxlora_torch import detect, open_folder, reader
from mlxlora_torch.archive import open_archive

from mlxlora_core.api import ForeignModel, ModelError, NoOptions, PluginError, ResourceError

D, F, V = 8, 24, 40
AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}


def llama(
    dtype: torch.dtype = torch.float16, width: int = D, hidden: int = F, seed: int = 0
) -> dict[str, Any]:
    """A random Llama of one layer under the names of Meta's files."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    return {
        "tok_embeddings.weight": some(V, width),
        "layers.0.attention.wq.weight": some(width, width),
        "layers.0.attention.wk.weight": some(width // 2, width),
        "layers.0.attention.wv.weight": some(width // 2, width),
        "layers.0.attention.wo.weight": some(width, width),
        "layers.0.feed_forward.w1.weight": some(hidden, width),
        "layers.0.feed_forward.w2.weight": some(width, hidden),
        "layers.0.feed_forward.w3.weight": some(hidden, width),
        "layers.0.attention_norm.weight": some(width),
        "layers.0.ffn_norm.weight": some(width),
        "norm.weight": some(width),
        "output.weight": some(V, width),
        "rope.freqs": torch.rand(3, generator=draw),
    }


def part(table: dict[str, Any], number: int, count: int) -> dict[str, Any]:
    """What one of ``count`` shards holds, cut by torch itself."""
    return {
        name: t.chunk(count, AXES[module])[number].clone() if (module := name.split(".")[-2]) in AXES else t
        for name, t in table.items()
    }


def save(folder: Path, *tables: dict[str, Any], params: Any = None) -> Path:
    """Write a checkpoint folder; the last shard is written first."""
    folder.mkdir(exist_ok=True)
    for number, table in reversed(list(enumerate(tables))):
        torch.save(table, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params or {"dim": D, "n_layers": 1, "n_heads": 2}))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


def open_(folder: Path) -> ForeignModel:
    return open_folder(folder, NoOptions())


def fault(folder: Path, kind: type[Exception] = ModelError) -> str:
    """The message with which the folder is refused, at the latest when it is read."""
    with pytest.raises(kind) as caught:
        for tensor in open_(folder).tensors.values():
            tensor.read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal(got: mx.array, want: torch.Tensor) -> None:
    """Same dtype, shape and bits."""
    assert str(got.dtype).split(".")[-1] == str(want.dtype).split(".")[-1]
    assert got.shape == tuple(want.shape)
    width = {2: (mx.uint16, torch.uint16), 4: (mx.uint32, torch.uint32)}[want.element_size()]
    np.testing.assert_array_equal(np.array(got.view(width[0])), want.contiguous().view(width[1]).numpy())


# --- values -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    table = llama(dtype)
    # The ends of the range: largest, smallest normal, smallest subnormal, and both zeros.
    limits = torch.finfo(dtype)
    table["norm.weight"][:5] = torch.tensor([limits.max, limits.tiny, limits.smallest_normal / 8, 0.0, -0.0])
    tensors = open_(save(tmp_path, table)).tensors
    assert set(tensors) == set(table)
    for name, want in table.items():
        assert tensors[name].shape == tuple(want.shape)
        assert_equal(tensors[name].read(), want)


def test_views_and_shared_storage_are_exact(tmp_path: Path) -> None:
    w = torch.arange(48.0).reshape(6, 8)
    half = torch.arange(48).reshape(6, 8).bfloat16()
    table = {
        "whole": w,
        "transposed": w.t(),
        "columns": w[:, 2:5],
        "every other": w[1::2, ::3],
        "transposed half": half.t(),
        "part of half": half[2:, 1:7:2],
        "scalar": w[3, 3],
        "empty": w[:0],
        "parameter": torch.nn.Parameter(w[2]),
    }
    torch.save(table, tmp_path / "plain.pth")
    assert (tmp_path / "plain.pth").stat().st_size < 6000, "the storage is there once"
    tensors = open_(save(tmp_path / "folder", table)).tensors
    for name, want in table.items():
        assert_equal(tensors[name].read(), want.detach())


def test_a_state_dict_with_its_versions_is_read(tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 2).state_dict()
    assert state._metadata  # written as attributes of an OrderedDict
    tensors = open_(save(tmp_path, state)).tensors
    for name, want in state.items():
        assert_equal(tensors[name].read(), want)


@pytest.mark.parametrize("count", [2, 11])
def test_shards_are_joined_along_the_right_axis(tmp_path: Path, count: int) -> None:
    # 11 shards: consolidated.10 sorts behind consolidated.09, and as text before consolidated.2
    width = count * 4
    whole = llama(torch.bfloat16, width=width, hidden=count * 3)
    whole["output.weight"] = torch.randn(count * 5, width).bfloat16()
    parts = [part(whole, number, count) for number in range(count)]
    folder = save(tmp_path, *parts, params={"dim": width})
    tensors = open_(folder).tensors
    assert set(tensors) == set(whole)
    for name, want in whole.items():
        assert tensors[name].shape == tuple(want.shape), name
        assert_equal(tensors[name].read(), want)


def test_shards_are_sorted_by_number(tmp_path: Path) -> None:
    whole = llama(width=44, hidden=22)
    whole["output.weight"] = torch.randn(44, 44).half()
    save(tmp_path, *(part(whole, number, 11) for number in range(11)), params={"dim": 44})
    for number in range(10):  # as text, .10 now stands between .1 and .2
        (tmp_path / f"consolidated.{number:02d}.pth").rename(tmp_path / f"consolidated.{number}.pth")
    got = open_(tmp_path).tensors["output.weight"].read()
    assert_equal(got, whole["output.weight"])


def test_order_is_that_of_the_file(tmp_path: Path) -> None:
    table = llama()
    # In a table the order of names is free; the bytes lie in the order of first mention.
    assert list(open_(save(tmp_path, table)).tensors) == list(table)
    storage = torch.arange(30.0)
    backwards = {"third": storage[20:], "second": storage[10:20], "first": storage[:10]}
    assert list(open_(save(tmp_path, backwards)).tensors) == ["first", "second", "third"]


def mapped_bytes(path: Path) -> int:
    """How much of a file this process has mapped."""
    ranges = [
        line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    return sum(int(end, 16) - int(start, 16) for start, end in (r.split("-") for r in ranges))


def test_only_the_pages_of_one_tensor_are_mapped_and_none_afterwards(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    table = {f"layers.{n}.attention.wq.weight": torch.full((64, 512), float(n)).half() for n in range(8)}
    path = save(tmp_path, table) / "consolidated.00.pth"
    assert path.stat().st_size > 8 * 65536
    for tensor in open_(tmp_path).tensors.values():
        tensor.read()
        assert mapped_bytes(path) == 0
    part = reader.Reader([open_archive(path)])._part(0, "layers.5.attention.wq.weight")
    assert 65536 <= mapped_bytes(path) <= 65536 + 2 * mmap.PAGESIZE
    assert part.eq(5).all()
    part[:] = 0  # of this process alone
    del part
    assert mapped_bytes(path) == 0
    assert_equal(
        open_(tmp_path).tensors["layers.5.attention.wq.weight"].read(), table["layers.5.attention.wq.weight"]
    )


def test_a_tensor_may_begin_at_any_byte(tmp_path: Path) -> None:
    path = save(tmp_path, llama()) / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    starts = set()
    for pad in range(4):  # zipfile does not align, as torch does
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("c/.padding", b"x" * pad)
            for name, data in members.items():
                archive.writestr(f"c/{name.split('/', 1)[1]}", data)
        starts.add(open_archive(path).position("norm.weight") % 4)
        for name, tensor in open_(tmp_path).tensors.items():
            assert_equal(tensor.read(), llama()[name])
    assert starts == {0, 1, 2, 3}


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    table = llama()
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path, table)
    finally:
        torch.serialization.set_crc32_options(True)
    for name, tensor in open_(tmp_path).tensors.items():
        assert_equal(tensor.read(), table[name])


def test_config_and_tokenizer_are_handed_over_as_they_are(tmp_path: Path) -> None:
    params = {"dim": D, "vocab_size": -1, "norm_eps": 1e-5, "ffn_dim_multiplier": None, "name": "λ"}
    checkpoint = open_(save(tmp_path, llama(), params=params))
    assert checkpoint.config == params
    assert checkpoint.tokenizer == {"tokenizer.model": tmp_path / "tokenizer.model"}


# --- shards that do not belong together ---------------------------------------


def halves(seed: int = 0, width: int = D) -> list[dict[str, Any]]:
    return [part(llama(width=width, seed=seed), number, 2) for number in range(2)]


def test_missing_shard_is_counted(tmp_path: Path) -> None:
    message = fault(save(tmp_path, halves()[0]))
    assert "found 1 of 2 shards: consolidated.01.pth missing" in message


def test_missing_shard_is_counted_by_params_where_no_norm_tells(tmp_path: Path) -> None:
    quarter = part(llama(), 0, 4)
    del quarter["norm.weight"]
    assert "found 1 of 4 shards" in fault(save(tmp_path, quarter))


def test_shard_of_another_model_beside_a_whole_one(tmp_path: Path) -> None:
    message = fault(save(tmp_path, llama(), llama(seed=1)))
    assert "found 2 shards, the model has 1: consolidated.01.pth too many" in message


def test_embedding_that_does_not_divide_the_width(tmp_path: Path) -> None:
    table = llama()
    table["tok_embeddings.weight"] = torch.zeros(V, 5)
    assert "5 columns, which do not divide the model's width 8" in fault(save(tmp_path, table))


def test_gap_and_stray_files_are_listed_together(tmp_path: Path) -> None:
    first, second = halves()
    save(tmp_path, first)
    torch.save(second, tmp_path / "consolidated.02.pth")
    torch.save(second, tmp_path / "consolidated.copy.pth")
    (tmp_path / "tokenizer.model").unlink()
    message = fault(tmp_path)
    assert "consolidated.01.pth missing beside consolidated.00.pth, consolidated.02.pth" in message
    assert "consolidated.copy.pth is no numbered shard" in message
    assert "tokenizer.model is missing" in message


def test_first_shard_missing(tmp_path: Path) -> None:
    save(tmp_path, *halves())
    (tmp_path / "consolidated.00.pth").unlink()
    assert "consolidated.00.pth missing" in fault(tmp_path)


def test_one_number_twice(tmp_path: Path) -> None:
    save(tmp_path, llama())
    torch.save(llama(), tmp_path / "consolidated.0.pth")
    assert "consolidated.0.pth and consolidated.00.pth have one number" in fault(tmp_path)


def test_a_huge_number_is_a_short_message(tmp_path: Path) -> None:
    save(tmp_path, llama())
    torch.save(llama(), tmp_path / "consolidated.999999999.pth")
    message = fault(tmp_path)
    assert "and 999999988 more missing" in message
    assert len(message) < 1000


def test_all_differences_of_unequal_shards_are_listed(tmp_path: Path) -> None:
    first, second = halves()
    del second["layers.0.attention.wv.weight"]
    second["layers.0.attention.wx.weight"] = torch.zeros(2)
    second["output.weight"] = second["output.weight"][:3]
    second["layers.0.feed_forward.w2.weight"] = second["layers.0.feed_forward.w2.weight"].float()
    message = fault(save(tmp_path, first, second))
    assert "consolidated.01.pth lacks layers.0.attention.wv.weight" in message
    assert "consolidated.00.pth lacks layers.0.attention.wx.weight" in message
    assert "output.weight is float16 (20, 8) in consolidated.00.pth and float16 (3, 8)" in message
    assert "w2.weight is float16 (8, 12) in consolidated.00.pth and float32 (8, 12)" in message


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.ffn_norm.weight", "rope.freqs"])
def test_replicated_tensors_must_be_equal(tmp_path: Path, name: str) -> None:
    first, second = halves()
    second[name] = second[name].clone()
    second[name][1] += 1
    message = fault(save(tmp_path, first, second))
    assert f"{name} should be the same in all shards and is not: shards of different models" in message


def test_unknown_tensors_that_are_equal_are_replicated(tmp_path: Path) -> None:
    tables = halves()
    for table in tables:
        table["something.else"] = torch.arange(6.0).reshape(2, 3)
    assert_equal(open_(save(tmp_path, *tables)).tensors["something.else"].read(), tables[0]["something.else"])


def test_one_shard_twice(tmp_path: Path) -> None:
    first, _ = halves()
    message = fault(save(tmp_path, first, first))
    assert "consolidated.00.pth and consolidated.01.pth hold the same weights" in message


def test_split_tensor_without_the_axis(tmp_path: Path) -> None:
    tables = halves()
    for table in tables:
        table["layers.0.attention.wo.weight"] = torch.ones(4)
    assert "layers.0.attention.wo.weight cannot be joined along axis 1" in fault(save(tmp_path, *tables))


def halves_by_rows() -> list[dict[str, Any]]:
    """Two shards whose embedding is split by rows, as in the releases since Llama 3."""
    name, whole = "tok_embeddings.weight", llama()
    return [part(whole, number, 2) | {name: whole[name].chunk(2, 0)[number].clone()} for number in range(2)]


def test_an_embedding_split_by_rows_is_joined_by_rows(tmp_path: Path) -> None:
    tensors = open_(save(tmp_path, *halves_by_rows())).tensors
    for name, want in llama().items():
        assert tensors[name].shape == tuple(want.shape), name
        assert_equal(tensors[name].read(), want)


def test_missing_shard_is_counted_where_the_embedding_is_split_by_rows(tmp_path: Path) -> None:
    assert "found 1 of 2 shards: consolidated.01.pth missing" in fault(save(tmp_path, halves_by_rows()[0]))


@pytest.mark.parametrize(
    "heads", [{"n_heads": 2, "head_dim": 2}, {"n_heads": 2, "head_dim": 3}, {}, {"n_heads": "2"}]
)
def test_heads_that_are_narrower_than_the_model_are_no_missing_shard(
    tmp_path: Path, heads: dict[str, Any]
) -> None:
    table = llama() | {"layers.0.attention.wq.weight": torch.ones(4, D)}
    assert open_(save(tmp_path, table, params={"dim": D} | heads)).tensors.keys() == table.keys()


def test_an_embedding_that_every_shard_holds_whole_is_read_once(tmp_path: Path) -> None:
    name, whole = "tok_embeddings.weight", llama()
    tensors = open_(save(tmp_path, *(part(whole, n, 2) | {name: whole[name]} for n in range(2)))).tensors
    for name, want in whole.items():
        assert_equal(tensors[name].read(), want)


def test_shards_are_joined_where_nothing_says_how_many_there_are(tmp_path: Path) -> None:
    tensors = open_(save(tmp_path, *halves_by_rows(), params={"dim": D})).tensors
    assert_equal(tensors["tok_embeddings.weight"].read(), llama()["tok_embeddings.weight"])


# --- tensors that are refused -------------------------------------------------


def test_other_dtypes_are_listed(tmp_path: Path) -> None:
    table = llama() | {
        "a": torch.zeros(2, dtype=torch.int64),
        "b": torch.zeros(2, dtype=torch.float64),
        "c": torch.zeros(2).to(torch.float8_e4m3fn),
        "d": torch.zeros(2, dtype=torch.uint16),
    }
    message = fault(save(tmp_path, table))
    for text in ("a is int64", "b is float64", "c is float8_e4m3fn", "d is uint16"):
        assert text in message
    assert "wanted float16, bfloat16, float32" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("count", [1, 2])
def test_values_that_are_not_finite_are_counted(
    tmp_path: Path, dtype: torch.dtype, value: float, count: int
) -> None:
    table = llama(dtype)
    ffn = "layers.0.feed_forward."
    table[ffn + "w1.weight"][-1, -1] = value
    table[ffn + "w2.weight"][0, 0] = value
    table[ffn + "w3.weight"][3:5, 2] = value
    tensors = open_(save(tmp_path, *(part(table, n, count) for n in range(count)))).tensors
    for name, bad in (("w1", 1), ("w2", 1), ("w3", 2)):
        with pytest.raises(ModelError, match=rf"{name}\.weight has {bad} values that are NaN or infinite"):
            tensors[f"{ffn}{name}.weight"].read()
    tensors["output.weight"].read()


def test_another_pickle_protocol(tmp_path: Path) -> None:
    save(tmp_path, llama())
    torch.save(llama(), tmp_path / "consolidated.00.pth", pickle_protocol=3)
    assert "is written with pickle protocol 3, wanted 2" in fault(tmp_path)


def test_entries_that_are_no_tensors_are_listed(tmp_path: Path) -> None:
    message = fault(
        save(tmp_path, {"model": llama(), "step": 3, "lr": 0.5, "names": ["a"], 7: torch.ones(1)})
    )
    for text in ("'model' is a dict", "'step' is a value of type int", "'names' is a list", "7 is a tensor"):
        assert text in message


@pytest.mark.parametrize(("content", "words"), [({}, "holds no tensor"), ([torch.ones(1)], "holds a list")])
def test_a_file_without_a_table(tmp_path: Path, content: Any, words: str) -> None:
    assert words in fault(save(tmp_path, content))


# --- params.json and tokenizer.model ------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"dim": 8,\n "n_heads": }', "params.json:2:13: is no JSON: Expecting value"),
        (b"", "params.json:1:1: is no JSON"),
        (b"[1, 2]", "holds a list, wanted an object"),
        (b'{"dim": 8, "dim": 16}', "dim there twice"),
        (b'{"norm_eps": NaN}', "NaN is no number"),
        (b'{"name":\n"\xff"}', "params.json:2: is not UTF-8"),
        (b"[" * 100_000, "is no usable JSON"),
        (b'{"dim": ' + b"9" * 5000 + b"}", "is no usable JSON"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "larger than 1 MiB"),
    ],
)
def test_params_that_cannot_be_used(tmp_path: Path, text: bytes, words: str) -> None:
    save(tmp_path, llama())
    (tmp_path / "params.json").write_bytes(text)
    assert words in fault(tmp_path)


def test_params_with_a_byte_order_mark(tmp_path: Path) -> None:
    save(tmp_path, llama())
    (tmp_path / "params.json").write_bytes(b'\xef\xbb\xbf{"dim": 8}')
    assert open_(tmp_path).config == {"dim": 8}


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.model.v7m1"])
def test_a_tokenizer_with_its_version_behind_the_name(tmp_path: Path, name: str) -> None:
    (save(tmp_path, llama()) / "tokenizer.model").rename(tmp_path / name)
    opened = open_(tmp_path)
    assert opened.tokenizer == {"tokenizer.model": tmp_path / name}
    assert list(opened.notes) == [f"{name} is taken for tokenizer.model"]
    (tmp_path / "tokenizer.model").write_bytes(b"the usual one")
    assert open_(tmp_path).tokenizer == {"tokenizer.model": tmp_path / "tokenizer.model"}


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.json", "tokenizer.model.bak"])
def test_another_tokenizer_is_named_where_none_is_found(tmp_path: Path, name: str) -> None:
    (save(tmp_path, llama()) / "tokenizer.model").rename(tmp_path / name)
    assert f"tokenizer.model is missing (there is {name}, which is not read" in fault(tmp_path)


def test_empty_tokenizer(tmp_path: Path) -> None:
    (save(tmp_path, llama()) / "tokenizer.model").write_bytes(b"")
    assert "tokenizer.model: is empty" in fault(tmp_path)


# --- files that are none, and machines without torch --------------------------


@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json", "tokenizer.model"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, llama()) / name
    path.unlink()
    os.mkfifo(path)  # opened without care, this waits for ever
    assert "is a pipe or a device" in fault(tmp_path)
    path.unlink()
    path.mkdir()
    assert "is a folder" in fault(tmp_path)
    path.rmdir()
    path.symlink_to(path)
    assert "cannot be read: Too many levels of symbolic links" in fault(tmp_path)


def test_a_disk_that_does_not_give_the_bytes(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        path = save(tmp_path, llama()) / name
        path.unlink()
        path.symlink_to("/proc/self/mem")  # page 0 is not mapped: EIO
        assert f"{name}: cannot be read: Input/output error" in fault(tmp_path)
        path.unlink()


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, llama()) / "consolidated.00.pth"
    open_(tmp_path)  # imports everything while that is still allowed
    path.chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    root = os.geteuid() == 0
    if root:  # who may read all
        os.seteuid(65534)
    try:
        message = fault(Path())
    finally:
        if root:
            os.seteuid(0)
    assert message == "consolidated.00.pth: cannot be read: Permission denied"


def test_a_file_swapped_after_it_was_checked(tmp_path: Path) -> None:
    tensors = open_(save(tmp_path, llama())).tensors
    torch.save(llama(seed=3), tmp_path / "consolidated.00.pth")
    with pytest.raises(ModelError, match="changed while it was being read"):
        tensors["norm.weight"].read()


def test_detect(tmp_path: Path) -> None:
    assert not detect(tmp_path)
    (tmp_path / "consolidated.safetensors").touch()
    assert not detect(tmp_path)
    (tmp_path / "consolidated.07.pth").touch()
    assert detect(tmp_path)


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_detecting_and_checking_import_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import mlxlora_torch
mlxlora_torch.mlxlora_weight_loaders()
assert mlxlora_torch.detect(Path(sys.argv[1]))
print(sorted({"torch", "mlx", "numpy"} & set(sys.modules)))
"""
    assert run(code, str(save(tmp_path, llama()))) == "[]\n"


def test_without_torch_one_line_names_the_extra(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
sys.modules["torch"] = None  # as if it were not installed
import mlxlora_torch
from mlxlora_core.api import NoOptions, PluginError
try:
    mlxlora_torch.open_folder(Path(sys.argv[1]), NoOptions())
except PluginError as fault:
    print(fault)
"""
    message = run(code, str(save(tmp_path, llama())))
    assert message.count("\n") == 1
    assert "reading .pth files needs torch" in message
    assert "pip install 'mlxlora[torch]'" in message


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("libtorch_cpu.so: failed to map segment from shared object", ResourceError),
        ("libc10.so: cannot allocate memory in static TLS block", ResourceError),
        ("libcudart.so.12: cannot open shared object file: No such file or directory", PluginError),
    ],
)
def test_a_torch_that_does_not_fit_is_told_from_one_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, kind: type[Exception]
) -> None:
    class Failing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch":
                raise ImportError(fault)

    save(tmp_path, llama())
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Failing()])
    with pytest.raises(kind, match=fault.partition(":")[0]):
        open_(tmp_path)


def test_an_unsafe_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert "torch 2.5.1+cpu is not safe for .pth files" in fault(save(tmp_path, llama()), PluginError)
