"""Which documents a fast multi-vector search scores exactly: those whose vectors an approximate index finds.

For each vector of the query the nearest document vectors are found (codes of ivf-pq decide which); a document's
estimate is the sum over the query's vectors of its best found score, and where none of its vectors was found, of the
worst score that was: what was missed can be no better than that, if the search is exact (Lee et al. 2023, XTR, eq. 5).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def estimated(
    found: Int[Tensor, "tokens list"], scores: Float[Tensor, "tokens list"], owner: Int[Tensor, " vectors"], keep: int
) -> Int[Tensor, " documents"]:
    """The documents of one query with the largest estimates, at most `keep`.

    Args:
        found: rows of document vectors for each vector of the query, best first; -1 where there is none.
        scores: their scores, minus infinity where there is none.
        owner: document of each document vector.
        keep: how many documents.
    """
    tokens, width = found.shape
    valid = found >= 0
    token = torch.arange(tokens).unsqueeze(1).expand(-1, width)[valid]
    document, inverse = torch.unique(owner[found[valid]], return_inverse=True)
    worst = torch.where(valid, scores, torch.inf).amin(dim=1)
    worst = torch.where(torch.isfinite(worst), worst, 0.0)
    table = worst.repeat(len(document), 1).reshape(-1)
    table.scatter_reduce_(0, inverse * tokens + token, scores[valid], "amax")
    totals = table.view(len(document), tokens).double().sum(dim=1)
    best: Tensor = document[torch.topk(totals, min(keep, len(document))).indices]
    return best
