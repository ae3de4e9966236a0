"""Whether the sources of a run have captions at all, and others that it does not read, looked for before the run."""

from contextlib import closing
from typing import Any

import numpy as np

from cosmos_scale.config import CaptionsConfig, RemoteConfig
from cosmos_scale.data.samples.caption_keys import KNOWN_NAMES, caption_keys, further_captions, plain_column
from cosmos_scale.data.samples.captions import draw_captions
from cosmos_scale.data.samples.sample import DamagedSample, SampleKey, UnreachableShard
from cosmos_scale.data.shards.index import MergedIndex, SourceIndex
from cosmos_scale.data.shards.reader import ShardReader
from cosmos_scale.errors import UserError

# With so many samples without caption, almost all of a source are without: a usable source has one among them.
LOOKED_AT = 64


def check_captions(index: MergedIndex, captions: CaptionsConfig, remote: RemoteConfig) -> list[str]:
    """Return a line on each source with further captions that are not read.

    Of a source with captions as a rule one sample is read. Raises UserError where a source has no caption for the run's
    sampling: none in LOOKED_AT samples spread over it.
    """
    with closing(ShardReader(remote)) as reader:
        return [line for source in index.sources if (line := _check_source(source, captions, reader))]


def _check_source(source: SourceIndex, captions: CaptionsConfig, reader: ShardReader) -> str:
    ends = np.cumsum([row.samples for row in source.rows])
    keys: dict[str, None] = {}
    texts: dict[str, None] = {}
    reason = None
    for sample in np.unique(np.linspace(0, ends[-1] - 1, LOOKED_AT).astype(int)).tolist():
        shard = int(np.searchsorted(ends, sample, side="right"))
        try:
            location = source.locate(shard, sample - int(ends[shard]) + source.rows[shard].samples)
            _, document = reader.read(location)
        except DamagedSample:
            continue  # what cannot be read proves nothing
        except UnreachableShard:
            return ""
        try:
            draw_captions(captions, document, SampleKey(0, 0, sample))
            return _unread(source, captions, document)
        except DamagedSample as damage:
            reason = str(damage).split("; the document has")[0]
        keys |= dict.fromkeys(document)
        texts |= dict.fromkeys(caption_keys(document))
    if reason is None:
        return ""
    rule = f"data.captions.sampling may fit {', '.join(texts)}, or " if texts else ""
    raise UserError(
        f"data source {source.name}: no caption in any sample looked at: {reason}; the samples have "
        f"{', '.join(keys) or 'no keys'}; rule: {rule}data.captions.keys names the keys of captions; "
        "where these lie in .txt, run `cosmos-scale data index` again"
    )


def _unread(source: SourceIndex, captions: CaptionsConfig, document: dict[str, Any]) -> str:
    """Say which texts that seem to be captions are not read; "" for none.

    Keys that the run names, and a sampling such as raw or long, leave out the rest on purpose.
    """
    further = further_captions(document)
    if not further or captions.keys is not None or captions.sampling not in ("textcrop", "random"):
        return ""
    called = caption_keys(document)
    read = [key for key in called if plain_column(key) in KNOWN_NAMES] or called
    keys = ", ".join([*read, *further])
    return (
        f"data source {source.name}: its samples have text under {', '.join(further)} too, which is not read; "
        f"rule: data.captions.keys names all that is read, such as [{keys}]"
    )
