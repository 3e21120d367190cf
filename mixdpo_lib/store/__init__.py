"""Where do things lie, under which key, whole or not at all, how far? Knows no model."""

from .arrays import large_array
from .artefacts import (
    artefact_key,
    cached,
    canonical_json,
    hash_seed,
    read_json,
    sha256_of,
    touched_artefacts,
    verify_artefact,
    whole_folder,
    write_json_atomic,
)
from .places import (
    MixDPOError,
    cache_folder,
    cache_part,
    locked,
    project_root,
    raw_folder,
    writing_to,
)
from .reporting import heartbeat, note, progress

__all__ = [
    "MixDPOError",
    "artefact_key",
    "cache_folder",
    "cache_part",
    "cached",
    "canonical_json",
    "hash_seed",
    "heartbeat",
    "large_array",
    "locked",
    "note",
    "progress",
    "project_root",
    "raw_folder",
    "read_json",
    "sha256_of",
    "touched_artefacts",
    "verify_artefact",
    "whole_folder",
    "write_json_atomic",
    "writing_to",
]
