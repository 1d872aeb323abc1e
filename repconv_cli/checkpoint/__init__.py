"""Checkpoints: files that nobody vouches for, read into checked tensors, modules and programs, and written safely.

Importing this package imports no torch; reading or writing a file does.
"""

from __future__ import annotations

from repconv_cli.checkpoint.formats import FileFormat
from repconv_cli.checkpoint.source import Source, read
from repconv_cli.checkpoint.write import WrittenFile, check_output, write_chunks, write_safetensors, write_text
from repconv_cli.checkpoint.writing import Writing

__all__ = [
    "FileFormat",
    "Source",
    "Writing",
    "WrittenFile",
    "check_output",
    "read",
    "write_chunks",
    "write_safetensors",
    "write_text",
]
