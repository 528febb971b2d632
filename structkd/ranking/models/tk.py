"""TK, the kernel student (Hofstaetter et al., ECAI 2020, arXiv 2002.01854; used in arXiv 2010.02666).

Word vectors, a small Transformer on each side, and soft histograms of their cosines. Texts meet in a matrix of cosines
only, so document vectors can be stored. No pretrained weights: the vocabulary is counted in a collection and its
vectors start at random.
"""

import dataclasses
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from structkd.errors import DataError, UsageError
from structkd.files import atomic_path, read_json, write_json
from structkd.ids import Pairs, Texts, fingerprint_arrays, fingerprint_json
from structkd.ranking.models.scorer import NeuralScorer
from structkd.scores.manifest import TeacherSpec

MU = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)
"Centres of the eleven kernels."

_FLOOR = 1e-10
_WORD = re.compile(r"[^\W_]+")
_PAIRS_AT_ONCE = 256  # scoring without gradient


@dataclass(frozen=True)
class TkConfig:
    """Shape of a TK model."""

    dimension: int = 128
    "Width of the word vectors."

    layers: int = 2
    "Transformer layers."

    heads: int = 8
    "Attention heads."

    feed_forward: int = 128
    "Inner width of a layer."

    dropout: float = 0.0
    "Dropout of the layers."

    vocabulary: int = 30_000
    "Words kept at most, the most frequent first."

    buckets: int = 512
    "Vectors shared by all other words, by hash: a rare word still matches itself."

    query_length: int = 30
    "Words of a query that are read."

    document_length: int = 200
    "Words of a document that are read."

    document_offset: int = 500
    "Position of a document's first word; a query's is 0."

    sigma: float = 0.1
    "Width of every kernel."

    def __post_init__(self) -> None:
        if self.dimension % (2 * self.heads) or self.dimension < 4:
            raise UsageError(
                f"TkConfig: dimension {self.dimension} must be a multiple of twice the heads ({self.heads})."
            )


class TkModel(nn.Module):
    """The network and its vocabulary.

    Token 0 is padding, 1 ... buckets are the hash buckets, then the words in order.

    Attributes:
        config: its shape.
        words: the vocabulary.
    """

    centres: Tensor

    def __init__(self, config: TkConfig, words: Sequence[str], *, seed: int = 0) -> None:
        super().__init__()
        self.config, self.words = config, tuple(words)
        first = 1 + config.buckets
        self._token_of = {word: first + position for position, word in enumerate(self.words)}
        with _seeded(seed):
            self.embedding = nn.Embedding(first + len(self.words), config.dimension, padding_idx=0)
            layer = nn.TransformerEncoderLayer(
                config.dimension, config.heads, config.feed_forward, config.dropout, batch_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
            self.weights = nn.Parameter(torch.empty(len(MU)).uniform_(-0.014, 0.014))
        self.mixing = nn.Parameter(torch.tensor(0.5))
        # softplus of it is the factor c_k: a negative c_k would sit at the floor of the logarithm, without gradient
        self.factors = nn.Parameter(torch.full((len(MU),), math.log(math.e - 1)))
        self.register_buffer("centres", torch.tensor(MU), persistent=False)

    @classmethod
    def fresh(cls, documents: Texts, config: TkConfig = TkConfig(), *, seed: int = 0) -> "TkModel":
        """An untrained model whose vocabulary is counted in the documents (words that occur twice or more).

        Raises:
            DataError: the documents hold no word twice.
        """
        counts = Counter(word for text in documents.texts for word in words_of(text))
        # equally frequent words in alphabetical order: the same documents give the same vocabulary
        frequent = sorted((word for word, count in counts.items() if count > 1), key=lambda w: (-counts[w], w))
        if not frequent:
            raise DataError(f"{len(documents)} documents hold no word twice; TK needs texts to learn words from.")
        return cls(config, frequent[: config.vocabulary], seed=seed)

    def tokenise(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int[Tensor, "texts length"], Bool[Tensor, "texts length"]]:
        """Token ids and mask, padded to the longest text (at least one place), cut at `length` words."""
        rows = [[self._token(word) for word in itertools.islice(words_of(text), length)] for text in texts]
        width = max([1, *map(len, rows)])
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        for position, row in enumerate(rows):
            tokens[position, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return tokens, tokens > 0

    def forward(
        self,
        query_tokens: Int[Tensor, "pairs query_words"],
        query_mask: Bool[Tensor, "pairs query_words"],
        document_tokens: Int[Tensor, "pairs document_words"],
        document_mask: Bool[Tensor, "pairs document_words"],
    ) -> Float[Tensor, " pairs"]:
        """s = sum_k w_k sum_i log(max(c_k sum_j K^k_ij, 1e-10)), K^k_ij = exp(-(M_ij - mu_k)^2 / (2 sigma^2)),
        M the cosines of query and document words. Documents are masked before the sum over j, queries after the
        logarithm: log 1e-10 = -23 of a padded word must not be added."""
        queries = self.represent(query_tokens, query_mask, 0)
        documents = self.represent(document_tokens, document_mask, self.config.document_offset)
        return self.interact(queries, query_mask, documents, document_mask)

    def represent(
        self, tokens: Int[Tensor, "texts length"], mask: Bool[Tensor, "texts length"], offset: int
    ) -> Float[Tensor, "texts length dimension"]:
        """Unit vectors of the words in context, a e + (1 - a) Transformer(e + position); 0 where masked."""
        words = self.embedding(tokens)
        # attention over nothing is not a number; a text without words attends to its padding and is masked below
        padding = ~mask & mask.any(-1, keepdim=True)
        context = self.encoder(words + positions(offset, words), src_key_padding_mask=padding)
        mixed = self.mixing * words + (1 - self.mixing) * context
        return nn.functional.normalize(torch.where(mask[:, :, None], mixed, 0), dim=-1)

    def interact(
        self,
        queries: Float[Tensor, "pairs query_words dimension"],
        query_mask: Bool[Tensor, "pairs query_words"],
        documents: Float[Tensor, "pairs document_words dimension"],
        document_mask: Bool[Tensor, "pairs document_words"],
    ) -> Float[Tensor, " pairs"]:
        """Scores from unit vectors."""
        with torch.autocast(queries.device.type, enabled=False):
            cosines = queries.float() @ documents.float().transpose(1, 2)
            sums = kernel_sums(cosines, document_mask, self.centres, self.config.sigma)
            logs = (nn.functional.softplus(self.factors) * sums).clamp(min=_FLOOR).log()
            return torch.where(query_mask[:, :, None], logs, 0).sum(1) @ self.weights

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors`, then `structkd.json` (shape and vocabulary): without the latter it is no model."""
        folder = Path(folder)
        with atomic_path(folder / "model.safetensors") as temporary:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            safetensors.torch.save_file(state, temporary)
        described = {"kind": "tk", "config": dataclasses.asdict(self.config), "vocabulary": list(self.words)}
        write_json(folder / "structkd.json", described)

    @classmethod
    def load(cls, folder: str | Path) -> "TkModel":
        """Read what `save` wrote.

        Raises:
            DataError: the folder holds no TK model, or its files do not fit together.
        """
        folder = Path(folder)
        described = read_json(folder / "structkd.json")
        if not isinstance(described, dict) or described.get("kind") != "tk":
            raise DataError(f'{folder / "structkd.json"}: describes no TK model; expected "kind": "tk".')
        try:
            model = cls(TkConfig(**described["config"]), described["vocabulary"])
            model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        except (KeyError, TypeError, RuntimeError, FileNotFoundError, safetensors.SafetensorError) as error:
            raise DataError(f"{folder}: the TK model cannot be read ({error}). Copy the whole folder again.") from None
        return model

    def _token(self, word: str) -> int:
        known = self._token_of.get(word)
        return known if known is not None else 1 + zlib.crc32(word.encode()) % self.config.buckets


class TkScorer(NeuralScorer):
    """TK as a Scorer.

    Attributes:
        model: the network.
        name: what the spec calls it.
        encoded: how many texts went through the Transformer so far.
    """

    kind = "tk"
    learning_rate = 3e-3  # everything starts from random weights

    def __init__(self, model: TkModel, *, name: str = "tk", device: str = "cpu") -> None:
        super().__init__()
        self.model, self.name, self.encoded = model, name, 0
        self.to(device)

    @classmethod
    def open(cls, folder: str | Path, *, device: str = "cpu") -> "TkScorer":
        """The model of a folder; DataError as in `TkModel.load`."""
        return cls(TkModel.load(folder), name=Path(folder).name, device=device)

    @property
    def bounded(self) -> bool:
        """Scores are sums of logarithms, of any size."""
        return False

    @property
    def spec(self) -> TeacherSpec:
        """Identity of the scores: weights, vocabulary, lengths."""
        state = {name: tensor.detach().cpu().numpy() for name, tensor in self.model.state_dict().items()}
        return TeacherSpec(
            model=self.name,
            weights_sha256=fingerprint_arrays(**state),
            tokenizer_sha256=fingerprint_json(list(self.model.words)),
            extra={"architecture": "tk", **dataclasses.asdict(self.model.config)},
        )

    def forward(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores with gradient; each distinct query and document goes through the Transformer once."""
        config = self.model.config
        queries, query_mask, query_of = self._represent(pairs.queries, pairs.query_rows, config.query_length, 0)
        documents, document_mask, document_of = self._represent(
            pairs.documents, pairs.document_rows, config.document_length, config.document_offset
        )
        return self.model.interact(
            queries[query_of], query_mask[query_of], documents[document_of], document_mask[document_of]
        )

    @torch.no_grad()
    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores without gradient, float32 on the CPU, in batches of documents of similar length."""
        training = self.training
        self.eval()
        out = torch.empty(len(pairs))
        lengths = {row: len(pairs.documents.texts[row]) for row in set(pairs.document_rows.tolist())}
        order = np.asarray(
            sorted(range(len(pairs)), key=lambda i: lengths[int(pairs.document_rows[i])]), dtype=np.int64
        )
        for start in range(0, len(order), _PAIRS_AT_ONCE):
            chunk = order[start : start + _PAIRS_AT_ONCE]
            out[torch.from_numpy(chunk)] = self.forward(pairs.take(chunk)).float().cpu()
        self.train(training)
        return out

    def save(self, folder: str | Path) -> None:
        """Write the model's folder."""
        self.model.save(folder)

    def _represent(self, texts: Texts, rows: Any, length: int, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors and mask of the distinct rows, and which of them each pair uses."""
        distinct, used = np.unique(rows, return_inverse=True)
        device = self.model.mixing.device
        tokens, mask = self.model.tokenise([texts.texts[row] for row in distinct], length)
        self.encoded += len(distinct)
        mask = mask.to(device)
        return self.model.represent(tokens.to(device), mask, offset), mask, torch.from_numpy(used).to(device)


def words_of(text: str) -> Iterator[str]:
    """Lower-cased words: runs of letters and digits of any script."""
    return (match.group().lower() for match in _WORD.finditer(text))


def kernel_sums(
    cosines: Float[Tensor, "pairs query_words document_words"],
    document_mask: Bool[Tensor, "pairs document_words"],
    centres: Float[Tensor, " kernels"],
    sigma: float,
) -> Float[Tensor, "pairs query_words kernels"]:
    """sum_j exp(-(M_ij - mu_k)^2 / (2 sigma^2)) over the valid document words."""
    open_words = document_mask[:, None, :].to(cosines.dtype)
    # kernel by kernel: eleven times the matrix of cosines would be the largest tensor of the model
    sums = [(torch.exp(-((cosines - centre) ** 2) / (2 * sigma**2)) * open_words).sum(-1) for centre in centres]
    return torch.stack(sums, dim=-1)


def positions(offset: int, words: Float[Tensor, "*texts length dimension"]) -> Float[Tensor, "length dimension"]:
    """Sinusoids [all sines | all cosines] with time scales from 1 to 10,000, of the positions from `offset` on."""
    length, half = words.shape[-2], words.shape[-1] // 2
    scales = torch.exp(-math.log(1e4) / (half - 1) * torch.arange(half, device=words.device, dtype=torch.float32))
    angles = torch.arange(offset, offset + length, device=words.device, dtype=torch.float32)[:, None] * scales
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(words.dtype)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Layers draw their first weights from the global generator: give them a seed, and put it back."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
