"""Fusion interferer: the features predict what else sounds, and the prediction steers the body. Not in the paper.

A head predicts the embedding of the interferer from the features and the query, taught by a loss of its own
(`interferer`); the prediction, projected, is added to the query. Neither objective reaches the other's weights.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.separators import Batch, fusions
from pipeline.separators.fusions import Features, Sizes, silent


class Fusion(fusions.Fusion):
    """Features that say which source is to be left out.

    hidden            width of the head's hidden layer
    dropout           of that layer, in training
    batches_of_mean   the running mean of the queries goes over about so many batches
    """

    def __init__(
        self, sizes: Sizes, body: nn.Module, *, hidden: int = 256, dropout: float = 0.2, batches_of_mean: int = 100
    ) -> None:
        super().__init__()
        self.head = InterfererHead(sizes.dim, sizes.query_dim, hidden, dropout, batches_of_mean)
        self.query_dim = sizes.query_dim
        self.project = silent(nn.Linear(sizes.query_dim, sizes.joint_dim))

    def query(self, query: Float[Tensor, "batch joint_dim"], features: Features) -> Float[Tensor, "batch joint_dim"]:
        """Add the projected prediction; the separation has no gradient to it."""
        with torch.no_grad():
            prediction = self.head.predict(features.sounding(), query[:, : self.query_dim])
        return query + self.project(prediction).to(query.dtype)

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Compute `interferer`, from 0 to 2: 1 - cosine of the prediction and the interferer's embedding.

        With the interferer as the query the target is to be predicted: each mixture is two examples. Called in training
        alone, since the queries go into the running mean.
        """
        steps, query, other = features.sounding(), batch.query, batch.interferer_query
        self.head.update_statistics(query)
        given, wanted = torch.cat([query, other]), torch.cat([other, query])
        return {"interferer": self.head.loss(torch.cat([steps, steps]), given, wanted)}


class InterfererHead(nn.Module):
    """Predicts the direction in which the interferer's embedding lies from the mean of all embeddings.

    It reads the features' mean and maximum over time and the query. Embeddings of one encoder share most of their
    direction (of the small network their mean has a cosine of 0.9 with each), so both sides are taken from the running
    mean of the training queries. A prediction is as long as embeddings lie from that mean: six times the length took
    the gain away, on one seed (reports/LOG.md, 2026-11-23).
    """

    def __init__(self, dim: int, query_dim: int, hidden: int, dropout: float, batches_of_mean: int) -> None:
        super().__init__()
        self.batches_of_mean = batches_of_mean
        self.layers = nn.Sequential(
            nn.Linear(2 * dim + query_dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, query_dim)
        )
        self.mean: Tensor
        self.spread: Tensor
        self.n_batches: Tensor
        self.register_buffer("mean", torch.zeros(query_dim))
        self.register_buffer("spread", torch.zeros(()))  # mean square distance from the mean
        self.register_buffer("n_batches", torch.zeros(()))

    @torch.no_grad()
    def update_statistics(self, query: Float[Tensor, "batch query_dim"]) -> None:
        """Take a training batch's queries into the running mean and spread."""
        query = query.float()
        self.n_batches += 1
        share = (1 / self.n_batches).clamp(min=1 / self.batches_of_mean)
        self.mean += share * (query.mean(dim=0) - self.mean)
        self.spread += share * ((query - self.mean).square().sum(dim=1).mean() - self.spread)

    def forward(
        self, steps: Float[Tensor, "batch steps dim"], query: Float[Tensor, "batch query_dim"]
    ) -> Float[Tensor, "batch query_dim"]:
        """Predict the direction, of any length."""
        with torch.autocast(steps.device.type, enabled=False):
            steps = steps.float()
            centred = F.normalize(query.float() - self.mean, dim=1) * math.sqrt(query.shape[1])
            prediction: Tensor = self.layers(torch.cat([steps.mean(dim=1), steps.amax(dim=1), centred], dim=1))
        return prediction

    def predict(
        self, steps: Float[Tensor, "batch steps dim"], query: Float[Tensor, "batch query_dim"]
    ) -> Float[Tensor, "batch query_dim"]:
        """Predict the interferer's embedding from the mean: the direction, without dropout, at embeddings' length."""
        training = self.training
        try:
            direction = F.normalize(self.eval()(steps, query), dim=1)
        finally:
            self.train(training)
        return direction * self.spread.sqrt()

    def loss(
        self,
        steps: Float[Tensor, "batch steps dim"],
        query: Float[Tensor, "batch query_dim"],
        wanted: Float[Tensor, "batch query_dim"],
    ) -> Float[Tensor, ""]:
        """Compute 1 - cosine of the prediction and of the wanted embedding from the mean."""
        return (1 - F.cosine_similarity(self(steps, query), wanted.float() - self.mean, dim=1)).mean()
