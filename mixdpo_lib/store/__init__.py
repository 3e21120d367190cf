"""Where do things lie, under which key, whole or not at all, how far? Knows no model."""

from .arrays import large_array
from .artefacts import (
    artefact_key,
    cached,
    hash_seed,
    touched_artefacts,
    verify_artefact,
    whole_folder,
)
from .files import (
    Shape,
    canonical_json,
    check_file_list,
    check_shape,
    file_hashes,
    plain,
    read_json,
    remove_folder,
    sha256_of,
    shown,
    sync,
    write_json_atomic,
)
from .identity import check_options, differences
from .places import (
    OF_OTHERS,
    MixDPOError,
    cache_folder,
    cache_part,
    locked,
    project_root,
    raw_folder,
    writing_to,
)
from .reporting import curve, heartbeat, note, progress

__all__ = [
    "plain",
    "sync",
    "shown",
    "remove_folder",
    "file_hashes",
    "differences",
    "check_options",
    "check_shape",
    "check_file_list",
    "MixDPOError",
    "Shape",
    "artefact_key",
    "cache_folder",
    "cache_part",
    "cached",
    "canonical_json",
    "hash_seed",
    "curve",
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
    "OF_OTHERS",
]
