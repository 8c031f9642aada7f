"""`scl_jax.main` that also records the examples of every batch: RECORD names a file, a line for each batch it fetches.

{"batch": number of the batch, "rows": [[row of the global batch, item_id], …]} with the rows of this process.
"""

import json
import os
from typing import Any

import numpy as np
from absl import app

from scl_jax import main
from scl_jax.training import loop

fetch = loop.Feed.fetch


def fetch_and_record(feed: loop.Feed, running: Any = ()) -> None:
    fetch(feed, running)
    stream, batch, _, place = feed._next
    rows = {
        row: int(item)
        for shard in batch.item_id.addressable_shards
        for row, item in zip(range(*shard.index[0].indices(len(batch.item_id))), np.asarray(shard.data), strict=True)
    }
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps({"batch": place["next_index"], "stream": stream, "rows": sorted(rows.items())}) + "\n")


if __name__ == "__main__":
    loop.Feed.fetch = fetch_and_record
    app.run(main.main)
