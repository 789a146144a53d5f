"""Bytes in and out: durable writing, locks, safe reading, tensor files, JSON Lines.

What is named here is for plugins: reading files of strangers without waiting
for a pipe, following a stand-in or trusting a size.
"""

from mlxlora_core.files.input_file import open_regular, read_exactly, read_json, refuse_stand_in
from mlxlora_core.files.jsonl import JsonLines, refuse_faults, scan_jsonl
from mlxlora_core.files.zip_layout import ZipMember, read_zip_layout

__all__ = [
    "JsonLines",
    "ZipMember",
    "open_regular",
    "read_exactly",
    "read_json",
    "read_zip_layout",
    "refuse_faults",
    "refuse_stand_in",
    "scan_jsonl",
]
