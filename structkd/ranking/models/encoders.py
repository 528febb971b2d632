"""The architectures under one name; each has a file of its own."""

from structkd.ranking.data.tokens import TokenCache, train_tokenizer
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.models.multi_vector import MultiVectorScorer
from structkd.ranking.models.scorer import NeuralScorer, quiet_loading, weights_sha256
from structkd.ranking.models.static import StaticScorer
from structkd.ranking.models.students import load_student as open_scorer
from structkd.ranking.models.students import student

__all__ = [
    "BiScorer",
    "CrossScorer",
    "MultiVectorScorer",
    "NeuralScorer",
    "StaticScorer",
    "TokenCache",
    "open_scorer",
    "quiet_loading",
    "student",
    "train_tokenizer",
    "weights_sha256",
]
