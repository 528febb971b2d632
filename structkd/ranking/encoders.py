"""The architectures under one name; each has a file of its own."""

from structkd.ranking.bi_encoder import BiScorer
from structkd.ranking.cross_encoder import CrossScorer
from structkd.ranking.multi_vector import MultiVectorScorer
from structkd.ranking.scorer import NeuralScorer, quiet_loading, weights_sha256
from structkd.ranking.static import StaticScorer
from structkd.ranking.students import load_student as open_scorer
from structkd.ranking.students import student
from structkd.ranking.tokens import TokenCache, train_tokenizer

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
