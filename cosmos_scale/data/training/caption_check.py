"""Whether the sources of a run have captions at all, looked for before the run."""

from contextlib import closing

import numpy as np

from cosmos_scale.config import CaptionsConfig, RemoteConfig
from cosmos_scale.data.samples.caption_keys import caption_keys
from cosmos_scale.data.samples.captions import draw_captions
from cosmos_scale.data.samples.sample import DamagedSample, SampleKey, UnreachableShard
from cosmos_scale.data.shards.index import MergedIndex, SourceIndex
from cosmos_scale.data.shards.reader import ShardReader
from cosmos_scale.errors import UserError

# With so many samples without caption, almost all of a source are without: a usable source has one among them.
LOOKED_AT = 64


def check_captions(index: MergedIndex, captions: CaptionsConfig, remote: RemoteConfig) -> None:
    """Raise UserError where a source has no caption for the run's sampling: none in LOOKED_AT samples spread over it.

    Of a source with captions as a rule one sample is read.
    """
    with closing(ShardReader(remote)) as reader:
        for source in index.sources:
            _check_source(source, captions, reader)


def _check_source(source: SourceIndex, captions: CaptionsConfig, reader: ShardReader) -> None:
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
            return
        try:
            draw_captions(captions, document, SampleKey(0, 0, sample))
            return
        except DamagedSample as damage:
            reason = str(damage).split("; the document has")[0]
        keys |= dict.fromkeys(document)
        texts |= dict.fromkeys(caption_keys(document))
    if reason is None:
        return
    rule = f"data.captions.sampling may fit {', '.join(texts)}, or " if texts else ""
    raise UserError(
        f"data source {source.name}: no caption in any sample looked at: {reason}; the samples have "
        f"{', '.join(keys) or 'no keys'}; rule: {rule}data.captions.keys names the keys of captions; "
        "where these lie in .txt, run `cosmos-scale data index` again"
    )
