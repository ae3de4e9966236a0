"""Features that stand for classes: the mean over all templates and names of a class, of length 1."""

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_scale.evaluation.evaluator import Encoder, Gather
from cosmos_scale.evaluation.prompts.texts import filled_in

# Texts encoded at a time. Classes are put together into groups by this number alone, so that the features of a class
# are the same, to the last bit, on any number of ranks.
GROUP_TEXTS = 256


def text_weights(encoder: Encoder, names: Sequence[Sequence[str]], templates: Sequence[str], gather: Gather) -> Tensor:
    """Return a feature of length 1 for each class: [classes, E] float32 on the setting's device; collective.

    names: of each class, one or more. templates: {} stands for the name. Each text's feature has length 1 before the
    mean is taken, over all names and templates of a class. Ranks share the work; a cache of the setting saves it.
    """
    setting = encoder.setting
    cache = setting.cache if encoder.weights else None
    made_of = json.dumps(["text weights", encoder.weights, names, templates])
    if cache is not None:
        kept = cache.load(made_of)
        # All ranks go on with what is kept, or none does: their hosts may see different folders.
        if bool(gather(torch.tensor([kept is not None], device=setting.device)).all()) and kept is not None:
            return kept["weights"].to(setting.device)
    weights_CE = _encode_together(encoder, names, templates, gather)
    if cache is not None and setting.rank == 0:
        cache.save(made_of, {"weights": weights_CE})
    return weights_CE


def _encode_together(
    encoder: Encoder, names: Sequence[Sequence[str]], templates: Sequence[str], gather: Gather
) -> Tensor:
    setting = encoder.setting
    per_group = max(1, GROUP_TEXTS // (len(templates) * max(map(len, names))))
    groups = [names[first : first + per_group] for first in range(0, len(names), per_group)]
    most = -(-len(groups) // setting.world_size)  # groups a rank
    mine = groups[setting.rank * most : (setting.rank + 1) * most]
    rows = []
    for done, group in enumerate(mine, start=1):
        texts = [filled_in(of_class, templates) for of_class in group]
        features = encoder.texts([text for of_class in texts for text in of_class]).float()
        rows += [part.mean(0) for part in features.split(list(map(len, texts)))]
        setting.report("groups of texts", done, len(mine))
    width = rows[0].shape[0] if rows else encoder.texts([""]).shape[1]
    padded = torch.zeros(most * per_group, width, device=setting.device)
    if rows:
        padded[: len(rows)] = F.normalize(torch.stack(rows), dim=-1)
    everyone = gather(padded).split(most * per_group)
    counts = [sum(map(len, groups[rank * most : (rank + 1) * most])) for rank in range(setting.world_size)]
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])
