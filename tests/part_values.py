"""What travels between two stages, for tests and their child processes that need neither torch nor Ray."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from shard_embedder.pipeline.core.schema import PART_FIELDS


def part_values(**given: Any) -> dict[str, Any]:
    """What travels with a part between two stages, empty but for what is given."""
    return {
        field.name: _EMPTY.get(field.type, [] if pa.types.is_list(field.type) else 0) for field in PART_FIELDS
    } | {"device_refusal": None, **given}


_EMPTY = {pa.string(): "", pa.bool_(): False, pa.float64(): 0.0}
