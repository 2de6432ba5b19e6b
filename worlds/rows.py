"""Rows of published data files, local or from the hub. [ours]"""

import csv
import fileinput
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from huggingface_hub import hf_hub_download


def opened(name: str, mode: str) -> IO:
    """A local file, or OWNER/REPOSITORY/PATH of a dataset on the hub; unzipped if its name ends in .gz."""
    owner, *rest = name.split("/", 2)
    if len(rest) == 2 and not Path(owner).exists():
        print(f"{name} is not here; looking for it on the hub", file=sys.stderr)
        name = hf_hub_download(f"{owner}/{rest[0]}", rest[1], repo_type="dataset")
    return fileinput.hook_compressed(name, mode)


def rows_of(name: str) -> Iterator[tuple[str, dict]]:
    """Yield ("FILE:LINE", row) of a .jsonl or .csv file, whose cells are texts. Raises ValueError, naming FILE:LINE."""
    with fileinput.FileInput(name, mode="rb", openhook=opened) as lines:
        table = csv.DictReader((line.decode("utf-8-sig") for line in lines), strict=True)
        rows = table if name.endswith((".csv", ".csv.gz")) else map(json.loads, filter(bytes.strip, lines))
        try:
            for row in rows:
                if not isinstance(row, dict) or None in row:
                    raise ValueError("it is not a JSON object, or has more cells than the header")
                yield f"{name}:{lines.lineno()}", row
        except Exception as error:  # of the file system, the hub, gzip, JSON, or CSV
            raise ValueError(f"{name}:{lines.lineno()}: cannot be read ({error})") from error
